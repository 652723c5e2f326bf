"""Zero-shot tasks, the field's yardsticks, computed by lm-eval and kept with the run.

Why lm-eval: a score compares with published ones only if the prompts and the arithmetic are the same. It runs on
the Hugging Face folder itself, in float32. Data comes from the hub, or from local JSON lines by the task files that
ship with the package (data only, no code). Task files of others can run any Python, so they need a word of trust.

    results = measure_tasks(targets, TaskOptions(("lambada_openai",), data=Path("eval")), on_progress)

Nothing here imports lm-eval until a score has to be computed: that takes seconds. `harness.py` is its other half.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter

from llmtrain.checkpoints.resolve import Target
from llmtrain.errors import UserError
from llmtrain.evaluation.cache import cached
from llmtrain.evaluation.results import weights_sha256
from llmtrain.storage.integrity import sha256_of

if TYPE_CHECKING:
    from llmtrain.evaluation.harness import Harness

SHIPPED = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "sciq", "winogrande")
"""The tasks whose definitions are in `task_files/`."""

_DATA_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, and how."""

    tasks: tuple[str, ...]
    limit: int | None = None
    """Only the first so many documents of each task."""
    batch: int | Literal["auto"] = "auto"
    """Requests in one forward pass."""
    data: Path | None = None
    """A folder with TASK.jsonl (.zst, .gz) of each task; None: the data sets on the hub."""
    files: Path | None = None
    """A folder with lm-eval task files of one's own."""
    trust_files: bool = False
    """Their code may run."""
    device: str = "auto"


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error; None where lm-eval knows none."""
    higher_is_better: bool | None
    documents: int | None


@dataclass(frozen=True)
class TaskResult:
    """What one set of weights scored in a task, or in each task of a group."""

    task: str
    """As it was asked for."""
    source: str
    """What says where the documents are: `hub`, a local file, or a folder of task files."""
    limit: int | None
    lm_eval: str
    """Its version."""
    context: int
    """Tokens that the model reads at once."""
    truncated: float
    """Share of requests whose start was cut off because they are longer."""
    seconds: float
    scores: list[Score]


@dataclass(frozen=True)
class TaskSource:
    """What lm-eval is told of a task, and what identifies it."""

    name: str
    spec: str | dict[str, Any]
    source: str
    sha256: str
    """Of the local files that define it; empty for what lm-eval ships."""


_FORM = TypeAdapter(TaskResult)


def measure_tasks(
    targets: list[Target],
    settings: TaskOptions,
    on_progress: Callable[[Target, str, int, int], None],
    *,
    warn: Callable[[str], None] = lambda message: None,
) -> list[list[TaskResult]]:
    """Score each target in each task, or take what was scored before; one list a target.

    Args:
        targets: what to score.
        settings: which tasks, and how.
        on_progress: called with the target, the task, requests done and in all; may raise to stop.
        warn: called with what the user should know.

    Raises:
        UserError: lm-eval is missing, there is no such task or data, or task files are not trusted.
        RunFailed: a score is not a number, or the hub cannot be reached.
    """
    version = _lm_eval_version()
    sources = [task_source(name, settings) for name in settings.tasks]

    @cache
    def loaded() -> dict[str, dict[str, Any]]:
        """All tasks at once, so that a name that means nothing is told before hours of work."""
        from llmtrain.evaluation.harness import load_task  # imports lm-eval, which takes seconds

        return {
            source.name: load_task(source, settings.files, settings.limit) for source in sources
        }

    results = []
    for target in targets:
        scorer = _Scorer(target, settings, version, loaded, on_progress)
        weights = weights_sha256(target.path)
        found = []
        for source in sources:
            identity = [weights, source.name, source.source, source.sha256, settings.limit, version]
            score = partial(scorer.score, source)
            found.append(cached(target, "tasks", identity, _FORM, score, warn))
        results.append(found)
    return results


def task_source(name: str, settings: TaskOptions) -> TaskSource:
    """Where a task is defined: by the user's task files, by those of the package with local data, or by lm-eval.

    Raises:
        UserError: task files are not trusted, or there is no local data or definition of this name.
    """
    if settings.files is not None:
        _require_trust(settings)
        return TaskSource(name, name, str(settings.files), _sha256_of_folder(settings.files))
    if settings.data is None:
        return TaskSource(name, name, "hub", "")
    if name not in SHIPPED:
        raise UserError(
            f"--task-data: the package ships no task file for {name!r}",
            hint=f"it does for {', '.join(SHIPPED)}; for others: --task-files FOLDER with your own",
        )
    path = _data_file(settings.data, name)
    definition = (
        resources.files("llmtrain.evaluation").joinpath(f"task_files/{name}.yaml").read_text()
    )
    spec = yaml.safe_load(definition) | {"dataset_kwargs": {"data_files": str(path.resolve())}}
    digest = hashlib.sha256(f"{definition}{sha256_of(path)}".encode()).hexdigest()
    return TaskSource(name, spec, path.name, digest)


class _Scorer:
    """The model of one target, loaded when the first score has to be computed."""

    def __init__(
        self,
        target: Target,
        settings: TaskOptions,
        version: str,
        loaded: Callable[[], dict[str, dict[str, Any]]],
        on_progress: Callable[[Target, str, int, int], None],
    ) -> None:
        self._target = target
        self._settings = settings
        self._version = version
        self._loaded = loaded
        self._on_progress = on_progress
        self._harness: Harness | None = None

    def score(self, source: TaskSource) -> TaskResult:
        from llmtrain.evaluation import harness

        settings, task = self._settings, self._loaded()[source.name]
        if self._harness is None:
            self._harness = harness.load(self._target.path, settings.device, settings.batch)
        measured = harness.score(
            self._harness,
            task,
            settings.limit,
            lambda *done: self._on_progress(self._target, source.name, *done),
        )
        return TaskResult(
            task=source.name,
            source=source.source,
            limit=settings.limit,
            lm_eval=self._version,
            context=self._harness.max_length,
            truncated=measured.truncated,
            seconds=measured.seconds,
            scores=measured.scores,
        )


def _lm_eval_version() -> str:
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("--tasks needs lm-eval", hint="pip install 'llmtrain[eval]'") from None


def _require_trust(settings: TaskOptions) -> None:
    assert settings.files is not None
    if settings.data is not None:
        raise UserError(
            "--task-files and --task-data do not go together",
            hint="task files name their data themselves",
        )
    if not settings.files.is_dir():
        raise UserError(
            f"--task-files: there is no folder {settings.files}",
            hint="a folder of lm-eval task files",
        )
    if not settings.trust_files:
        raise UserError(
            f"the task files in {settings.files} are code: lm-eval runs any Python that they name (!function, class)",
            hint="read them first; then --trust-task-files runs them",
        )


def _data_file(folder: Path, name: str) -> Path:
    for suffix in _DATA_SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise UserError(
        f"--task-data {folder} holds no {name}.jsonl (.zst, .gz)",
        hint=f"the documents of {name} as JSON lines, with the fields of its data set on the hub",
    )


def _sha256_of_folder(folder: Path) -> str:
    files = sorted(
        path for path in folder.rglob("*") if path.suffix in (".yaml", ".py", ".jsonl", ".json")
    )
    return hashlib.sha256(" ".join(map(sha256_of, files)).encode()).hexdigest()

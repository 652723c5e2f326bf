"""Zero-shot tasks, scored by lm-eval on the weights folder itself in float32.

Why lm-eval: a score is comparable with published ones only if the prompts and the arithmetic are
the same. Documents come from the hub, or from local JSON lines with the task files of this package,
which contain no code. Task files of others can run any Python, so they need `--trust-task-files`.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from llmtrain.checkpoints.resolve import Target
from llmtrain.errors import UserError
from llmtrain.evaluation.cache import cached, ignore, weights_sha256
from llmtrain.evaluation.options import TaskDefinition, TaskOptions
from llmtrain.evaluation.results import Progress, TaskResult
from llmtrain.storage.integrity import sha256_of

if TYPE_CHECKING:
    from llmtrain.evaluation.harness import Scorer

SHIPPED = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "sciq", "winogrande")
"""Tasks with a definition in `task_files/`."""

_DATA_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")


def measure_tasks(
    targets: list[Target],
    options: TaskOptions,
    on_progress: Progress,
    *,
    warn: Callable[[str], None] = ignore,
) -> list[list[TaskResult]]:
    """Return the scores of each target in each task, measured or cached; one list per target.

    Raises:
        UserError: lm-eval is missing, a task or its data is missing, or task files are not trusted.
        RunFailed: a score is not finite, or the hub cannot be reached.
    """
    version = _lm_eval_version()
    definitions = [find_definition(name, options) for name in options.tasks]

    @cache
    def scorer() -> "Scorer":
        from llmtrain.evaluation.harness import Scorer  # importing lm-eval takes seconds

        return Scorer(definitions, options)

    def score(target: Target, task: TaskDefinition) -> TaskResult:
        return scorer().score(target.path, task, partial(on_progress, target, task.name))

    results = []
    for target in targets:
        weights = weights_sha256(target.path)
        found = []
        for task in definitions:
            parts = (weights, task.name, task.source, task.sha256, options.limit, version)
            identity = "\n".join(map(str, parts))
            measure = partial(score, target, task)
            found.append(cached(target, "tasks", identity, TaskResult, measure, warn))
        results.append(found)
    return results


def find_definition(name: str, options: TaskOptions) -> TaskDefinition:
    """Find a task in the user's task files, in ours (with local data), or in lm-eval.

    Raises:
        UserError: task files are not trusted, or the local data or definition is missing.
    """
    if options.files is not None:
        _require_trust(options.files, options)
        return TaskDefinition(name, name, str(options.files), _sha256_of_folder(options.files))
    if options.data is None:
        return TaskDefinition(name, name, "hub", "")
    if name not in SHIPPED:
        raise UserError(
            f"--task-data has no task file for {name!r}",
            hint=f"it supports {', '.join(SHIPPED)}; for other tasks, pass --task-files FOLDER",
        )
    path = _data_file(options.data, name)
    task_file = resources.files("llmtrain.evaluation") / f"task_files/{name}.yaml"
    text = task_file.read_text()
    config = yaml.safe_load(text) | {"dataset_kwargs": {"data_files": str(path.resolve())}}
    digest = hashlib.sha256(f"{text}{sha256_of(path)}".encode()).hexdigest()
    return TaskDefinition(name, config, path.name, digest)


def _lm_eval_version() -> str:
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("--tasks needs lm-eval", hint="pip install 'llmtrain[eval]'") from None


def _require_trust(files: Path, options: TaskOptions) -> None:
    if options.data is not None:
        raise UserError(
            "--task-files and --task-data cannot be combined",
            hint="drop --task-data: task files name their own data",
        )
    if not files.is_dir():
        raise UserError(
            f"--task-files: {files} is not a directory", hint="pass a folder of lm-eval task files"
        )
    if not options.trust_files:
        raise UserError(
            f"the task files in {files} are code: lm-eval runs any Python they name "
            "(!function, class)",
            hint="read them, then pass --trust-task-files to run them",
        )


def _data_file(folder: Path, name: str) -> Path:
    for suffix in _DATA_SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    raise UserError(
        f"--task-data {folder} contains no {name}.jsonl (.zst, .gz)",
        hint=f"write the documents of {name} as JSON lines with the fields of its hub data set",
    )


def _sha256_of_folder(folder: Path) -> str:
    suffixes = (".yaml", ".py", ".jsonl", ".json")
    files = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    return hashlib.sha256(" ".join(map(sha256_of, files)).encode()).hexdigest()

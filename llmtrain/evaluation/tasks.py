"""Zero-shot tasks, scored by lm-eval on the weights folder itself in float32.

Why lm-eval: a score is comparable with published ones only if the prompts and the arithmetic are
the same. Documents come from the hub, or from local JSON lines with the task files of this package,
which contain no code. Third-party task files can run any Python, so they need `--trust-task-files`.
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
from llmtrain.evaluation.options import TaskDefinition, TaskOptions
from llmtrain.evaluation.results import Progress, TaskResult, cached, ignore
from llmtrain.evaluation.weights import weights_digest
from llmtrain.storage.integrity import Digest, sha256_of

if TYPE_CHECKING:
    from llmtrain.evaluation.harness import Scorer

SHIPPED = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "sciq", "winogrande")
"""Tasks with a definition in `task_files/`."""


def measure_tasks(
    targets: list[Target],
    options: TaskOptions,
    on_progress: Progress,
    *,
    warn: Callable[[str], None] = ignore,
) -> list[list[TaskResult]]:
    """Return the scores of each target in each task, measured or cached; one list per target."""
    try:
        version = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("--tasks needs lm-eval", hint="pip install 'llmtrain[eval]'") from None
    definitions = [find_definition(name, options) for name in options.tasks]

    @cache
    def scorer() -> "Scorer":
        from llmtrain.evaluation.harness import Scorer  # importing lm-eval takes seconds

        return Scorer(definitions, options)

    def score(target: Target, weights: Digest, task: TaskDefinition) -> TaskResult:
        def measure() -> TaskResult:
            return scorer().score(target.path, task, partial(on_progress, target, task.name))

        parts = ("", task.name, task.source, task.sha256, options.limit, version)
        identity = "\n".join(map(str, parts))
        return cached(target, "tasks", weights, identity, TaskResult, measure, warn)

    results = []
    for target in targets:
        weights = weights_digest(target.path)
        results.append([score(target, weights, task) for task in definitions])
    return results


def find_definition(name: str, options: TaskOptions) -> TaskDefinition:
    """Find a task in the user's task files, in ours (with local data), or in lm-eval."""
    if options.files is not None:
        return TaskDefinition(name, name, str(options.files), _sha256_of_trusted(options))
    if options.data is None:
        return TaskDefinition(name, name, "hub", "")
    if name not in SHIPPED:
        raise UserError(
            f"--task-data has no task file for {name!r}",
            hint=f"it supports {', '.join(SHIPPED)}; for other tasks, pass --task-files FOLDER",
        )
    candidates = (options.data / f"{name}.jsonl{suffix}" for suffix in ("", ".zst", ".gz"))
    path = next(filter(Path.is_file, candidates), None)
    if path is None:
        raise UserError(
            f"--task-data {options.data} contains no {name}.jsonl (.zst, .gz)",
            hint=f"write the documents of {name} as JSON lines with the fields of its hub data set",
        )
    text = (resources.files("llmtrain.evaluation") / f"task_files/{name}.yaml").read_text()
    config = yaml.safe_load(text) | {"dataset_kwargs": {"data_files": str(path.resolve())}}
    digest = hashlib.sha256(f"{text}{sha256_of(path)}".encode()).hexdigest()
    return TaskDefinition(name, config, path.name, digest)


def _sha256_of_trusted(options: TaskOptions) -> str:
    """Return the hash of the user's task files; raise a UserError unless they are trusted."""
    assert options.files is not None
    if options.data is not None:
        problem = "--task-files and --task-data cannot be combined"
        raise UserError(problem, hint="drop --task-data: task files name their own data")
    if not options.files.is_dir():
        problem = f"--task-files: {options.files} is not a directory"
        raise UserError(problem, hint="pass a folder of lm-eval task files")
    if not options.trust_files:
        raise UserError(
            f"the task files in {options.files} are code: lm-eval runs any Python they name",
            hint="read them, then pass --trust-task-files to run them",
        )
    suffixes = (".yaml", ".py", ".jsonl", ".json")
    files = sorted(path for path in options.files.rglob("*") if path.suffix in suffixes)
    return hashlib.sha256(" ".join(map(sha256_of, files)).encode()).hexdigest()

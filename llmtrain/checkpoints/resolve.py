"""Decide what a word on the command line or in a config names, and find its weights.

A word names a run, a folder or file of weights, a folder of checkpoints, or OWNER/NAME[@REVISION]
on the Hugging Face hub. A path that exists takes precedence over a repository.

    find_series(None)  # the newest run under runs/, for `average`
    find_targets("runs/demo")  # for `eval`, `generate` and `export`
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoints.checkpoint import CONFIG_FILE, Checkpoint, load_origin
from llmtrain.checkpoints.open import is_checkpoint
from llmtrain.checkpoints.series import Series, folder_series, run_series
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.run_folder import RAW, RunFolder, is_run, newest_run, step_folders

_REPOSITORY = re.compile(r"(?!runs/|\.)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""OWNER/NAME or OWNER/NAME@REVISION."""


@dataclass(frozen=True)
class Weights:
    """A folder or file with weights."""

    path: Path


@dataclass(frozen=True)
class Folder:
    """A folder without weights of its own, which may contain checkpoints."""

    path: Path


@dataclass(frozen=True)
class Repository:
    """A model on the hub."""

    name: str
    revision: str | None

    def download(self) -> Checkpoint:
        """Download one revision, `main` by default, to the hub's cache.

        Raises:
            UserError: there is no such model or revision.
            RunFailed: the hub cannot be reached.
        """
        from llmtrain.checkpoints.hub import hub_checkpoint  # takes a second to import

        try:
            return hub_checkpoint(self.name, self.revision or "main")
        except (UserError, RunFailed) as error:
            error.hint += f"; the folder {self} does not exist either"
            raise

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def resolve(
    word: str | None, *, key: str | None = None
) -> RunFolder | Weights | Folder | Repository:
    """Return what `word`, the value of the config key `key`, names; None: the newest run.

    Raises:
        UserError: it names nothing.
    """
    if word is None:
        return newest_run()
    path = Path(word)
    if is_run(path):
        return RunFolder(path)
    if path.is_file() or is_checkpoint(path):
        return Weights(path)
    if path.exists():
        return Folder(path)
    if match := _REPOSITORY.fullmatch(word):
        return Repository(match[1], match[2])
    raise UserError(
        f"{key}: {word} does not exist" if key else f"{word} does not exist",
        hint="name a run, a folder or file of weights, or OWNER/NAME on the hub",
    )


# --- for averages ---------------------------------------------------------------------------------


def find_series(
    word: str | None, *, revision_pattern: str | None = None, discard: bool = False
) -> Series:
    """Return the checkpoints of a run, a folder, or a repository; None: the newest run.

    Raises:
        UserError: it does not exist, or contains no checkpoints.
        RunFailed: the hub cannot be reached.
    """
    found = resolve(word)
    if isinstance(found, Repository):
        from llmtrain.checkpoints.hub import hub_series  # takes a second to import

        if found.revision is not None:
            raise UserError(
                f"{found} is one revision, and an average needs several",
                hint=f"name the repository: {found.name}",
            )
        return hub_series(found.name, revision_pattern=revision_pattern, discard=discard)
    if revision_pattern is not None:
        raise UserError(
            f"{found.path} is a folder and has no revisions", hint="leave out --revision-pattern"
        )
    if discard:
        raise UserError(
            f"{found.path} was not downloaded", hint="--discard-inputs applies to series on the hub"
        )
    return run_series(found) if isinstance(found, RunFolder) else folder_series(found.path)


# --- for evaluation, generation and export --------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One set of weights to use."""

    label: str
    """"raw" for a snapshot, the label of an average, or the name of the folder."""
    step: int | None
    path: Path
    run: RunFolder | None
    """The run that contains it, if any."""


def find_targets(word: str | Path | None, *, every_snapshot: bool = False) -> list[Target]:
    """Return the weights that `word` names, by step, raw before averages; None: the newest run.

    A run stands for all its averages and the raw snapshots of the same steps, or for its newest
    snapshot if it has no average; with `every_snapshot`, for every snapshot and average. A folder
    of weights inside a run stands for itself and the raw snapshot of its step.

    Raises:
        UserError: it does not exist or contains no weights.
        RunFailed: the hub cannot be reached.
    """
    found = resolve(None if word is None else str(word))
    if isinstance(found, RunFolder):
        return _run_targets(found, every_snapshot)
    if isinstance(found, Repository):
        folder = found.download().folder
        return [Target(str(found).rpartition("/")[2], None, folder, None)]
    if not (found.path / CONFIG_FILE).is_file():
        raise UserError(
            f"{found.path} is neither a run nor a folder of weights",
            hint="a run contains config.yaml, a folder of weights config.json and model.safetensors",
        )
    return _folder_targets(found.path)


def _folder_targets(path: Path) -> list[Target]:
    label, run = _label_and_run(path)
    origin = load_origin(path)
    target = Target(label, origin.step if origin else None, path, run)
    if run is None or label == RAW or target.step is None or not run.snapshot(target.step).is_dir():
        return [target]
    return [Target(RAW, target.step, run.snapshot(target.step), run), target]


def _run_targets(run: RunFolder, every_snapshot: bool) -> list[Target]:
    averages = [
        Target(folder.name, step, path, run)
        for folder in (sorted(run.averages.iterdir()) if run.averages.is_dir() else [])
        for step, path in step_folders(folder).items()
    ]
    snapshots = step_folders(run.snapshots)
    if not snapshots and not averages:
        raise UserError(
            f"{run.path} has no snapshot yet",
            hint="continue training: checkpoint.snapshot_every sets the steps between snapshots",
        )
    steps = set(snapshots) if every_snapshot else {target.step for target in averages}
    if not averages:
        steps.add(max(snapshots))
    raw = [Target(RAW, step, path, run) for step, path in snapshots.items() if step in steps]
    return sorted(
        [*raw, *averages], key=lambda target: (target.step, target.label != RAW, target.label)
    )


def _label_and_run(path: Path) -> tuple[str, RunFolder | None]:
    """Derive label and run of a folder of weights from its path."""
    folder = path.resolve()
    parents = folder.parents
    if len(parents) > 1 and parents[0].name == "snapshots" and is_run(parents[1]):
        return RAW, RunFolder(parents[1])
    if len(parents) > 2 and parents[1].name == "averages" and is_run(parents[2]):
        return parents[0].name, RunFolder(parents[2])
    return folder.name, None

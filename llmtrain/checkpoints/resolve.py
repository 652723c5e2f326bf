"""Find the run, path or repository that a word on the command line or in a config names.

`find_series` serves `average`; `find_targets` serves `eval`, `generate` and `export`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoints.checkpoint import CONFIG_FILE, Checkpoint, load_origin
from llmtrain.checkpoints.series import Series, folder_series, run_series
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.run_folder import RAW, RunFolder, is_run, newest_run, step_folders

_REPOSITORY = re.compile(r"(?!runs/|\.)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""OWNER/NAME or OWNER/NAME@REVISION."""


@dataclass(frozen=True)
class Repository:
    """A model on the Hugging Face hub."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def download(self) -> Checkpoint:
        """Download one revision, `main` by default, to the hub's cache."""
        from llmtrain.checkpoints.hub import hub_checkpoint  # takes a second to import

        try:
            return hub_checkpoint(self.name, self.revision or "main")
        except (UserError, RunFailed) as error:
            error.hint += f"; the folder {self} does not exist either"
            raise


def resolve(word: str | None, *, key: str | None = None) -> RunFolder | Path | Repository:
    """Return the run, the existing path, or the repository that `word` names; None: the newest run.

    An existing path takes precedence over a repository. The message contains `key`, the config key.
    """
    if word is None:
        return newest_run()
    path = Path(word)
    if path.exists():
        return RunFolder(path) if is_run(path) else path
    if match := _REPOSITORY.fullmatch(word):
        return Repository(match[1], match[2])
    hint = "name a run, a folder or file of weights, or OWNER/NAME on the hub"
    raise UserError(f"{key}: {word} does not exist" if key else f"{word} does not exist", hint=hint)


def find_series(
    word: str | None, *, revision_pattern: str | None = None, discard: bool = False
) -> Series:
    """Return the checkpoints of a run, folder or repository; for the options see `hub_series`."""
    found = resolve(word)
    if isinstance(found, Repository):
        from llmtrain.checkpoints.hub import hub_series  # takes a second to import

        if found.revision is not None:
            raise UserError(f"{found} is one revision", hint=f"name the repository: {found.name}")
        return hub_series(found.name, revision_pattern=revision_pattern, discard=discard)
    if revision_pattern is not None or discard:
        hint = "leave out --revision-pattern and --discard-inputs"
        raise UserError(f"{word or 'the run'} is not on the hub", hint=hint)
    return run_series(found) if isinstance(found, RunFolder) else folder_series(found)


@dataclass(frozen=True)
class Target:
    """One set of weights to evaluate, generate from or export."""

    label: str
    """"raw" for a snapshot, the label of an average, or the name of the folder."""
    step: int | None
    path: Path
    run: RunFolder | None


def find_targets(word: str | Path | None, *, every_snapshot: bool = False) -> list[Target]:
    """Return the weights that `word` names, by step, raw before averages.

    A run stands for all its averages and the raw snapshots of the same steps, or for its newest
    snapshot without an average; with `every_snapshot`, for every snapshot and average. A folder of
    weights inside a run stands for itself and the raw snapshot of its step.
    """
    found = resolve(None if word is None else str(word))
    if isinstance(found, RunFolder):
        return _run_targets(found, every_snapshot)
    if isinstance(found, Repository):
        return [Target(str(found).rpartition("/")[2], None, found.download().folder, None)]
    if (found / CONFIG_FILE).is_file():
        return _folder_targets(found)
    hint = "a run contains config.yaml; a folder of weights contains config.json"
    raise UserError(f"{found} is neither a run nor a folder of weights", hint=hint)


def _run_targets(run: RunFolder, every_snapshot: bool) -> list[Target]:
    folders = sorted(run.averages.iterdir()) if run.averages.is_dir() else []
    averages = [
        Target(folder.name, step, path, run)
        for folder in folders
        for step, path in step_folders(folder).items()
    ]
    snapshots = step_folders(run.snapshots)
    if not snapshots and not averages:
        hint = "continue training: checkpoint.snapshot_every sets the steps between snapshots"
        raise UserError(f"{run.path} contains no snapshot yet", hint=hint)
    steps = set(snapshots) if every_snapshot else {target.step for target in averages}
    if not averages:
        steps.add(max(snapshots))
    raw = [Target(RAW, step, path, run) for step, path in snapshots.items() if step in steps]
    return sorted([*raw, *averages], key=lambda each: (each.step, each.label != RAW, each.label))


def _folder_targets(path: Path) -> list[Target]:
    label, run = _label_and_run(path.resolve())
    origin = load_origin(path)
    target = Target(label, origin.step if origin else None, path, run)
    if run is not None and label != RAW and target.step is not None:
        snapshot = run.snapshot(target.step)
        if snapshot.is_dir():
            return [Target(RAW, target.step, snapshot, run), target]
    return [target]


def _label_and_run(folder: Path) -> tuple[str, RunFolder | None]:
    for parent in filter(is_run, folder.parents):
        match folder.relative_to(parent).parts:
            case ("snapshots", _):
                return RAW, RunFolder(parent)
            case ("averages", label, _):
                return label, RunFolder(parent)
    return folder.name, None

"""What `llmtrain eval` is asked to measure, as a list of folders of weights with their labels.

Why: "this run" means its averages and the raw weights of the same steps, and a difference from raw
only means something within one run. Both are decided here, from names alone.

    targets_named("runs/demo", every_snapshot=False)
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoints.weights_folder import CONFIG_FILE, load_origin
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.run_folder import RAW, RunFolder, is_run, step_folders

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""OWNER/NAME or OWNER/NAME@REVISION on the hub."""


@dataclass(frozen=True)
class Target:
    """One set of weights to measure."""

    label: str
    """"raw" for a snapshot, else the label of the average or the name of the folder."""
    step: int | None
    path: Path
    run: RunFolder | None
    """The run it belongs to, if any."""


def targets_named(name: str, *, every_snapshot: bool) -> list[Target]:
    """The weights that `name` stands for: what `targets_of` says of a folder, or a revision on the hub.

    Raises:
        UserError: there is no such folder, repository or revision, or no weights in it.
        RunFailed: the hub cannot be reached.
    """
    match = _REPOSITORY.fullmatch(name)
    if Path(name).exists() or match is None or name.startswith(("runs/", ".")):
        return targets_of(Path(name), every_snapshot=every_snapshot)
    from llmtrain.checkpoints.hub_series import hub_checkpoint  # takes a second to import

    try:
        folder = hub_checkpoint(match[1], match[2] or "main").folder
    except (UserError, RunFailed) as error:  # which may be of a folder whose name was mistyped
        error.hint += f"; there is no folder {name} here"
        raise
    return [Target(name.rpartition("/")[2], None, folder, None)]


def targets_of(path: Path, *, every_snapshot: bool) -> list[Target]:
    """The weights that `path` stands for, by step, raw before averages.

    A run stands for all its averages and the raw snapshots of the same steps, or for its newest
    snapshot while it has no average; with `every_snapshot`, for every snapshot and average. A
    folder of weights inside a run stands for itself and the raw snapshot of its step.

    Raises:
        UserError: it is neither a run nor a folder of weights, or the run has no snapshot yet.
    """
    if is_run(path):
        return _of_run(RunFolder(path), every_snapshot)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} is neither a run nor a folder of weights",
            hint="a run holds config.yaml, a folder of weights config.json and model.safetensors",
        )
    label, run = _place(path)
    origin = load_origin(path)
    target = Target(label, origin.step if origin else None, path, run)
    if run is None or label == RAW or target.step is None or not run.snapshot(target.step).is_dir():
        return [target]
    return [Target(RAW, target.step, run.snapshot(target.step), run), target]


def _of_run(run: RunFolder, every_snapshot: bool) -> list[Target]:
    averages = [
        Target(folder.name, step, path, run)
        for folder in (sorted(run.averages.iterdir()) if run.averages.is_dir() else [])
        for step, path in step_folders(folder).items()
    ]
    snapshots = step_folders(run.snapshots)
    if not snapshots and not averages:
        raise UserError(
            f"{run.path} has no snapshot yet",
            hint="snapshots are written every checkpoint.snapshot_every steps once warm-up is over",
        )
    matching = set(snapshots) if every_snapshot else {target.step for target in averages}
    if not averages:
        matching.add(max(snapshots))
    raw = [Target(RAW, step, path, run) for step, path in snapshots.items() if step in matching]
    return sorted(
        [*raw, *averages], key=lambda target: (target.step, target.label != RAW, target.label)
    )


def _place(path: Path) -> tuple[str, RunFolder | None]:
    """Label and run of a folder of weights, from where it lies."""
    parents = path.resolve().parents
    if len(parents) > 1 and parents[0].name == "snapshots" and is_run(parents[1]):
        return RAW, RunFolder(parents[1])
    if len(parents) > 2 and parents[1].name == "averages" and is_run(parents[2]):
        return parents[0].name, RunFolder(parents[2])
    return path.resolve().name, None

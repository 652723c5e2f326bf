"""The runs of a folder: how far each one is, how good, how old and how large.

Why from files alone: the list is the same whether a run is training on this machine, has ended, or was
copied from elsewhere; only the lock of its folder tells that a process is at it.

    for entry in list_runs(Path("runs")): print(entry.name, entry.state)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtrain.config.loading import load_config
from llmtrain.errors import UserError
from llmtrain.evaluation.report.rows import Curve, loss_curves
from llmtrain.storage.commit import is_locked
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RAW, RunFolder, is_run


@dataclass(frozen=True)
class BestLoss:
    """The lowest validation loss of some weights of a run."""

    label: str
    step: int
    loss: float
    """Nats per token."""


@dataclass(frozen=True)
class Entry:
    """One run."""

    name: str
    path: str
    state: Literal["running", "finished", "interrupted", "damaged"]
    """running: a process holds it; damaged: a file of it cannot be read."""
    step: int | None
    """The last step that the log tells of; None where the run is damaged."""
    max_steps: int | None
    raw: BestLoss | None
    average: BestLoss | None
    """Of the best of all averages."""
    modified: float
    """When its log was written last, in seconds since 1970."""
    bytes: int
    """Of all its files."""
    problem: str | None
    """What is damaged."""


def list_runs(parent: Path) -> list[Entry]:
    """The runs directly below `parent`, the one that was trained last first.

    Raises:
        UserError: `parent` is no folder.
    """
    if not parent.is_dir():
        raise UserError(
            f"there is no folder {parent}",
            hint="train a run (llmtrain pretrain --config FILE), or name its folder",
        )
    entries = [_entry(RunFolder(path)) for path in sorted(parent.iterdir()) if is_run(path)]
    return sorted(entries, key=lambda entry: -entry.modified)


def _entry(run: RunFolder) -> Entry:
    log = run.metrics if run.metrics.exists() else run.config
    step = max_steps = problem = None
    curves: dict[str, Curve] = {}
    try:
        max_steps = load_config(run.config).train.max_steps
        step = max((event["step"] for event in read_events(run.metrics)), default=0)
        curves = loss_curves(run)
    except UserError as error:
        problem = str(error)
    return Entry(
        name=run.path.name,
        path=str(run.path),
        state=_state(run, step, max_steps, problem),
        step=step,
        max_steps=max_steps,
        raw=_best({label: curve for label, curve in curves.items() if label == RAW}),
        average=_best({label: curve for label, curve in curves.items() if label != RAW}),
        modified=log.stat().st_mtime,
        bytes=_size(run.path),
        problem=problem,
    )


def _state(
    run: RunFolder, step: int | None, max_steps: int | None, problem: str | None
) -> Literal["running", "finished", "interrupted", "damaged"]:
    if is_locked(run.path):
        return "running"
    if problem is not None or step is None or max_steps is None:
        return "damaged"
    return "finished" if step >= max_steps else "interrupted"


def _best(curves: Mapping[str, Curve]) -> BestLoss | None:
    points = [(loss, step, label) for label, curve in curves.items() for step, loss in curve]
    if not points:
        return None
    loss, step, label = min(points)
    return BestLoss(label, step, loss)


def _size(folder: Path) -> int:
    """Bytes of all files; one that vanishes meanwhile, as a state does when its successor is there, counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except FileNotFoundError:
            continue
    return total

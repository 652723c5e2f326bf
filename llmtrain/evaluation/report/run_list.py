"""List of the runs in a folder: state, progress, best losses, age and size.

Why from files only: the list is the same while a run trains, after it, and for a copy. Only the
lock of the folder shows that a process is training.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtrain.config.loading import load_config
from llmtrain.errors import UserError
from llmtrain.evaluation.curves import Curve, Windows, main_windows, measured_curves
from llmtrain.storage.json_files import read_events
from llmtrain.storage.locks import is_locked
from llmtrain.storage.run_folder import RAW, RunFolder, is_run

RunState = Literal["running", "finished", "interrupted", "damaged"]
"""running: a process has locked the folder; damaged: a file cannot be read."""


@dataclass(frozen=True)
class BestLoss:
    """The lowest validation loss of a run, for raw weights or for averages, in nats per token."""

    label: str
    step: int
    loss: float


@dataclass(frozen=True)
class RunEntry:
    """One run; a damaged one has a problem and may lack the steps."""

    name: str
    path: str
    state: RunState
    step: int | None
    """Last logged step."""
    max_steps: int | None
    raw: BestLoss | None
    average: BestLoss | None
    windows: Windows | None
    """Windows of both losses."""
    modified: float
    """Time of the last log line, in seconds since 1970."""
    bytes: int
    problem: str | None


def list_runs(parent: Path) -> list[RunEntry]:
    """Return the runs directly below `parent`, most recently trained first."""
    if not parent.is_dir():
        raise UserError(f"{parent} is not a directory", hint="pretrain, or pass the folder of runs")
    entries = [_entry(RunFolder(path)) for path in sorted(parent.iterdir()) if is_run(path)]
    return sorted(entries, key=lambda entry: -entry.modified)


def _entry(run: RunFolder) -> RunEntry:
    log = run.metrics if run.metrics.exists() else run.config
    step = max_steps = problem = None
    curves: dict[str, Curve] = {}
    windows = None
    state: RunState = "damaged"
    try:
        max_steps = load_config(run.config).train.max_steps
        step = max((event["step"] for event in read_events(run.metrics)), default=0)
        measured = measured_curves(run)
        (windows,) = main_windows([measured])
        curves = measured[windows] if windows else {}
        state = "finished" if step >= max_steps else "interrupted"
    except UserError as error:
        problem = str(error)
    raw = {RAW: curves.pop(RAW, [])}
    return RunEntry(
        name=run.path.name,
        path=str(run.path),
        state="running" if is_locked(run.path) else state,
        step=step,
        max_steps=max_steps,
        raw=_best(raw),
        average=_best(curves),
        windows=windows,
        modified=log.stat().st_mtime,
        bytes=_size(run.path),
        problem=problem,
    )


def _best(curves: Mapping[str, Curve]) -> BestLoss | None:
    points = [BestLoss(label, *point) for label, curve in curves.items() for point in curve]
    return min(points, key=lambda best: (best.loss, best.step, best.label), default=None)


def _size(folder: Path) -> int:
    """Return the bytes of all files; a file deleted meanwhile counts zero."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += 0 if path.is_dir() else path.lstat().st_size
    return total

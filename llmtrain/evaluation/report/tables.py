"""What the report of a run shows, as numbers: losses by step, tokens and hours, and what averaging saves.

Why apart from the page: the terminal, the CSV files, the charts and the page all show these same numbers.

    record = read_record(RunFolder(Path("runs/demo"))); savings(record)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE
from llmtrain.config.loading import load_config
from llmtrain.config.schema import flatten
from llmtrain.evaluation.report.rows import Curve, Interventions, interventions, loss_curves
from llmtrain.storage.json_files import read_events, read_json
from llmtrain.storage.run_folder import RAW, RunFolder, step_folders


@dataclass(frozen=True)
class Clock:
    """Tokens and hours of training by step, as the log tells them; between its lines by interpolation."""

    steps: Sequence[int]
    tokens: Sequence[float]
    seconds: Sequence[float]

    def tokens_at(self, step: int) -> float | None:
        """Tokens trained on up to `step`; None where the run has no log."""
        return float(np.interp(step, self.steps, self.tokens)) if self.steps else None

    def hours_at(self, step: int) -> float | None:
        """Hours of training up to `step`; None where the run has no log."""
        return float(np.interp(step, self.steps, self.seconds)) / 3600 if self.steps else None


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    name: str
    run: RunFolder
    config: dict[str, Any]
    """Dotted key → value."""
    curves: dict[str, Curve]
    """Validation loss by step for raw, first, and each average."""
    clock: Clock
    training: list[dict[str, Any]]
    """The lines of the log about training steps."""
    samples: list[tuple[int, str]]
    """Step and text, where the run wrote any."""
    interventions: Interventions
    provenance: dict[str, dict[str, Any]]
    """Of the newest average of each label: what `provenance.json` says."""
    environment: dict[str, Any]
    """Where it was trained; empty where the run does not say."""

    @property
    def step(self) -> int:
        """The last step that the log or a result tells of."""
        steps = [event["step"] for event in self.training] + [
            c[-1][0] for c in self.curves.values() if c
        ]
        return max(steps, default=0)


@dataclass(frozen=True)
class Saving:
    """The best of one kind of weights, and what training it saves against the raw weights."""

    run: str
    label: str
    step: int
    """Where its loss is lowest."""
    loss: float
    """Nats per token."""
    gain: float | None
    """The lowest raw loss of the run minus this; None without raw losses."""
    reached: int | None
    """The first measured step with a loss not above the lowest raw one; None: at no step."""
    raw_step: int | None
    """The first measured step at which the raw weights have their lowest loss."""
    steps_saved: int | None
    """From `reached` to `raw_step`."""
    tokens_saved: float | None
    hours_saved: float | None


def read_records(runs: Sequence[RunFolder]) -> list[RunRecord]:
    """The runs in the order given, each with a name of its own.

    Raises:
        UserError: a file of a run is damaged.
    """
    names = [run.path.resolve().name for run in runs]
    unique = len(set(names)) == len(names)
    return [
        read_record(run, name if unique else str(run.path))
        for run, name in zip(runs, names, strict=True)
    ]


def read_record(run: RunFolder, name: str) -> RunRecord:
    """Everything that the files of a run tell of it.

    Raises:
        UserError: a file of the run is damaged.
    """
    events = read_events(run.metrics)
    training = [event for event in events if "lr" in event]
    timed = [
        e for e in training if math.isfinite(e.get("seconds", math.nan) + e.get("tokens", math.nan))
    ]
    start = [0] if timed else []
    return RunRecord(
        name=name,
        run=run,
        config=flatten(load_config(run.config)),
        curves=loss_curves(run),
        clock=Clock(
            steps=start + [e["step"] for e in timed],
            tokens=start + [e["tokens"] for e in timed],
            seconds=start + [e["seconds"] for e in timed],
        ),
        training=training,
        samples=[(e["step"], str(e["sample"])) for e in events if "sample" in e],
        interventions=interventions(run),
        provenance=_provenance(run),
        environment=read_json(run.environment) if run.environment.exists() else {},
    )


def savings(record: RunRecord) -> list[Saving]:
    """A row for raw and each average, lowest loss first."""
    raw = record.curves.get(RAW, [])
    raw_step, raw_loss = min(raw, key=lambda point: point[1]) if raw else (None, None)
    rows = [
        _saving(record, label, curve, raw_step, raw_loss)
        for label, curve in record.curves.items()
        if curve
    ]
    return sorted(rows, key=lambda row: row.loss)


def _saving(
    record: RunRecord, label: str, curve: Curve, raw_step: int | None, raw_loss: float | None
) -> Saving:
    step, loss = min(curve, key=lambda point: point[1])
    reached = None
    if raw_loss is not None and label != RAW:
        reached = next((at for at, value in curve if value <= raw_loss), None)
    tokens = hours = None
    if reached is not None and raw_step is not None:
        tokens = _difference(record.clock.tokens_at(raw_step), record.clock.tokens_at(reached))
        hours = _difference(record.clock.hours_at(raw_step), record.clock.hours_at(reached))
    return Saving(
        run=record.name,
        label=label,
        step=step,
        loss=loss,
        gain=_difference(raw_loss, loss),
        reached=reached,
        raw_step=raw_step,
        steps_saved=None if reached is None or raw_step is None else raw_step - reached,
        tokens_saved=tokens,
        hours_saved=hours,
    )


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def gains(record: RunRecord) -> dict[str, Curve]:
    """For each average, by step: the raw loss of the same step minus its own; positive is better."""
    raw = dict(record.curves.get(RAW, []))
    curves = {
        label: [(step, raw[step] - loss) for step, loss in curve if step in raw]
        for label, curve in record.curves.items()
        if label != RAW
    }
    return {label: curve for label, curve in curves.items() if curve}


def _provenance(run: RunFolder) -> dict[str, dict[str, Any]]:
    found = {}
    for folder in sorted(run.averages.iterdir()) if run.averages.is_dir() else []:
        steps = step_folders(folder)
        path = steps[max(steps)] / PROVENANCE_FILE if steps else folder / PROVENANCE_FILE
        if path.is_file():
            found[folder.name] = read_json(path)
    return found

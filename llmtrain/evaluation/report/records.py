"""Numbers of the report: losses by step, tokens and hours, savings, spikes and samples of a run.

Why from files only: the report shows what training logged and `llmtrain eval` measured. It can be
written again on a machine without the weights.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE
from llmtrain.config.loading import load_config
from llmtrain.config.schema import flatten
from llmtrain.evaluation.curves import Curve, Windows, main_windows, measured_curves
from llmtrain.evaluation.results import stored_results
from llmtrain.storage.json_files import read_events, read_json
from llmtrain.storage.run_folder import RAW, RunFolder, step_folders


@dataclass(frozen=True)
class Clock:
    """Tokens and hours of training by step, interpolated between log lines; None without a log."""

    steps: Sequence[int]
    tokens: Sequence[float]
    seconds: Sequence[float]

    def tokens_at(self, step: int) -> float | None:
        """Return the tokens trained on up to a step."""
        return float(np.interp(step, self.steps, self.tokens)) if self.steps else None

    def hours_at(self, step: int) -> float | None:
        """Return the hours of training up to `step`."""
        return float(np.interp(step, self.steps, self.seconds)) / 3600 if self.steps else None

    def between(self, start: int, end: int) -> tuple[float | None, float | None]:
        """Return the tokens and hours from one step to another."""
        values = [(at(start), at(end)) for at in (self.tokens_at, self.hours_at)]
        tokens, hours = (None if a is None or b is None else b - a for a, b in values)
        return tokens, hours


@dataclass(frozen=True)
class Interventions:
    """Steps with a non-finite or far too high loss or gradient norm, and the reactions."""

    nonfinite: int
    spikes: int
    skipped: int
    rewinds: int

    def __str__(self) -> str:
        return (
            f"spikes {self.spikes:,}, not finite {self.nonfinite:,}: "
            f"skipped {self.skipped:,} steps, rewound {self.rewinds:,} times"
        )


@dataclass(frozen=True)
class RunRecord:
    """Contents of the files of one run."""

    name: str
    run: RunFolder
    config: dict[str, Any]
    """Dotted key → value."""
    curves: dict[str, Curve]
    """Validation loss of raw weights, first, and of each average, on the same windows."""
    windows: Windows | None
    """Windows of `curves`; None if there are no losses."""
    others: dict[Windows, dict[str, Curve]]
    """Losses on other windows."""
    clock: Clock
    training: list[dict[str, Any]]
    """Log lines of training steps."""
    samples: list[tuple[int, str]]
    interventions: Interventions
    provenance: dict[str, dict[str, Any]]
    """`provenance.json` of the newest average with each label."""
    environment: dict[str, Any]
    discarded: list[str]
    """Labels and steps of measured averages that contain discarded snapshots."""

    @property
    def step(self) -> int:
        """Last step with a log line or a result."""
        measured = [curve[-1][0] for curve in self.curves.values() if curve]
        return max([event["step"] for event in self.training] + measured, default=0)


@dataclass(frozen=True)
class Saving:
    """The best weights with one label, and the training they save compared with raw weights."""

    run: str
    label: str
    step: int
    loss: float
    val_tokens: int | None
    """Tokens on which the losses of the run were measured."""
    gain: float | None
    """Lowest raw loss of the run minus this loss."""
    reached: int | None
    """First measured step whose loss is at most the lowest raw loss."""
    raw_step: int | None
    """First measured step with the lowest raw loss."""
    steps_saved: int | None
    tokens_saved: float | None
    hours_saved: float | None


def read_records(runs: Sequence[RunFolder]) -> list[RunRecord]:
    """Read the runs in the given order, each under a unique name."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    measured = [measured_curves(run) for run in runs]
    rows = zip(runs, names, measured, main_windows(measured), strict=True)
    return [_read_record(*row) for row in rows]


def _read_record(
    run: RunFolder, name: str, measured: dict[Windows, dict[str, Curve]], windows: Windows | None
) -> RunRecord:
    events = read_events(run.metrics)
    training = [event for event in events if "lr" in event]
    keys = ("step", "tokens", "seconds")
    rows = [[event.get(key, math.nan) for key in keys] for event in training]
    timed = [row for row in rows if all(map(math.isfinite, row))]
    columns = zip([0, 0, 0], *timed, strict=True)
    rejected = [result for result in stored_results(run) if result.discarded]
    return RunRecord(
        name=name,
        run=run,
        config=flatten(load_config(run.config)),
        curves=measured[windows] if windows else {},
        windows=windows,
        others={each: curves for each, curves in measured.items() if each != windows},
        clock=Clock(*columns) if timed else Clock((), (), ()),
        training=training,
        samples=[(event["step"], str(event["sample"])) for event in events if "sample" in event],
        interventions=_interventions([*events, *read_events(run.rewound_metrics)]),
        provenance=_provenance(run),
        environment=read_json(run.environment) if run.environment.exists() else {},
        discarded=list(dict.fromkeys(f"{r.label} at step {r.step:,}" for r in rejected)),
    )


def _interventions(events: Sequence[dict[str, Any]]) -> Interventions:
    incidents = [event for event in events if "incident" in event]
    kinds = Counter(event["incident"] for event in incidents)
    return Interventions(
        nonfinite=kinds["nonfinite"],
        spikes=kinds["spike"],
        skipped=sum(event["action"] == "skip" for event in incidents),
        rewinds=sum("rewound_from" in event for event in events),
    )


def _provenance(run: RunFolder) -> dict[str, dict[str, Any]]:
    found = {}
    for folder in sorted(run.averages.iterdir()) if run.averages.is_dir() else []:
        steps = step_folders(folder)
        path = (steps[max(steps)] if steps else folder) / PROVENANCE_FILE
        if path.is_file():
            found[folder.name] = read_json(path)
    return found


def differing_windows(records: Sequence[RunRecord]) -> list[str]:
    """Return the properties in which the validation windows differ; empty if comparable.

    Why not the configs: `eval` may have measured the losses on other tokens.
    """
    properties = [asdict(record.windows) for record in records if record.windows]
    return [
        field.name
        for field in fields(Windows)
        if len({each[field.name] for each in properties}) > 1
    ]


def savings(record: RunRecord) -> list[Saving]:
    """Return the best of raw weights and of each average, lowest loss first."""
    curves = {label: curve for label, curve in record.curves.items() if curve}
    rows = [_saving(record, label, curve) for label, curve in curves.items()]
    return sorted(rows, key=lambda row: row.loss)


def _saving(record: RunRecord, label: str, curve: Curve) -> Saving:
    step, loss = min(curve, key=lambda point: point[1])
    raw = record.curves.get(RAW)
    count = record.windows.tokens if record.windows else None
    if not raw:
        return Saving(record.name, label, step, loss, count, *[None] * 6)
    raw_step, raw_loss = min(raw, key=lambda point: point[1])
    row = partial(Saving, record.name, label, step, loss, count, raw_loss - loss)
    reached = next((at for at, value in curve if value <= raw_loss), None)
    if reached is None or label == RAW:
        return row(None, raw_step, None, None, None)
    tokens, hours = record.clock.between(reached, raw_step)
    return row(reached, raw_step, raw_step - reached, tokens, hours)


def gains(record: RunRecord) -> dict[str, Curve]:
    """Return the raw loss minus the loss of each average at the same step."""
    raw = dict(record.curves.get(RAW, []))
    curves = {
        label: [(step, raw[step] - loss) for step, loss in curve if step in raw]
        for label, curve in record.curves.items()
        if label != RAW
    }
    return {label: curve for label, curve in curves.items() if curve}

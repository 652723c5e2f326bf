"""What a sweep came to: a table, a CSV and a PNG, and the training that the best average saves.

Why: "0.04 lower" says little; "what training reaches 300 steps later" says what it is worth.

    rows = summary(result, run); write_csv(result, Path("sweep.csv")); draw(result, Path("sweep.png"), "demo")
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.averaging.sweep import Candidate, SweepResult
from llmtrain.config.loading import load_config
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RAW, RunFolder


@dataclass(frozen=True)
class SummaryRow:
    """One candidate at the newest step it has."""

    label: str
    step: int
    loss: float
    delta: float
    """Minus the raw loss of the same step."""
    best: bool
    reached: int | None
    """The first compared step at which it is as good as the raw weights of the last; None: never."""
    steps_saved: int | None
    """From there to the first compared step at which the raw weights are."""
    tokens_saved: int | None
    hours_saved: float | None
    """Of training, by the run's own clock; None where the run has no metrics."""


def summary(result: SweepResult, run: RunFolder) -> list[SummaryRow]:
    """A row for each candidate, best first."""
    tokens_per_step = load_config(run.config).tokens_per_step
    clock = [(e["step"], e["seconds"]) for e in read_events(run.metrics) if "seconds" in e]
    last = max(result.raw.losses)
    rows = []
    for candidate in result.candidates:
        step = max(candidate.losses)
        reached = min(
            (s for s, loss in candidate.losses.items() if loss <= result.raw.losses[last]),
            default=None,
        )
        # Raw weights wander: they may have been as good as at the end long before it.
        raw_reached = min(
            s for s, loss in result.raw.losses.items() if loss <= result.raw.losses[last]
        )
        saved = None if reached is None else raw_reached - reached
        rows.append(
            SummaryRow(
                label=candidate.label,
                step=step,
                loss=candidate.losses[step],
                delta=candidate.losses[step] - result.raw.losses[step],
                best=candidate is result.best,
                reached=reached,
                steps_saved=saved,
                tokens_saved=None if saved is None else saved * tokens_per_step,
                hours_saved=None
                if reached is None or not clock
                else _hours(clock, reached, raw_reached),
            )
        )
    return rows


def _hours(clock: list[tuple[int, float]], start: int, end: int) -> float:
    """Hours of training between two steps, between the logged ones by interpolation."""
    steps, seconds = zip(*sorted(clock), strict=True)
    begun, ended = np.interp([start, end], steps, seconds)
    return float(ended - begun) / 3600.0


def write_csv(result: SweepResult, path: Path) -> None:
    """One line a step: raw and each candidate, empty where it has no window."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [result.raw, *result.candidates]
    writer.writerow(["step", *(candidate.label for candidate in columns)])
    for step in sorted(result.raw.losses):
        writer.writerow([step, *(candidate.losses.get(step, "") for candidate in columns)])
    write_atomically(path, text.getvalue())


def draw(result: SweepResult, path: Path, title: str) -> None:
    """Loss against step for raw and each candidate, the best one in colour and thick."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    shades = colormaps["viridis"](np.linspace(0.1, 0.9, max(len(result.candidates), 2)))

    def line(candidate: Candidate, label: str, **style: Any) -> None:
        steps = sorted(candidate.losses)
        axes.plot(
            steps,
            [candidate.losses[step] for step in steps],
            label=label,
            marker="o",
            markersize=3,
            **style,
        )

    line(result.raw, RAW, color="black", linewidth=1.6)
    for shade, candidate in zip(shades[1:], result.candidates[1:], strict=False):
        line(candidate, candidate.label, color=shade, linewidth=1.0)
    line(result.best, f"{result.best.label} (best)", color="#D55E00", linewidth=2.2)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())

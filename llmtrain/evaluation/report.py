"""What a run came to: the losses of raw and averaged weights as one table and one plot.

Why from files alone: the report reads what training and `eval` measured, computes no loss itself,
and can be made again on a machine without the weights.

    draw_losses(loss_curves(run), Path("loss.png"), title="demo")
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.evaluation.results import Row, stored_rows
from llmtrain.evaluation.targets import RAW
from llmtrain.events import read_events
from llmtrain.files import RunFolder, write_atomically

Curve = list[tuple[int, float]]
"""(step, loss in nats per token), by step."""

_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart in colour blindness; raw is black."""
_MARKERS = ("", "o", "s", "^", "D", "v", "P")


def loss_curves(run: RunFolder) -> dict[str, Curve]:
    """Validation loss by step for raw and each average; raw first.

    Takes what `eval` measured (see `newest_rows`), and what training logged on as many tokens.
    """
    rows = _comparable(stored_rows(run))
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for event in read_events(run.metrics):
        if rows and event.get("val/tokens") != rows[0].tokens:
            continue
        for key, loss in event.items():
            if key.startswith("val/loss") and loss is not None:  # a loss that was not finite
                curves[key.removeprefix("val/loss").lstrip("/") or RAW][event["step"]] = loss
    for row in rows:
        if row.step is not None:
            curves[row.label][row.step] = row.loss
    return {
        label: sorted(curves[label].items()) for label in sorted(curves, key=lambda name: (name != RAW, name))
    }


@dataclass(frozen=True)
class Interventions:
    """How often training met a spike or a number that is not finite, and what it did."""

    nonfinite: int
    """Steps whose loss or gradient norm was not finite."""
    spikes: int
    """Steps whose loss or gradient norm was far above those before them."""
    skipped: int
    """Of both, the steps whose update was left out."""
    rewinds: int
    """Times that the run went back."""

    def __str__(self) -> str:
        return (
            f"spikes {self.spikes:,}, not finite {self.nonfinite:,}: skipped {self.skipped:,} steps, "
            f"rewound {self.rewinds:,} times"
        )


def interventions(run: RunFolder) -> Interventions:
    """What `metrics.jsonl` tells of them, with what rewinds took back."""
    events = [*read_events(run.metrics), *read_events(run.rewound_metrics)]
    kinds = Counter((event["incident"], event["action"] == "skip") for event in events if "incident" in event)
    return Interventions(
        nonfinite=kinds["nonfinite", True] + kinds["nonfinite", False],
        spikes=kinds["spike", True] + kinds["spike", False],
        skipped=kinds["nonfinite", True] + kinds["spike", True],
        rewinds=sum("rewound_from" in event for event in events),
    )


def newest_rows(run: RunFolder) -> list[Row]:
    """For raw and each average, the result of its newest step, all on the same validation windows.

    Raises:
        UserError: nothing was evaluated yet.
    """
    rows = _comparable(stored_rows(run))
    if not rows:
        raise UserError(f"{run.path} has no evaluated weights", hint=f"llmtrain eval {run.path}")
    newest = {row.label: row for row in rows}  # rows come by label and step: the last one stays
    return list(newest.values())


def draw_losses(curves: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Draw validation loss against steps as a PNG, the y axis fitted to what follows warm-up.

    Raises:
        UserError: there is no loss to draw.
    """
    if not any(curves.values()):
        raise UserError(
            "there is no validation loss to draw", hint="train with an eval.every, or run llmtrain eval"
        )
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for index, (label, curve) in enumerate(curves.items()):
        axes.plot(
            [step for step, _ in curve],
            [loss for _, loss in curve],
            label=f"{label}: {curve[-1][1]:.4f} at step {curve[-1][0]:,}",
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.4,
        )
    low, high = _loss_range(curves)
    axes.set_ylim(low, high)
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


def _loss_range(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Limits that show the last nine tenths of the steps in full; the start may leave the frame."""
    last = max(curve[-1][0] for curve in curves.values() if curve)
    losses = [loss for curve in curves.values() for step, loss in curve if step >= last / 10]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """Results measured on the same validation windows: of those with most results, the largest windows."""
    groups = defaultdict(list)
    for row in rows:
        if row.split == "val":
            groups[row.data, row.tokens, row.precision].append(row)
    return max(groups.values(), key=lambda group: (len(group), group[0].tokens), default=[])

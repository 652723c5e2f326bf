"""Which charts a report has, and how its lines are told apart.

Why: of one run, colour, dash and marker all say which weights; of several, the colour says which run
and the dash and the marker which weights, so that 1× and 10× of one kind are two colours of one line.

    drawings = [draw(chart) for chart in charts(records)]
"""

from collections.abc import Callable, Sequence

from llmtrain.evaluation.report.charts import Chart, Line, is_drawable
from llmtrain.evaluation.report.rows import Curve
from llmtrain.evaluation.report.tables import RunRecord, gains
from llmtrain.model.tokenizer import well_formed

LOSS_AXES = {"steps": "step", "tokens": "tokens", "hours": "hours of training"}
"""What the validation loss is drawn against → the label of that axis."""
LOSS_CHARTS = {"steps": "loss", "tokens": "loss-tokens", "hours": "loss-hours"}
"""… → the name of that chart."""

_TRAINING = (
    ("training-loss", "loss", "Training loss", "nats per token"),
    ("learning-rate", "lr", "Learning rate", "learning rate"),
    ("gradient-norm", "grad_norm", "Gradient norm before clipping", "norm"),
    ("throughput", "tokens_per_second", "Throughput", "tokens per second"),
    ("utilisation", "mfu", "Model FLOP/s utilisation", "share of the peak"),
    ("memory", "memory", "Memory, peak of a process", "bytes"),
    ("skipped", "skipped", "Steps skipped so far", "steps"),
)
"""Name of the chart, key of the event, title, label of the y axis."""

_NOT_FROM_ZERO = ("training-loss", "gradient-norm")
_LEFT_OUT_AT_ZERO = ("skipped",)


def charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Every chart for which there are numbers, validation loss first."""
    drawn = [*loss_charts(records), gain_chart(records), *training_charts(records)]
    return [chart for chart in drawn if any(line.x for line in chart.lines)]


def loss_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Validation loss against steps, tokens and hours."""
    found = []
    for axis, x_label in LOSS_AXES.items():
        lines = _lines(records, lambda record: record.curves, _scale(axis))
        title = f"Validation loss against {axis}"
        found.append(
            Chart(
                LOSS_CHARTS[axis], title, x_label, "nats per token", lines, late=True, shown=".4f"
            )
        )
    return found


def gain_chart(records: Sequence[RunRecord]) -> Chart:
    """The raw loss minus that of each average, at the same step."""
    title = "Gain over raw at the same step (up is better)"
    lines = _lines(records, gains, _scale("steps"))
    return Chart(
        "gain", title, "step", "nats per token", lines, baseline=0.0, late=True, shown=".4f"
    )


def training_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """One line a run: what training logged."""
    found = []
    for name, key, title, y_label in _TRAINING:
        lines = []
        for index, record in enumerate(records):
            events = [event for event in record.training if is_drawable(event.get(key))]
            values = [event[key] for event in events]
            if any(values) or (values and name not in _LEFT_OUT_AT_ZERO):
                steps = [event["step"] for event in events]
                lines.append(
                    Line(well_formed(record.name), steps, values, colour=index, dash=index)
                )
        found.append(
            Chart(
                name,
                title,
                "step",
                y_label,
                lines,
                log_y=name == "gradient-norm",
                from_zero=name not in _NOT_FROM_ZERO,
                late=name == "training-loss",
            )
        )
    return found


def _scale(axis: str) -> Callable[[RunRecord, int], float | None]:
    """How far along the axis a step of a run lies; None where the run's log does not tell."""

    def place(record: RunRecord, step: int) -> float | None:
        if axis == "steps":
            return step
        return record.clock.tokens_at(step) if axis == "tokens" else record.clock.hours_at(step)

    return place


def _lines(
    records: Sequence[RunRecord],
    curves_of: Callable[[RunRecord], dict[str, Curve]],
    place: Callable[[RunRecord, int], float | None],
) -> list[Line]:
    """A line for each kind of weights of each run; a kind looks the same in every chart."""
    kinds = list(dict.fromkeys(label for record in records for label in record.curves))
    lines = []
    for index, record in enumerate(records):
        for label, curve in curves_of(record).items():
            placed = [(x, loss) for step, loss in curve if (x := place(record, step)) is not None]
            kind = kinds.index(label)
            lines.append(
                Line(
                    well_formed(f"{record.name}: {label}" if len(records) > 1 else label),
                    [x for x, _ in placed],
                    [loss for _, loss in placed],
                    colour=index if len(records) > 1 else kind,
                    dash=kind,
                    marker=kind,
                )
            )
    return [line for line in lines if line.x]

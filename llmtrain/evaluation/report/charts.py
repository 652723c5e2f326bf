"""Line charts of the report as SVG and PNG, readable on a phone, on paper and when color-blind.

Why SVG plus the position of each point: the figure prints well, and a few lines of script show the
values under the pointer without a plotting library.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from llmtrain.errors import printable
from llmtrain.evaluation.curves import Curve
from llmtrain.evaluation.report.records import RunRecord, gains

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The color-blind-safe palette of Okabe and Ito."""
_GAPS = ((5, 1.5), (1.5, 1), (6, 1.5, 1.5, 1.5), (3, 3), (8, 2, 2, 2, 2, 2))
DASHES = ("-", *((0, lengths) for lengths in _GAPS))
MARKERS = ("", "o", "s", "^", "D", "v", "P")

_LOSS_CHARTS = (
    ("loss", "steps", "step"),
    ("loss-tokens", "tokens", "tokens"),
    ("loss-hours", "hours", "hours of training"),
)
"""Name of the chart, x axis, label of the x axis."""
_TRAINING = (
    ("training-loss", "loss", "Training loss", "nats per token"),
    ("learning-rate", "lr", "Learning rate", "learning rate"),
    ("gradient-norm", "grad_norm", "Gradient norm before clipping", "norm"),
    ("throughput", "tokens_per_second", "Throughput", "tokens per second"),
    ("utilisation", "mfu", "Model FLOP/s utilisation", "share of the peak"),
    ("memory", "memory", "Peak memory of a process", "bytes"),
    ("skipped", "skipped", "Skipped steps so far", "steps"),
)
"""Name of the chart, key in the log, title, label of the y axis."""

_SIZE = (5.6, 3.6)
"""Inches: 403 by 259 points, so that 11.5-point text suits a phone and a desktop."""
_LEGEND_ROW, _ROWS_INCLUDED = 0.22, 2
"""Inches added per legend row after the included ones, so that the plot does not shrink."""
_MAX_POINTS = 500
"""Points of a line whose values the page shows; longer lines are thinned."""
_LARGEST = 1e30
_STYLE = Path(__file__).parent / "page" / "charts.mplstyle"


@dataclass(frozen=True)
class Line:
    """One curve, with a gap at each y that is None or not finite."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float] = ()
    """Half the length of the error bar at each point; NaN draws none."""
    colour: int = 0
    dash: int = 0
    marker: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis."""

    name: str
    """Letters and hyphens; also the file name and HTML id."""
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    """Ignored unless a value is positive."""
    from_zero: bool = False
    baseline: float | None = None
    late: bool = False
    """Fit the y axis to the last 90% of the x axis."""
    shown: str = ".4g"
    """Format of values below 1,000."""
    axis: str = ""
    """x axis of a validation loss."""


@dataclass(frozen=True)
class Drawing:
    """A rendered chart."""

    chart: Chart
    svg: str
    png: bytes
    points: list[dict[str, Any]]
    """Label, color and points of each line: x and y in SVG units, and both values as text."""
    frame: tuple[float, float, float, float]
    """Left, top, right and bottom of the axes in SVG units."""


def brief(value: float) -> str:
    """Format a number for an axis or a table: `3.7M`, `12k`, `0.05`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.6g}"


def duration(hours: float) -> str:
    """Format a time: `3.2 hours`, `12.5 minutes`, `40 seconds`."""
    if abs(hours) >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if abs(hours) >= 1 / 60 else f"{hours * 3600:.0f} seconds"


def is_drawable(value: float | None) -> bool:
    """Return whether a chart can show a value: finite, and small enough for axis arithmetic."""
    return value is not None and abs(value) < _LARGEST


def run_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Return every chart that has data, validation loss first.

    With one run, color, dash and marker all show the label of the weights. With several runs, the
    color shows the run.
    """
    loss = partial(Chart, y_label="nats per token", late=True, shown=".4f")
    drawn = []
    for name, axis, x_label in _LOSS_CHARTS:
        lines = _lines(records, lambda record: record.curves, axis)
        title = f"Validation loss{_on_tokens(records)}, by {axis}"
        drawn.append(loss(name, title, x_label, lines=lines, axis=axis))
    title = "Gain over raw at the same step (up is better)"
    lines = _lines(records, gains, "steps")
    drawn.append(loss("gain", title, "step", lines=lines, baseline=0.0))
    drawn += [_training_chart(records, *each) for each in _TRAINING]
    return [chart for chart in drawn if any(line.x for line in chart.lines)]


def _on_tokens(records: Sequence[RunRecord]) -> str:
    """Return the number of validation tokens, if it is the same for all runs."""
    counts = {record.windows.tokens for record in records if record.windows}
    count = counts.pop() if len(counts) == 1 else None
    return f" on {count:,} tokens" if count else ""


def _training_chart(
    records: Sequence[RunRecord], name: str, key: str, title: str, y_label: str
) -> Chart:
    lines = []
    for index, record in enumerate(records):
        events = [event for event in record.training if is_drawable(event.get(key))]
        values = [event[key] for event in events]
        if any(values) or (values and name != "skipped"):
            steps = [event["step"] for event in events]
            lines.append(Line(printable(record.name), steps, values, colour=index, dash=index))
    chart = Chart(name, title, "step", y_label, lines)
    if name == "training-loss":
        return replace(chart, late=True)
    return replace(chart, log_y=True) if name == "gradient-norm" else replace(chart, from_zero=True)


def _lines(
    records: Sequence[RunRecord], curves_of: Callable[[RunRecord], dict[str, Curve]], axis: str
) -> list[Line]:
    """Return a line per run and label; a label looks the same in every chart."""
    labels = list(dict.fromkeys(label for record in records for label in record.curves))
    several = len(records) > 1
    unlike = several and not _on_tokens(records)
    lines = []
    for index, record in enumerate(records):
        tokens = record.windows.tokens if unlike and record.windows else None
        suffix = f" ({tokens:,} tokens)" if tokens else ""
        for label, curve in curves_of(record).items():
            points = [(x, y) for step, y in curve if (x := _x(record, axis, step)) is not None]
            if points:
                name = printable(f"{record.name}: {label}{suffix}" if several else label)
                xs, ys = zip(*points, strict=True)
                kind = labels.index(label)
                colour = index if several else kind
                lines.append(Line(name, xs, ys, colour=colour, dash=kind, marker=kind))
    return lines


def _x(record: RunRecord, axis: str, step: int) -> float | None:
    if axis == "steps":
        return step
    return record.clock.tokens_at(step) if axis == "tokens" else record.clock.hours_at(step)


def draw(chart: Chart) -> Drawing:
    """Draw a chart; the same chart gives the same bytes."""
    with matplotlib.rc_context(fname=_STYLE), warnings.catch_warnings():
        # A glyph missing from our font is a box in the PNG; the SVG uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        columns = 1 if any(len(line.label) > 24 for line in chart.lines) else 2
        rows = math.ceil(len(chart.lines) / columns) if len(chart.lines) > 1 else 0
        size = _SIZE[0], _SIZE[1] + _LEGEND_ROW * max(rows - _ROWS_INCLUDED, 0)
        figure = Figure(figsize=size, dpi=144, layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            _draw_line(axes, line)
        _label(axes, chart)
        if len(chart.lines) > 1:
            place: Any = {"loc": "outside lower left", "ncols": columns, "fontsize": 10.5}
            figure.legend(**place, handlelength=2.6, columnspacing=1.2)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")  # keep this layout for the points and the SVG
        points = [_points(axes, line, chart) for line in chart.lines]
        (left, bottom), (right, top) = axes.get_position().get_points()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    frame = (*_svg_units(figure, left, top), *_svg_units(figure, right, bottom))
    return Drawing(chart, svg.getvalue(), png.getvalue(), points, frame)


def inline_svg(drawing: Drawing) -> Markup:
    """Return the SVG as a page element without prologue or size, with ids unique to the figure."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{drawing.chart.name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{drawing.chart.name}-", svg)
    start, end = svg.split(">", maxsplit=1)
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    return Markup(f"{start}>{end}")  # matplotlib has escaped its text


def _colour(line: Line) -> str:
    return COLOURS[line.colour % len(COLOURS)]


def _draw_line(axes: Axes, line: Line) -> None:
    values = [math.nan if y is None or not is_drawable(y) else y for y in line.y]
    axes.plot(
        line.x,
        values,
        label=line.label,
        color=_colour(line),
        linestyle=DASHES[line.dash % len(DASHES)],
        marker=MARKERS[line.marker % len(MARKERS)],
        markersize=4,
        markevery=max(1, math.ceil(len(line.x) / 12)),
        linewidth=1.5,
    )
    if alone := _isolated(values):
        marks = [line.x[i] for i in alone], [values[i] for i in alone]
        axes.plot(*marks, color=_colour(line), linestyle="", marker="o", markersize=4)
    if line.spread:
        bars: Any = {"fmt": "none", "ecolor": _colour(line), "elinewidth": 1.0, "capsize": 2.5}
        axes.errorbar(line.x, values, line.spread, label=None, **bars)


def _isolated(values: Sequence[float]) -> list[int]:
    """Return the indices of points without a neighbor, which a line does not show."""
    known = [False, *map(math.isfinite, values), False]
    return [i - 1 for i in range(1, len(known) - 1) if known[i - 1 : i + 2] == [False, True, False]]


def _label(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    points = [point for line in chart.lines for point in _drawable_points(line)]
    if chart.log_x:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(left=0)
    if chart.log_y and any(y > 0 for _, y in points):
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: brief(value))
    if chart.baseline is not None:
        axes.axhline(chart.baseline, color="#777777", linewidth=0.8)
    if chart.late:
        last = max((x for line in chart.lines for x in line.x), default=0.0)
        late = [y for x, y in points if x >= last / 10]
        low, high = min(late, default=0.0), max(late, default=1.0)
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
    if chart.from_zero:
        axes.set_ylim(bottom=0)


def _log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def _drawable_points(line: Line) -> list[tuple[float, float]]:
    points = zip(line.x, line.y, strict=True)
    return [(x, y) for x, y in points if y is not None and is_drawable(y)]


def _points(axes: Axes, line: Line, chart: Chart) -> dict[str, Any]:
    """Return a line as the script of the page reads it."""
    known = _drawable_points(line)
    chosen = known[:: math.ceil(len(line.x) / _MAX_POINTS) or 1]
    if chosen[-1:] != known[-1:]:
        chosen.append(known[-1])
    lowest = axes.get_ylim()[0]
    points = []
    for x, y in chosen:
        drawn = lowest if axes.get_yscale() == "log" and y <= 0 else y
        place = axes.figure.transFigure.inverted().transform(axes.transData.transform((x, drawn)))
        points.append([*_svg_units(axes.figure, *place), _value(x, ".4g"), _value(y, chart.shown)])
    return {"label": line.label, "colour": _colour(line), "points": points}


def _value(value: float, shown: str) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{shown}}"


def _svg_units(figure: Any, x: float, y: float) -> tuple[float, float]:
    """Convert a position in the figure (0 to 1, upward) to points from the upper left corner."""
    width, height = figure.get_size_inches()
    return round(float(x * width * 72), 1), round(float((1 - y) * height * 72), 1)

"""Line charts that read well on a phone, on paper and in colour blindness: SVG, PNG, and where each point lies.

Why SVG with points beside it: the drawing stays a drawing that prints, and a page's few lines of script
can show the values under the pointer without a plotting library of its own.

    drawing = draw(Chart("loss", "Validation loss", "step", "nats per token", lines)); drawing.png
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart in colour blindness."""
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 3)),
    (0, (8, 2, 2, 2, 2, 2)),
)
MARKERS = ("", "o", "s", "^", "D", "v", "P")

_SIZE = (5.6, 3.6)
"""Inches: 403 by 259 points, so that text of 11.5 points is read on a phone and is not huge on a desk."""
_SHOWN = 500
"""Points of a line that tell their value; of a longer line, every so many."""
_LARGEST = 1e30
_STYLE: Any = {
    "font.size": 11.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "llmtrain",
    "text.parse_math": False,  # a `$` in a name is a `$`
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.labelcolor": "#222222",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One curve; where `y` is None or not finite there is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float] = ()
    """Half the length of a vertical bar at each point, such as a standard error; NaN, or none at all: no bar."""
    colour: int = 0
    """Indices into `COLOURS`, `DASHES` and `MARKERS`, which begin anew after the last."""
    dash: int = 0
    marker: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis."""

    name: str
    """Of its files and in the page: letters and hyphens."""
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    """For positive values."""
    log_y: bool = False
    from_zero: bool = False
    """Let the y axis begin at zero."""
    baseline: float | None = None
    """Where to draw a thin horizontal line."""
    late: bool = False
    """Fit the y axis to what follows the first tenth, whose values may leave the frame."""
    shown: str = ".4g"
    """How a value below 1,000 is written."""


@dataclass(frozen=True)
class Drawing:
    """A chart, drawn."""

    chart: Chart
    svg: str
    """A whole SVG document."""
    png: bytes
    points: list[dict[str, Any]]
    """For each line its label, colour and points: x and y in the SVG's own units, and both values as text."""
    frame: tuple[float, float, float, float]
    """Left, top, right and bottom of the axes in the SVG's own units."""


def brief(value: float) -> str:
    """`3.7M`, `12k`, `0.05`: a number on an axis or in a table."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.6g}"


def duration(hours: float) -> str:
    """`3.2 hours`, `12.5 minutes`, `40 seconds`."""
    if abs(hours) >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if abs(hours) >= 1 / 60 else f"{hours * 3600:.0f} seconds"


def draw(chart: Chart) -> Drawing:
    """Draw a chart; the same chart gives the same bytes."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # In the SVG the reader's own fonts write a label; in the PNG, what ours lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=_SIZE, dpi=144, layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            _draw_line(axes, line)
        _label(axes, chart)
        if len(chart.lines) > 1:
            columns = 1 if max(len(line.label) for line in chart.lines) > 24 else 2
            figure.legend(
                loc="outside lower left",
                ncols=columns,
                fontsize=10.5,
                handlelength=2.6,
                columnspacing=1.2,
            )
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")  # as it lies now, in all that follows
        points, frame = [_points(axes, line, chart) for line in chart.lines], _frame(axes)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Drawing(chart, svg.getvalue(), png.getvalue(), points, frame)


def inline(drawing: Drawing) -> str:
    """The SVG as an element of a page: no prologue, ids that no other figure has, as wide as its place."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{drawing.chart.name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{drawing.chart.name}-", svg)
    start, end = svg.split(">", maxsplit=1)
    return re.sub(r' (width|height)="[^"]*"', "", start) + ">" + end


def _draw_line(axes: Axes, line: Line) -> None:
    values = [math.nan if y is None or not is_drawable(y) else y for y in line.y]
    axes.plot(
        line.x,
        values,
        label=line.label,
        color=COLOURS[line.colour % len(COLOURS)],
        linestyle=DASHES[line.dash % len(DASHES)],
        marker=MARKERS[line.marker % len(MARKERS)],
        markersize=4,
        markevery=max(1, math.ceil(len(line.x) / 12)),
        linewidth=1.5,
    )
    if line.spread:
        colour = COLOURS[line.colour % len(COLOURS)]
        axes.errorbar(
            line.x,
            values,
            line.spread,
            fmt="none",
            ecolor=colour,
            elinewidth=1.0,
            capsize=2.5,
            label=None,
        )


def _label(axes: Axes, chart: Chart) -> None:
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_brief)
    if chart.log_y and any(
        y > 0 for line in chart.lines for y in line.y if y is not None and is_drawable(y)
    ):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(_brief)
    if chart.baseline is not None:
        axes.axhline(chart.baseline, color="#777777", linewidth=0.8)
    if chart.late:
        axes.set_ylim(_late_range(chart.lines))
    if chart.from_zero:
        axes.set_ylim(bottom=0)


def _brief(value: float, _: float) -> str:
    return brief(value)


def _late_range(lines: Sequence[Line]) -> tuple[float, float]:
    last = max((x for line in lines for x in line.x), default=0.0)
    late = [
        y
        for line in lines
        for x, y in zip(line.x, line.y, strict=True)
        if x >= last / 10 and is_drawable(y)
    ]
    values = [y for y in late if y is not None] or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def is_drawable(value: float | None) -> bool:
    """Whether a chart can show it: finite, and of a size that leaves room for arithmetic."""
    return value is not None and abs(value) < _LARGEST


def _points(axes: Axes, line: Line, chart: Chart) -> dict[str, Any]:
    """A line for the page's script."""
    every = math.ceil(len(line.x) / _SHOWN) or 1
    known = [
        (x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and is_drawable(y)
    ]
    chosen = [*known[::every], *known[-1:]] if (len(known) - 1) % every else known[::every]
    return {
        "label": line.label,
        "colour": COLOURS[line.colour % len(COLOURS)],
        "points": [
            [*_place(axes, x, y), _value(x, ".4g"), _value(y, chart.shown)] for x, y in chosen
        ],
    }


def _value(value: float, shown: str) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{shown}}"


def _place(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """A point in the SVG's units, which are points from its upper left corner."""
    if axes.get_yscale() == "log" and y <= 0:
        y = axes.get_ylim()[0]
    across, up = axes.transData.transform((x, y))
    scale = 72 / axes.figure.dpi
    return round(float(across) * scale, 1), round(_SIZE[1] * 72 - float(up) * scale, 1)


def _frame(axes: Axes) -> tuple[float, float, float, float]:
    box, (width, height) = axes.get_position(), _SIZE
    left, right = box.x0 * width * 72, box.x1 * width * 72
    top, bottom = (1 - box.y1) * height * 72, (1 - box.y0) * height * 72
    return round(left, 1), round(top, 1), round(right, 1), round(bottom, 1)

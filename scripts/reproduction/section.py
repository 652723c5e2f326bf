"""A claim's part of the page: comparisons with a verdict, tables and figures.

The modules of the claims create sections; `page` writes them.

    Section("Against the step", [Comparison(1, "constant, end", estimate)], [], [])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.evaluation.report.charts import Chart, Line
from reproduction.plan import WINDOW
from reproduction.results import Results
from reproduction.statistics import Estimate


@dataclass(frozen=True)
class Comparison:
    """One comparison with its verdict."""

    claim: int
    what: str
    """The two sides and the condition."""
    difference: Estimate | None
    """Difference in nats per token, negative if the first is better; None: not measured."""
    main: bool = False
    """Show it in the table of verdicts at the top of the page."""


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    caption: str
    made: Sequence[str]
    """Keys of `Results.commands` behind it; "log" is the training log."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """One claim."""

    title: str
    text: str
    comparisons: Sequence[Comparison]
    tables: Sequence[Table]
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Labels:
    """Labels of the weights that all claims use."""

    lawa: str
    online_lawa: str
    matched: str
    """The EMA with the mean age of the LAWA window, (k - 1)N/2 steps."""
    swa_early: str
    swa_late: str
    merge: str
    """The merge that emulates a 1-sqrt cooldown over the last fifth."""

    @classmethod
    def of(cls, results: Results) -> "Labels":
        """Create the labels from the plan's sizes."""
        plan = results.plan
        every, age = plan["spacing"], (WINDOW - 1) * plan["spacing"] / 2
        return cls(
            lawa=f"lawa-{WINDOW}x{every}",
            online_lawa=f"online-lawa-{WINDOW}x{every}",
            matched=f"ema-{age / (1 + age):g}",
            swa_early=f"swa-from-{plan['swa_early']}x{every}",
            swa_late=f"swa-from-{plan['swa_late']}x{every}",
            merge=merge_label(results, plan["steps"]),
        )


def merge_label(results: Results, end: int) -> str:
    """Return the label of the merge that emulates the cooldown ending at step `end`."""
    every = results.plan["spacing"]
    return f"decay-1-sqrt-{end // 5 // every}x{every}"


def cell(value: Estimate | None, *, signed: bool = True) -> str:
    """Format an estimate for a table."""
    return "n/a" if value is None else value.signed if signed else str(value)


def line(
    label: str, points: Sequence[tuple[float, Estimate | None]], kind: int, *, sign: float = 1
) -> Line:
    """Return means with standard errors as bars; `kind` selects colour, dash and marker."""
    known = [(x, estimate) for x, estimate in points if estimate is not None]
    errors = [math.nan if estimate.error is None else estimate.error for _, estimate in known]
    return Line(
        label,
        [x for x, _ in known],
        [sign * estimate.mean for _, estimate in known],
        spread=[] if all(map(math.isnan, errors)) else errors,
        colour=kind,
        dash=kind,
        marker=kind,
    )

"""What a claim comes to on the page: comparisons with a verdict, tables, figures.

Why apart from the claims and from the page: the ones compute, the other writes, and both see only this.

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
    """One question to the data."""

    claim: int
    what: str
    """This against that, where."""
    difference: Estimate | None
    """In nats per token; negative: the first is better. None: not measured."""
    main: bool = False
    """Whether it stands in the table on top of the page."""


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    caption: str
    made: Sequence[str]
    """What of `Results.commands` it is made of; "log": what training logged."""
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
    """What the weights are called that all claims speak of."""

    lawa: str
    online_lawa: str
    matched: str
    """The EMA whose mean age is that of the LAWA window, (k - 1)N/2 steps."""
    swa_early: str
    swa_late: str
    merge: str
    """What stands for a 1-sqrt cooldown over the last fifth."""

    @classmethod
    def of(cls, results: Results) -> "Labels":
        """By the plan's sizes."""
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
    """Label of the merge that stands for the cooldown that ends at step `end`."""
    every = results.plan["spacing"]
    return f"decay-1-sqrt-{end // 5 // every}x{every}"


def cell(value: Estimate | None, *, signed: bool = True) -> str:
    """An estimate in a table."""
    return "n/a" if value is None else value.signed if signed else str(value)


def line(
    label: str, points: Sequence[tuple[float, Estimate | None]], kind: int, *, sign: float = 1
) -> Line:
    """Means with their standard errors as bars; `kind` decides colour, dash and marker."""
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

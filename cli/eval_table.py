"""What `llmtrain eval` prints: losses, and with texts or tasks every measure of every set of weights.

console.print(loss_table(rows))
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from llmtrain.checkpoints.resolve import Target
    from llmtrain.evaluation.results import Row
    from llmtrain.evaluation.tasks import TaskResult
    from llmtrain.evaluation.text import TextResult


@dataclass(frozen=True)
class Measured:
    """All that was measured of one set of weights."""

    target: "Target"
    row: "Row | None"
    """None: no data is known."""
    text: "TextResult | None" = None
    tasks: "list[TaskResult]" = field(default_factory=list)


def json_of(measured: Measured) -> dict[str, Any]:
    """One object of `--json`: the loss, null where there is none, and what else was asked for."""
    from llmtrain.evaluation.results import Row

    target, row = measured.target, measured.row
    document = dict.fromkeys(Row.__dataclass_fields__) | {
        "label": target.label,
        "step": target.step,
        "path": str(target.path),
        "run": target.run.path.resolve().name if target.run else None,
    }
    document |= asdict(row) if row else {}
    if measured.text is not None:
        document["text"] = asdict(measured.text)
    if measured.tasks:
        document["tasks"] = [asdict(result) for result in measured.tasks]
    return document


def loss_table(rows: "list[Row]") -> Table:
    """One line a set of weights; which run it is of, where there are several."""
    several = len({row.run for row in rows}) > 1
    names = ("step", "loss", "perplexity", "bits/byte", "minus raw", "tokens", "s")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("weights", no_wrap=True), *columns, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(
            escape(f"{row.run}: {row.label}" if several and row.run else row.label),
            "" if row.step is None else f"{row.step:,}",
            f"{row.loss:.4f}",
            "inf" if row.perplexity is None else _figure(row.perplexity, 3),
            "n/a" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
            "n/a" if row.delta is None else f"{row.delta:+.4f}",
            f"{row.tokens:,}",
            f"{row.seconds:.1f}",
        )
    return table


def measures_table(everything: list[Measured]) -> Table:
    """One line a measure and a set of weights, those of a measure below each other."""
    several = len({_place(one.target)[0] for one in everything}) > 1
    names = ("step", "value", "±", "minus raw")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(
        Column("measure", overflow="fold"),
        Column("weights", overflow="fold"),
        *columns,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    lines: dict[str, list[tuple[Target, _Figure]]] = {}
    for one in everything:
        for name, figure in _figures(one):
            lines.setdefault(name, []).append((one.target, figure))
    for name, figures in lines.items():
        raw = {_place(target): figure.value for target, figure in figures if target.label == "raw"}
        for i, (target, figure) in enumerate(figures):
            table.add_row(
                escape(name) if i == 0 else "",
                escape(
                    f"{_place(target)[0].name}: {target.label}"
                    if several and target.run
                    else target.label
                ),
                "" if target.step is None else f"{target.step:,}",
                "inf" if figure.value is None else _figure(figure.value, 4),
                "" if figure.stderr is None else _figure(figure.stderr, 4),
                _difference(figure.value, raw.get(_place(target)), target.label),
                end_section=i == len(figures) - 1,
            )
    return table


def _place(target: "Target") -> tuple[Path, int | None]:
    """Run and step; outside a run, a place of its own."""
    return (target.run.path if target.run else target.path).resolve(), target.step


@dataclass(frozen=True)
class _Figure:
    value: float | None
    """None where it does not fit a float."""
    stderr: float | None = None


def _figures(one: Measured) -> Iterator[tuple[str, _Figure]]:
    if one.row is not None:
        yield f"{one.row.split}: loss", _Figure(one.row.loss)
        yield f"{one.row.split}: bits/byte", _Figure(one.row.bits_per_byte)
    if one.text is not None:
        name = one.text.file.rpartition("/")[2]
        yield f"{name}: loss", _Figure(one.text.loss)
        yield f"{name}: word perplexity", _Figure(one.text.word_perplexity)
        yield f"{name}: byte perplexity", _Figure(one.text.byte_perplexity)
    for result in one.tasks:
        for score in result.scores:
            arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
            yield f"{score.task}: {score.metric}{arrow}", _Figure(score.value, score.stderr)


def explanations(everything: list[Measured]) -> list[str]:
    """How texts and tasks were measured, as far as the figures depend on it; each line once."""
    lines = []
    for one in everything:
        if text := one.text:
            kind = (
                "disjoint windows"
                if text.windows == "disjoint"
                else f"strided by {text.stride:,}: windows"
            )
            lines.append(
                f"{text.file}: {text.tokens:,} tokens, {text.words:,} words, {text.bytes:,} bytes; "
                f"{kind} of {text.context:,} tokens, {text.precision}"
            )
        for result in one.tasks:
            documents = {score.task: score.documents or 0 for score in result.scores}
            cut = (
                f"; {result.truncated:.0%} of the requests lost their start"
                if result.truncated
                else ""
            )
            first = " (the first)" if result.limit else ""
            lines.append(
                f"{result.task}: {sum(documents.values()):,} documents{first} from {result.source}, "
                f"context of {result.context:,} tokens{cut}"
            )
    return list(dict.fromkeys(lines))


def _difference(value: float | None, raw: float | None, label: str) -> str:
    if label == "raw":
        return ""
    return "n/a" if value is None or raw is None else _figure(value - raw, 4, "+")


def _figure(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if abs(value) < 1e5 else f"{value:{sign}.3e}"

"""The report as one self-contained HTML page, with its figures and tables as files.

Why one page: it can be mailed, archived next to the weights, and printed.
"""

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llmtrain import __version__
from llmtrain.errors import UserError, printable
from llmtrain.evaluation.curves import Curve
from llmtrain.evaluation.report.charts import Drawing, brief, draw, duration, inline_svg, run_charts
from llmtrain.evaluation.report.records import (
    RunRecord,
    Saving,
    differing_windows,
    gains,
    read_records,
    savings,
)
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.run_folder import RunFolder

PAGE = "report.html"

_TRAINING_COLUMNS = (
    "step", "loss", "lr", "grad_norm", "tokens",
    "tokens_per_second", "mfu", "memory", "seconds", "skipped",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A written report; `plot` shows the validation loss, savings start with the lowest loss."""

    page: Path
    plot: Path
    records: list[RunRecord]
    savings: list[Saving]


def write_report(runs: Sequence[RunFolder], folder: Path) -> Report:
    """Write the page, figures and tables into `folder`, replacing earlier ones."""
    records = read_records(runs)
    for record in records:
        if not any(record.curves.values()):
            path = record.run.path
            hint = f"train with eval.every, or run llmtrain eval {shlex.quote(str(path))}"
            raise UserError(f"{path} does not contain validation losses", hint=hint)
    saved = [row for record in records for row in savings(record)]
    if not differing_windows(records):
        saved.sort(key=lambda row: row.loss)
    drawings = [draw(chart) for chart in run_charts(records)]
    for run in runs:
        run.check_output(folder)
    for drawing in drawings:
        write_atomically(folder / f"{drawing.chart.name}.svg", drawing.svg)
        write_atomically(folder / f"{drawing.chart.name}.png", drawing.png)
    for name, rows in _tables(records, saved).items():
        write_atomically(folder / f"{name}.csv", _csv(rows))
    write_atomically(folder / PAGE, render_page(records, saved, drawings))
    return Report(folder / PAGE, folder / "loss.png", records, saved)


def render_page(
    records: Sequence[RunRecord], saved: Sequence[Saving], drawings: Sequence[Drawing]
) -> str:
    """Return the page; the template escapes HTML and control characters in all text of the runs."""
    templates = Environment(
        loader=PackageLoader("llmtrain.evaluation.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    templates.filters |= {"brief": brief, "duration": duration, "inline": inline_svg}
    templates.filters |= {"inputs": _inputs, "other_facts": _other_facts, "lines": _lines}
    settings = _settings([record.config for record in records])
    return templates.get_template("report.html").render(
        runs=records,
        savings=saved,
        unlike=differing_windows(records),
        elsewhere=_elsewhere(records),
        drawings=drawings,
        numbers=_numbers(records),
        samples=[sample for record in records for sample in _samples(record)],
        settings=settings,
        differing=[(key, values) for key, values in settings if len({*values}) > 1],
        environment=_settings([record.environment for record in records]),
        points={
            d.chart.name: {"frame": d.frame, "x_label": d.chart.x_label, "lines": d.points}
            for d in drawings
        },
        version=__version__,
    )


def _numbers(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the validation losses as a table: a row per step, a column per line of the chart."""
    columns = [
        (f"{record.name}: {label}" if len(records) > 1 else label, dict(curve))
        for record in records
        for label, curve in record.curves.items()
    ]
    steps = sorted({step for _, curve in columns for step in curve})
    rows = [
        (f"{step:,}", [f"{curve[step]:.4f}" if step in curve else "" for _, curve in columns])
        for step in steps
    ]
    return {"names": [name for name, _ in columns], "rows": rows}


def _elsewhere(records: Sequence[RunRecord]) -> list[tuple[str, str, int, str, str]]:
    """Return run, label, step, loss and windows of each loss that the charts do not show."""
    return [
        (record.name, label, step, f"{loss:.4f}", str(windows))
        for record in records
        for windows, curves in record.others.items()
        for label, step, loss in _points(curves)
    ]


def _points(curves: Mapping[str, Curve]) -> list[tuple[str, int, float]]:
    return [(label, step, loss) for label, curve in curves.items() for step, loss in curve]


def _samples(record: RunRecord) -> list[tuple[str, int, str]]:
    """Return run, step and text of the first sample, the last, and two evenly spaced between."""
    last = len(record.samples) - 1
    chosen = sorted({round(i * last / 3) for i in range(4)})
    return [(record.name, *record.samples[i]) for i in chosen if last >= 0]


def _inputs(provenance: Mapping[str, Any]) -> list[list[str]]:
    """Return step, weight, hash and path of each input; a third-party file may have any content."""
    inputs = provenance.get("inputs")
    return [_input(entry) for entry in inputs] if isinstance(inputs, list) else []


def _input(entry: object) -> list[str]:
    known: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    weight = known.get("weight")
    shown = f"{weight:.6g}" if isinstance(weight, float) else str(weight)
    digest = str(known.get("blake3") or known.get("sha256"))
    return [str(known.get("step")), shown, digest[:16], str(known.get("path"))]


def _other_facts(provenance: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in provenance.items() if key != "inputs"}
    return json.dumps(rest, indent=1, ensure_ascii=False)


def _lines(text: str) -> Markup:
    """Return text as HTML with its line breaks."""
    return Markup("\n").join(map(printable, text.split("\n")))


def _settings(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the rows of a table: a key and its value in each document."""
    keys = list(dict.fromkeys(key for document in documents for key in document))
    return [(key, [_setting(document.get(key)) for document in documents]) for key in keys]


def _setting(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def _tables(records: Sequence[RunRecord], saved: Sequence[Saving]) -> dict[str, list[list[Any]]]:
    """Return the rows of each CSV file by name, header first."""
    losses: list[list[Any]] = [
        ["run", "weights", "step", "tokens", "hours", "loss", "val_tokens", "gain"]
    ]
    training: list[list[Any]] = [["run", *_TRAINING_COLUMNS]]
    for record in records:
        clock, gained = record.clock, {k: dict(curve) for k, curve in gains(record).items()}
        for windows, curves in [(record.windows, record.curves), *record.others.items()]:
            for label, step, loss in _points(curves):
                place = [clock.tokens_at(step), clock.hours_at(step)]
                gain = gained.get(label, {}).get(step) if windows == record.windows else None
                counted = windows.tokens if windows else None
                losses.append([record.name, label, step, *place, loss, counted, gain])
        rows = [[record.name, *map(event.get, _TRAINING_COLUMNS)] for event in record.training]
        training += rows
    header = [field.name for field in fields(Saving)]
    best = [header, *(list(asdict(row).values()) for row in saved)]
    return {"losses": losses, "training": training, "best": best}


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    safe = ([printable(cell) if type(cell) is str else cell for cell in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(safe)
    return text.getvalue()

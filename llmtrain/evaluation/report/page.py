"""The report as one HTML page that needs no network and no server, and its parts as files.

Why one page: it can be mailed, kept beside the weights, printed and opened in ten years. What it shows
was measured before; nothing is computed anew.

    write_report([RunFolder(Path("runs/demo"))], Path("runs/demo/report")).page
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
from llmtrain.errors import UserError
from llmtrain.evaluation.report.charts import Drawing, brief, draw, duration, inline
from llmtrain.evaluation.report.run_charts import LOSS_CHARTS, charts
from llmtrain.evaluation.report.tables import RunRecord, Saving, gains, read_records, savings
from llmtrain.model.tokenizer import well_formed
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.run_folder import RAW, RunFolder

PAGE = "report.html"
_SAMPLES = 4
"""Of a run that wrote more, so many are shown: the first, the last, and some between."""
_TRAINING_COLUMNS = (
    "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory", "seconds", "skipped",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    plot: Path
    """Validation loss against steps, as a PNG."""
    records: list[RunRecord]
    savings: list[Saving]
    """Of all runs, lowest loss first."""


def write_report(runs: Sequence[RunFolder], folder: Path) -> Report:
    """Write the page and its parts into `folder`; what has their names gives way.

    Raises:
        UserError: there is no validation loss, or a file of a run is damaged.
        WriteFailed: the disk is full or cannot be written to.
    """
    records = read_records(runs)
    for record in records:
        if not any(record.curves.values()):
            raise UserError(
                f"{record.run.path} has no validation loss to show",
                hint=f"train with an eval.every, or run llmtrain eval {shlex.quote(str(record.run.path))}",
            )
    saved = sorted((row for record in records for row in savings(record)), key=lambda row: row.loss)
    drawings = [draw(chart) for chart in charts(records)]
    for drawing in drawings:
        write_atomically(folder / f"{drawing.chart.name}.svg", drawing.svg)
        write_atomically(folder / f"{drawing.chart.name}.png", drawing.png)
    for name, rows in _tables(records, saved).items():
        write_atomically(folder / f"{name}.csv", _csv(rows))
    write_atomically(folder / PAGE, page(records, saved, drawings))
    return Report(folder / PAGE, folder / f"{LOSS_CHARTS['steps']}.png", records, saved)


def page(records: Sequence[RunRecord], saved: Sequence[Saving], drawings: Sequence[Drawing]) -> str:
    """The whole page; text of runs is escaped by the template."""
    templates = Environment(
        loader=PackageLoader("llmtrain.evaluation.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    figures = [_figure(drawing) for drawing in drawings]
    rendered = templates.get_template("report.html").render(
        title=" · ".join(record.name for record in records),
        runs=[
            {"name": record.name, "lead": _lead(record), "interventions": record.interventions}
            for record in records
        ],
        headline=_headline(saved),
        best=[{"run": row.run, "label": row.label, "cells": _saving_cells(row)} for row in saved],
        unlike=_unlike(records),
        loss_figures=[figure for figure in figures if figure["axis"]],
        gain_figures=[figure for figure in figures if figure["name"] == "gain"],
        training_figures=[
            figure for figure in figures if not figure["axis"] and figure["name"] != "gain"
        ],
        numbers=_numbers(records),
        samples=[
            sample for record in records for sample in _samples(record, several=len(records) > 1)
        ],
        averages=[a for record in records for a in _averages(record, several=len(records) > 1)],
        config=_settings(records, [record.config for record in records]),
        differing=_settings(records, [record.config for record in records], differing=True)
        if len(records) > 1
        else None,
        environment=_settings(records, [record.environment for record in records]),
        points={
            d.chart.name: {"frame": d.frame, "x_label": d.chart.x_label, "lines": d.points}
            for d in drawings
        },
        version=__version__,
    )
    return well_formed(rendered)


# --- pieces of the page ------------------------------------------------------------------------


def _figure(drawing: Drawing) -> dict[str, Any]:
    name = drawing.chart.name
    axis = next((axis for axis, chart in LOSS_CHARTS.items() if chart == name), "")
    svg = Markup(inline(drawing))  # matplotlib has escaped its text
    return {"name": name, "axis": axis, "title": drawing.chart.title, "svg": svg}


def _lead(record: RunRecord) -> str:
    """`900 of 900 steps, 3.69M tokens, 0.05 hours`."""
    words = [f"{record.step:,} of {record.config['train.max_steps']:,} steps"]
    if (tokens := record.clock.tokens_at(record.step)) is not None:
        words.append(f"{brief(tokens)} tokens")
    if (hours := record.clock.hours_at(record.step)) is not None:
        words.append(f"{duration(hours)} of training")
    words.append(
        f"learning rate {record.config['optimizer.lr']:g}, {record.config['schedule.name']}"
    )
    return ", ".join(words)


def _headline(saved: Sequence[Saving]) -> list[tuple[str, str]]:
    """The few figures that stand out: of the best weights of all."""
    best = saved[0]
    facts = [(f"{best.loss:.4f}", f"lowest validation loss: {best.label}, step {best.step:,}")]
    if best.label != RAW and best.gain is not None:
        facts.append((f"{best.gain:+.4f}", "gain over the lowest raw loss of its run"))
    if best.reached is None or best.steps_saved is None or best.steps_saved <= 0:
        return facts
    facts.append(
        (f"{best.steps_saved:,}", f"steps saved: as good as raw ever was at step {best.reached:,}")
    )
    if best.tokens_saved is not None:
        facts.append((brief(best.tokens_saved), "tokens saved"))
    if best.hours_saved is not None:
        facts.append((duration(best.hours_saved), "of training saved"))
    return facts


def _saving_cells(row: Saving) -> list[str]:
    raw = row.label == RAW
    return [
        f"{row.loss:.4f}",
        f"{row.step:,}",
        "" if raw or row.gain is None else f"{row.gain:+.4f}",
        "" if raw else "never" if row.reached is None else f"step {row.reached:,}",
        "" if row.steps_saved is None else f"{row.steps_saved:,}",
        "" if row.tokens_saved is None else brief(row.tokens_saved),
        "" if row.hours_saved is None else duration(row.hours_saved),
    ]


def _unlike(records: Sequence[RunRecord]) -> list[str]:
    """The settings by which the validation losses of the runs are no measure of each other."""
    deciding = ("data.path", "data.block_size", "eval.tokens")
    return [key for key in deciding if len({str(record.config[key]) for record in records}) > 1]


def _numbers(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Validation losses by step: a column for each line of the chart."""
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


def _samples(record: RunRecord, *, several: bool) -> list[dict[str, str]]:
    last = len(record.samples) - 1
    chosen = (
        sorted({round(index * last / (_SAMPLES - 1)) for index in range(_SAMPLES)})
        if last >= 0
        else []
    )
    prefix = f"{record.name}, " if several else ""
    return [
        {"caption": f"{prefix}step {record.samples[i][0]:,}", "text": record.samples[i][1]}
        for i in chosen
    ]


def _averages(record: RunRecord, *, several: bool) -> list[dict[str, Any]]:
    """What each average is made of, for its newest step."""
    found = []
    for label, about in record.provenance.items():
        inputs = about.get("inputs")
        rest = {key: value for key, value in about.items() if key != "inputs"}
        words = f"{about.get('method')}, {'kept while training' if about.get('online') else 'made afterwards'}"
        found.append(
            {
                "name": f"{record.name}: {label}" if several else label,
                "about": f"— {words}; that of step {about.get('step')}",
                "inputs": [_input(entry) for entry in inputs] if isinstance(inputs, list) else [],
                "rest": json.dumps(rest, indent=1, ensure_ascii=False),
            }
        )
    return found


def _input(entry: object) -> list[str]:
    """Step, weight, hash and place of one input; what a foreign file says is shown as it is."""
    known: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    weight = known.get("weight")
    shown = f"{weight:.6g}" if isinstance(weight, float) else str(weight)
    return [str(known.get("step")), shown, str(known.get("sha256"))[:16], str(known.get("path"))]


def _settings(
    records: Sequence[RunRecord], documents: Sequence[Mapping[str, Any]], *, differing: bool = False
) -> dict[str, Any]:
    """A row for each key, a column for each run."""
    keys = list(dict.fromkeys(key for document in documents for key in document))
    rows = [(key, [_setting(document.get(key)) for document in documents]) for key in keys]
    if differing:
        rows = [(key, values) for key, values in rows if len(set(values)) > 1]
    return {"names": [record.name for record in records], "rows": rows}


def _setting(value: object) -> str:
    return (
        ""
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


# --- tables ------------------------------------------------------------------------------------


def _tables(records: Sequence[RunRecord], saved: Sequence[Saving]) -> dict[str, list[list[Any]]]:
    """Name → rows of a CSV file, the first with the names of the columns."""
    losses: list[list[Any]] = [["run", "weights", "step", "tokens", "hours", "loss", "gain"]]
    training: list[list[Any]] = [["run", *_TRAINING_COLUMNS]]
    for record in records:
        gained = {label: dict(curve) for label, curve in gains(record).items()}
        for label, curve in record.curves.items():
            for step, loss in curve:
                place = [record.clock.tokens_at(step), record.clock.hours_at(step)]
                losses.append(
                    [record.name, label, step, *place, loss, gained.get(label, {}).get(step)]
                )
        training += [
            [record.name, *(e.get(key) for key in _TRAINING_COLUMNS)] for e in record.training
        ]
    best = [
        [field.name for field in fields(Saving)],
        *(list(asdict(row).values()) for row in saved),
    ]
    return {"losses": losses, "training": training, "best": best}


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return well_formed(text.getvalue())

"""`llmtrain report`: what runs came to, as a table and as one HTML page with its figures and numbers.

llmtrain report runs/demo
"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .common import console, print_json, warn
from .eval_table import loss_table

if TYPE_CHECKING:
    from llmtrain.evaluation.report.page import Report
    from llmtrain.evaluation.report.tables import Saving


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders of runs to show in one page.",
            show_default="the newest under runs/",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the page and its parts.",
            show_default="RUN/report; of several, RUN/report/compared",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Show the losses of raw and averaged weights, and write a page of what the runs came to.

    report.html needs no network. Beside it lie its figures (SVG, PNG) and numbers (CSV). With several runs,
    the page compares them and is written below the first. Takes what `pretrain` logged and `eval` measured;
    computes nothing anew.
    """
    from llmtrain.evaluation.report.page import write_report
    from llmtrain.evaluation.report.rows import newest_rows
    from llmtrain.storage.run_folder import newest_run, require_run

    named = {run.resolve(): run for run in runs or []}  # each once, however often it is named
    folders = [require_run(run) for run in named.values()] or [newest_run()]
    measured = {folder.path: newest_rows(folder) for folder in folders}
    rows = [row for of_run in measured.values() for row in of_run]
    target = out or (folders[0].report if len(folders) == 1 else folders[0].report / "compared")
    written = write_report(folders, target)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]} | _described(written))
        return
    if rows:
        console.print(loss_table(rows))
    for path in (path for path, of_run in measured.items() if not of_run):
        command = f"llmtrain eval {shlex.quote(str(path))}"
        warn(f"{path}: the losses are those of training only ({command} measures every average)")
    for saving in written.savings:
        if line := _saving_line(saving):
            console.print(f"{saving.run}: {line}" if len(folders) > 1 else line, markup=False)
    for record in written.records:
        told = str(record.interventions)
        console.print(f"{record.name}: {told}" if len(folders) > 1 else told, markup=False)
    console.print(f"page: [bold]{escape(str(written.page))}[/]")


def _described(written: "Report") -> dict[str, Any]:
    """What `--json` says beside the rows."""
    acted = [asdict(record.interventions) for record in written.records]
    return {
        "page": str(written.page),
        "plot": str(written.plot),
        "best": [asdict(saving) for saving in written.savings],
        "interventions": {key: sum(each[key] for each in acted) for key in acted[0]},
    }


def _saving_line(saving: "Saving") -> str:
    """What averaging saved, in a sentence; nothing for raw weights."""
    from llmtrain.evaluation.report.charts import brief, duration
    from llmtrain.storage.run_folder import RAW

    if saving.label == RAW or saving.raw_step is None:
        return ""
    if saving.reached is None or saving.steps_saved is None:
        return f"{saving.label} is at no step as good as the best raw weights"
    good = f"{saving.label} at step {saving.reached:,} is as good as raw ever was (step {saving.raw_step:,})"
    if saving.steps_saved <= 0:
        return f"{good}: saves nothing"
    tokens = "" if saving.tokens_saved is None else f", {brief(saving.tokens_saved)} tokens"
    hours = "" if saving.hours_saved is None else f", {duration(saving.hours_saved)}"
    return f"{good}: saves {saving.steps_saved:,} steps{tokens}{hours}"

"""`llmtrain report`: print the losses of runs and write an HTML report."""

import shlex
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import JsonFlag, console, print_json, warn
from .eval import loss_table

if TYPE_CHECKING:
    from llmtrain.evaluation.report.page import Report
    from llmtrain.evaluation.report.records import Saving


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN", help="Runs to show.", show_default="the newest run under runs/"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report.", show_default="RUN/report or RUN/report/compared"
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare raw and averaged weights and write an HTML report.

    report.html needs no network. Its folder also contains the figures (SVG, PNG) and tables (CSV).
    With several runs, the page compares them. The report shows what `pretrain` logged and `eval`
    measured; it does not compute losses.
    """
    from llmtrain.evaluation.curves import newest_results
    from llmtrain.evaluation.report.page import write_report
    from llmtrain.evaluation.report.records import differing_windows
    from llmtrain.storage.run_folder import newest_run, require_run

    named = {run.resolve(): run for run in runs or []}  # a run named twice counts once
    folders = [require_run(run) for run in named.values()] or [newest_run()]
    measured = {folder.path: newest_results(folder) for folder in folders}
    results = [result for each in measured.values() for result in each]
    target = out or (folders[0].report if len(folders) == 1 else folders[0].report / "compared")
    written = write_report(folders, target)
    if as_json:
        print_json({"rows": [asdict(result) for result in results]} | _as_json(written))
        return
    if results:
        console.print(loss_table(results))
    for path in (path for path, found in measured.items() if not found):
        command = f"llmtrain eval {shlex.quote(str(path))}"
        warn(f"{path} has losses from training only: run {command} to measure every average")
    if different := differing_windows(written.records):
        hint = "run llmtrain eval RUN ... --tokens N for all of them"
        warn(
            f"the losses of these runs are not comparable: different {', '.join(different)}; {hint}"
        )
    for record in (record for record in written.records if record.discarded):
        listed = ", ".join(record.discarded)
        warn(f"{record.name}: left out averages of snapshots that a rewind discarded: {listed}")
    lines = [(saving.run, _sentence(saving)) for saving in written.savings]
    lines += [(record.name, str(record.interventions)) for record in written.records]
    for name, line in filter(itemgetter(1), lines):
        console.print(f"{name}: {line}" if len(folders) > 1 else line)
    console.print(f"page: {written.page}", style="bold")


def _as_json(written: "Report") -> dict[str, object]:
    counts = [asdict(record.interventions) for record in written.records]
    return {
        "page": str(written.page),
        "plot": str(written.plot),
        "best": list(map(asdict, written.savings)),
        "interventions": {key: sum(each[key] for each in counts) for key in counts[0]},
    }


def _sentence(saving: "Saving") -> str:
    """Return a sentence on the training that averaging saved; empty for raw weights."""
    from llmtrain.evaluation.report.charts import brief, duration
    from llmtrain.storage.run_folder import RAW

    if saving.label == RAW or saving.raw_step is None:
        return ""
    if saving.reached is None or saving.steps_saved is None:
        return f"{saving.label} never reaches the best raw loss"
    steps = f"step {saving.reached:,} (raw: step {saving.raw_step:,})"
    saved = "nothing"
    if saving.steps_saved > 0:
        tokens = "" if saving.tokens_saved is None else f", {brief(saving.tokens_saved)} tokens"
        hours = "" if saving.hours_saved is None else f", {duration(saving.hours_saved)}"
        saved = f"{saving.steps_saved:,} steps{tokens}{hours}"
    return f"{saving.label} reaches the best raw loss at {steps}: saves {saved}"

"""What `llmtrain average` shows: the averages made, their weights, and the table of a sweep.

Why apart from `average.py`: the options alone fill that file.

    print_averages(run_plans(series, plans, settings))
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

from llmtrain.averaging.average import average as make
from llmtrain.averaging.request import AverageRequest, make_specs
from llmtrain.averaging.spec import Average, AverageSpec, MergeOptions
from llmtrain.checkpoints.series import Series, run_series
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import newest_run, require_run

from .common import ProgressLine, console, err_console, interruptible, print_json, warn

if TYPE_CHECKING:
    from llmtrain.averaging.sweep_report import SummaryRow  # which imports torch


def run_plans(
    series: Series, plans: Sequence[AverageSpec], settings: MergeOptions
) -> list[Average]:
    """Average with a progress line."""
    with interruptible("what is complete is kept") as interrupt, ProgressLine("averaging") as line:

        def on_progress(done: int, total: int) -> None:
            interrupt.check()
            line.update(done, total)

        return make(series, plans, settings, progress=on_progress, warn=warn)


def print_averages(results: Sequence[Average]) -> None:
    """Step, label, inputs and folder of each average."""
    table = Table(
        "step",
        "label",
        "inputs",
        Column("written to", overflow="fold"),
        box=None,
        header_style="bold",
    )
    for result in results:
        steps = [str(source.step) for source in result.spec.inputs]
        inputs = " ".join(
            steps if len(steps) <= 8 else [*steps[:3], "…", *steps[-3:], f"({len(steps)})"]
        )
        table.add_row(
            str(result.spec.step), result.spec.label, inputs, escape(str(result.spec.target))
        )
    console.print(table)
    if kept := sum(result.kept for result in results):
        err_console.print(
            f"{kept} of {len(results)} existed already, of the same checkpoints and weights, and were kept"
        )


def print_weights(plans: Sequence[AverageSpec], as_json: bool) -> None:
    """The coefficients of each planned average, and nothing read or written."""
    if as_json:
        print_json(
            [
                {
                    "label": plan.label,
                    "step": plan.step,
                    "inputs": [source.step for source in plan.inputs],
                    "weights": list(plan.weights),
                }
                for plan in plans
            ]
        )
        return
    for plan in plans:
        table = Table(
            "checkpoint",
            "weight",
            box=None,
            header_style="bold",
            title=f"{plan.label}, step {plan.step}",
        )
        for source, weight in zip(plan.inputs, plan.weights, strict=True):
            table.add_row(source.location, f"{weight:.10g}")
        console.print(table)


def evaluate_sweep(
    source: str | None, text: str, request: AverageRequest, *, write_best: bool, as_json: bool
) -> None:
    """Evaluate candidates; a table, a CSV and a PNG, and if wanted the best one as a folder.

    Raises:
        UserError: the command line says more than --sweep and --at, which would be ignored.
    """
    from llmtrain.averaging.sweep import parse_sweep, sweep
    from llmtrain.averaging.sweep_report import draw, summary, write_csv

    if replace(request, at=None) != AverageRequest():
        raise UserError(
            "--sweep takes the methods' options in its own text, and of the others only --at",
            hint='such as --sweep "method=lawa,linear window=3,5 every=200"',
        )
    run = require_run(Path(source)) if source is not None else newest_run()
    candidates, at = parse_sweep(text), None if request.at is None else request.at_step
    with interruptible("nothing was written") as interrupt, ProgressLine("evaluating") as line:

        def on_progress(done: int, total: int) -> None:
            interrupt.check()
            line.update(done, total)

        result = sweep(run, candidates, at=at, progress=on_progress)
    for reason in result.skipped:
        warn(reason)
    rows = summary(result, run)
    write_csv(result, run.report / "sweep.csv")
    draw(
        result,
        run.report / "sweep.png",
        f"{run.path.name}: averages of {len(result.candidates)} kinds",
    )
    written: Sequence[Average] = []
    if write_best and result.best.request is not None:
        series = run_series(run)
        written = run_plans(series, make_specs(series, result.best.request), MergeOptions())
    if as_json:
        curves = zip(rows, result.candidates, strict=True)
        print_json(
            {
                "raw": {"losses": result.raw.losses},
                "candidates": [
                    asdict(row) | {"losses": candidate.losses} for row, candidate in curves
                ],
                "tokens": result.tokens,
                "written": [one.as_json() for one in written],
            }
        )
        return
    console.print(_sweep_table(rows))
    console.print(
        f"raw at step {max(result.raw.losses):,}: {result.raw.losses[max(result.raw.losses)]:.4f}"
    )
    console.print(f"{run.report / 'sweep.csv'}\n{run.report / 'sweep.png'}", markup=False)
    if written:
        print_averages(written)


def _sweep_table(rows: "Sequence[SummaryRow]") -> Table:
    table = Table(
        "", "average", "step", "loss", "minus raw", "saved: steps", "tokens", "hours", box=None
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            "*" if row.best else "",
            row.label,
            f"{row.step:,}",
            f"{row.loss:.4f}",
            f"{row.delta:+.4f}",
            "none" if row.steps_saved is None else f"{row.steps_saved:,}",
            "" if row.tokens_saved is None else f"{row.tokens_saved:,}",
            "" if row.hours_saved is None else f"{row.hours_saved:.3g}",
        )
    return table

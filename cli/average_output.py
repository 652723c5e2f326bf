"""Results of `llmtrain average`: averages, weights, and the table of a sweep."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.averaging.spec import Average, AverageSpec
from llmtrain.checkpoints.resolve import find_series
from llmtrain.checkpoints.series import Series, run_series
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import newest_run, require_run

from .common import ProgressLine, console, err_console, interruptible, print_json, warn

if TYPE_CHECKING:
    from llmtrain.averaging.sweep import SummaryRow  # imports torch


def average_series(
    source: str | None,
    revision_pattern: str | None,
    request: AverageRequest,
    options: MergeOptions,
    show_weights: bool,
    as_json: bool,
) -> None:
    """Make the averages of a request and print them, or only print their weights."""
    series = find_series(source, revision_pattern=revision_pattern, discard=options.discard_inputs)
    specs = make_specs(series, request)
    if show_weights:
        _print_weights(specs, as_json)
        return
    _warn_about(series, specs, request)
    results = _average(series, specs, options)
    if as_json:
        print_json([result.spec.as_json() for result in results])
    else:
        _print_averages(results)


def _warn_about(series: Series, specs: Sequence[AverageSpec], request: AverageRequest) -> None:
    newest, last = series.steps[-1], specs[-1].step
    at_last = request.at_step == "last" and request.method not in ("custom", "dense")
    if at_last and last < newest:
        warn(
            f"no such window ends at the newest checkpoint, step {newest:,}; "
            f"the average is that of step {last:,}"
        )
    for spec in specs:
        if (error := spec.options.get("profile_error", 0.0)) > 0.1:
            warn(
                f"{spec.label} at step {spec.step:,} is {error:.0%} off the requested profile: "
                "the stored averages are too few, or too far from this width"
            )


def _average(series: Series, specs: Sequence[AverageSpec], options: MergeOptions) -> list[Average]:
    with _progress("averaging", "finished averages are kept") as progress:
        return average(series, specs, options, progress=progress, warn=warn)


@contextmanager
def _progress(description: str, outcome: str) -> Iterator[Callable[[int, int], None]]:
    with interruptible(outcome) as interrupt, ProgressLine(description) as line:

        def update(done: int, total: int) -> None:
            interrupt.check()
            line.update(done, total)

        yield update


def _print_averages(results: Sequence[Average]) -> None:
    folder = Column("written to", overflow="fold")
    table = Table("step", "label", "inputs", folder, box=None, header_style="bold")
    for result in results:
        spec, steps = result.spec, [str(source.step) for source in result.spec.inputs]
        if len(steps) > 8:
            steps = [*steps[:3], "…", *steps[-3:], f"({len(steps)})"]
        table.add_row(str(spec.step), spec.label, " ".join(steps), str(spec.target))
    console.print(table)
    if cached := sum(result.cached for result in results):
        err_console.print(f"kept {cached} of {len(results)}, which existed with the same inputs")


def _print_weights(specs: Sequence[AverageSpec], as_json: bool) -> None:
    if as_json:
        entries = [spec.as_json() for spec in specs]
        print_json([{k: v for k, v in entry.items() if k != "path"} for entry in entries])
        return
    for spec in specs:
        title = f"{spec.label}, step {spec.step}"
        table = Table("checkpoint", "weight", box=None, header_style="bold", title=title)
        for source, weight in zip(spec.inputs, spec.weights, strict=True):
            table.add_row(source.location, f"{weight:.10g}")
        console.print(table)


def evaluate_sweep(
    source: str | None, text: str, request: AverageRequest, *, write_best: bool, as_json: bool
) -> None:
    """Evaluate candidates, write a CSV and a PNG, print a table, and write the best if asked."""
    from llmtrain.averaging.sweep import draw, parse_sweep, summary, sweep, write_csv

    if replace(request, at=None) != AverageRequest():
        raise UserError(
            "--sweep takes the options of the methods in its text; only --at can be added to it",
            hint='use --sweep "method=lawa,linear window=3,5 every=200"',
        )
    run = require_run(Path(source)) if source is not None else newest_run()
    requests, at = parse_sweep(text), None if request.at is None else request.at_step
    with _progress("evaluating", "nothing was written") as progress:
        result = sweep(run, requests, at=at, progress=progress)
    for reason in result.skipped:
        warn(reason)
    rows = summary(result, run)
    run.check_output(run.report)
    table_file, plot_file = run.report / "sweep.csv", run.report / "sweep.png"
    write_csv(result, table_file)
    draw(result, plot_file, f"{run.path.name}: averages of {len(result.candidates)} kinds")
    written: Sequence[Average] = []
    if write_best and result.best.request is not None:
        series = run_series(run)
        written = _average(series, make_specs(series, result.best.request), MergeOptions())
    if as_json:
        curves = zip(rows, result.candidates, strict=True)
        candidates = [asdict(row) | {"losses": each.losses} for row, each in curves]
        document = {"raw": {"losses": result.raw.losses}, "candidates": candidates}
        written_specs = [each.spec.as_json() for each in written]
        print_json(document | {"tokens": result.tokens, "written": written_specs})
        return
    console.print(_sweep_table(rows))
    last = max(result.raw.losses)
    console.print(f"raw at step {last:,}: {result.raw.losses[last]:.4f}")
    console.print(str(table_file))
    console.print(str(plot_file))
    if written:
        _print_averages(written)


def _sweep_table(rows: "Sequence[SummaryRow]") -> Table:
    numbers = ("step", "loss", "minus raw", "saved: steps", "tokens", "hours")
    columns = [Column(name, justify="right") for name in numbers]
    table = Table("", "average", *columns, box=None)
    for row in rows:
        saved = ["none", "", ""]
        if row.steps_saved is not None:
            saved = [f"{row.steps_saved:,}", f"{row.tokens_saved:,}", ""]
        if row.hours_saved is not None:
            saved[2] = f"{row.hours_saved:.3g}"
        marks = ["*" if row.best else "", row.label]
        table.add_row(*marks, f"{row.step:,}", f"{row.loss:.4f}", f"{row.delta:+.4f}", *saved)
    return table

"""`llmtrain average`: turn checkpoints of one run into a better model.

llmtrain average --every 1000
"""

from pathlib import Path
from typing import Annotated

import typer


def average(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run. Default: the newest one under runs/.", show_default=False),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Training steps between two checkpoints of a window.", min=1, show_default=False),
    ] = None,
    window: Annotated[int, typer.Option(help="Checkpoints in a window.", min=1)] = 5,
    at: Annotated[
        str, typer.Option(help="Step at which a window ends: last (the newest complete one), all, or a step.")
    ] = "last",
    disjoint: Annotated[
        bool, typer.Option("--disjoint", help="Windows that share no checkpoint, as in the paper's script.")
    ] = False,
    label: Annotated[
        str | None,
        typer.Option(help="Name of the average. Default: such as lawa-5x1000.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write. Default: averages/LABEL/step-STEP in the run.", show_default=False
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash the run's own snapshots again instead of trusting the record."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Average checkpoints of one run (LAWA: the mean of the last --window, --every steps apart).

    Training is never touched. Checkpoints from warm-up are never used, windows are always complete.
    """
    from llmtrain.averaging.average import average as make
    from llmtrain.averaging.plan import lawa_plans
    from llmtrain.averaging.series import run_series
    from llmtrain.files import RunFolder, newest_run

    from .common import console, notes, print_json, progress_line

    folder = RunFolder(run) if run is not None else newest_run()
    series = run_series(folder)
    plans = lawa_plans(
        series, folder, every=every, window=window, at=at, disjoint=disjoint, label=label, out=out
    )
    with progress_line("averaging") as line:
        results = make(series, plans, verify=verify, progress=line.update)
    if as_json:
        print_json([result.as_json() for result in results])
        return
    from rich.table import Table

    table = Table("step", "label", "inputs", "written to", box=None, header_style="bold")
    for result in results:
        inputs = " ".join(str(step) for step in result.plan.window)
        table.add_row(str(result.plan.step), result.plan.label, inputs, str(result.plan.target))
    console.print(table)
    if kept := sum(result.kept for result in results):
        notes.print(
            f"{kept} of {len(results)} existed already, of the same checkpoints and weights, and were kept"
        )

"""`llmtrain report`: what a run came to, as a table and a plot.

llmtrain report runs/demo
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .common import console, print_json
from .eval import loss_table


def report(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of the run.", show_default="the newest under runs/")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the plot.", show_default="RUN/report")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Show the newest loss of raw weights and of each average, and draw loss against step as a PNG.

    Takes what `pretrain` logged and `eval` measured; computes nothing anew.
    """
    from llmtrain.evaluation.report import draw_losses, interventions, loss_curves, newest_rows
    from llmtrain.files import RunFolder, newest_run, require_run

    folder: RunFolder = newest_run() if run is None else require_run(run)
    rows = newest_rows(folder)
    plot = (out or folder.report) / "loss.png"
    draw_losses(loss_curves(folder), plot, title=folder.path.name)
    if as_json:
        acted = asdict(interventions(folder))
        print_json({"rows": [asdict(row) for row in rows], "plot": str(plot), "interventions": acted})
    else:
        console.print(loss_table(rows))
        console.print(str(interventions(folder)))
        console.print(f"plot: {plot}", markup=False)

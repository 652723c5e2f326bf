"""`llmtrain eval`: the loss of raw and averaged weights, side by side.

llmtrain eval runs/demo
"""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table

from .common import console, interruptible, print_json, progress_line

if TYPE_CHECKING:
    from llmtrain.evaluation.results import Row
    from llmtrain.evaluation.targets import Target


class Split(StrEnum):
    """Which part of the data."""

    VAL = "val"
    TRAIN = "train"


def evaluate(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="TARGET",
            help="Runs or folders of weights.",
            show_default="the newest run under runs/",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of token shards.", show_default="the run's data.path")
    ] = None,
    split: Annotated[Split, typer.Option(help="Which split.")] = Split.VAL,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Only the first so many tokens.", show_default="the run's eval.tokens, else all"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Windows in one forward pass.", show_default="the run's eval.batch"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    every_snapshot: Annotated[
        bool, typer.Option("--all", help="Every snapshot, not only those whose step has an average.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Evaluate weights: loss (nats per token), perplexity, bits per byte, difference from raw.

    A run stands for its averages and the raw snapshots of the same steps. The split is read in
    disjoint windows of the model's block size, each token but the first predicted once. Results are
    kept under the run's evals/ and not computed twice for the same weights and data.
    """
    from llmtrain.evaluation.results import Settings, measure
    from llmtrain.evaluation.targets import targets_of
    from llmtrain.files import newest_run

    paths = targets or [newest_run().path]
    # Two averages of one step bring the same raw weights: measure and show them once.
    found = {
        target.path.resolve(): target
        for path in paths
        for target in targets_of(path, every_snapshot=every_snapshot)
    }
    wanted = list(found.values())
    settings = Settings(data=data, split=split.value, tokens=tokens, batch=batch, device=device)
    kept = "what was measured is kept; the same command goes on from there"
    with interruptible(kept) as interrupt, progress_line("evaluating") as line:

        def on_progress(target: "Target", done: int, total: int) -> None:
            interrupt.check()
            line.update(wanted.index(target), len(wanted), f"{target.path} {done / total:.0%}")

        rows = measure(wanted, settings, on_progress)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        console.print(loss_table(rows))


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
            "inf"
            if row.perplexity is None
            else f"{row.perplexity:{'.3f' if row.perplexity < 1e5 else '.3e'}}",
            "n/a" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
            "n/a" if row.delta is None else f"{row.delta:+.4f}",
            f"{row.tokens:,}",
            f"{row.seconds:.1f}",
        )
    return table

"""`llmtrain runs`: list the runs of a folder, newest first."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Column, Table
from rich.text import Text

from .common import JsonFlag, console, err_console, format_bytes, print_json, warn

if TYPE_CHECKING:
    from llmtrain.evaluation.report.run_list import RunEntry

_COLOURS = {"running": "green", "finished": "default", "interrupted": "yellow", "damaged": "red"}


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that contains the runs.")] = Path("runs"),
    as_json: JsonFlag = False,
) -> None:
    """List runs: state, step, lowest validation loss of raw and averaged weights, age, size.

    A run is *running* while a process trains it, *finished* when its log reaches train.max_steps,
    otherwise *interrupted*. Losses are in nats per token, measured on the number of validation
    tokens shown; only those on the same tokens are comparable. Age is the time since the last log
    line.
    """
    from llmtrain.evaluation.report.run_list import list_runs

    entries = list_runs(folder)
    if as_json:
        print_json([asdict(entry) | {"age": time.time() - entry.modified} for entry in entries])
        return
    for problem in (entry.problem for entry in entries if entry.problem is not None):
        warn(problem)
    if entries:
        console.print(_table(entries))
        if len({entry.windows for entry in entries if entry.windows}) > 1:
            warn(
                "the losses are not comparable: the runs were measured on different tokens, data "
                "or precisions; run llmtrain eval RUN ... --tokens N for all of them"
            )
    else:
        hint = "start one with llmtrain pretrain --config FILE"
        err_console.print(f"{folder}/ contains no runs: {hint}")


def _table(entries: "list[RunEntry]") -> Table:
    names = ("step", "raw", "averaged", "tokens", "age", "size")
    table = Table(
        Column("run", overflow="fold"),
        Column("state", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in names),
        Column("by", overflow="fold"),
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for entry in entries:
        table.add_row(
            entry.name,
            Text(entry.state, _COLOURS[entry.state]),
            "" if entry.step is None else f"{entry.step:,}/{entry.max_steps:,}",
            *("" if best is None else f"{best.loss:.4f}" for best in (entry.raw, entry.average)),
            f"{entry.windows.tokens:,}" if entry.windows and entry.windows.tokens else "",
            _age(time.time() - entry.modified),
            format_bytes(entry.bytes),
            "" if entry.average is None else entry.average.label,
        )
    return table


def _age(seconds: float) -> str:
    """Format a time as `40s`, `12m`, `3h` or `5d`."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"

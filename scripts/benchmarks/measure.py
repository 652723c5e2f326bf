"""Measure sides in turns; report medians, quartiles and ratios within a round.

Why: machines are shared and their speed changes. Two sides that take turns see the same machine, so
a ratio within a round is more reliable than seconds. The table shows the median and the spread of
all rounds, never the best one.

    taken = take_turns({"ours": once, "plain": other}, rounds=5)
    publish(rows("eval", taken, "plain", {}), None)
"""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmtrain.runtime.device import environment, resolve_device

Figures = Mapping[str, float]
"""Figures of one round of one side, with units in the names: {"tokens/s": 1475.0}."""
Side = Callable[[], Figures]
"""A function that does the work of one round."""


@dataclass(frozen=True)
class Row:
    """One figure of one side."""

    what: str
    """The measured model or command."""
    side: str
    figure: str
    median: float | None
    """None: not measured; `note` has the reason."""
    low: float | None = None
    """First quartile of the rounds."""
    high: float | None = None
    """Third quartile."""
    rounds: int = 0
    ratio: float | None = None
    """Median over the rounds of this side's figure divided by that of `against`."""
    target: str = ""
    """Target of the ratio or the figure."""
    note: str = ""
    against: str = ""
    """The side in the denominator of the ratio."""


class Worker:
    """A side in a separate process, so that its memory is measured alone."""

    def __init__(self, build: Callable[..., Side], *arguments: Any) -> None:
        """Start the process.

        Args:
            build: an importable function; it is called in the process and returns the side.
            arguments: arguments of `build`.
        """
        here, there = multiprocessing.Pipe()
        self._connection = here
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(there, build, arguments), daemon=True)
        self._process.start()

    def __call__(self) -> Figures:
        """Run one round in the process.

        Raises:
            RuntimeError: the round failed or the process ended.
        """
        self._connection.send("go")
        while not self._connection.poll(1):
            if not self._process.is_alive():
                raise RuntimeError(f"a side ended with exit code {self._process.exitcode}")
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise RuntimeError(f"{type(answer).__name__}: {answer}") from answer
        figures: Figures = answer
        return figures

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, build: Callable[..., Side], arguments: Sequence[Any]) -> None:
    side: Side | None = None
    while connection.recv() == "go":
        try:
            side = side or build(*arguments)
            connection.send(dict(side()))
        except Exception as error:  # the parent process reports it
            connection.send(error)


def take_turns(
    sides: Mapping[str, Side], rounds: int, *, unmeasured: int = 1
) -> dict[str, list[Figures]]:
    """Run each side once per round, after some unmeasured rounds (building, compiling, caches).

    Workers are closed at the end.
    """
    taken: dict[str, list[Figures]] = {name: [] for name in sides}
    with Console(stderr=True).status("") as status, ExitStack() as workers:
        for side in sides.values():
            if isinstance(side, Worker):
                workers.callback(side.close)
        for number in range(-unmeasured, rounds):
            for name, side in sides.items():
                status.update(
                    f"{name}: "
                    + (f"round {number + 1} of {rounds}" if number >= 0 else "not measured yet")
                )
                figures = side()
                if number >= 0:
                    taken[name].append(figures)
    return taken


def seconds(work: Callable[[], Tensor], times: int) -> float:
    """Return the seconds of this many calls, until the device has finished."""
    started = time.perf_counter()
    for _ in range(times):
        result = work()
    result.view(-1)[0].item()  # waits for the device
    return time.perf_counter() - started


def rows(
    what: str,
    taken: Mapping[str, Sequence[Figures]],
    against: str | None,
    targets: Mapping[tuple[str, str], str],
) -> list[Row]:
    """Return a row for each side and figure.

    Args:
        what: the measured model or command.
        taken: the result of `take_turns`.
        against: the side in the denominator; None: no ratios.
        targets: by (side, figure).
    """
    return [
        _row(what, side, figure, taken, against, targets.get((side, figure), ""))
        for side, rounds in taken.items()
        for figure in rounds[0]
    ]


def _row(
    what: str,
    side: str,
    figure: str,
    taken: Mapping[str, Sequence[Figures]],
    against: str | None,
    target: str,
) -> Row:
    values = [figures[figure] for figures in taken[side]]
    low, middle, high = spread(values)
    ratio = None
    if against is not None and side != against and figure in taken[against][0]:
        others = [figures[figure] for figures in taken[against]]
        if all(others):
            ratio = statistics.median(
                mine / other for mine, other in zip(values, others, strict=True)
            )
    return Row(
        what, side, figure, middle, low, high, len(values), ratio, target, against=against or ""
    )


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def facts() -> dict[str, Any]:
    """Return the machine, the versions and the date."""
    return environment(resolve_device("auto")) | {"date": date.today().isoformat()}


def publish(found: Sequence[Row], path: Path | None) -> None:
    """Print the rows and, with a path, write them as JSON; see `show` and `write`."""
    show(found)
    if path is not None:
        write(found, path)


def show(found: Sequence[Row]) -> None:
    """Print a table per measurement, at most 80 columns wide, then the unmeasured rows."""
    console = Console(width=None if sys.stdout.isatty() else 80, highlight=False)
    about = facts()
    console.print(
        f"{about['processor']}, {about['threads']} threads, {about['device']}, "
        f"torch {about['torch']}"
    )
    measured = [row for row in found if row.median is not None]
    for (what, against), group in groupby(measured, lambda row: (row.what, row.against)):
        console.print(_table(what + (f"; ratio to {against}" if against else ""), list(group)))
    for row in found:
        if row.median is None:
            console.print(
                f"not measured: {', '.join(filter(None, (row.what, row.side)))}: {row.note}"
            )


def _table(title: str, found: Sequence[Row]) -> Table:
    table = Table(
        "side",
        "figure",
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for name in ("median", "quartiles", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("target")
    before = ""
    for row in found:
        quartiles = "" if row.low == row.high else f"{_number(row.low)} to {_number(row.high)}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        side = "" if row.side == before else row.side
        table.add_row(side, row.figure, _number(row.median), quartiles, ratio, row.target)
        before = row.side
    return table


def _number(value: float | None) -> str:
    """Format with three significant digits, or as an integer: 0.0123, 1.23, 1,234."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(found: Iterable[Row], path: Path) -> None:
    """Write the rows and the machine as JSON; an existing file is replaced."""
    path.write_text(
        json.dumps({"on": facts(), "rows": [asdict(row) for row in found]}, indent=2) + "\n"
    )


def not_measured(what: str, side: str, why: str) -> Row:
    """Return the row of a figure that cannot be measured here."""
    return Row(what, side, "", None, note=why)


def require_cuda() -> str | None:
    """Return why GPU rows cannot be measured here, or None if they can."""
    return None if torch.cuda.is_available() else "no CUDA device here"

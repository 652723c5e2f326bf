"""What every command shares: where output goes, and how an error looks.

Why: results go to standard output and everything else to standard error, so that `--json` and
pipes hold nothing but results; and every failure is one red line and a hint.

    console.print(table); notes.print("reading 12 files")
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from typing_extensions import Doc

if TYPE_CHECKING:
    from llmtrain.runtime.signals import Interrupt

_PIPE_WIDTH = 160
"""Columns when the output is no terminal: wide enough that no table cell is cut."""

_PIPE_INTERVAL = 10.0
"""Seconds between two progress lines when the output is no terminal."""


class _Console(Console):
    """One that leaves with the exit code of a closed pipe, as every command does."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output()
        raise SystemExit(128 + signal.SIGPIPE)


def _console(*, stderr: bool) -> Console:
    probe = Console(stderr=stderr)
    width = None if probe.is_terminal else _PIPE_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False, soft_wrap=not probe.is_terminal)


console = _console(stderr=False)
"""Results: tables, the log of a run. Standard output."""

notes = _console(stderr=True)
"""Everything about the results: progress, warnings, errors. Standard error."""


OneSetOfWeights = Annotated[
    str | None,
    typer.Argument(
        help="A run (its newest average, of several the one that eval found best), a folder of GPT-2 weights, "
        "or OWNER/NAME[@REVISION] on the hub.",
        show_default="the newest run under runs/",
    ),
]
"""TARGET of the commands that use weights."""


def help_of(cls: type, field: str) -> str:
    """Return the `Doc` text of a dataclass field, the help of the option that sets it."""
    hint = get_type_hints(cls, include_extras=True)[field]
    return next(each.documentation for each in hint.__metadata__ if isinstance(each, Doc))


def print_json(document: object) -> None:
    """One JSON document on standard output and nothing else."""
    try:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        raise typer.Exit(128 + signal.SIGPIPE) from None


def print_error(error: Exception, hint: str | None) -> None:
    """One red line and, on a line of its own, what to do next."""
    notes.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    if hint:
        notes.print(f"[bold]hint:[/] {escape(hint)}", soft_wrap=True)


def discard_output() -> None:
    """Once whoever read our output is gone: what is left in the buffer must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(message: str) -> None:
    """A yellow line for what the user should know and need not act on at once."""
    notes.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def say_at_the_end(message: str) -> None:
    """A line for whoever still reads standard error; the exit code is the same where nobody does."""
    with suppress(
        OSError, SystemExit
    ):  # rich leaves with a code of its own where the pipe is closed
        notes.print(message, markup=False, soft_wrap=True)


@contextmanager
def interruptible(outcome: str) -> Iterator["Interrupt"]:
    """A signal ends the block where it calls `check`; then say `outcome` and leave with its exit code."""
    from llmtrain.runtime.signals import Interrupt, Interrupted

    try:
        with Interrupt() as interrupt:
            yield interrupt
    except Interrupted as interrupted:
        say_at_the_end(f"{interrupted}: {outcome}")
        raise typer.Exit(interrupted.exit_code) from None


class ProgressLine:
    """A progress bar on a terminal, a plain line every ten seconds elsewhere; on standard error."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = time.monotonic()

    def __enter__(self) -> "ProgressLine":
        if notes.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeRemainingColumn(),
                console=notes,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int | None, detail: str = "") -> None:
        """Show `done` of `total` (None: not known) units of work, and `detail` as it stands."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._description, total=total, detail=detail)
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif time.monotonic() - self._last >= _PIPE_INTERVAL:
            self._last = time.monotonic()
            share = (
                f"{done:,}" if total is None else f"{done:,}/{total:,} ({done / max(total, 1):.0%})"
            )
            notes.print(f"{self._description}: {share} {detail}".rstrip())


@contextmanager
def progress_line(description: str) -> Iterator[ProgressLine]:
    """The progress of one piece of work; see `ProgressLine`."""
    with ProgressLine(description) as line:
        yield line


def parse_duration(text: str) -> float:
    """Seconds of `1h30m`, `90m`, `45s`, `2d` or a plain number of seconds."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not match or not any(match.groups()) or len(text) > 20:
        raise typer.BadParameter(f"{text!r} is no time; write 90m, 1h30m or 3600s")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def format_bytes(count: float) -> str:
    """Return bytes with three digits: `498 MB`, `1.99 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{format_number(count)} {unit}"


def format_number(value: float | None) -> str:
    """Return a number with three digits; n/a for None."""
    if value is None:
        return "n/a"
    if value >= 100:
        return f"{round(value, 3 - len(str(int(value)))):,.0f}"
    return f"{value:.3g}"

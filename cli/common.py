"""Consoles, progress, errors and option types that all commands share.

Why two consoles: `--json` and pipes may contain nothing but results.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from typing_extensions import Doc

from llmtrain.errors import StorageWarning, printable

if TYPE_CHECKING:
    from llmtrain.runtime.signals import Interrupt

_PIPE_WIDTH = 160
"""Columns if the output is not a terminal; wide enough to keep table cells whole."""
_PIPE_INTERVAL = 10.0
"""Seconds between two progress lines if the output is not a terminal."""


class _Console(Console):
    """Console with wide lines in a pipe, which exits with its own code if the pipe closes.

    Rich converts every string that it prints, and every table cell, with `render_str`. Each becomes
    one line without control characters, because names of tensors, runs and files may contain any.
    """

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width, self.soft_wrap = _PIPE_WIDTH, True

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_stdout()
        raise SystemExit(128 + signal.SIGPIPE)


console = _Console(stderr=False)
"""Standard output: results."""
err_console = _Console(stderr=True)
"""Standard error: progress, warnings and errors."""

WeightsArgument = Annotated[
    str | None,
    typer.Argument(
        help="A run (the best measured weights of its newest averaged step), a folder of GPT-2 "
        "weights, or OWNER/NAME[@REVISION] on the hub.",
        show_default="the newest run under runs/",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override a key of the config; repeatable."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def help_of(cls: type, field: str) -> str:
    """Return the `Doc` text of a dataclass field, the help of the option that sets it."""
    hint = get_type_hints(cls, include_extras=True)[field]
    return next(each.documentation for each in hint.__metadata__ if isinstance(each, Doc))


def print_json(document: object) -> None:
    """Print one JSON document on standard output, in printable ASCII."""
    text = json.dumps(document, indent=2, allow_nan=False)
    print_text(text.replace("\x7f", "\\u007f"))


def print_text(text: str, end: str = "\n") -> None:
    """Print text without escaping it on standard output; it may contain several lines."""
    console.print(Text(text), end=end, no_wrap=True, overflow="ignore", crop=False)


def print_error(error: object, hint: str) -> None:
    """Print the error in red and, on the next line, its hint."""
    _print_labelled("[bold red]error:[/]", str(error))
    if hint:
        _print_labelled("[bold]hint:[/]", hint)


def print_traceback(error: Exception) -> None:
    """Print the Python traceback of an error on standard error."""
    for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
        err_console.print(line, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    _print_labelled("[yellow]warning:[/]", message)


def _print_labelled(label: str, message: str) -> None:
    """Print a message after its label; keep the indented lines of a list."""
    first, *items = (clip(line) for line in message.split("\n  "))
    err_console.print(f"{label} {escape(first)}", markup=True, soft_wrap=True)
    for item in items:
        err_console.print(f"  {item}", soft_wrap=True)


def clip(text: str, length: int = 1000) -> str:
    """Return the text, truncated to `length` characters."""
    return text if len(text) <= length else f"{text[:length]}…"


def print_selection(label: str, path: object, reason: str) -> None:
    """Print on standard error which weights a command uses, and why."""
    explained = f" ({reason})" if reason else ""
    err_console.print(f"{label}: {path}{explained}", style="dim", soft_wrap=True)


def show_storage_warnings() -> None:
    """Print warnings about the file system on one line, like those of the commands."""
    show = warnings.showwarning

    def print_or_show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, StorageWarning):
            warn(str(message))
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = print_or_show


def print_outcome(message: str) -> None:
    """Print a last line on standard error; a closed pipe does not change the exit code."""
    with suppress(OSError, SystemExit):
        err_console.print(message, soft_wrap=True)


def discard_stdout() -> None:
    """Redirect standard output to /dev/null, so that flushing at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def interruptible(outcome: str) -> Iterator["Interrupt"]:
    """Stop the block at its next `check` after a signal, print `outcome` and exit."""
    from llmtrain.runtime.signals import Interrupt, Interrupted

    try:
        with Interrupt() as interrupt:
            yield interrupt
    except Interrupted as interrupted:
        print_outcome(f"{interrupted}: {outcome}")
        raise typer.Exit(interrupted.exit_code) from None


class ProgressLine:
    """Progress on standard error: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._last = time.monotonic()
        self._bar = Progress(
            *Progress.get_default_columns(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=err_console,
            transient=True,
            disable=not err_console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=None, detail="", visible=False)

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int | None, detail: str = "") -> None:
        """Show that `done` of `total` units are complete; None means an unknown total."""
        detail = printable(detail)
        self._bar.update(self._task, completed=done, total=total, detail=detail, visible=True)
        if self._bar.disable and time.monotonic() - self._last >= _PIPE_INTERVAL:
            self._last = time.monotonic()
            share = "" if total is None else f"/{total:,} ({done / max(total, 1):.0%})"
            err_console.print(f"{self._description}: {done:,}{share} {detail}".rstrip())


def parse_duration(text: str) -> float:
    """Return the seconds of `1h30m`, `90m`, `45s`, `2d` or a plain number of seconds."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not match or not any(match.groups()) or len(text) > 20:
        raise typer.BadParameter(f"{text!r:.100} is not a time; use 90m, 1h30m or 3600s")
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

"""The `llmtrain` command and its exit codes.

Why one place: exit codes are a contract. 0 success; 1 the run failed; 2 invalid command line,
config or input; 128 + N stopped by signal N.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from llmtrain import __version__
from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime import launcher

from .average import average
from .common import clip, print_error, print_traceback, show_storage_warnings
from .config import config
from .doctor import doctor
from .eval import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .plan import plan
from .prepare import prepare
from .pretrain import pretrain
from .recipes import recipes
from .report import report
from .runs import runs
from .verify import verify

app = typer.Typer(
    name="llmtrain",
    help="Pre-train GPT-2 models at high learning rates, then average the checkpoints of the run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 the run failed, 2 invalid command line, config or input, "
    "128 + N stopped by signal N with everything saved (130 Ctrl-C, 143 SIGTERM).",
)
command: Callable[..., None]
for command in (prepare, plan, pretrain, average, inspect):
    app.command()(command)
app.command(name="eval")(evaluate)
for command in (report, runs, generate, export, recipes, config, doctor, verify):
    app.command()(command)

_debug = False


def main() -> None:
    """Run one command and exit with its code."""
    _open_missing_descriptors()
    launcher.let_threads_sleep()
    launcher.silence_other_ranks()
    show_storage_warnings()
    try:
        sys.exit(app(standalone_mode=False))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.exit(launcher.worker_exit_code(code))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if launcher.reports_error():
            if _debug:
                print_traceback(error)
            _print_exception(error)
        sys.exit(2 if isinstance(error, UserError) or _is_usage_error(error) else 1)


def _is_usage_error(error: Exception) -> bool:
    """Return whether typer rejected the command line; its exception classes are private."""
    return hasattr(error, "format_message")


def _open_missing_descriptors() -> None:
    """Open /dev/null for each closed standard descriptor and its stream.

    Otherwise the next opened file gets the number of the closed descriptor, and messages are
    written into that file.
    """
    for number, (stream, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, stream) is None:  # Python found the descriptor closed
            setattr(sys, stream, os.fdopen(number, mode, closefd=False))


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"llmtrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the Python traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Set options that precede the command."""
    global _debug  # noqa: PLW0603  (one process, one command line)
    _debug = debug


def _print_exception(error: Exception) -> None:
    """Print an error with a hint; explain errors of the system and unexpected ones."""
    if type(error) is RuntimeError and isinstance(error.__context__, OSError):
        error = error.__context__  # pathlib's RuntimeError for a symlink loop, before Python 3.13
    if isinstance(error, UserError | RunFailed):
        print_error(error, error.hint)
    elif _is_usage_error(error):
        _print_usage_error(error)
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        print_error(f"{place}{error.strerror or error}", "check the path and the disk")
    else:
        message = f"{type(error).__name__}: {error}"
        print_error(message, "this is a bug; run `llmtrain --debug …` for the traceback")


def _print_usage_error(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":  # typer has printed the help
        return
    command = error.ctx.command_path if error.ctx else "llmtrain"
    print_error(clip(error.format_message(), 300), f"see {command} --help")


if __name__ == "__main__":
    main()

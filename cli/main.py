"""The `llmtrain` command: its sub-commands, and what becomes of an error.

Why it is apart: exit codes are a contract (0 done, 1 the run failed, 2 the command line, the
config or the input is wrong, 128 + signal when a signal ended it) and are decided in one place.

    llmtrain --help
"""

import errno
import sys
from typing import Annotated

import typer

from llmtrain import __version__
from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime import launcher

from .average import average
from .common import print_error
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
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong command line, config or input, "
    "128 + N ended by signal N with everything saved (130 Ctrl-C, 143 SIGTERM).",
)
app.command()(prepare)
app.command()(plan)
app.command()(pretrain)
app.command()(average)
app.command()(inspect)
app.command(name="eval")(evaluate)
app.command()(report)
app.command()(runs)
app.command()(generate)
app.command()(export)
app.command()(recipes)
app.command()(config)
app.command()(doctor)
app.command()(verify)

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
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
    """Options that stand before the command."""
    global _debug  # noqa: PLW0603  (one process, one command line)
    _debug = debug


def main() -> None:
    """Run one command and leave with its exit code."""
    launcher.silence_other_ranks()
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.exit(launcher.worker_exit_code(code))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if launcher.reports_error():
            if _debug:
                raise
            _tell(error)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _tell(error: Exception) -> None:
    """What happened in one red line, and what to do next."""
    before = error.__context__
    if isinstance(before, OSError) and before.errno == errno.ELOOP and type(error) is RuntimeError:
        error = before  # so speaks pathlib of links in a circle, before Python 3.13
    if isinstance(error, UserError | RunFailed):
        print_error(error, error.hint)
    elif isinstance(
        error, OSError
    ):  # of a path that was given, or of the machine: told in plain words
        place = f"{error.filename}: " if error.filename else ""
        print_error(
            RunFailed(f"{place}{error.strerror or error}", hint=""),
            "is the path right, and the disk sound?",
        )
    else:
        described = RunFailed(f"{type(error).__name__}: {error}", hint="")
        print_error(described, "this should not happen: `llmtrain --debug …` shows where it did")


if __name__ == "__main__":
    main()

"""Start-up time of `llmtrain --help` and `import llmtrain`, as whole processes.

startup(rounds=11)
"""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .measure import Figures, Row, publish, rows, take_turns

COMMANDS = {
    "llmtrain --help": [str(Path(sys.executable).with_name("llmtrain")), "--help"],
    "import llmtrain": [sys.executable, "-c", "import llmtrain"],
    "python alone": [sys.executable, "-c", ""],
}
TARGETS = {("llmtrain --help", "s"): "≤ 0.3", ("import llmtrain", "s"): "≤ 0.1"}


def startup(
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 11,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure `llmtrain --help` and `import llmtrain`."""
    publish(measure(rounds=rounds), json)


def measure(*, rounds: int) -> list[Row]:
    """Return the rows."""
    sides = {name: partial(_seconds, command) for name, command in COMMANDS.items()}
    return rows("startup", take_turns(sides, rounds), "python alone", TARGETS)


def _seconds(command: list[str]) -> Figures:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"s": time.perf_counter() - started}

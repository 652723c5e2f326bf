"""Runs the commands of a plan, several at a time; what is done is not done again.

Why: an experiment of hours is stopped and started many times. A finished run answers at once, an unfinished
one goes on, a run that failed is a result, noted in NAME.failed beside it, and a branch waits for its parent.

    train(trainings, config, root, workers=2)
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from reproduction.plan import Training

LLMTRAIN = Path(sys.executable).parent / "llmtrain"
_FAILED_RUN = 1
"""How `llmtrain pretrain` ends where loss or gradients were not finite."""


class Stopped(Exception):
    """A signal came; the commands that ran have saved their state."""


def command(arguments: Sequence[str]) -> str:
    """Run one llmtrain command, its messages to the terminal; what it prints.

    Raises:
        SystemExit: it failed, with its exit code.
    """
    print(f"$ llmtrain {' '.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([LLMTRAIN, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout


def failure(root: Path, name: str) -> str | None:
    """What a run failed with, if it did."""
    note = root / f"{name}.failed"
    return note.read_text() if note.exists() else None


def train(trainings: Sequence[Training], config: Path, root: Path, workers: int) -> None:
    """Run each training once, in this order, `workers` at a time, each with its share of the cores.

    Output goes to NAME.log beside the run.

    Raises:
        Stopped: by Ctrl-C or SIGTERM, once every command has saved its state.
        SystemExit: a command was refused, or ended as no run should.
    """
    root.mkdir(parents=True, exist_ok=True)
    waiting = list(dict.fromkeys(trainings))
    running: dict[Training, subprocess.Popen[bytes]] = {}
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        while waiting or running:
            for training in [each for each, process in running.items() if process.poll() is not None]:
                _note(training, running.pop(training).returncode, root)
            waiting = [each for each in waiting if not _failed_already(each, root)]
            for training in _ready(waiting, running)[: workers - len(running)]:
                waiting.remove(training)
                running[training] = _start(training, config, root, workers)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _ready(waiting: Sequence[Training], running: dict[Training, "subprocess.Popen[bytes]"]) -> list[Training]:
    """Those whose parent neither waits nor runs."""
    busy = {each.name for each in (*waiting, *running)}
    return [each for each in waiting if each.parent not in busy]


def _failed_already(training: Training, root: Path) -> bool:
    """Whether it failed, earlier or just now because its parent did."""
    if training.parent is not None and failure(root, training.parent) is not None:
        (root / f"{training.name}.failed").write_text(f"{training.parent}, of which it is a branch, failed\n")
    return failure(root, training.name) is not None


def _start(training: Training, config: Path, root: Path, workers: int) -> "subprocess.Popen[bytes]":
    arguments = training.arguments(config, root)
    print(f"$ llmtrain {' '.join(arguments)}", flush=True)
    threads = max((os.cpu_count() or 1) // workers, 1)
    with (root / f"{training.name}.log").open("ab") as log:
        return subprocess.Popen(
            [LLMTRAIN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is passed on once, by `train`
        )


def _note(training: Training, code: int, root: Path) -> None:
    log = root / f"{training.name}.log"
    tail = log.read_text(errors="replace").strip().splitlines()[-2:]
    if code == _FAILED_RUN:
        (root / f"{training.name}.failed").write_text("\n".join(tail) + "\n")
        print(f"{training.name} failed: {' '.join(tail)}", flush=True)
    elif code != 0:
        print("\n".join(tail), file=sys.stderr)
        raise SystemExit(f"{training.name} ended with {code}: see {log}; the same command goes on")

"""Runs llmtrain commands, several at a time; what is done is not done again.

Why: an experiment of hours is stopped and started many times. A finished run answers at once, an unfinished
one goes on, a measurement that is there is kept, a run whose loss was not finite is a result, noted in NAME.failed,
and a branch waits for its parent. A full disk, say, or a hub that lets nobody in, is no result: the command is
run again.

    run([Job("constant", ("pretrain", "--config", "configs/demo.yaml"))], Path("runs"), workers=2)
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LLMTRAIN = Path(sys.executable).parent / "llmtrain"
_FAILED_RUN, _REFUSED = 1, 2
"""How llmtrain ends where a run failed, and where the input is not what it should be."""
_DIVERGED = "skipped"
"""What it says where loss or gradients were not finite: of what a run fails with, this alone is its own doing."""
_OF_THE_HUB = re.compile("the hub (refuses|wants to know|has no)|40[134] Client Error")
"""What it says where the name is wrong, or another token is wanted: nothing that was measured, and soon mended."""


@dataclass(frozen=True)
class Job:
    """One llmtrain command."""

    name: str
    arguments: tuple[str, ...]
    """The words after `llmtrain`."""
    parent: str | None = None
    """The job that must have ended before."""
    output: Path | None = None
    """Where what it prints goes; a job whose output is there is done."""
    refusable: bool = False
    """That llmtrain refuses it is a result as well, noted as a failed run is."""

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join(["llmtrain", *self.arguments])


_Running = dict[Job, "subprocess.Popen[bytes]"]


class Stopped(Exception):
    """A signal came; the commands that ran have saved what they had."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Around the work of a script: a signal ends it with one line and, as a command, with 128 + signal.

    Raises:
        SystemExit: it came.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stopped:
        print("stopped, with everything saved; the same command goes on", file=sys.stderr)
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        raise SystemExit(128 + number) from None


def failure(root: Path, name: str) -> str | None:
    """What a job failed with, if it did."""
    note = root / f"{name}.failed"
    return note.read_text().strip() if note.exists() else None


def run(jobs: Sequence[Job], root: Path, workers: int) -> None:
    """Run each job once, in this order, `workers` at a time, each with its share of the cores.

    What it says goes to NAME.log in `root`.

    Raises:
        Stopped: by SIGTERM or SIGHUP, once every command has ended.
        SystemExit: a command was refused, or ended as none should.
    """
    root.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in dict.fromkeys(jobs) if job.output is None or not job.output.exists()]
    running: _Running = {}
    before = {number: signal.signal(number, _stop) for number in _stopping()}
    try:
        while waiting or running:
            for job in [each for each, process in running.items() if process.poll() is not None]:
                _ended(job, running.pop(job).returncode, root)
            waiting = [job for job in waiting if not _failed_already(job, root)]
            for job in _ready(waiting, running)[: workers - len(running)]:
                waiting.remove(job)
                running[job] = _start(job, root, workers)
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopping() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP of a terminal that closes, unless nohup has it ignored."""
    heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGHUP] if heard else [signal.SIGTERM]


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _ready(waiting: Sequence[Job], running: _Running) -> list[Job]:
    """Those whose parent neither waits nor runs."""
    busy = {job.name for job in (*waiting, *running)}
    return [job for job in waiting if job.parent not in busy]


def _failed_already(job: Job, root: Path) -> bool:
    """Whether it failed, earlier or just now because its parent did."""
    if job.parent is not None and failure(root, job.parent) is not None:
        (root / f"{job.name}.failed").write_text(f"{job.parent}, which it needs, failed\n")
    return failure(root, job.name) is not None


def _start(job: Job, root: Path, workers: int) -> "subprocess.Popen[bytes]":
    print(f"$ {job.command}", flush=True)
    threads = max((os.cpu_count() or 1) // workers, 1)
    log, printed = root / f"{job.name}.log", _unfinished(job) or root / f"{job.name}.log"
    printed.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as errors, printed.open("wb" if job.output else "ab") as output:
        return subprocess.Popen(
            [LLMTRAIN, *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is passed on once, by `run`
        )


def _unfinished(job: Job) -> Path | None:
    return job.output and job.output.with_name(f".{job.output.name}")


def _ended(job: Job, code: int, root: Path) -> None:
    log, printed = root / f"{job.name}.log", _unfinished(job)
    if code == 0 and job.output and printed:
        printed.replace(job.output)
    if code == 0:
        return
    tail = log.read_text(errors="replace").strip().splitlines()[-2:]
    diverged = code == _FAILED_RUN and _DIVERGED in "".join(tail)
    refused = job.refusable and code == _REFUSED and not _OF_THE_HUB.search("".join(tail))
    if diverged or refused:
        (root / f"{job.name}.failed").write_text("\n".join(tail) + "\n")
        print(f"{job.name} failed: {' '.join(tail)}", flush=True)
        return
    print("\n".join(tail), file=sys.stderr)
    raise SystemExit(f"{job.name} ended with {code}: see {log}; the same command goes on")


def answer(arguments: Sequence[str]) -> str:
    """What an llmtrain command prints.

    Raises:
        SystemExit: it failed, with its exit code; it has said why.
    """
    done = subprocess.run([LLMTRAIN, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout

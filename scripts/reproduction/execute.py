"""Run llmtrain commands, several at a time, and skip those that have finished.

An experiment of hours is stopped and started many times. A finished run returns at once, an
unfinished one resumes, and existing measurements are kept. A run with a non-finite loss is a
result, recorded in NAME.failed. A branch starts after its parent. Other failures, such as a full
disk or a refused hub request, are not results: the next start repeats the command.

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
"""llmtrain's exit codes for a failed run and for invalid input."""
_DIVERGED = "update skipped"
"""Marks a non-finite loss or gradient: the only failure that is a result of the run itself."""
_OF_THE_HUB = re.compile(
    "needs a token for the hub|the hub has no|no permission for|40[134] Client Error"
)
"""Marks a wrong repository name or a missing token: a failure that the user can fix."""


@dataclass(frozen=True)
class Job:
    """One llmtrain command."""

    name: str
    arguments: tuple[str, ...]
    """Arguments of `llmtrain`."""
    parent: str | None = None
    """The job that must end first."""
    output: Path | None = None
    """File for the output; a job with an existing output has finished."""
    refusable: bool = False
    """Record a refusal by llmtrain (exit code 2) as a failed run instead of stopping."""

    @property
    def command(self) -> str:
        """Return the command as typed in a shell."""
        return shlex.join(["llmtrain", *self.arguments])


_Running = dict[Job, "subprocess.Popen[bytes]"]


class Stopped(Exception):
    """A signal arrived; the running commands have saved their work."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """End a script that receives a signal with one line and exit code 128 + signal.

    Raises:
        SystemExit: a signal arrived.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stopped:
        print("stopped with everything saved; repeat the command to resume", file=sys.stderr)
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        raise SystemExit(128 + number) from None


def failure(root: Path, name: str) -> str | None:
    """Return a job's recorded failure, or None."""
    note = root / f"{name}.failed"
    return note.read_text().strip() if note.exists() else None


def run(jobs: Sequence[Job], root: Path, workers: int) -> None:
    """Run each job once, in order, `workers` at a time, each with its share of the cores.

    The output of each job goes to NAME.log in `root`.

    Raises:
        Stopped: by SIGTERM or SIGHUP, once every command has ended.
        SystemExit: a command was refused or ended unexpectedly.
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
    """Return SIGTERM, and SIGHUP unless nohup ignores it."""
    heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGHUP] if heard else [signal.SIGTERM]


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _ready(waiting: Sequence[Job], running: _Running) -> list[Job]:
    """Return the jobs whose parent is neither waiting nor running."""
    busy = {job.name for job in (*waiting, *running)}
    return [job for job in waiting if job.parent not in busy]


def _failed_already(job: Job, root: Path) -> bool:
    """Return whether a job failed, earlier or now because its parent failed."""
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
    raise SystemExit(f"{job.name} ended with {code}: see {log}; repeat the command to resume")


def answer(arguments: Sequence[str]) -> str:
    """Return the output of an llmtrain command.

    Raises:
        SystemExit: the command failed, with its exit code; it has printed the reason.
    """
    done = subprocess.run([LLMTRAIN, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout

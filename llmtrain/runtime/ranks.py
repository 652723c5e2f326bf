"""Which of the processes of a run this is, as the launcher's environment says, and who of them speaks.

Why apart from training: the command line must know before torch is imported. N processes print one
log, that of rank 0, and an error is told once, by the process that met it first; the others wait until
it is told, because the launcher ends all as soon as one has left.

    quiet_unless_first(); ...; with telling() as mine: print(error) if mine else None
"""

import functools
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(seconds=20)
"""How long a process waits for another one that should speak, or leave, before it."""

LAUNCHER = "LLMTRAIN_LAUNCHER"
"""Where it is our own launcher: names its process id, in the environment of what it starts."""

_FIRST_TO_FAIL, _TOLD, _LEFT = "first-to-fail", "told", "left"


def is_member() -> bool:
    """Whether a launcher (torchrun, or another that sets its variables) started this process."""
    return all(name in os.environ for name in _ENVIRONMENT)


def rank() -> int:
    """Number of this process among all of the run; 0 for a process alone."""
    return int(os.environ["RANK"]) if is_member() else 0


def is_restarted() -> bool:
    """Whether the launcher starts the processes again when one leaves with an exit code."""
    return is_member() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def leave_with_launcher() -> None:
    """From here on, let the end of our own launcher be a SIGTERM to this process: a SIGKILL it cannot pass on.

    Looked for every second. Linux would tell (PR_SET_PDEATHSIG), yet once for each thread that the launcher
    had, and a second SIGTERM leaves at once, with nothing saved.
    """
    if LAUNCHER in os.environ:
        Thread(target=_end_with_launcher, name="launcher", daemon=True).start()


def _end_with_launcher() -> None:
    while not _launcher_is_gone():
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _launcher_is_gone() -> bool:
    """Whether our own launcher started this process and is no more; the store was its as well."""
    parent = str(os.getppid())
    return os.environ.get(LAUNCHER, parent) != parent


def quiet_unless_first() -> None:
    """Let only rank 0 write to standard output and error; `telling` lifts it for an error."""
    if rank() > 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)


@functools.cache
def store() -> "Store":
    """What the processes share before, and beside, a process group: names and values."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    shared: Store = next(iter(rendezvous("env://")))[0]
    # The launcher's store outlives its workers: what those before a restart said is not for us.
    return (
        PrefixStore(f"llmtrain/{_name_of_this_start(shared)}", shared) if is_restarted() else shared
    )


def _name_of_this_start(shared: "Store") -> str:
    """What rank 0 answers to each process that says it is here: launchers count restarts, each its own."""
    mine, others = (
        uuid.uuid4().hex,
        [f"here/{each}" for each in range(1, int(os.environ["WORLD_SIZE"]))],
    )
    if rank() == 0:
        for each in others:
            shared.delete_key(each)  # of one that is gone; who lives says it again
        for each in others:
            shared.set(f"answer/{shared.get(each).decode()}", mine)
        return mine
    while not shared.check([f"answer/{mine}"]):
        shared.set(f"here/{rank()}", mine)
        time.sleep(0.05)
    return shared.get(f"answer/{mine}").decode()


def first_to_fail() -> bool:
    """Whether no other process has failed before this one. It is remembered: say it before leaving."""
    if not is_member():
        return True
    try:
        mine = str(rank())
        return bool(store().compare_set(_FIRST_TO_FAIL, "", mine).decode() == mine)
    except RuntimeError:  # whoever held the store is gone, and cannot have told anything more
        return rank() == 0


@contextmanager
def telling() -> Iterator[bool]:
    """True for the one process that is to tell its error, whose standard error is open then."""
    if not is_member():
        yield True
        return
    mine = first_to_fail()
    with suppress(RuntimeError):
        if not mine:
            store().wait([_TOLD], _PATIENCE)
    if mine and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
    yield mine
    with suppress(RuntimeError):
        if mine:
            sys.stderr.flush()
            store().set(_TOLD, "1")


def leave(code: int) -> int:
    """Before the end of a process that did not fail: the others leave after rank 0.

    Returns:
        The exit code to leave with: 0 for an interruption where the launcher would start all again.
    """
    if not is_member() or _launcher_is_gone():
        return code
    with suppress(RuntimeError):
        if rank() == 0:
            sys.stdout.flush()
            sys.stderr.flush()
            store().set(_LEFT, "1")
        else:
            store().wait([_LEFT], _PATIENCE)
    return 0 if is_restarted() and code > 2 else code

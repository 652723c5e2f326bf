"""The processes that train one model together: who they are, what they agree on, what they add up.

Why: with N processes a run must be the run of one. Every decision (to stop, to go back, what to resume
from) is made once and heard by all; every number that is shown is of all. A process alone is a world
of one, and nothing here costs it anything.

    with join(device, spread=False) as (world, device): loss = world.mean(loss)
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    HashStore,  # public as torch.distributed.HashStore, untyped there
)

from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime import ranks
from llmtrain.runtime.signals import Interrupted

T = TypeVar("T")

_SECONDS_TO_BE_ENDED = 10.0
"""A launcher that sees which process is gone, and says of what, ends the others in less time."""


@dataclass(frozen=True)
class World:
    """This process among those that train one model."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine."""
    local_size: int = 1
    """Processes on this machine."""
    saving: "dist.ProcessGroup | None" = None
    """The same processes a second time, for states that are saved while training goes on."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that prints and commits."""
        return self.rank == 0

    def local_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """This process's part of the rows of a batch, which divides."""
        each = len(rows) // self.size
        return rows[self.rank * each : (self.rank + 1) * each]

    def mean(self, value: Tensor) -> Tensor:
        """Mean over all processes of a number on the device, shape (); it is overwritten."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sum over all processes of each number, in float64."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 alone; what it returns or raises on purpose, every process does."""
        if self.size == 1:
            return function()
        outcome: list[T | Exception | None] = [None, None]
        if self.is_rank_zero:
            try:
                outcome[0] = function()
            except (UserError, RunFailed, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]  # what `function` returned

    def local_rank_zero_first(self, function: Callable[[], T]) -> T:
        """Call `function` on one process of each machine, and once it is done there on the others.

        What it raises on purpose anywhere, every process does.
        """
        if self.size == 1:
            return function()
        failures: list[Exception | None] = [None] * self.size
        failure = None
        if self.local_rank == 0:
            try:
                function()
            except (UserError, RunFailed, OSError) as error:
                failure = error
        dist.all_gather_object(failures, failure)
        if first := next(filter(None, failures), None):
            raise first
        return function()

    @contextmanager
    def enter_on_rank_zero(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter `context` on rank 0 alone; where it cannot be entered, no process goes on."""
        with ExitStack() as stack:
            self.on_rank_zero(lambda: stack.enter_context(context))
            yield

    def exit_code_agreement(self) -> Callable[[int], int]:
        """A function of an exit code that says, on all processes alike, with which one to leave now (0: stay)."""
        return _Agreement() if self.size > 1 else lambda code: code


class _Agreement:
    """The exit code of a signal to one process, heard by all of them at the same call.

    Each call starts a reduction on the CPU and gives the result of the one before, which is there by then:
    nobody waits for a device, or longer for another process than the step makes it wait anyway.
    """

    def __init__(self) -> None:
        self._code = torch.zeros((), dtype=torch.int64)
        self._reducing: dist.Work | None = None

    def __call__(self, code: int) -> int:
        if self._reducing is not None:
            self._reducing.wait()
        agreed = int(self._code)
        self._code = torch.tensor(code)
        self._reducing = dist.all_reduce(self._code, op=dist.ReduceOp.MAX, async_op=True)
        return agreed


@contextmanager
def init_distributed(device: torch.device, *, spread: bool) -> Iterator[tuple[World, torch.device]]:
    """Come together with the other processes that the launcher started; alone where it started none.

    Args:
        device: the kind of device to train on; each process gets its own.
        spread: weights will be spread over the processes, even over one alone.

    Raises:
        UserError: the processes have not a device each.
        RunFailed: another process has gone without a word.
    """
    if not ranks.is_member():
        if spread:
            dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
        try:
            yield World(), device
        finally:
            if spread:
                dist.destroy_process_group()
        return
    ranks.leave_with_launcher()
    rank, size, local_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    try:
        device = _own_device(device, local_rank, local_size, size)
        own = device if device.type == "cuda" else None
        dist.init_process_group(
            _backend(device), store=ranks.store(), rank=rank, world_size=size, device_id=own
        )
        saving = dist.new_group(backend="gloo") if size > 1 else None
        yield World(rank, size, local_rank, local_size, saving), device
        dist.barrier(group=saving)
    except Interrupted:  # as agreed by all
        dist.destroy_process_group()
        raise
    except BaseException as error:
        # Before the connections close, and the others fail because of it.
        if _is_lost_peer(error):
            if dist.is_torchelastic_launched():
                time.sleep(_SECONDS_TO_BE_ENDED)
            raise RunFailed(
                f"the connection to the other processes of this run is lost ({str(error).splitlines()[0]})",
                hint="was one killed, or out of memory? The same command goes on from the newest state",
            ) from error
        ranks.first_to_fail()
        raise
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _own_device(device: torch.device, local_rank: int, local_size: int, size: int) -> torch.device:
    if size > 1 and (device.index is not None or device.type == "mps"):
        raise UserError(
            f"train.device {device} cannot be shared by {size} processes",
            hint="--set train.device=cuda gives each its own GPU; --set train.device=cpu needs none",
        )
    if device.type != "cuda":
        return device
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes were started here, and there are {torch.cuda.device_count()} GPUs",
            hint=f"--nproc {torch.cuda.device_count()}",
        )
    own = torch.device("cuda", local_rank if device.index is None else device.index)
    torch.cuda.set_device(own)
    return own


def _is_lost_peer(error: BaseException) -> bool:
    """Whether an error is that of a connection whose other end is gone."""
    if not isinstance(error, RuntimeError) or isinstance(error, RunFailed):
        return False
    return isinstance(error, dist.DistError) or bool(
        re.search(r"gloo|NCCL|[Cc]onnection", str(error))
    )

"""The process group of a run: ranks, collective helpers, and errors raised by all ranks."""

import functools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store  # typed only there
from torch.distributed.rendezvous import rendezvous

from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime import launcher
from llmtrain.runtime.signals import Interrupted

T = TypeVar("T")

_SECONDS_UNTIL_STOPPED = 10.0
"""Time within which the launcher stops the other ranks after a failure and reports the cause."""


@dataclass(frozen=True)
class World:
    """This process among all ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    saving: dist.ProcessGroup | None = None
    """A second group of all ranks, for checkpoints that are saved during training."""

    @property
    def is_rank_zero(self) -> bool:
        """True for the process that prints and commits."""
        return self.rank == 0

    def local_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return this rank's rows of a batch, which must divide evenly."""
        return np.split(rows, self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """Replace a scalar tensor with its mean over all ranks."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; return or raise its outcome on all ranks."""
        if self.size == 1:
            return function()
        outcome = [*_attempt(function)] if self.is_rank_zero else [None, None]
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        value, failure = outcome
        if isinstance(failure, Exception):
            raise failure
        return value  # type: ignore[return-value]  # the value of `function`

    def local_rank_zero_first(self, function: Callable[[], T]) -> T:
        """Call `function` on one rank of each machine, then on the others; all raise its error."""
        if self.size == 1:
            return function()
        failure = _attempt(function)[1] if self.local_rank == 0 else None
        failures = [failure] * self.size
        dist.all_gather_object(failures, failure)
        if first := next(filter(None, failures), None):
            raise first
        return function()

    @contextmanager
    def enter_on_rank_zero(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter `context` on rank 0; raise its error on all ranks."""
        with ExitStack() as stack:
            self.on_rank_zero(lambda: stack.enter_context(context))
            yield

    def exit_code_agreement(self) -> Callable[[int], int]:
        """Return a function from this rank's exit code to that of all ranks (0: continue)."""
        return _MaxExitCode() if self.size > 1 else lambda code: code


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except (UserError, RunFailed, OSError) as error:
        return None, error


class _MaxExitCode:
    """The maximum of an exit code over all ranks, one call late, so that training never blocks."""

    def __init__(self) -> None:
        self._code = torch.zeros((), dtype=torch.int64)
        self._reduction: dist.Work | None = None

    def __call__(self, code: int) -> int:
        if self._reduction is not None:
            self._reduction.wait()
        agreed = int(self._code)
        self._code = torch.tensor(code)
        self._reduction = dist.all_reduce(self._code, op=dist.ReduceOp.MAX, async_op=True)
        return agreed


@contextmanager
def init_distributed(device: torch.device, *, spread: bool) -> Iterator[tuple[World, torch.device]]:
    """Join the process group of the launcher's workers, and yield this rank's device.

    Without a launcher, the process is alone. Sharded weights (`spread`) need a group even then.
    """
    if not launcher.is_worker():
        if spread:
            dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1)
        try:
            yield World(), device
        finally:
            if spread:
                dist.destroy_process_group()
        return
    launcher.stop_with_launcher()
    rank, size, local_rank = (int(os.environ[name]) for name in launcher.RANK_VARIABLES)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    try:
        device = _own_device(device, local_rank, local_size, size)
        own = device if device.type == "cuda" else None
        dist.init_process_group(
            _backend(device), store=_store(), rank=rank, world_size=size, device_id=own
        )
        saving = dist.new_group(backend="gloo") if size > 1 else None
        yield World(rank, size, local_rank, local_size, saving), device
        dist.barrier(group=saving)
    except Interrupted:  # agreed by all ranks
        dist.destroy_process_group()
        raise
    except Exception as error:
        # The process group stays open: other ranks must not fail before this error is printed.
        if not _is_lost_connection(error):
            raise
        if dist.is_torchelastic_launched():
            time.sleep(_SECONDS_UNTIL_STOPPED)
        raise RunFailed(
            f"lost the connection to another process of this run: {str(error).splitlines()[0]}",
            hint="check whether one was killed or out of memory; the same command resumes the run",
        ) from error
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _own_device(device: torch.device, local_rank: int, local_size: int, size: int) -> torch.device:
    if size > 1 and (device.index is not None or device.type == "mps"):
        hint = "use --set train.device=cuda for one GPU per process, or --set train.device=cpu"
        raise UserError(f"train.device {device} cannot be shared by {size} processes", hint=hint)
    if device.type != "cuda":
        return device
    if local_size > torch.cuda.device_count():
        count = torch.cuda.device_count()
        message = f"{local_size} processes on this machine need as many GPUs: it has {count}"
        raise UserError(message, hint=f"--nproc {count}")
    own = torch.device("cuda", local_rank if device.index is None else device.index)
    torch.cuda.set_device(own)
    return own


def _is_lost_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    foreign = isinstance(error, RuntimeError) and not isinstance(error, RunFailed)
    return foreign and re.search(r"gloo|NCCL|[Cc]onnection", str(error)) is not None


@functools.cache
def _store() -> Store:
    """Return the key-value store from which the process group is initialized.

    The launcher's store outlives a restart, so each start uses its own prefix. Why not torch's
    prefix: it contains the restart count, which each machine counts separately.
    """
    shared: Store = next(iter(rendezvous("env://")))[0]
    if not launcher.has_restarts():
        return shared
    return PrefixStore(f"llmtrain/{_start_name(shared)}", shared)


def _start_name(shared: Store) -> str:
    """Return a random name that rank 0 sends to each other rank that has registered."""
    name = uuid.uuid4().hex
    others = [f"here/{rank}" for rank in range(1, int(os.environ["WORLD_SIZE"]))]
    if launcher.rank() == 0:
        for key in others:
            shared.delete_key(key)  # of an earlier start; running ranks register again
        for key in others:
            shared.set(f"answer/{shared.get(key).decode()}", name)
        return name
    while not shared.check([f"answer/{name}"]):
        shared.set(f"here/{launcher.rank()}", name)
        time.sleep(0.05)
    return shared.get(f"answer/{name}").decode()

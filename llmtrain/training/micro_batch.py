"""The micro-batch: the sequences in one forward pass, found when a run starts, reduced on OOM.

Why by trial: no table predicts what fits and what is fast on a device. A trial leaves no gradients,
and every step seeds its own random draws. Trials run uncompiled, because compiling every candidate
would take minutes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from llmtrain.errors import RunFailed
from llmtrain.planning.memory import (
    LESS_MEMORY,
    USABLE,
    device_memory,
    divisors,
    peak,
)
from llmtrain.runtime.device import available_memory, device_name
from llmtrain.training.checkpoint import TrainingProgress
from llmtrain.training.worker import Log, Worker, is_out_of_memory

T = TypeVar("T")

_GAIN = 1.03  # speedup that justifies the memory of a larger micro-batch
_LONG_ENOUGH = 0.1  # seconds to time the passes of a small model
_PATIENCE = 60.0  # seconds for the whole search
_SPARE = 0.05  # share of GPU memory left free in a trial for library buffers and fragmentation
_CPU_FACTOR = 1.35  # safety factor: the CPU allocator does not return freed memory


def find_micro_batch(worker: Worker, progress: TrainingProgress, log: Log) -> None:
    """Set `progress.micro_batch`: keep it unless something that it depends on has changed.

    For `auto`, set the fastest of 1, 2, 4, … (divisors of its share) that fits on every process.
    """
    config, world = worker.config, worker.world
    asked = config.train.micro_batch
    depends_on = {
        "asked": asked,
        "sequences": worker.sequences,
        "processes": world.size,
        "parallel": worker.parallel,
        "block_size": config.data.block_size,
        "precision": worker.autocast_precision,
        "activation_checkpointing": config.train.activation_checkpointing,
        "device": world.on_rank_zero(lambda: device_name(worker.device)),
    }
    if progress.micro_batch_for == depends_on:
        if progress.micro_batch != asked:
            log(f"micro-batch: {progress.micro_batch}, as before")
        return
    progress.micro_batch_for = depends_on
    if asked != "auto":
        progress.micro_batch = asked
        # Running out of memory later, within a step, would leave the other processes blocked.
        while worker.parallel == "ddp" and any(
            world.sums([_seconds(worker, progress.micro_batch, 1) is None])
        ):
            problem = _reduce(worker, progress)
            worker.warn(f"{problem}: continuing with {progress.micro_batch}")
        return
    sizes = _candidates(worker)
    speeds = _speeds(worker, sizes) or {sizes[0]: 0.0}
    fast = max(speeds.values()) / _GAIN
    progress.micro_batch = next(size for size, speed in speeds.items() if speed >= fast)
    log(f"micro-batch: {progress.micro_batch}, the fastest of {', '.join(map(str, speeds))}")


def retry_on_oom(worker: Worker, progress: TrainingProgress, work: Callable[[], T]) -> T:
    """Return what `work` returns, repeated with smaller micro-batches while memory runs out.

    `work` is a part of a step whose only side effect is gradients.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # After the except block: the error's frames no longer hold tensors.
        problem = _reduce(worker, progress)
        if worker.parallel is not None:  # the other processes block in the middle of their step
            smaller = f"--set train.micro_batch={progress.micro_batch}"
            raise RunFailed(problem, hint=f"resume with {smaller}")
        worker.warn(f"{problem}: continuing with {progress.micro_batch}")
        if worker.is_compiled:
            torch.compiler.reset()  # else torch switches to code for any size


@contextmanager
def explain_oom() -> Iterator[None]:
    """Convert an out-of-memory error that no smaller micro-batch avoids into a RunFailed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunFailed(f"out of memory: {reason}", hint=LESS_MEMORY) from error


def _reduce(worker: Worker, progress: TrainingProgress) -> str:
    """Set the next smaller micro-batch and return the problem; fail at 1."""
    _discard_grads(worker)
    size = progress.micro_batch
    problem = f"out of memory at micro-batch {size}"
    if size == 1:
        raise RunFailed(problem, hint=LESS_MEMORY)
    progress.micro_batch = max(n for n in divisors(worker.sequences) if n < size)
    return problem


def _discard_grads(worker: Worker) -> None:
    worker.model.zero_grad(set_to_none=True)
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(worker.device)  # exclude trials from the logged memory


def _candidates(worker: Worker) -> list[int]:
    """Return 1 and divisors of the share that at least double each time.

    Use the planned memory if a failed trial kills the process (CPU) or blocks the others (FSDP).
    """
    sizes = [1]
    for size in divisors(worker.sequences):
        if size >= 2 * sizes[-1]:
            sizes.append(size)
    world, cuda = worker.world, worker.device.type == "cuda"
    if cuda and not worker.is_sharded:
        return sizes
    room = USABLE * available_memory(worker.device)
    room /= 1 if cuda else _CPU_FACTOR * world.local_size
    usages = [device_memory(worker.config.with_micro_batch(n), worker.layout) for n in sizes]
    # Weights and averages are already allocated.
    needed = [peak(each).total - each[0].weights - each[0].averages for each in usages]
    fitting = world.sums([each <= room for each in needed])
    return [size for size, n in zip(sizes, fitting, strict=True) if size == 1 or n == world.size]


def _speeds(worker: Worker, sizes: list[int]) -> dict[int, float]:
    """Return sequences per second by micro-batch, for those that fit.

    Stop after two sizes without a gain, or when the time is up.
    """
    speeds: dict[int, float] = {}
    started, expected = time.perf_counter(), 0.0
    for size in sizes:
        repeats = 2 if not expected else round(min(max(_LONG_ENOUGH / expected, 2), 10))
        seconds = _seconds(worker, size, repeats)
        spent = time.perf_counter() - started
        failed, total, spent = worker.world.sums([seconds is None, seconds or 0.0, spent])
        if failed:
            break
        mean = total / worker.world.size
        speeds[size] = size / mean
        expected = 2 * mean
        *before, one, two = [0.0, 0.0, *speeds.values()]
        no_gain = max(one, two) < _GAIN * max(before)
        if no_gain or spent / worker.world.size + 3 * expected > _PATIENCE:
            break
    return speeds


def _seconds(worker: Worker, size: int, repeats: int) -> float | None:
    """Return the shortest time of a pass after a warm-up pass; None if out of memory."""
    try:
        return min(_pass_times(worker, size, 1 + repeats)[1:])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or worker.is_sharded:
            raise
    finally:
        _discard_grads(worker)
    return None


def _pass_times(worker: Worker, size: int, passes: int) -> list[float]:
    """Time passes that accumulate gradients, with the memory of a real step reserved."""
    reserved = _reserve(worker)
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        worker.dummy_pass(worker.model, size)
        times.append(time.perf_counter() - started)
    del reserved  # not earlier
    return times


def _reserve(worker: Worker) -> torch.Tensor:
    """Allocate what a new optimizer has yet to allocate, and some spare memory."""
    device, size = worker.device, 0
    if not worker.optimizer.state:
        size = device_memory(worker.config.with_micro_batch(1), worker.layout)[0].optimizer
    if device.type == "cuda":
        size += int(_SPARE * torch.cuda.get_device_properties(device).total_memory)
    return torch.empty(size, dtype=torch.uint8, device=device)

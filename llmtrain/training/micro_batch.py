"""How many sequences go through the model at a time: chosen when a run begins, lowered when memory runs out.

Why by trial: what fits and what is fast depends on device, precision and shape in ways that no table
foresees, and neither may change what is learned. Only how a batch is cut up changes, never the batch;
a trial leaves no gradient behind, its draws do not count (every step seeds its own), and the number
chosen is part of the training state, so that a resumed run goes on with it.

The trial runs uncompiled, since to compile every candidate would take minutes; that compiled code needs no more
memory is assumed.

    choose(trainer, say); loss = lowering(trainer, lambda: ...)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from llmtrain.errors import RunFailed
from llmtrain.planning.memory import USABLE, Layout, device_memory, divisors, peak
from llmtrain.runtime.device import autocast, available_memory, device_name, resolve_precision

if TYPE_CHECKING:
    from llmtrain.training.trainer import Trainer

T = TypeVar("T")

_GAIN = 1.03
"""What is not faster than a smaller micro-batch by this factor is not worth its memory."""
_LONG_ENOUGH = 0.1
"""Seconds over which a small model's passes are timed."""
_PATIENCE = 60.0
"""Seconds for the whole search."""
_SPARE = 0.05
"""Share of a GPU's memory left free in a trial: for buffers of libraries, and gaps."""
_KEPT = 1.35
"""So many times what it needs at once may a process on a CPU take, since it keeps what it frees."""
_MESSAGES = (
    "can't allocate memory",
    "can't start new thread",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
    "MPS backend out of memory",
)
"""Of errors without a type of their own, when memory ran out."""


def find_micro_batch(trainer: "Trainer", say: Callable[[str], None]) -> None:
    """Set the micro-batch that `trainer` goes on with: as before, where nothing it depends on has changed.

    Else the one asked for; for `auto` the fastest of 1, 2, 4, … (divisors of a process's share of the
    batch) that fits on every process.

    Raises:
        RunFailed: memory ran out where processes wait for each other.
    """
    progress, world, asked = trainer.progress, trainer.world, trainer.config.train.micro_batch
    depends_on = {
        "asked": asked,
        "sequences": _share(trainer),
        "processes": world.size,
        "parallel": trainer.parallel,
        "block_size": trainer.config.data.block_size,
        "precision": trainer.cast,
        "activation_checkpointing": trainer.config.train.activation_checkpointing,
        "device": world.on_rank_zero(lambda: device_name(trainer.device)),
    }
    if progress.micro_batch_for == depends_on:
        if progress.micro_batch != asked:
            say(f"micro-batch: {progress.micro_batch}, as before")
        return
    progress.micro_batch_for = depends_on
    if asked != "auto":
        progress.micro_batch = asked
        while trainer.parallel == "ddp" and not _fits_everywhere(trainer):
            # Later, in the middle of a step, the others would wait for the one without memory.
            _lower(trainer)
        return
    sizes = _candidates(trainer)
    rates = _rates(trainer, sizes) or {sizes[0]: 0.0}
    fast = max(rates.values()) / _GAIN
    progress.micro_batch = next(size for size, rate in rates.items() if rate >= fast)
    say(f"micro-batch: {progress.micro_batch}, the fastest of {', '.join(map(str, rates))}")


def retry_on_oom(trainer: "Trainer", work: Callable[[], T]) -> T:
    """What `work`, a part of a step that leaves only gradients, gives; done again in smaller micro-batches
    where memory runs out.

    Raises:
        RunFailed: memory ran out, and the micro-batch is 1 or other processes take part.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here, where the error is gone, nothing holds the tensors of its frames any more.
        if trainer.parallel is not None:  # the others wait in the middle of their step
            size = trainer.progress.micro_batch
            hint = f"--set train.micro_batch={_smaller(trainer)}" if size > 1 else _HINT
            raise RunFailed(
                _out_of_memory(trainer), hint=f"{hint}; the run goes on from its newest state"
            )
        _lower(trainer)
        if trainer.is_compiled:
            torch.compiler.reset()  # else code for any size takes the place of code for this one


@contextmanager
def explain_oom(device: torch.device) -> Iterator[None]:
    """Memory that runs out where no smaller micro-batch helps, in one line.

    Raises:
        RunFailed: instead of the error that says so.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        raise RunFailed(f"out of {_kind(device)}memory: {said}", hint=_HINT) from error


_HINT = (
    "llmtrain plan says what takes it; --set train.activation_checkpointing=true, a smaller eval.batch, "
    "train.parallel=fsdp on several GPUs, or a smaller model or block need less"
)


def one_pass(trainer: "Trainer", forward: nn.Module, size: int) -> None:
    """A forward and backward pass of `forward` over `size` sequences; it adds its gradients to those there are.

    Its tokens lie in memory as a step's do: else what it compiles would be compiled anew for the first step.
    """
    length = trainer.config.data.block_size + 1
    windows = torch.arange(size * length, device=trainer.device).view(size, length)
    windows %= trainer.config.model.vocab_size
    with autocast(trainer.device, trainer.cast):
        loss = forward(windows[:, :-1], windows[:, 1:])
    loss.backward()
    loss.item()  # the host waits for it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of a GPU, or of the host, for which torch has no type of error."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        message in str(error) for message in _MESSAGES
    )


def _share(trainer: "Trainer") -> int:
    """Sequences of a batch that are this process's."""
    return trainer.config.batch_size // trainer.world.size


def _kind(device: torch.device) -> str:
    return "GPU " if device.type == "cuda" else ""


def _out_of_memory(trainer: "Trainer") -> str:
    return f"out of {_kind(trainer.device)}memory at micro-batch {trainer.progress.micro_batch}"


def _smaller(trainer: "Trainer") -> int:
    return max(n for n in divisors(_share(trainer)) if n < trainer.progress.micro_batch)


def _lower(trainer: "Trainer") -> None:
    """Go on with the next smaller micro-batch, as if nothing of the step had happened."""
    _clean_up(trainer)
    said = _out_of_memory(trainer)
    if trainer.progress.micro_batch == 1:
        raise RunFailed(said, hint=_HINT)
    trainer.progress.micro_batch = _smaller(trainer)
    trainer.warn(f"{said}: going on with {trainer.progress.micro_batch}")


def _clean_up(trainer: "Trainer") -> None:
    trainer.model.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(
            trainer.device
        )  # what a trial took is not what training takes


# --- what fits, and how fast it is -----------------------------------------------------------------


def _candidates(trainer: "Trainer") -> list[int]:
    """1 and divisors of the share, each at least twice the one before; where a trial cannot tell, by the plan.

    Too much memory of a CPU is not refused but killed for, and in shards one process without memory
    leaves the others waiting.
    """
    sizes = [1]
    for size in divisors(_share(trainer)):
        if size >= 2 * sizes[-1]:
            sizes.append(size)
    world, cuda = trainer.world, trainer.device.type == "cuda"
    if cuda and not _in_shards(trainer):
        return sizes
    room = USABLE * available_memory(trainer.device) / (1 if cuda else _KEPT * world.local_size)
    fitting = world.sums([_planned(trainer, size) <= room for size in sizes])
    return [size for size, n in zip(sizes, fitting, strict=True) if size == 1 or n == world.size]


def _in_shards(trainer: "Trainer") -> bool:
    return trainer.parallel in ("fsdp", "hsdp")


def _layout(trainer: "Trainer") -> Layout:
    """As the plan takes it; HSDP shards within a machine."""
    precision = resolve_precision(trainer.config.train.precision, trainer.device)
    return Layout(
        trainer.world.local_size if trainer.parallel == "hsdp" else trainer.world.size,
        "fsdp" if _in_shards(trainer) else "ddp",
        2 if precision == "bfloat16" else 4,
        cuda=trainer.device.type == "cuda",
    )


def _planned(trainer: "Trainer", size: int) -> int:
    """Bytes that training will need beyond the weights and averages, which are there already."""
    usages = device_memory(trainer.config.with_micro_batch(size), _layout(trainer))
    return peak(usages).total - usages[0].weights - usages[0].averages


def _rates(trainer: "Trainer", sizes: list[int]) -> dict[int, float]:
    """Sequences a second by micro-batch, of those that fit; until two in a row were no faster, or it takes long.

    The processes decide alike, from sums over all.
    """
    rates: dict[int, float] = {}
    started, expected = time.perf_counter(), 0.0
    for size in sizes:
        repeats = 2 if not expected else round(min(max(_LONG_ENOUGH / expected, 2), 10))
        seconds = _seconds(trainer, size, repeats)
        spent = time.perf_counter() - started
        failed, total, spent = trainer.world.sums([seconds is None, seconds or 0.0, spent])
        if failed:
            break
        mean = total / trainer.world.size
        rates[size] = size / mean
        expected = 2 * mean
        *before, one, two = [0.0, 0.0, *rates.values()]
        no_faster = max(one, two) < _GAIN * max(before)
        if no_faster or spent / trainer.world.size + 3 * expected > _PATIENCE:
            break
    return rates


def _seconds(trainer: "Trainer", size: int, repeats: int) -> float | None:
    """The shortest of the passes over `size` sequences, after a first one; None: out of memory."""
    try:
        return min(_times(trainer, size, 1 + repeats)[1:])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or _in_shards(trainer):
            raise
    finally:
        _clean_up(trainer)
    return None


def _times(trainer: "Trainer", size: int, passes: int) -> list[float]:
    """Seconds of each pass; gradients add up meanwhile, and what a step needs beside them has its place."""
    reserved = _reserve(trainer)
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        one_pass(trainer, trainer.model, size)
        times.append(time.perf_counter() - started)
    del reserved  # not before
    return times


def _reserve(trainer: "Trainer") -> torch.Tensor:
    """Memory for the moments, which the optimizer of a fresh run has not yet, and some to spare."""
    device, wanted = trainer.device, 0
    if not trainer.optimizer.state:
        wanted = device_memory(trainer.config.with_micro_batch(1), _layout(trainer))[0].optimizer
    if device.type == "cuda":
        wanted += int(_SPARE * torch.cuda.get_device_properties(device).total_memory)
    return torch.empty(wanted, dtype=torch.uint8, device=device)


def _fits_everywhere(trainer: "Trainer") -> bool:
    return trainer.world.sums([_seconds(trainer, trainer.progress.micro_batch, 1) is None])[0] == 0

"""The plan of a run: what it computes, holds, sends, stores and takes, from the configuration alone.

Why: whether a model fits, and what it costs, should be known before the first GPU is paid for.

    plan = estimate(load_config(Path("configs/gpt2-small.yaml")), Options(devices=8)); plan.hours
"""

from dataclasses import dataclass

from llmtrain.averaging.merge import CHUNK
from llmtrain.checkpoints.windows import sliding_windows
from llmtrain.config.schedules import block_size, tokens_until
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.planning.activations import FLOAT
from llmtrain.planning.architecture import Architecture
from llmtrain.planning.machine import HardwareOptions, Machine, resolve_machine
from llmtrain.planning.memory import (
    DOUBLE,
    Usage,
    device_memory,
    host_memory,
    micro_batch,
    micro_batches,
)
from llmtrain.planning.storage import Storage, run_storage, snapshot_bytes, snapshot_steps

MERGE_THREADS = 4
"""The most that the streaming merge starts."""


@dataclass(frozen=True)
class Communication:
    """What a device sends in a step, and whether the computation gives it the time."""

    bytes: int
    """Sent by each device, and received."""
    seconds: float | None
    """At the links' rate."""
    hidden: bool | None
    """Whether it can go on behind the backward pass that it belongs to."""
    exposed_seconds: float | None
    """What of it cannot."""


@dataclass(frozen=True)
class Averaging:
    """What `llmtrain average` reads, writes and takes."""

    label: str
    averages: int
    read: int
    written: int
    memory: int
    """Bytes of its buffers, however large the model."""
    seconds: float


@dataclass(frozen=True)
class CostEstimate:
    """All of it; sizes in bytes, what is not known None."""

    architecture: Architecture
    machine: Machine
    steps: int
    tokens_per_step: int
    """Once the sequences have their full length."""
    tokens: int
    micro_batches: int
    flops: int
    tokens_per_second: float | None
    """At full length."""
    step_seconds: float | None
    hours: float | None
    """As if all communication were hidden."""
    hours_exposed: float | None
    """With what cannot be hidden added to every step."""
    usages: list[Usage]
    host_memory: int
    communication: Communication | None
    storage: Storage
    averaging: list[Averaging]


def estimate(config: RunConfig, options: HardwareOptions) -> CostEstimate:
    """What the run will cost on the machine of the options.

    Raises:
        UserError: options that are out of range or do not go with the config.
    """
    model = Architecture(config.model, config.data.block_size)
    machine = resolve_machine(config, options, model.flops_per_token())
    config = config.with_micro_batch(machine.micro_batch)
    speed = machine.flops and machine.flops * machine.layout.devices
    rate = speed and speed / model.flops_per_token()
    step_seconds = config.tokens_per_step / rate if rate else None
    flops = _flops(config, model)
    hours = flops / speed / 3600 if speed else None
    communication = _communication(config, model, machine)
    return CostEstimate(
        architecture=model,
        machine=machine,
        steps=config.train.max_steps,
        tokens_per_step=config.tokens_per_step,
        tokens=tokens_until(config.train.max_steps, config),
        micro_batches=micro_batches(config, machine.layout),
        flops=flops,
        tokens_per_second=rate,
        step_seconds=step_seconds,
        hours=hours,
        hours_exposed=_with_exposed(hours, step_seconds, communication),
        usages=device_memory(config, machine.layout),
        host_memory=host_memory(config, machine.layout),
        communication=communication,
        storage=run_storage(config),
        averaging=_averaging(config, options, machine.disk),
    )


def _flops(config: RunConfig, model: Architecture) -> int:
    """Of the whole run; the first steps may train on shorter sequences, whose attention costs less."""
    warmup, steps = config.data.block_warmup, config.train.max_steps
    short = min(steps, warmup.steps) if warmup is not None else 0
    lengths = [block_size(step, config.data) for step in range(1, short + 1)]
    short_flops = config.batch_size * sum(
        length * model.flops_per_token(length) for length in lengths
    )
    return short_flops + (steps - short) * config.tokens_per_step * model.flops_per_token()


def _communication(
    config: RunConfig, model: Architecture, machine: Machine
) -> Communication | None:
    """DDP: one float32 ring all-reduce a step, behind the last micro-batch's backward pass.

    FSDP: for every micro-batch an all-gather in the precision of matrix products behind the forward pass
    (a third of the computation) and another behind the backward pass; behind the last backward pass a
    float32 reduce-scatter too.
    """
    layout = machine.layout
    if layout.devices == 1:
        return None
    once = (
        model.parameters * (layout.devices - 1) / layout.devices
    )  # numbers that a ring moves in a pass
    flops = micro_batch(config) * config.data.block_size * model.flops_per_token()
    compute = flops / machine.flops if machine.flops else None
    times = micro_batches(config, layout)
    gather = once * layout.item if layout.sharded else 0.0
    reduce = once * FLOAT * (1 if layout.sharded else 2)
    sent = round(times * 2 * gather + reduce)
    if machine.link is None:
        return Communication(sent, None, None, None)
    seconds = sent / machine.link
    if compute is None:
        return Communication(sent, seconds, None, None)
    forward, backward = compute / 3, compute * 2 / 3
    exposed = (
        times * max(gather / machine.link - forward, 0.0)
        + (times - 1) * max(gather / machine.link - backward, 0.0)
        + max((gather + reduce) / machine.link - backward, 0.0)
    )
    return Communication(sent, seconds, exposed == 0, exposed)


def _with_exposed(
    hours: float | None, step: float | None, communication: Communication | None
) -> float | None:
    """The hours of a run whose steps take longer by what of its communication is not hidden."""
    if hours is None or step is None or communication is None:
        return hours
    if communication.exposed_seconds is None:
        return None
    return hours * (1 + communication.exposed_seconds / step)


def _averaging(config: RunConfig, options: HardwareOptions, disk: float) -> list[Averaging]:
    """LAWA over the run's snapshots: the last window, and the whole sliding trajectory in one pass."""
    every, size = options.every or config.checkpoint.snapshot_every, options.window
    if every % config.checkpoint.snapshot_every:
        raise UserError(
            f"--every {every:,} is no multiple of checkpoint.snapshot_every {config.checkpoint.snapshot_every:,}",
            hint="the spacing of a window is one of snapshots",
        )
    windows = sliding_windows(snapshot_steps(config), every=every, size=size)
    label, each = f"LAWA {size}×{every}", snapshot_bytes(config)
    return [
        _merge(f"{label}, {name}", chosen, each, disk)
        for name, chosen in (("the last", windows[-1:]), ("all (--at all)", windows))
        if chosen
    ]


def _merge(label: str, windows: list[tuple[int, ...]], each: int, disk: float) -> Averaging:
    """Each input is read once.

    A thread holds a piece as it is stored, three of work, one rounded, and the sums that are open.
    """
    read = len({step for window in windows for step in window}) * each
    written = len(windows) * each
    open_sums = min(len(windows), len(windows[0]))
    memory = MERGE_THREADS * CHUNK * DOUBLE * (5 + open_sums)
    return Averaging(label, len(windows), read, written, memory, (read + written) / disk)

"""Estimate the cost of a run from its configuration.

result = estimate(load_config(Path("configs/gpt2-small.yaml")), HardwareOptions(devices=8))
"""

from dataclasses import dataclass

from llmtrain.averaging.merge import CHUNK
from llmtrain.checkpoints.windows import Window, sliding_windows
from llmtrain.config.schedules import block_size, tokens_until
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.planning.hardware import (
    DEVICES_PER_MACHINE,
    DISK,
    MFU,
    NETWORK,
    HardwareOptions,
    Parallel,
)
from llmtrain.planning.memory import (
    USABLE,
    Layout,
    Usage,
    check_batch,
    device_memory,
    divisors,
    host_memory,
    micro_batch,
    micro_batches,
    peak,
)
from llmtrain.planning.sizes import (
    DOUBLE,
    FLOAT,
    Architecture,
    DiskUsage,
    disk_usage,
    snapshot_bytes,
    snapshot_steps,
)
from llmtrain.runtime.hardware import Datasheet, Precision, datasheet

DEFAULT_MICRO_BATCH = 16
"""Upper limit of an `auto` micro-batch if the device's memory is unknown."""
WINDOW = 5
"""Checkpoints in the LAWA window of the averaging estimate."""
MERGE_THREADS = 4
"""Highest number of threads of a merge."""


@dataclass(frozen=True)
class Machine:
    """The devices of an estimate; unknown values are None."""

    device: str
    precision: Precision
    layout: Layout
    micro_batch: int
    """Sequences in one forward pass on one device."""
    memory: float | None
    """Bytes of one device."""
    flops: float | None
    """FLOP/s that one device sustains."""
    mfu: float | None
    """Ratio of `flops` to the dense peak."""
    link: float | None
    """Bytes/s of one device in each direction."""
    disk: float
    """Bytes/s."""
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Communication:
    """Traffic of one device in a step, and how much of it computation hides."""

    bytes: int
    """Sent by each device, and received."""
    seconds: float | None
    hidden: bool | None
    """All of it overlaps with computation."""
    exposed_seconds: float | None
    """Seconds that do not overlap."""


@dataclass(frozen=True)
class Averaging:
    """Cost of one `llmtrain average` command."""

    label: str
    averages: int
    read: int
    written: int
    memory: int
    """Bytes of its buffers, independent of the model size."""
    seconds: float


@dataclass(frozen=True)
class Memory:
    """Memory of one device, and of the host of a GPU."""

    peak: Usage
    moments: list[Usage]
    fits: bool | None
    host: int


@dataclass(frozen=True)
class Time:
    """Duration of a run, at the full sequence length."""

    tokens_per_second: float | None
    step_seconds: float | None
    hours: float | None
    """With all communication hidden."""
    hours_exposed: float | None
    """With exposed communication added to every step."""
    device_hours: float | None


@dataclass(frozen=True)
class CostEstimate:
    """Costs of a run, as printed by `llmtrain plan --json`; bytes, unknown values None."""

    parameters: int
    parameters_without_embeddings: int
    flops_per_token: int
    flops: int
    tokens: int
    steps: int
    micro_batches: int
    machine: Machine
    memory: Memory
    time: Time
    communication: Communication | None
    storage: DiskUsage
    averaging: list[Averaging]


def estimate(config: RunConfig, options: HardwareOptions) -> CostEstimate:
    """Estimate the cost of a run.

    Raises:
        UserError: the options are out of range or do not fit the config.
    """
    model = Architecture(config.model, config.data.block_size)
    machine = resolve_machine(config, options, model.flops_per_token())
    config = config.with_micro_batch(machine.micro_batch)
    flops = _flops(config, model)
    communication = _communication(config, model, machine)
    return CostEstimate(
        parameters=model.parameters,
        parameters_without_embeddings=model.without_embeddings,
        flops_per_token=model.flops_per_token(),
        flops=flops,
        tokens=tokens_until(config.train.max_steps, config),
        steps=config.train.max_steps,
        micro_batches=micro_batches(config, machine.layout),
        machine=machine,
        memory=_memory(config, machine),
        time=_time(config, machine, flops, model.flops_per_token(), communication),
        communication=communication,
        storage=disk_usage(config),
        averaging=_averaging(config),
    )


def _memory(config: RunConfig, machine: Machine) -> Memory:
    usages = device_memory(config, machine.layout)
    top = peak(usages)
    fits = None if machine.memory is None else top.total <= machine.memory
    return Memory(top, usages, fits, host_memory(config, machine.layout))


def _time(
    config: RunConfig,
    machine: Machine,
    flops: int,
    flops_per_token: int,
    communication: Communication | None,
) -> Time:
    if not machine.flops:
        return Time(None, None, None, None, None)
    devices = machine.layout.devices
    speed = machine.flops * devices
    rate = speed / flops_per_token
    step = config.tokens_per_step / rate
    hours = flops / speed / 3600
    exposed = 0.0 if communication is None else communication.exposed_seconds
    hours_exposed = None if exposed is None else hours * (1 + exposed / step)
    return Time(rate, step, hours, hours_exposed, hours * devices)


def resolve_machine(config: RunConfig, options: HardwareOptions, flops_per_token: int) -> Machine:
    """Fill in the options from data sheets and the config.

    Raises:
        UserError: a value is out of range, the device is unlisted, or the batch is not divisible.
    """
    options.check()
    device = options.device.lower()
    sheet = Datasheet(0.0, None) if device in ("cpu", "other") else datasheet(device)
    precision, precision_note = _precision(config, device)
    item = 2 if precision == "bfloat16" else 4
    layout = Layout(options.devices, _parallel(config, options), item, cuda=device != "cpu")
    check_batch(config, options.devices)
    size, size_note = _micro_batch(config, layout, sheet.memory)
    dense = sheet.flops if precision == "bfloat16" and sheet.flops else None
    flops, speed_note = _speed(options, dense, flops_per_token)
    link, link_note = _link(options, sheet)
    uncounted = "; CUDA, NCCL and fragmentation take more" if layout.cuda else ""
    recompute = config.train.activation_checkpointing
    notes = [
        speed_note,
        link_note,
        f"disk: {DISK / 1e9:g} GB/s, reading and writing together",
        precision_note,
        size_note,
        f"memory: tensors only, uncompiled{uncounted}",
        "activation checkpointing: adds a third to the FLOPs; expect a lower --mfu" * recompute,
    ]
    return Machine(
        device=device,
        precision=precision,
        layout=layout,
        micro_batch=size,
        memory=sheet.memory,
        flops=flops,
        mfu=flops / dense if flops and dense else None,
        link=link,
        disk=DISK,
        assumptions=tuple(filter(None, notes)),
    )


def _flops(config: RunConfig, model: Architecture) -> int:
    """Return the FLOPs of the run; shorter first sequences need less for attention."""
    warmup, steps = config.data.block_warmup, config.train.max_steps
    short = min(steps, warmup.steps) if warmup is not None else 0
    lengths = [block_size(step, config.data) for step in range(1, short + 1)]
    per_row = sum(length * model.flops_per_token(length) for length in lengths)
    full = (steps - short) * config.tokens_per_step * model.flops_per_token()
    return config.batch_size * per_row + full


def _communication(
    config: RunConfig, model: Architecture, machine: Machine
) -> Communication | None:
    """Return the traffic of a step; None for one device.

    DDP: a float32 ring all-reduce, overlapped with the last micro-batch's backward pass. FSDP, for
    every micro-batch: an all-gather in the precision of matrix products during the forward pass (a
    third of the computation) and another during the backward pass. The last backward pass also
    overlaps a float32 reduce-scatter.
    """
    layout = machine.layout
    if layout.devices == 1:
        return None
    once = model.parameters * (layout.devices - 1) / layout.devices  # numbers per ring pass
    times = micro_batches(config, layout)
    gather = once * layout.item if layout.sharded else 0.0
    reduce = once * FLOAT * (1 if layout.sharded else 2)
    sent = round(times * 2 * gather + reduce)
    if machine.link is None:
        return Communication(sent, None, None, None)
    seconds = sent / machine.link
    if not machine.flops:
        return Communication(sent, seconds, None, None)
    flops = micro_batch(config) * config.data.block_size * model.flops_per_token()
    compute = flops / machine.flops
    forward, backward = compute / 3, compute * 2 / 3
    exposed = (
        times * max(gather / machine.link - forward, 0.0)
        + (times - 1) * max(gather / machine.link - backward, 0.0)
        + max((gather + reduce) / machine.link - backward, 0.0)
    )
    return Communication(sent, seconds, exposed == 0, exposed)


def _averaging(config: RunConfig) -> list[Averaging]:
    """Estimate LAWA over the run's snapshots: the last window, and a window at every snapshot."""
    every = config.checkpoint.snapshot_every
    windows = sliding_windows(snapshot_steps(config), every=every, size=WINDOW)
    label, folder = f"LAWA {WINDOW}×{every}", snapshot_bytes(config)
    return [
        _merge(f"{label}, {name}", chosen, folder)
        for name, chosen in (("the last", windows[-1:]), ("all (--at all)", windows))
        if chosen
    ]


def _merge(label: str, windows: list[Window], folder: int) -> Averaging:
    """Estimate a merge that reads each input once.

    A thread holds one chunk as stored, three for work, one rounded, and one sum per open window.
    """
    read = len({step for window in windows for step in window}) * folder
    written = len(windows) * folder
    open_sums = min(len(windows), len(windows[0]))
    memory = MERGE_THREADS * CHUNK * DOUBLE * (5 + open_sums)
    return Averaging(label, len(windows), read, written, memory, (read + written) / DISK)


def _precision(config: RunConfig, device: str) -> tuple[Precision, str | None]:
    if config.train.precision != "auto":
        return config.train.precision, None
    if device == "other":
        return "bfloat16", "precision: auto means bfloat16; or --set train.precision=float32"
    if device != "cpu":
        return "bfloat16", None
    import torch  # only a CPU's precision depends on this machine

    from llmtrain.runtime.device import resolve_precision

    precision = resolve_precision("auto", torch.device("cpu"))
    return precision, f"precision: auto means {precision} on this machine"


def _parallel(config: RunConfig, options: HardwareOptions) -> Parallel:
    setting = options.parallel or config.train.parallel
    if setting == "hsdp":
        raise UserError(
            "llmtrain plan does not support hsdp",
            hint="use --parallel fsdp: its memory and time within one machine are the same",
        )
    return "fsdp" if setting == "fsdp" else "ddp"


def _micro_batch(config: RunConfig, layout: Layout, memory: float | None) -> tuple[int, str | None]:
    """Return the largest micro-batch that fits; training may find a smaller one as fast."""
    if config.train.micro_batch != "auto":
        return config.train.micro_batch, None
    sizes = divisors(config.batch_size // layout.devices)
    if memory is None:
        size = max(n for n in sizes if n <= DEFAULT_MICRO_BATCH)
        return size, f"micro-batch: auto means {size}, because the device's memory is unknown"
    totals = {n: peak(device_memory(config.with_micro_batch(n), layout)).total for n in sizes}
    size = max((n for n in sizes if totals[n] <= USABLE * memory), default=1)
    return size, f"micro-batch: auto means {size}, the largest in {USABLE:.0%} of the memory"


def _speed(
    options: HardwareOptions, dense: float | None, flops_per_token: int
) -> tuple[float | None, str | None]:
    """Return the sustained FLOP/s of one device."""
    if options.tokens_per_second is not None:
        flops = options.tokens_per_second * flops_per_token / options.devices
        rate = f"{options.tokens_per_second:,.0f} tokens/s"
        return flops, f"speed: {rate} measured on all devices, --tokens-per-second"
    if dense is None:
        return None, None
    mfu = options.mfu or MFU
    peak = f"{dense / 1e12:,.6g} TFLOP/s per device"
    return dense * mfu, f"speed: {mfu:.0%} (--mfu) of {peak}, published dense bfloat16 peak"


def _link(options: HardwareOptions, sheet: Datasheet) -> tuple[float | None, str | None]:
    """Return the bytes/s of one device in each direction."""
    if options.devices == 1:
        return None, None
    if options.interconnect_gbps is not None:
        rate, source = options.interconnect_gbps * 1e9, "--interconnect-gbps"
    elif options.devices <= DEVICES_PER_MACHINE and sheet.link is not None:
        rate, source = sheet.link, "NVLink, --interconnect-gbps"
    elif options.devices > DEVICES_PER_MACHINE and sheet.flops:
        rate, source = NETWORK, "a 400 Gb/s card, --interconnect-gbps"
    else:
        return None, None
    return rate, f"links: {rate / 1e9:g} GB/s per device each way, {source}"

"""Estimate the cost of a run from its configuration."""

from dataclasses import dataclass

from llmtrain.averaging.merge import CHUNK
from llmtrain.checkpoints.windows import Window, sliding_windows
from llmtrain.config.schedules import block_size, tokens_until
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.planning import memory, sizes
from llmtrain.planning.hardware import HardwareOptions, Parallel
from llmtrain.planning.memory import Layout, Usage, micro_batches
from llmtrain.planning.sizes import Architecture, DiskUsage
from llmtrain.runtime.hardware import Datasheet, Precision, datasheet

DEFAULT_MICRO_BATCH = 16
"""Upper limit of an `auto` micro-batch if the device's memory is unknown."""
WINDOW = 5
"""Checkpoints in the LAWA window of the averaging estimate."""
MERGE_THREADS = 4
MFU = 0.4
"""Assumed model FLOPs utilization: share of the dense peak."""
DEVICES_PER_MACHINE = 8
"""GPUs that NVLink connects; the network connects more."""
NETWORK = 50e9
"""Bytes/s of a GPU in each direction: one 400 Gb/s card. Rings over eight cards can be faster."""
DISK = 2e9
"""Assumed bytes/s of the disk, reading and writing together."""


_MAX_CHECKPOINTS = 10**6


@dataclass(frozen=True)
class Machine:
    """The devices of an estimate; unknown values are None."""

    device: str
    precision: Precision
    layout: Layout
    micro_batch: int
    memory: float | None
    flops: float | None
    """FLOP/s that one device sustains."""
    mfu: float | None
    link: float | None
    """Bytes/s of one device in each direction."""
    disk: float
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Communication:
    """Traffic of one device in a step, and how much of it computation hides."""

    bytes: int
    seconds: float | None = None
    hidden: bool | None = None
    exposed_seconds: float | None = None
    """Seconds that do not overlap with computation."""


@dataclass(frozen=True)
class Averaging:
    """Cost of one `llmtrain average` command."""

    label: str
    averages: int
    read: int
    written: int
    memory: int
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

    tokens_per_second: float | None = None
    step_seconds: float | None = None
    hours: float | None = None
    """With all communication hidden."""
    hours_exposed: float | None = None
    """With exposed communication added to every step."""
    device_hours: float | None = None


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
    """Estimate the cost of a run; raise UserError if the options do not fit the config."""
    _require_countable(config)
    model = Architecture(config.model, config.data.block_size)
    machine = _resolve_machine(config, options, model.flops_per_token())
    config = config.with_micro_batch(machine.micro_batch)
    communication = _communication(config, model, machine)
    usages = memory.device_memory(config, machine.layout)
    top = memory.peak(usages)
    fits = None if machine.memory is None else top.total <= machine.memory
    return CostEstimate(
        parameters=model.parameters,
        parameters_without_embeddings=model.without_embeddings,
        flops_per_token=model.flops_per_token(),
        flops=_flops(config, model),
        tokens=tokens_until(config.train.max_steps, config),
        steps=config.train.max_steps,
        micro_batches=micro_batches(config, machine.layout),
        machine=machine,
        memory=Memory(top, usages, fits, memory.host_memory(config, machine.layout)),
        time=_time(config, model, machine, communication),
        communication=communication,
        storage=sizes.disk_usage(config),
        averaging=_averaging(config),
    )


def _time(
    config: RunConfig, model: Architecture, machine: Machine, communication: Communication | None
) -> Time:
    if not machine.flops:
        return Time()
    devices = machine.layout.devices
    speed = machine.flops * devices
    rate = speed / model.flops_per_token()
    step = config.tokens_per_step / rate
    hours = _flops(config, model) / speed / 3600
    exposed = communication.exposed_seconds if communication else 0.0
    hours_exposed = None if exposed is None else hours * (1 + exposed / step)
    return Time(rate, step, hours, hours_exposed, hours * devices)


def _resolve_machine(config: RunConfig, options: HardwareOptions, flops_per_token: int) -> Machine:
    """Fill in the options from data sheets and the config."""
    options.check()
    device = options.device.lower()
    sheet = Datasheet(0.0, None) if device in ("cpu", "other") else datasheet(device)
    precision, precision_note = _precision(config, device)
    item = 2 if precision == "bfloat16" else 4
    layout = Layout(options.devices, _parallel(config, options), item, cuda=device != "cpu")
    memory.check_batch(config, options.devices)
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


def _require_countable(config: RunConfig) -> None:
    """Raise UserError if the estimate would list more steps than fit in memory."""
    every = min(config.checkpoint.snapshot_every, config.checkpoint.state_every)
    if config.train.max_steps // every > _MAX_CHECKPOINTS:
        raise UserError(
            f"train.max_steps {config.train.max_steps:,} would save a checkpoint more than "
            f"{_MAX_CHECKPOINTS:,} times",
            hint="plan a shorter run, or raise checkpoint.snapshot_every and state_every",
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

    DDP: a float32 ring all-reduce during the last micro-batch's backward pass. FSDP: an all-gather
    in the precision of matrix products during each forward pass (a third of the computation) and
    each backward pass, and a float32 reduce-scatter during the last one.
    """
    layout = machine.layout
    if layout.devices == 1:
        return None
    once = model.parameters * (layout.devices - 1) / layout.devices  # numbers per ring pass
    times = micro_batches(config, layout)
    gather = once * layout.item if layout.sharded else 0.0
    reduce = once * sizes.FLOAT * (1 if layout.sharded else 2)
    sent = round(times * 2 * gather + reduce)
    if machine.link is None:
        return Communication(sent)
    seconds = sent / machine.link
    if not machine.flops:
        return Communication(sent, seconds)
    flops = memory.micro_batch(config) * config.data.block_size * model.flops_per_token()
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
    windows = sliding_windows(sizes.snapshot_steps(config), every=every, size=WINDOW)
    if not windows:
        return []
    label, folder = f"LAWA {WINDOW}×{every}", sizes.snapshot_bytes(config)
    last, all_ = f"{label}, the last", f"{label}, all (--at all)"
    return [_merge(last, windows[-1:], folder), _merge(all_, windows, folder)]


def _merge(label: str, windows: list[Window], folder: int) -> Averaging:
    """Estimate a merge that reads each input once."""
    read = len({step for window in windows for step in window}) * folder
    written = len(windows) * folder
    open_sums = min(len(windows), len(windows[0]))
    # A thread holds one chunk as stored, three for work, one rounded, and the open sums.
    buffers = MERGE_THREADS * CHUNK * sizes.DOUBLE * (5 + open_sums)
    return Averaging(label, len(windows), read, written, buffers, (read + written) / DISK)


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


def _micro_batch(
    config: RunConfig, layout: Layout, available: float | None
) -> tuple[int, str | None]:
    if config.train.micro_batch != "auto":
        return config.train.micro_batch, None
    candidates = memory.divisors(config.batch_size // layout.devices)
    if available is None:
        size = max(n for n in candidates if n <= DEFAULT_MICRO_BATCH)
        return size, f"micro-batch: auto means {size}, because the device's memory is unknown"
    totals = {
        n: memory.peak(memory.device_memory(config.with_micro_batch(n), layout)).total
        for n in candidates
    }
    size = max((n for n in candidates if totals[n] <= memory.USABLE * available), default=1)
    return size, f"micro-batch: auto means {size}, the largest in {memory.USABLE:.0%} of the memory"


def _speed(
    options: HardwareOptions, dense: float | None, flops_per_token: int
) -> tuple[float | None, str | None]:
    if options.tokens_per_second is not None:
        flops = options.tokens_per_second * flops_per_token / options.devices
        note = f"{options.tokens_per_second:,.0f} tokens/s measured on all devices"
        return flops, f"speed: {note}, --tokens-per-second"
    if dense is None:
        return None, None
    mfu = options.mfu or MFU
    peak = f"{dense / 1e12:,.6g} TFLOP/s per device"
    return dense * mfu, f"speed: {mfu:.0%} (--mfu) of {peak}, published dense bfloat16 peak"


def _link(options: HardwareOptions, sheet: Datasheet) -> tuple[float | None, str | None]:
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

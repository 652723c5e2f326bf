"""On what the run is planned: devices, their speed, links and disk, and what of it is an assumption.

Why: a plan is as good as its assumptions, so each is a number with a source, or one that the user gave,
or it is missing and what depends on it is not computed.

    machine = resolve_machine(config, Options(devices=8, device="h100"))
"""

from dataclasses import dataclass

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.planning.memory import USABLE, Layout, Parallel, device_memory, divisors, peak
from llmtrain.runtime.device import Datasheet, Precision, datasheet, resolve_precision

DEVICES_A_MACHINE = 8
"""GPUs that NVLink joins; beyond them the network does."""
NETWORK = 50e9
"""Bytes/s and GPU in each direction: NDR InfiniBand, 400 Gb/s, a card for each GPU.

As if each GPU's traffic left through its own card. Rings over all eight cards of a machine leave most of it
to NVLink and can come near eight times this.
"""
USUAL_MICRO_BATCH = 16
"""The most for `auto` where nothing says what fits: the default of train.micro_batch."""
MFU = 0.4
"""Model FLOPs over the dense peak, where none is given."""


@dataclass(frozen=True)
class HardwareOptions:
    """What the user says of the machine."""

    devices: int = 1
    device: str = "h100"
    parallel: Parallel | None = None
    """Default: train.parallel, auto being ddp."""
    mfu: float | None = None
    flops: float | None = None
    """Dense peak of one device, FLOP/s, instead of the published one."""
    tokens_per_second: float | None = None
    """Measured, of all devices; then there is nothing to assume of their speed."""
    interconnect_gbps: float | None = None
    """GB/s of one device in each direction."""
    disk_gbps: float = 2.0
    """GB/s, reading and writing together."""
    window: int = 5
    every: int | None = None
    """Steps between two snapshots of a window; default: checkpoint.snapshot_every."""


@dataclass(frozen=True)
class Machine:
    """The devices as the plan takes them; what is not known is None."""

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
    """What that is of the dense peak."""
    link: float | None
    """Bytes/s of one device in each direction."""
    disk: float
    """Bytes/s."""
    assumptions: tuple[str, ...]


def resolve_machine(config: RunConfig, options: HardwareOptions, flops_per_token: int) -> Machine:
    """The machine that the options mean, with defaults from data sheets.

    Raises:
        UserError: a value out of range, a device that is not in the table, a batch that does not divide.
    """
    _check(options)
    device = options.device.lower()
    sheet = Datasheet(0.0, None) if device in ("cpu", "other") else datasheet(device)
    precision, assumed = _precision(config, device)
    layout = Layout(
        options.devices,
        _parallel(config, options),
        2 if precision == "bfloat16" else 4,
        cuda=device != "cpu",
    )
    check_batch(config, options.devices)
    micro_batch, chosen = _micro_batch(config, layout, sheet.memory)
    dense = options.flops or (sheet.flops if precision == "bfloat16" else 0.0) or None
    if options.tokens_per_second is not None:
        sustained: float | None = options.tokens_per_second * flops_per_token / options.devices
        speed: str | None = (
            f"speed: {options.tokens_per_second:,.0f} tokens/s measured on all devices, --tokens-per-second"
        )
    else:
        sustained = dense and dense * (options.mfu or MFU)
        speed = _say_speed(options, dense)
    link, linked = _link(options, sheet)
    disk = f"disk: {options.disk_gbps:g} GB/s, reading and writing together, --disk-gbps"
    return Machine(
        device=device,
        precision=precision,
        layout=layout,
        micro_batch=micro_batch,
        memory=sheet.memory,
        flops=sustained,
        mfu=sustained / dense if sustained and dense else None,
        link=link,
        disk=options.disk_gbps * 1e9,
        assumptions=tuple(
            line
            for line in (
                speed,
                linked,
                disk,
                assumed,
                chosen,
                _say_memory(layout),
                _say_again(config),
            )
            if line
        ),
    )


def _check(options: HardwareOptions) -> None:
    positive = {
        "--devices": options.devices,
        "--mfu": options.mfu,
        "--flops": options.flops,
        "--tokens-per-second": options.tokens_per_second,
        "--interconnect-gbps": options.interconnect_gbps,
        "--disk-gbps": options.disk_gbps,
        "--window": options.window,
        "--every": options.every,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(
                f"{name} {value:g} is no number above 0",
                hint=f"see llmtrain plan --help for {name}",
            )
    if options.mfu is not None and options.mfu > 1:
        raise UserError(
            f"--mfu {options.mfu:g} is above 1, the device's peak",
            hint="a share of it, such as --mfu 0.4",
        )
    if options.tokens_per_second is not None and (
        options.mfu is not None or options.flops is not None
    ):
        raise UserError(
            "--tokens-per-second is a measured speed, and --mfu and --flops an assumed one",
            hint="give one or the other",
        )


def check_batch(config: RunConfig, processes: int) -> None:
    """Raise a UserError unless a step's sequences divide among the processes, and each's into micro-batches."""
    sequences, micro = config.batch_size, config.train.micro_batch
    each, rest = divmod(sequences, processes)
    if rest:
        key, unit = "batch_sequences", 1
        if config.train.batch_tokens is not None:
            key, unit = "batch_tokens", config.data.block_size
        fitting_sizes = [n * processes * unit for n in (each, each + 1) if n]
        said = " or ".join(f"{n:,}" for n in fitting_sizes)
        raise UserError(
            f"train.{key} {sequences * unit:,} does not divide over {processes:,} processes: {said} would",
            hint=f"--set train.{key}={fitting_sizes[-1]}, or another number of processes",
        )
    if micro != "auto" and each % micro:
        fitting = next(n for n in range(min(micro, each), 0, -1) if each % n == 0)
        raise UserError(
            f"a step of {sequences:,} sequences leaves {each:,} for each of {processes:,} processes, which does not "
            f"divide into train.micro_batch {micro}: {fitting} would",
            hint=f"--set train.micro_batch={fitting}",
        )


def _micro_batch(config: RunConfig, layout: Layout, memory: float | None) -> tuple[int, str | None]:
    """The micro-batch, and what was assumed where it is left to the run.

    The run itself takes a smaller one where that is as fast.
    """
    if config.train.micro_batch != "auto":
        return config.train.micro_batch, None
    sizes = divisors(config.batch_size // layout.devices)
    if memory is None:
        size = max(n for n in sizes if n <= USUAL_MICRO_BATCH)
        return size, f"micro-batch: auto is taken for {size}, as the device's memory is not known"
    fitting = [
        n
        for n in sizes
        if peak(device_memory(config.with_micro_batch(n), layout)).total <= USABLE * memory
    ]
    size = max(fitting, default=1)
    return (
        size,
        f"micro-batch: auto is taken for {size}, the largest in {USABLE:.0%} of the device's memory",
    )


def _precision(config: RunConfig, device: str) -> tuple[Precision, str | None]:
    """The precision of matrix products, and what was assumed where the config leaves it open."""
    if config.train.precision != "auto":
        return config.train.precision, None
    if device == "other":
        return "bfloat16", "precision: auto is taken for bfloat16, --set train.precision=float32"
    if device != "cpu":
        return "bfloat16", None
    import torch  # only this machine's processor can tell what it multiplies

    precision = resolve_precision("auto", torch.device("cpu"))
    return precision, f"precision: auto, which is {precision} on this machine"


def _say_speed(options: HardwareOptions, peak: float | None) -> str | None:
    if peak is None:
        return None
    source = "--flops" if options.flops else "published dense bfloat16 peak"
    return (
        f"speed: {options.mfu or MFU:.0%} (--mfu) of {peak / 1e12:,.6g} TFLOP/s a device, {source}"
    )


def _parallel(config: RunConfig, options: HardwareOptions) -> Parallel:
    setting = options.parallel or config.train.parallel
    if setting == "hsdp":
        raise UserError(
            "hsdp is not planned", hint="--parallel fsdp is its memory and time within one machine"
        )
    return "fsdp" if setting == "fsdp" else "ddp"


def _say_again(config: RunConfig) -> str | None:
    if not config.train.activation_checkpointing:
        return None
    return "activation checkpointing computes a third more than is counted: expect a lower --mfu"


def _say_memory(layout: Layout) -> str:
    left_out = "; CUDA, NCCL and fragmentation take more" if layout.cuda else ""
    return f"memory: that of tensors, uncompiled{left_out}"


def _link(options: HardwareOptions, sheet: Datasheet) -> tuple[float | None, str | None]:
    if options.devices == 1:
        return None, None
    if options.interconnect_gbps is not None:
        rate, source = options.interconnect_gbps * 1e9, "--interconnect-gbps"
    elif options.devices <= DEVICES_A_MACHINE and sheet.link is not None:
        rate, source = sheet.link, "NVLink, --interconnect-gbps"
    elif options.devices > DEVICES_A_MACHINE and sheet.flops:
        rate, source = NETWORK, "a 400 Gb/s card, --interconnect-gbps"
    else:
        return None, None
    return rate, f"links: {rate / 1e9:g} GB/s a device each way, {source}"

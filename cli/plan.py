"""`llmtrain plan`: what a run will cost, before anything of it exists.

llmtrain plan --config configs/gpt2-small.yaml --devices 8 --device h100
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Column, Table

from .common import console, print_json

if TYPE_CHECKING:
    from llmtrain.planning.estimate import CostEstimate


class Parallel(StrEnum):
    """How a run is spread over several devices."""

    DDP = "ddp"
    FSDP = "fsdp"


_SPEED = "Speed"
_AVERAGING = "Averaging"


def plan(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file, such as configs/gpt2-small.yaml.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override a key of the config; repeatable."
        ),
    ] = None,
    devices: Annotated[int, typer.Option(help="How many.")] = 1,
    device: Annotated[
        str,
        typer.Option(
            help="h200, h100, h100-pcie, h100-nvl, a100-80gb, a100-40gb, a100, l40s, l4, a10g, cpu, or other: one of "
            "which nothing is known."
        ),
    ] = "h100",
    parallel: Annotated[
        Parallel | None,
        typer.Option(
            help="ddp: a whole copy on each device. fsdp: sharded.", show_default="train.parallel"
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Share of the dense peak that training reaches; an assumption.",
            show_default="0.4",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            help="Dense peak of one device in FLOP/s.",
            show_default="published",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            help="Measured, of all devices; instead of --mfu.",
            show_default=False,
            rich_help_panel=_SPEED,
        ),
    ] = None,
    interconnect_gbps: Annotated[
        float | None,
        typer.Option(
            help="GB/s (gigabytes) of one device in each direction.",
            show_default="NVLink's up to 8 devices, 50 beyond",
            rich_help_panel=_SPEED,
        ),
    ] = None,
    disk_gbps: Annotated[
        float,
        typer.Option(help="GB/s of the disk, both ways together.", rich_help_panel=_AVERAGING),
    ] = 2.0,
    window: Annotated[
        int, typer.Option(help="Checkpoints in a window (LAWA).", rich_help_panel=_AVERAGING)
    ] = 5,
    every: Annotated[
        int | None,
        typer.Option(
            help="Training steps between two of them.",
            show_default="checkpoint.snapshot_every",
            rich_help_panel=_AVERAGING,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document and nothing else; sizes in bytes."),
    ] = False,
) -> None:
    """Show what a run will cost, from its configuration alone: no data, no GPU, nothing written.

    Parameters and FLOPs, memory of one device at its peak, hours, communication, disk, averaging. The model
    is taken uncompiled; torch.compile needs less memory. Assumptions are printed; what is not known is n/a.
    """
    from llmtrain.config.loading import load_config
    from llmtrain.planning.estimate import estimate
    from llmtrain.planning.machine import HardwareOptions

    options = HardwareOptions(
        devices=devices,
        device=device,
        parallel=parallel.value if parallel else None,
        mfu=mfu,
        flops=flops,
        tokens_per_second=tokens_per_second,
        interconnect_gbps=interconnect_gbps,
        disk_gbps=disk_gbps,
        window=window,
        every=every,
    )
    result = estimate(load_config(config, settings or []), options)
    if as_json:
        print_json(_document(result))
        return
    for table in (_run(result), _memory(result), _time(result), _disk(result), _averaging(result)):
        console.print(table)
        console.print()
    console.print("Assumptions", style="bold")
    for line in result.machine.assumptions:
        console.print(f"  {line}", markup=False)


def _table(title: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    named = [Column(name, justify=justify, no_wrap=True) for name in columns]
    return Table(
        Column(min_width=24),
        *named,
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=any(columns),
    )


def _run(plan: "CostEstimate") -> Table:
    model, layout = plan.architecture, plan.machine.layout
    table = _table("Model and run", "", justify="left")
    sequences = (
        f"{plan.tokens_per_step // model.block_size // layout.devices // plan.micro_batches:,}"
    )
    table.add_row("parameters", f"{model.parameters:,}")
    table.add_row("  without embeddings", f"{model.without_embeddings:,}")
    table.add_row(
        "tokens", f"{plan.tokens_per_step:,} a step, {plan.steps:,} steps, {plan.tokens:,} in all"
    )
    table.add_row("FLOPs", f"{model.flops_per_token():.3g} a token, {plan.flops:.3g} in all")
    table.add_row("devices", f"{layout.devices:,} × {plan.machine.device}" + _spread(plan))
    table.add_row(
        "a device's step", f"{plan.micro_batches} × {sequences} sequences of {model.block_size:,}"
    )
    table.add_row("precision", plan.machine.precision)
    return table


def _spread(plan: "CostEstimate") -> str:
    return f", {plan.machine.layout.parallel}" if plan.machine.layout.devices > 1 else ""


_NAMES = {
    "weights": "weights (float32)",
    "optimizer": "the optimizer's moments",
    "averages": "online averages",
    "gradients": "gradients",
    "copies": "weights as multiplied",
    "activations": "activations",
    "logits": "logits and loss",
    "buffers": "buffers",
    "written": "copy that is written",
}


def _memory(plan: "CostEstimate") -> Table:
    """Each part at the peak and at most: what is large is not all there at once."""
    from llmtrain.planning.memory import peak

    top = peak(plan.usages)
    table = _table("Memory of one device", "at the peak", "at most")
    for part, name in _NAMES.items():
        most = max(getattr(usage, part) for usage in plan.usages)
        if most:
            table.add_row(name, size(getattr(top, part)), size(most))
    table.add_row("peak", size(top.total), "", style="bold")
    table.add_row(f"  {top.moment}")
    table.add_row("fits", _fits(plan, top.total))
    if plan.machine.layout.cuda:
        table.add_row("host, saving a state", size(plan.host_memory))
    return table


def _fits(plan: "CostEstimate", used: int) -> str:
    """The rest must hold what is not counted."""
    if plan.machine.memory is None:
        return "n/a"
    rest = plan.machine.memory - used
    return (
        f"{'yes, ' if rest >= 0 else 'no, '}{size(abs(rest))} {'left' if rest >= 0 else 'too much'}"
    )


def _time(plan: "CostEstimate") -> Table:
    table = _table("Time and communication", "")
    devices, sent = plan.machine.layout.devices, plan.communication
    table.add_row("tokens/s", number(plan.tokens_per_second))
    table.add_row("a step", seconds(plan.step_seconds))
    table.add_row(
        "hours", number(plan.hours) if plan.hours else "n/a without --flops or --tokens-per-second"
    )
    table.add_row("device-hours", number(plan.hours and plan.hours * devices))
    if sent is not None and sent.hidden is False:
        table.add_row("hours, exposed added", number(plan.hours_exposed))
    if sent is not None:
        table.add_row("sent by a device a step", size(sent.bytes))
        table.add_row("  takes", seconds(sent.seconds))
        hidden = {
            None: "n/a",
            True: "yes",
            False: f"no, {seconds(sent.exposed_seconds)} a step are not",
        }
        table.add_row("  hidden by computation", hidden[sent.hidden])
    return table


def _disk(plan: "CostEstimate") -> Table:
    storage = plan.storage
    table = _table("Disk at the end of the run", "folders", "each", "together")
    for saved in (storage.snapshots, *storage.averages, storage.states):
        table.add_row(saved.label, f"{saved.count:,}", size(saved.bytes_each), size(saved.bytes))
    table.add_row("total", "", "", size(storage.total), style="bold")
    table.add_row("  at its fullest", "", "", size(storage.largest))
    return table


def _averaging(plan: "CostEstimate") -> Table:
    table = _table(
        "Averaging with llmtrain average", "averages", "read", "written", "buffers", "takes"
    )
    for work in plan.averaging:
        table.add_row(
            work.label, f"{work.averages:,}", size(work.read), size(work.written), size(work.memory),
            seconds(work.seconds),
        )  # fmt: skip  # one line of cells
    if not plan.averaging:
        table.add_row("no complete window")
    return table


def size(count: float) -> str:
    """Bytes in three digits: `498 MB`, `1.99 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{_three(count)} {unit}"


def seconds(value: float | None) -> str:
    """Three digits with the unit a person would choose; None is n/a."""
    if value is None:
        return "n/a"
    if value >= 7200:
        return f"{_three(value / 3600)} h"
    return f"{_three(value)} s" if value >= 1 else f"{_three(value * 1000)} ms"


def number(value: float | None) -> str:
    """Three digits; None is n/a."""
    return "n/a" if value is None else _three(value)


def _three(value: float) -> str:
    if value >= 100:
        return f"{round(value, 3 - len(str(int(value)))):,.0f}"
    return f"{value:.3g}"


def _document(plan: "CostEstimate") -> dict[str, Any]:
    """The plan as JSON; what is not known is null."""
    from dataclasses import asdict

    from llmtrain.planning.memory import peak

    top, model = peak(plan.usages), plan.architecture
    fits = None if plan.machine.memory is None else top.total <= plan.machine.memory
    storage = plan.storage
    return {
        "parameters": model.parameters,
        "parameters_without_embeddings": model.without_embeddings,
        "flops_per_token": model.flops_per_token(),
        "flops": plan.flops,
        "tokens": plan.tokens,
        "steps": plan.steps,
        "micro_batches": plan.micro_batches,
        "machine": asdict(plan.machine),
        "memory": {
            "peak": asdict(top) | {"total": top.total},
            "moments": [asdict(usage) | {"total": usage.total} for usage in plan.usages],
            "fits": fits,
            "host": plan.host_memory,
        },
        "time": {
            "tokens_per_second": plan.tokens_per_second,
            "step_seconds": plan.step_seconds,
            "hours": plan.hours,
            "hours_exposed": plan.hours_exposed,
            "device_hours": plan.hours and plan.hours * plan.machine.layout.devices,
        },
        "communication": asdict(plan.communication) if plan.communication else None,
        "storage": asdict(storage) | {"total": storage.total, "largest": storage.largest},
        "averaging": [asdict(work) for work in plan.averaging],
    }

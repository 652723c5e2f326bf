"""The `llmtrain plan` command."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Column, Table

from llmtrain.planning.hardware import HardwareOptions, Parallel

from .common import JsonFlag, SetOption, console, format_bytes, format_number, help_of, print_json

if TYPE_CHECKING:
    from llmtrain.config.schema import RunConfig
    from llmtrain.planning.estimate import CostEstimate


def _option(field: str, panel: str | None = None, *, default: bool | str = True) -> Any:
    help_text = help_of(HardwareOptions, field)
    return typer.Option(help=help_text, show_default=default, rich_help_panel=panel)


def plan(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file, such as configs/gpt2-small.yaml.")
    ],
    settings: SetOption = None,
    devices: Annotated[int, _option("devices")] = 1,
    device: Annotated[str, _option("device")] = "h100",
    parallel: Annotated[Parallel | None, _option("parallel", default="train.parallel")] = None,
    mfu: Annotated[float | None, _option("mfu", "Speed", default="0.4")] = None,
    tokens_per_second: Annotated[
        float | None, _option("tokens_per_second", "Speed", default=False)
    ] = None,
    interconnect_gbps: Annotated[
        float | None,
        _option("interconnect_gbps", "Speed", default="NVLink's up to 8 devices, 50 beyond"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Estimate the cost of a run from its configuration, without data or a GPU.

    Prints parameters, FLOPs, peak memory of one device, hours, communication, disk and averaging.
    Assumes an uncompiled model; torch.compile needs less memory. Lists its assumptions; unknown
    values are n/a.
    """
    from llmtrain.config.loading import load_config
    from llmtrain.planning.estimate import estimate

    options = HardwareOptions(devices, device, parallel, mfu, tokens_per_second, interconnect_gbps)
    run = load_config(config, settings or [])
    result = estimate(run, options)
    if as_json:
        print_json(asdict(result))
        return
    console.print(_run(run, result), "")
    for table in (_memory, _time, _disk, _averaging):
        console.print(table(result), "")
    console.print("Assumptions", style="bold")
    for line in result.machine.assumptions:
        console.print(f"  {line}")


def _table(title: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    return Table(
        Column(min_width=24),
        *(Column(name, justify=justify, no_wrap=True) for name in columns),
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=any(columns),
    )


def _run(run: "RunConfig", plan: "CostEstimate") -> Table:
    layout = plan.machine.layout
    spread = f", {layout.parallel}" if layout.devices > 1 else ""
    sequences = f"{plan.machine.micro_batch:,} sequences of {run.data.block_size:,}"
    table = _table("Model and run", "", justify="left")
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("  without embeddings", f"{plan.parameters_without_embeddings:,}")
    per_step = f"{run.tokens_per_step:,} per step"
    table.add_row("tokens", f"{per_step} × {plan.steps:,} = {plan.tokens:,}")
    table.add_row("FLOPs", f"{plan.flops_per_token:.3g} per token, {plan.flops:.3g} in total")
    table.add_row("devices", f"{layout.devices:,} × {plan.machine.device}{spread}")
    table.add_row("step of one device", f"{plan.micro_batches} × {sequences}")
    table.add_row("precision", plan.machine.precision)
    return table


def _memory(plan: "CostEstimate") -> Table:
    """Show each part at the peak and at its own maximum, which can be another moment."""
    top = plan.memory.peak
    table = _table("Memory of one device", "at the peak", "at most")
    for part in (name for name in vars(top) if name not in ("moment", "total")):
        most = max(getattr(usage, part) for usage in plan.memory.moments)
        if most:
            table.add_row(part, format_bytes(getattr(top, part)), format_bytes(most))
    table.add_row("peak", format_bytes(top.total), "", style="bold")
    table.add_row(f"  {top.moment}")
    table.add_row("fits", _fits(plan.machine.memory, top.total))
    if plan.machine.layout.cuda:
        table.add_row("host, saving checkpoint", format_bytes(plan.memory.host))
    return table


def _fits(memory: float | None, used: int) -> str:
    if memory is None:
        return "n/a"
    difference = format_bytes(abs(memory - used))
    return f"yes, {difference} left" if used <= memory else f"no, {difference} too much"


def _time(plan: "CostEstimate") -> Table:
    table = _table("Time and communication", "")
    time, sent = plan.time, plan.communication
    hours = format_number(time.hours) if time.hours else "n/a without --tokens-per-second"
    table.add_row("tokens/s", format_number(time.tokens_per_second))
    table.add_row("time per step", _seconds(time.step_seconds))
    table.add_row("hours", hours)
    table.add_row("device-hours", format_number(time.device_hours))
    if sent is None:
        return table
    if sent.hidden is False:
        table.add_row("hours, exposed added", format_number(time.hours_exposed))
    table.add_row("sent per device and step", format_bytes(sent.bytes))
    table.add_row("  takes", _seconds(sent.seconds))
    exposed = f"no, {_seconds(sent.exposed_seconds)} per step are exposed"
    overlap = {None: "n/a", True: "yes", False: exposed}[sent.hidden]
    table.add_row("  hidden by computation", overlap)
    return table


def _disk(plan: "CostEstimate") -> Table:
    storage = plan.storage
    table = _table("Disk at the end of the run", "folders", "each", "total")
    for saved in (storage.snapshots, *storage.averages, storage.states):
        sizes = map(format_bytes, (saved.bytes_each, saved.bytes))
        table.add_row(saved.label, f"{saved.count:,}", *sizes)
    table.add_row("total", "", "", format_bytes(storage.total), style="bold")
    table.add_row("  maximum during the run", "", "", format_bytes(storage.largest))
    return table


def _averaging(plan: "CostEstimate") -> Table:
    columns = ("averages", "read", "written", "buffers", "time")
    table = _table("Averaging with llmtrain average", *columns)
    for work in plan.averaging:
        sizes = map(format_bytes, (work.read, work.written, work.memory))
        table.add_row(work.label, f"{work.averages:,}", *sizes, _seconds(work.seconds))
    if not plan.averaging:
        table.add_row("no complete window")
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return "n/a"
    if value >= 7200:
        return f"{format_number(value / 3600)} h"
    return f"{format_number(value)} s" if value >= 1 else f"{format_number(value * 1000)} ms"

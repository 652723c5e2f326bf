"""Profile a training step by operation.

Times are self times. The profiler adds overhead, so the sum exceeds an unprofiled step.

    profile("6x384")
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from llmtrain.runtime.device import resolve_device

from .loops import step_of_ours
from .measure import Figures, Row, Side, Worker, publish, rows, take_turns
from .shapes import MODELS, Shape, shape_of, write_tokens

OPERATIONS = 15
"""Number of operations listed by name."""
_STEP, _REST = "step", "all others"


def profile(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "6x384",
    rounds: Annotated[int, typer.Option(min=1, help="Measured steps.")] = 5,
    set_: Annotated[list[str], typer.Option("--set", help="SECTION.KEY=VALUE of our config.")] = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure the operations of a training step."""
    publish(measure(model, rounds=rounds, settings=set_), json)


def measure(model: str, *, rounds: int, settings: list[str]) -> list[Row]:
    """Return the rows of one model: the step, then its longest operations."""
    shape = shape_of(model)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        steps = take_turns({_STEP: Worker(operations, shape, Path(folder), settings)}, rounds)[
            _STEP
        ]
    means = {
        name: sum(step.get(name, 0.0) for step in steps) / rounds for step in steps for name in step
    }
    most = sorted(means.keys() - {_STEP}, key=lambda name: -means[name])[:OPERATIONS]
    taken = {name: [{"ms": step.get(name, 0.0)} for step in steps] for name in (_STEP, *most)}
    taken[_REST] = [
        {"ms": step[_STEP] - sum(step.get(name, 0.0) for name in most)} for step in steps
    ]
    return rows(f"a step of {model}, block {shape.block}, batch {shape.batch}", taken, _STEP, {})


def operations(shape: Shape, data: Path, settings: list[str]) -> Side:
    """Build a side that returns the milliseconds of a profiled step and of its operations."""
    step, device = step_of_ours(shape, data, settings), resolve_device("auto")
    cuda = device.type == "cuda"

    def once() -> Figures:
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
        ) as seen:
            started = time.perf_counter()
            step().item()  # waits for the device
            seconds = time.perf_counter() - started
        found = {
            event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
            for event in seen.key_averages()
            if event.device_type == DeviceType.CPU  # a kernel's time also counts for its launcher
        }
        return found | {_STEP: 1e3 * seconds}

    return once

"""Training: tokens per second, memory and share of the device's rate, compared with other loops.

The measured code is `Trainer.step` of `llmtrain pretrain`, with schedule, clipping, spike detector
and sampler, not a loop written for the benchmark.

    train(["plain"], model="6x384")
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llmtrain.runtime.device import peak_flops, resolve_device

from . import loops
from .measure import Row, Side, Worker, publish, rows, take_turns
from .shapes import MODELS, shape_of, write_tokens

OURS, FRUGAL, GRAPHS, MATRIX = "llmtrain", "… recomputing", "… as CUDA graphs", "matrix product"
_RECOMPUTE, _REPLAY = "train.activation_checkpointing=true", "train.compile=cuda-graphs"
_GPU_TARGETS = {"gpt2-small": "≥ 0.50", "gpt2-medium": "≥ 0.55", "gpt2-large": "≥ 0.55"}
_TARGETS = {
    "6x384": {
        (OURS, "tokens/s"): "≥ 2.6 × plain",
        (OURS, "GB"): "≤ 0.45 × plain",
        (OURS, "share"): "≥ 0.75",
    },
    "gpt2-small": {(OURS, "tokens/s"): "≥ 2.5 × plain"},
}


def train(
    against: Annotated[
        list[str],
        typer.Option(
            help="plain (eager, float32), transformers, or a checkout with nanoGPT's model.py."
        ),
    ] = ["plain"],  # noqa: B006  (typer's convention)
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "6x384",
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences a step.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps in a round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    set_: Annotated[list[str], typer.Option("--set", help="SECTION.KEY=VALUE of our config.")] = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure training."""
    publish(measure(against, model, batch=batch, steps=steps, rounds=rounds, settings=set_), json)


def measure(
    against: list[str],
    model: str,
    *,
    batch: int | None,
    steps: int,
    rounds: int,
    settings: list[str],
) -> list[Row]:
    """Return the rows of one model."""
    shape = shape_of(model) if batch is None else replace(shape_of(model), batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        sides: dict[str, Side] = {
            OURS: Worker(loops.ours, shape, Path(folder), steps, settings),
            FRUGAL: Worker(loops.ours, shape, Path(folder), steps, [*settings, _RECOMPUTE]),
        }
        if resolve_device("auto").type == "cuda":
            sides[GRAPHS] = Worker(loops.ours, shape, Path(folder), steps, [*settings, _REPLAY])
        named = {
            other if other in loops.OTHERS else Path(other).resolve().name: other
            for other in against
        }
        if len(named) < len(against) or OURS in named:
            raise typer.BadParameter("two sides have the same name", param_hint="--against")
        for other in named.values():
            if other not in loops.OTHERS and not (Path(other) / "model.py").is_file():
                raise typer.BadParameter(f"{other} has no model.py", param_hint="--against")
        for name, other in named.items():
            builder: Callable[..., Side] = loops.OTHERS.get(other, loops.checkout)
            sides[name] = Worker(builder, shape, Path(folder), steps, other)
        sides[MATRIX] = Worker(loops.matrix_products)
        taken = take_turns(sides, rounds)
    products = [figures["TFLOP/s"] for figures in taken[MATRIX]]
    shares = [
        figures["tokens/s"] * loops.flops_per_token(shape) / 1e12 / rate
        for figures, rate in zip(taken[OURS], products, strict=True)
    ]
    taken[OURS] = [
        {**figures, "share": share} for figures, share in zip(taken[OURS], shares, strict=True)
    ]
    targets = _TARGETS.get(model, {})
    if peak := peak_flops(resolve_device("auto"), "bfloat16"):
        per_token = loops.flops_per_token(shape)
        taken[OURS] = [
            {**figures, "MFU": figures["tokens/s"] * per_token / peak} for figures in taken[OURS]
        ]
        targets = {
            (OURS, "MFU"): _GPU_TARGETS.get(model, ""),
            (OURS, "tokens/s"): "≥ 1.3 × nanoGPT",
        }
    return rows(
        f"train {model}, block {shape.block}, batch {shape.batch}",
        taken,
        next(iter(named), None),
        targets,
    )

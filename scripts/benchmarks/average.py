"""`llmtrain average` as a whole command: five checkpoints of GPT-2 small, or all windows of twenty.

The lower bound is `cat` and `cp`: any averaging must read every input and write one output. Files
are in the page cache, so disks are not measured.

    average(against="plain")
"""

import shutil
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape, save_weights
from llmtrain.config.loading import dump_config
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.model.gpt import GPT
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.run_folder import RunFolder

from .commands import LLMTRAIN, run
from .measure import Figures, Row, Side, publish, rows, take_turns

EVERY = 10
SIZES = {
    "last": (
        "5 checkpoints of 124M",
        5,
        ModelConfig(n_layer=12, n_head=12, n_embd=768, bias=False),
        1024,
    ),
    "all": (
        "16 windows of 20 of 30M",
        20,
        ModelConfig(n_layer=6, n_head=6, n_embd=384, bias=False),
        256,
    ),
}
"""For each --at: the name, the number of checkpoints, the model and its block size."""
TARGETS = {
    "last": {("llmtrain", "s"): "≤ 3 × cat + cp", ("llmtrain", "MB"): "≤ 300"},
    "all": {("llmtrain", "read/inputs"): "≤ 1.1"},
}


def average(
    at: Annotated[
        Literal["last", "all"],
        typer.Option(help="One average of 5, or every window of 5 among 20."),
    ] = "last",
    against: Annotated[
        Literal["plain"] | None,
        typer.Option(help="plain: whole state dicts, loaded and added one by one."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    work: Annotated[
        Path | None, typer.Option(help="Keep the checkpoints here and reuse existing ones.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure `llmtrain average` on checkpoints in the page cache."""
    publish(measure(at, against, rounds=rounds, work=work), json)


def measure(at: str, against: str | None, *, rounds: int, work: Path | None = None) -> list[Row]:
    """Return the rows of one average, or of all windows; see `SIZES`."""
    what, count, model, block = SIZES[at]
    with ExitStack() as stack:
        folder = (
            work.absolute()
            if work
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-average-")))
        )
        series = RunFolder(folder / f"run-{at}")
        if not series.config.exists():
            _write_run(series, count, Shape(model, block, model.vocab_size - 1))
        inputs = sorted(series.snapshots.glob("*/model.safetensors"))
        sides: dict[str, Side] = {"llmtrain": partial(_llmtrain, series, inputs, at)}
        if at == "last":
            sides["… --no-verify"] = partial(_llmtrain, series, inputs, at, "--checks", "no-verify")
            sides["cat + cp"] = partial(_copied, inputs, folder / "copy")
        if against == "plain":
            sides["plain"] = partial(_plain, inputs, folder / "plain.safetensors")
        taken = take_turns(sides, rounds)
    return rows(what, taken, against or ("cat + cp" if at == "last" else None), TARGETS[at])


def _write_run(series: RunFolder, count: int, shape: Shape) -> None:
    """Write snapshots like the trainer does: a model and a random walk from it."""
    steps = [EVERY * number for number in range(1, count + 1)]
    weights = dict(GPT(shape.model, shape.block_size, seed=1).named_parameters())
    generator = torch.Generator().manual_seed(1)
    for step in steps:
        for tensor in weights.values():
            tensor.data += 1e-3 * torch.randn(tensor.shape, generator=generator)
        with staged_folder(series.snapshot(step)) as folder:
            save_weights(folder, dict(weights), shape, Origin(step, step, 1e-3, "bench"))
    config = {
        "name": "bench",
        "data": {"path": "none", "block_size": shape.block_size},
        "model": shape.model.model_dump(),
        "schedule": {"name": "constant", "warmup_steps": 0},
        "train": {"max_steps": steps[-1], "batch_sequences": 1, "micro_batch": 1},
    }
    series.config.write_text(dump_config(RunConfig.model_validate(config)))


def _llmtrain(series: RunFolder, inputs: list[Path], at: str, *options: str) -> Figures:
    command = [
        "average",
        str(series.path),
        "--every",
        str(EVERY),
        "--window",
        "5",
        "--at",
        at,
        *options,
    ]
    figures = run([LLMTRAIN, *command], series.path.parent)
    shutil.rmtree(series.averages)
    size = sum(path.stat().st_size for path in inputs) / 1e6
    return {"s": figures["s"], "MB": figures["MB"], "read/inputs": figures["MB read"] / size}


def _copied(inputs: list[Path], copy: Path) -> Figures:
    files = " ".join(map(str, inputs))
    figures = run(["sh", "-c", f"cat {files} > /dev/null && cp {inputs[-1]} {copy}"], copy.parent)
    copy.unlink()
    return {"s": figures["s"]}


def _plain(inputs: list[Path], target: Path) -> Figures:
    command = [sys.executable, str(Path(__file__).with_name("plain_average.py")), str(target)]
    figures = run([*command, *map(str, inputs)], target.parent)
    target.unlink()
    return {name: figures[name] for name in ("s", "MB")}

"""How long the training loop blocks for a snapshot of GPT-2 small, compared with a blocking save.

Both sides run in turns because disk speed varies. The synchronous side waits for the save to end.

    snapshot(rounds=7)
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape
from llmtrain.checkpoints.shared_files import SharedFiles
from llmtrain.config.schema import ModelConfig
from llmtrain.model.gpt import GPT
from llmtrain.runtime.device import resolve_device
from llmtrain.runtime.distributed import World
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.snapshots import SnapshotWriter

from .measure import Figures, Row, publish, rows, take_turns

BLOCK = 1024


def snapshot(
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure how long the loop blocks for a snapshot of 124M parameters on this device."""
    publish(measure(rounds=rounds), json)


def measure(*, rounds: int) -> list[Row]:
    """Return the rows, with ratios to a blocking save."""
    shape = ModelConfig(n_layer=12, n_head=12, n_embd=768, bias=False)
    model = GPT(shape, BLOCK, seed=1).to(resolve_device("auto"))
    model_shape = Shape(shape, BLOCK, shape.vocab_size - 1)
    with tempfile.TemporaryDirectory(prefix="bench-snapshot-") as folder:
        run = RunFolder(Path(folder))
        shared = SharedFiles(run.tokenizer, model_shape, "gpt2")
        writer = SnapshotWriter(model, World(), model_shape, shared, failed=print)
        save = partial(_save, writer, model, run)
        sides = {"llmtrain": partial(save, wait=False), "synchronous": partial(save, wait=True)}
        taken = take_turns(sides, rounds)
        writer.close()
    targets = {("llmtrain", "s"): "ratio ≤ 0.20"}
    return rows("wait for a snapshot of 124M", taken, "synchronous", targets)


def _save(writer: SnapshotWriter, model: GPT, run: RunFolder, *, wait: bool) -> Figures:
    """Return the seconds until training can continue; later writing is not measured."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    writer.save(run.snapshot(1), dict(model.named_parameters()), Origin(1, 1, 1e-3, "bench"))
    if wait:
        writer.wait()
    seconds = time.perf_counter() - started
    writer.wait()
    return {"s": seconds}

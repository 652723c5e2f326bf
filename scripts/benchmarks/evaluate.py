"""Evaluation: tokens per second of the loss on a split, compared with training the same model.

An evaluation is a forward pass, a third of a training step's work.

    evaluate(model="6x384")
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from llmtrain.config.schema import ModelConfig
from llmtrain.data.token_data import open_training_data
from llmtrain.evaluation.loss import evaluate as loss_of_split
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.device import peak_memory, resolve_device, resolve_precision

from . import loops
from .measure import Figures, Row, Side, Worker, publish, rows, take_turns
from .shapes import MODELS, Shape, shape_of, write_tokens

_TARGETS = {("eval", "tokens/s"): "≥ 2.8 × training"}


def evaluate(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "6x384",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure evaluation compared with training."""
    publish(measure(model, rounds=rounds), json)


def measure(model: str, *, rounds: int) -> list[Row]:
    """Return the rows of one model."""
    shape = shape_of(model)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder))
        sides: dict[str, Side] = {
            "eval": Worker(evaluation, shape, Path(folder)),
            "training": Worker(loops.ours, shape, Path(folder), 3, []),
        }
        taken = take_turns(sides, rounds)
    return rows(f"eval {model}, block {shape.block}", taken, "training", _TARGETS)


def evaluation(shape: Shape, data: Path) -> Side:
    """Build the side of `llmtrain eval` on the first tokens of a split, with its defaults."""
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    config = ModelConfig(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    model = GPT(config, shape.block, seed=0).to(device)
    loops.keep_memory(device)
    tokens = open_training_data(loops.config_of(shape, data, []).data)
    reader, token_bytes = tokens.reader("val"), load_tokenizer(tokens.tokenizer).token_bytes()
    limit = 32 * shape.block

    def once() -> Figures:
        started = time.perf_counter()
        loss_of_split(
            model,
            reader,
            np.asarray(token_bytes),
            block_size=shape.block,
            batch=16,
            device=device,
            precision=precision,
            limit=limit,
        )
        return {
            "tokens/s": limit / (time.perf_counter() - started),
            "GB": peak_memory(device) / 1e9,
        }

    return once

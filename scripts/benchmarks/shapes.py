"""The models of the benchmarks, their batches, and random tokens to train on."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer

from llmtrain.runtime.device import resolve_device


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and the batch it is trained on; the vocabulary is 50304."""

    n_layer: int
    n_head: int
    n_embd: int
    block: int
    batch: int
    """Sequences a step, in one micro-batch."""


MODELS = {
    "6x384": Shape(6, 6, 384, 256, 8),
    "gpt2-small": Shape(12, 12, 768, 1024, 1),
    "gpt2-medium": Shape(24, 16, 1024, 1024, 1),
    "gpt2-large": Shape(36, 20, 1280, 1024, 1),
}
_ON_GPU = {"6x384": 64, "gpt2-small": 32, "gpt2-medium": 16, "gpt2-large": 8}
"""Sequences a step on a GPU."""


def shape_of(model: str) -> Shape:
    """Return the shape of a model by its name.

    Raises:
        BadParameter: unknown name.
    """
    if model not in MODELS:
        raise typer.BadParameter(f"{model} is not one of {', '.join(MODELS)}", param_hint="--model")
    shape = MODELS[model]
    return replace(shape, batch=_ON_GPU[model]) if resolve_device("auto").type == "cuda" else shape


def tokens_of(model: str) -> int:
    """Return the tokens of a step on this device."""
    shape = shape_of(model)
    return shape.batch * shape.block


def write_tokens(folder: Path) -> None:
    """Write random tokens of GPT-2's vocabulary in nanoGPT's layout."""
    tokens = np.random.default_rng(0).integers(50257, size=2_000_000, dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(folder / f"{split}.bin")

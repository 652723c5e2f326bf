"""Weights of a tiny model by step, for the averaging tests."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.checkpoint import Shape
from llmtrain.config import ModelConfig
from llmtrain.files import RunFolder
from llmtrain.model import GPT

SHAPE = Shape(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, bias=False), 16, 96)

MakeRun = Callable[..., RunFolder]


def weights_at(step: int) -> dict[str, Tensor]:
    """Weights that are a function of the step: a fixed model plus a small random walk of its own."""
    model = GPT(SHAPE.model, SHAPE.block_size, seed=1)
    generator = torch.Generator().manual_seed(step)
    return {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }

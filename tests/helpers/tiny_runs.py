"""Weights of a tiny model by step, for the averaging tests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.averaging.merge import CHUNK
from llmtrain.checkpoints.gpt2_folder import Shape
from llmtrain.config.schema import ModelConfig
from llmtrain.model.gpt import GPT
from llmtrain.storage.run_folder import RunFolder

SHAPE = Shape(ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, bias=False), 16, 96)

LARGE = (CHUNK // 257 + 100, 257)
"""More numbers than are summed at a time."""

MakeRun = Callable[..., RunFolder]


def weights_at(step: int) -> dict[str, Tensor]:
    """Weights that are a function of the step: a fixed model plus a small random walk of its own."""
    model = GPT(SHAPE.model, SHAPE.block_size, seed=1)
    generator = torch.Generator().manual_seed(step)
    return {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def model_at(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model of odd shapes: a matrix over several pieces, a scalar, an empty tensor, integers."""
    generator = torch.Generator().manual_seed(step)

    def floats(*shape: int) -> Tensor:
        base = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        return (base + 0.01 * torch.randn(shape, generator=generator)).to(dtype)

    return {
        "embed.weight": floats(*LARGE),
        "head.weight": floats(70, 11),
        "norm.weight": floats(11),
        "scale": floats(),
        "none": torch.zeros(0, 4, dtype=dtype),
        "position_ids": torch.arange(7),
        "mask": torch.tensor([True, False, True]),
    }


def write_checkpoint(folder: Path, model: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """A folder of safetensors, in one file or in shards with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    if shards == 1:
        save_file(dict(model), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(model)
    weight_map = {}
    for number in range(shards):
        filename = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file(
            {name: model[name] for name in part}, folder / filename, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(part, filename)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def load_all(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever its shards."""
    return {
        name: t
        for path in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(path).items()
    }

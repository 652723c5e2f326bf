"""Tiny models and checkpoints whose weights depend on the step."""

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
"""Shape with more numbers than one chunk of a merge."""

MakeRun = Callable[..., RunFolder]


def weights_at(step: int) -> dict[str, Tensor]:
    """Return weights as a function of the step: a fixed model plus small noise."""
    model = GPT(SHAPE.model, SHAPE.block_size, seed=1)
    generator = torch.Generator().manual_seed(step)
    return {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }


def model_at(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return tensors of odd shapes: one of several chunks, a scalar, an empty one, integers."""
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
    """Write a safetensors folder with one file, or with shards and an index."""
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
    """Return all tensors of a folder with any number of shards."""
    return {
        name: t
        for path in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(path).items()
    }

"""Training files of nanoGPT and build-nanogpt as Hugging Face's GPT-2.

Both use GPT-2's names in our layout. nanoGPT applies the exact GELU, build-nanogpt GPT-2's tanh
approximation. A fork with other tensors or settings is not converted: with a GPT-2 config it would
load without an error and compute different logits.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.checkpoints import gpt2_folder
from llmtrain.checkpoints.gpt2_folder import SIZES, Shape
from llmtrain.checkpoints.torch_load import GPTConfig

ACTIVATION_KEY = "activation_function"
"""Entry of the files that `llmtrain export --format nanogpt` writes; nanoGPT ignores it."""

_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_REQUIRED = {*SIZES, "block_size"}


class Conversion(NamedTuple):
    """Tensors by output name: the file's own names if it is not a GPT-2."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    note: str | None = None
    """Reason why a file with a recorded shape was not converted."""


def to_gpt2(path: Path, document: object, tensors: dict[str, Tensor]) -> Conversion:
    """Convert the tensors of a training file that records the shape of a GPT-2.

    Raise a UserError if the recorded shape is invalid.
    """
    entries = document if isinstance(document, Mapping) else {}
    values = _recorded_values(entries)
    if not values.keys() >= _REQUIRED:
        return Conversion(tensors)
    activation = _activation(entries)
    if unknown := sorted(map(str, values.keys() - _REQUIRED - {"bias", "dropout"})):
        problem: str | None = f"its settings include {unknown[0]}"
    elif activation is None:
        problem = "it does not record the activation function"
    else:
        shape = _shape(path, values, activation)
        kept = {n: t for n, t in tensors.items() if not n.endswith(gpt2_folder.CAUSAL_MASKS)}
        problem = _difference(shape, kept)
    if problem is not None:
        note = f"not a GPT-2, so names are kept and no config.json is written: {problem}"
        return Conversion(tensors, None, note)
    converted = {n: gpt2_folder.transpose_conv1d(n, tensor) for n, tensor in kept.items()}
    if _HEAD in converted:  # it may be an equal copy
        converted[_HEAD] = converted[_WTE]
    if not shape.model.bias:
        converted |= gpt2_folder.zero_biases(converted)
    return Conversion(converted, gpt2_folder.hugging_face_config(shape))


def _recorded_values(entries: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return nanoGPT's `model_args` or build-nanogpt's `config`."""
    settings = entries.get("model_args") or entries.get("config")
    if isinstance(settings, GPTConfig | argparse.Namespace):
        return vars(settings)
    return settings if isinstance(settings, Mapping) else {}


def _activation(entries: Mapping[Any, Any]) -> object:
    """Return Hugging Face's name of the activation function, or None if unknown."""
    if ACTIVATION_KEY in entries:
        return entries[ACTIVATION_KEY]
    if not entries.get("model_args"):
        return "gelu_new" if isinstance(entries.get("config"), GPTConfig) else None
    # nanoGPT always stores its settings; earlier versions of our export stored none.
    return "gelu_new" if entries.get("config") == {} else "gelu"


def _shape(path: Path, values: Mapping[Any, Any], activation: object) -> Shape:
    config = {
        **values,
        "model_type": "gpt2",
        "n_positions": values["block_size"],
        "activation_function": activation,
        "llmtrain": {"bias": values.get("bias", True)},
    }
    shape = gpt2_folder.shape_of(config, path)
    return replace(shape, eot=min(50256, shape.model.vocab_size - 1))


def _difference(shape: Shape, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the first difference from the tensors of a GPT-2, or None."""
    if shape.model.n_layer > len(tensors):
        return f"it has fewer than {shape.model.n_layer:,} layers"
    expected = _gpt2_shapes(shape)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != _HEAD}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            here, gpt2 = found.get(name, "absent"), expected.get(name, "absent")
            return f"{name} is {here}, in a GPT-2 {gpt2}"
    head = tensors.get(_HEAD)
    if head is not None and not torch.equal(head, tensors[_WTE]):
        return f"{_HEAD} is not tied to {_WTE}"
    return None


def _gpt2_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter by name, in our layout."""
    model = shape.model
    width = model.n_embd
    weights = {
        "ln_1": (width,),
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    blocks = range(model.n_layer)
    layers = {f"h.{i}.{name}": size for i in blocks for name, size in weights.items()}
    layers["ln_f"] = (width,)
    shapes: dict[str, tuple[int, ...]] = {
        _WTE: (model.vocab_size, width),
        "transformer.wpe.weight": (shape.block_size, width),
    }
    for name, size in layers.items():
        shapes[f"transformer.{name}.weight"] = size
        if model.bias:
            shapes[f"transformer.{name}.bias"] = size[:1]
    return shapes

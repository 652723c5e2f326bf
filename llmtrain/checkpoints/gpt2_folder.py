"""Hugging Face GPT-2 folders: write and load our models, and convert to this layout.

Why: snapshots *are* Hugging Face folders, so transformers, evaluation harnesses and serving engines
read them without an export. The layout differs from our model in two points: linear weights are
(in, out), as in GPT-2's Conv1D, and biases always exist (zero for a model without biases).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.checkpoints.checkpoint import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Origin,
    recorded_digests,
    verified_reader,
)
from llmtrain.checkpoints.safetensors_files import open_safetensors
from llmtrain.checkpoints.tensors import StoredArray, TensorSpec
from llmtrain.config.schema import ModelConfig
from llmtrain.config.sections import DataConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import Tokenizer
from llmtrain.storage.json_files import read_json, write_json

CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers in older GPT-2 files."""

SIZES = ("n_layer", "n_head", "n_embd", "vocab_size")

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_LAYER_NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight")

_REQUIRED_SETTINGS: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
"""Settings of Hugging Face's GPT-2 that change its logits, with the values our model supports."""


@dataclass(frozen=True)
class Shape:
    """Everything needed to compute with weights, except the weights."""

    model: ModelConfig
    block_size: int
    eot: int
    """Id of the end-of-text token."""


def transpose_conv1d(name: str, tensor: Tensor) -> Tensor:
    """Convert a tensor between our layout and Hugging Face's, in either direction."""
    return tensor.t() if name.endswith(_CONV1D) else tensor


def zero_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the biases that Hugging Face's GPT-2 requires, for `tensors` in its layout."""
    return {
        name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[-1])
        for name, tensor in tensors.items()
        if name.endswith((*_CONV1D, *_LAYER_NORMS))
    }


def added_biases(folder: Path, names: Iterable[str]) -> set[str]:
    """Return those of `names` that `zero_biases` added to a model without biases."""
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    own = config.get("llmtrain")
    if not isinstance(own, dict) or own.get("bias") is not False:
        return set()
    return {name for name in names if name.endswith(".bias")}


def hugging_face_config(shape: Shape) -> dict[str, Any]:
    """Return the `config.json` of a `GPT2LMHeadModel` with the same logits."""
    model = shape.model
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "activation_function": model.activation,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": model.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), shape.eot),
        "dtype": "float32",
        "llmtrain": {"bias": model.bias},
    }


def generation_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return transformers' generation settings: no unused ids, at most block-size tokens."""
    unused = list(range(tokenizer.vocab_size, shape.model.vocab_size))
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot)
    suppress = {"suppress_tokens": unused} if unused else {}
    return {**special, "max_length": shape.block_size, **suppress}


def save_weights(
    folder: Path,
    weights: dict[str, Tensor],
    shape: Shape,
    origin: Origin,
    provenance: object = None,
) -> None:
    """Write a Hugging Face GPT-2 folder into the existing (staged) `folder`.

    `weights`, the float32 parameters by name, is emptied to avoid holding tensors twice.
    """
    save_tensors(folder / WEIGHTS_FILE, weights, shape)
    write_json(folder / CONFIG_FILE, hugging_face_config(shape))
    write_json(folder / TRAINING_FILE, asdict(origin))
    if provenance is not None:
        write_json(folder / PROVENANCE_FILE, provenance)


def save_tensors(
    path: Path, weights: dict[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float32
) -> None:
    """Write a weights file in Hugging Face's layout; see `save_weights`."""
    tensors = {}
    for name in list(weights):
        value = weights.pop(name).detach().to("cpu", dtype)
        tensors[name] = transpose_conv1d(name, value).contiguous()
    if not shape.model.bias:
        tensors |= zero_biases(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of `tensors` on disk, without the header."""
    return sum(tensor.nbytes for tensor in tensors.values())


def load_shape(folder: Path) -> Shape:
    """Read the shape of the model from `config.json`; raise a UserError unless it is a GPT-2."""
    recorded_digests(folder)
    return shape_of(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)


def shape_of(config: Mapping[str, Any], path: Path) -> Shape:
    """Return the shape that `config` describes: the contents of `config.json`, read from `path`."""
    for key, supported in _REQUIRED_SETTINGS.items():
        value = config.get(key, None if key == "model_type" else supported[0])
        if value not in supported:
            hint = f"name a GPT-2 whose {key} is {' or '.join(map(repr, supported))}"
            raise UserError(f"{path}: {key} {value!r} is not supported", hint=hint)
    own = config.get("llmtrain", {})
    try:
        sizes: dict[str, Any] = {key: config.get(key) for key in SIZES}
        model = ModelConfig(
            **sizes,
            bias=own.get("bias", True) if isinstance(own, dict) else own,
            scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
            activation="gelu" if config.get("activation_function") == "gelu" else "gelu_new",
        )
        positions: Any = config.get("n_positions")
        block_size = DataConfig(path="", block_size=positions).block_size
    except ValidationError as error:
        wrong = error.errors()[0]
        problem = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        message = f"{path} is not a valid GPT-2 config: {problem}"
        raise UserError(message, hint="restore the file") from error
    # Public models have several end-of-text tokens or none; the logits do not depend on it.
    eot = config.get("eos_token_id")
    return Shape(model, block_size, eot if isinstance(eot, int) else model.vocab_size - 1)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights by our parameter names, on the CPU, in our layout; check their digests."""
    checkpoint = open_safetensors(folder, step=0, location=str(folder))
    weights = {}
    with verified_reader(checkpoint) as reader:
        for name, spec in checkpoint.tensors.items():
            raw = reader.read(name, 0, spec.count, np.empty(spec.bytes, np.uint8))
            full = f"transformer.{name.removeprefix('transformer.')}"
            weights[full] = transpose_conv1d(name, _as_tensor(raw, spec)).contiguous()
    return weights


def _as_tensor(raw: StoredArray, spec: TensorSpec) -> Tensor:
    tensor, others = torch.from_numpy(raw), {"BF16": torch.bfloat16, "BOOL": torch.bool}
    dtype = others.get(spec.dtype, tensor.dtype)
    return tensor.view(dtype).view(spec.shape)


def load_model(folder: Path) -> GPT:
    """Load the model of a folder on the CPU, in evaluation mode; check it against its config."""
    shape = load_shape(folder)
    weights = load_weights(folder)
    _check_sizes(folder, shape, weights)
    model = GPT(shape.model, shape.block_size)
    expected = model.state_dict()
    misfits = [n for n, t in expected.items() if n not in weights or weights[n].shape != t.shape]
    if misfits:
        raise UserError(
            f"{folder}: {len(misfits)} tensors are missing or have another shape, "
            f"such as {misfits[0]}",
            hint="use the config.json and model.safetensors of one model",
        )
    # Unused tensors are the tied head, and the zero biases of a model without biases.
    model.load_state_dict({name: weights[name] for name in expected})
    return model.eval()


def _check_sizes(folder: Path, shape: Shape, weights: Mapping[str, Tensor]) -> None:
    """Compare the sizes in the config with the weights before allocating a model."""
    width = shape.model.n_embd
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    names = ("transformer.wte.weight", "transformer.wpe.weight")
    tables = [list(weights.get(name, torch.empty(0)).shape) for name in names]
    found = [len(layers), *tables]
    expected = [shape.model.n_layer, [shape.model.vocab_size, width], [shape.block_size, width]]
    if found != expected:
        message = f"{folder}: layers, wte and wpe are {found}, config.json says {expected}"
        raise UserError(message, hint="use the config.json and model.safetensors of one model")

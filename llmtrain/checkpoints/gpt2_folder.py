"""A folder of weights: written so that Hugging Face reads it, read back as our model.

Why: the average of two checkpoints, an evaluation harness and a serving engine should all take what
training wrote, with no export in between. So a snapshot *is* a Hugging Face GPT-2 folder, with
`training.json` beside the weights: step, tokens and learning rate.

    with staged_folder(run.snapshot(step)) as folder: save_weights(folder, weights, shape, origin)

In the file, linear weights are (in, out) as GPT-2's Conv1D has them, and a model without biases has
biases of zero, which Hugging Face's GPT-2 always carries.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.checkpoints.weights_folder import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Origin,
    load_origin,
    weights_files,
)
from llmtrain.config.schema import ModelConfig
from llmtrain.config.sections import DataConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.storage.json_files import read_json, write_json

__all__ = [
    "CONFIG_FILE",
    "PROVENANCE_FILE",
    "TRAINING_FILE",
    "WEIGHTS_FILE",
    "Origin",
    "Shape",
    "bytes_of",
    "hugging_face_config",
    "load_model",
    "load_origin",
    "load_shape",
    "load_weights",
    "read_json",
    "save_weights",
    "write_json",
]

_ONLY: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
"""Settings of Hugging Face's GPT-2 that change its logits and have one value here."""

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Linear weights, which files have as (in, out)."""


@dataclass(frozen=True)
class Shape:
    """What is needed, beside the weights, to compute with them."""

    model: ModelConfig
    block_size: int
    eot: int
    """Id of the end-of-text token."""


def hugging_face_config(shape: Shape) -> dict[str, Any]:
    """The `config.json` of a `GPT2LMHeadModel` with the same logits."""
    model = shape.model
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "activation_function": "gelu_new",
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": model.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": True,
        "bos_token_id": shape.eot,
        "eos_token_id": shape.eot,
        "dtype": "float32",
        "llmtrain": {"bias": model.bias},
    }


def save_weights(
    folder: Path,
    weights: dict[str, Tensor],
    shape: Shape,
    origin: Origin,
    provenance: object = None,
) -> None:
    """Write a Hugging Face GPT-2 folder into the (staged) `folder`.

    Args:
        folder: an existing folder, committed by the caller.
        weights: the model's parameters by name, float32; emptied, so that no tensor is held twice.
        shape: the model's shape.
        origin: goes to `training.json`.
        provenance: of an average; goes to `provenance.json`.
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
        tensors[name] = value.t().contiguous() if name.endswith(CONV1D) else value.contiguous()
    if not shape.model.bias:
        tensors |= _zero_biases(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """What tensors take on disk, but for a header."""
    return sum(tensor.nbytes for tensor in tensors.values())


def load_shape(folder: Path) -> Shape:
    """The shape of the model in a folder of weights.

    Raises:
        UserError: `config.json` is missing, damaged, or of another architecture.
    """
    return shape_of(read_json(folder / CONFIG_FILE), folder)


def shape_of(config: Mapping[str, Any], folder: Path) -> Shape:
    """The shape that a `config.json`, of `folder`, describes; see `load_shape`."""
    if config.get("model_type") != "gpt2":
        raise UserError(
            f"{folder} holds a model of type {config.get('model_type')!r}, not gpt2",
            hint="only GPT-2 folders can be loaded here",
        )
    for key, supported in _ONLY.items():
        if key in config and config[key] not in supported:
            raise UserError(
                f"{folder / CONFIG_FILE}: {key} {config[key]!r} is not GPT-2 as it is computed here",
                hint=f"only {' or '.join(map(repr, supported))}",
            )
    own, eot = config.get("llmtrain", {}), config.get("eos_token_id")
    try:
        model = ModelConfig(
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            vocab_size=config["vocab_size"],
            bias=own.get("bias", True),
            scale_attn_by_inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
        )
        block_size = DataConfig(path="", block_size=config["n_positions"]).block_size
    except (KeyError, AttributeError, ValidationError) as error:
        wrong = error.errors()[0] if isinstance(error, ValidationError) else None
        what = (
            f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
            if wrong
            else f"{error} is missing or wrong"
        )
        raise UserError(
            f"{folder / CONFIG_FILE} is no GPT-2 config: {what}", hint="restore the file"
        ) from error
    # Elsewhere there may be several such tokens, or none; what is computed here does not depend on it.
    return Shape(model, block_size, eot if isinstance(eot, int) else model.vocab_size - 1)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder by the model's parameter names, on the CPU, in our layout.

    Raises:
        UserError: the file is missing or damaged.
    """
    weights = {}
    for path in weights_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    tensor = file.get_tensor(name)
                    full = name if name.startswith("transformer.") else f"transformer.{name}"
                    weights[full] = tensor.t().contiguous() if name.endswith(CONV1D) else tensor
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read {path}: {error}",
                hint="llmtrain verify PATH tells which files are damaged",
            ) from None
    return weights


def load_model(folder: Path) -> GPT:
    """The model in a folder of weights, on the CPU, in evaluation mode.

    Raises:
        UserError: files are missing or damaged, or the tensors do not fit the config.
    """
    shape = load_shape(folder)
    weights = load_weights(folder)
    _require_fit(folder, shape, weights)
    model = GPT(shape.model, shape.block_size)
    expected = model.state_dict()
    misfits = [
        name
        for name, value in expected.items()
        if name not in weights or weights[name].shape != value.shape
    ]
    if misfits:
        raise UserError(
            f"{folder}: {len(misfits)} tensors are missing or of another shape, such as {misfits[0]}",
            hint="config.json and model.safetensors do not belong together",
        )
    # What remains unused is the tied head and the biases of a model without biases, which are zero.
    model.load_state_dict({name: weights[name] for name in expected})
    return model.eval()


def _require_fit(folder: Path, shape: Shape, weights: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless the sizes of the config are those of the weights: before anything is built."""
    layers = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    width, vocabulary = shape.model.n_embd, shape.model.vocab_size
    sizes = {"wte": (vocabulary, width), "wpe": (shape.block_size, width)}
    for name, size in sizes.items():
        tensor = weights.get(f"transformer.{name}.weight")
        if tensor is None or tuple(tensor.shape) != size or layers != shape.model.n_layer:
            raise UserError(
                f"{folder} holds {layers} layers and {name} of {None if tensor is None else list(tensor.shape)}, "
                f"config.json says {shape.model.n_layer:,} and {list(size)}",
                hint="config.json and model.safetensors do not belong together",
            )


def _zero_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A zero for each bias that Hugging Face's GPT-2 has and a model without biases has not."""
    return {
        name.removesuffix("weight") + "bias": tensor.new_zeros(tensor.shape[-1])
        for name, tensor in tensors.items()
        if name.endswith((*CONV1D, "ln_1.weight", "ln_2.weight", "ln_f.weight"))
    }

"""Initial weights from an earlier run, in any format that `llmtrain average` reads.

They are read one tensor at a time, so no process holds the whole model.
"""

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoints.checkpoint import CONFIG_FILE, Checkpoint, Reader, verified_reader
from llmtrain.checkpoints.gpt2_folder import (
    CAUSAL_MASKS,
    load_shape,
    other_tensors,
    shape_of,
    transpose_conv1d,
)
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.resolve import Repository, resolve
from llmtrain.checkpoints.tensors import ITEM_BYTES, to_float64
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.runtime.sharded import copy_full_tensor
from llmtrain.storage.run_folder import RunFolder

_GPT2_ONLY = "name a GPT-2 in the format of Hugging Face or nanoGPT"
_EMBEDDINGS = ("wte.weight", "wpe.weight")


def open_weights(source: str) -> Checkpoint:
    """Open the weights that `init_from` names; download them if they are on the hub."""
    found = resolve(source, key="init_from")
    if isinstance(found, RunFolder):
        problem = f"init_from: {source} is a run, which contains many weights"
        raise UserError(problem, hint="name one of them: a folder in its snapshots/ or averages/")
    return found.download() if isinstance(found, Repository) else open_checkpoint(found, step=0)


def load_initial_weights(source: Checkpoint, model: GPT, config: RunConfig) -> None:
    """Load weights into a model at step 0, sharded or not.

    Additional rows of a larger vocabulary keep their random values. If the new block size is
    smaller, only the first positions are used. A file that differs from its record is an error.
    """
    _check_model(source, config)
    parameters = dict(model.named_parameters())
    names = {name.removeprefix("transformer."): name for name in source.tensors}
    if extra := other_tensors(source.tensors, parameters):
        problem = f"{source.location} is not a GPT-2: it contains {extra[0]}"
        raise UserError(f"{problem}, which a GPT-2 does not use", hint=_GPT2_ONLY)
    with verified_reader(source) as reader:
        for name, fresh in model.initial_weights(config.seed):
            stored = names.pop(name.removeprefix("transformer."), None)
            if stored is None:
                raise UserError(f"{source.location} lacks {name}", hint="is it a complete GPT-2?")
            value = _read(reader, source, stored)
            copy_full_tensor(parameters[name], _fit(value, fresh, source.location, name))
        for stored in names.values():
            is_bias = stored.endswith("bias") and not stored.endswith(CAUSAL_MASKS)
            if is_bias and _read(reader, source, stored).any():
                raise UserError(f"{source.location} has biases", hint="--set model.bias=true")


def _check_model(source: Checkpoint, config: RunConfig) -> None:
    if source.config is None:
        if not (source.folder / CONFIG_FILE).is_file():
            raise UserError(f"{source.location} is not a GPT-2: it has no config", hint=_GPT2_ONLY)
        shape = load_shape(source.folder)
    else:
        shape = shape_of(source.config, source.files[0])
    here, there = config.model.model_dump(), shape.model.model_dump()
    wrong = [
        f"model.{key}={there[key]}".lower()
        for key in ("n_layer", "n_head", "n_embd", "scale_attn_by_inverse_layer_idx", "activation")
        if here[key] != there[key]
    ]
    if config.model.vocab_size < shape.model.vocab_size:
        wrong.append(f"model.vocab_size={shape.model.vocab_size}")
    if config.data.block_size > shape.block_size:
        wrong.append(f"data.block_size={shape.block_size}")
    if wrong:
        hint = " ".join(f"--set {each}" for each in wrong)
        raise UserError(f"{source.location} does not fit the model of the config", hint=hint)


def _read(reader: Reader, source: Checkpoint, name: str) -> Tensor:
    """Return a stored tensor in float32, transposed if it is a Conv1D weight."""
    spec = source.tensors[name]
    buffer = np.empty(spec.count * ITEM_BYTES[spec.dtype], dtype=np.uint8)
    values = np.empty(spec.count)
    to_float64(reader.read(name, 0, spec.count, buffer), spec.dtype, values)
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(values.astype(np.float32)).view(spec.shape)
    if not tensor.isfinite().all():
        problem = f"{source.location}: {name} contains NaN, infinity or values beyond float32"
        raise UserError(problem, hint="choose weights from before the training diverged")
    return transpose_conv1d(name, tensor)


def _fit(value: Tensor, fresh: Tensor, location: str, name: str) -> Tensor:
    """Copy `value` into `fresh`; embeddings may differ in their number of rows."""
    if value.shape[name.endswith(_EMBEDDINGS) :] != fresh.shape[name.endswith(_EMBEDDINGS) :]:
        raise UserError(
            f"{location}: {name} has shape {tuple(value.shape)} instead of {tuple(fresh.shape)}",
            hint="its config.json does not match its weights",
        )
    rows = min(len(value), len(fresh))
    fresh[:rows] = value[:rows]
    return fresh

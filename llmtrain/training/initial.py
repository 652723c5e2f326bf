"""Weights to begin with that somebody trained before: for continued pre-training.

Why tensor by tensor: weights may be spread over processes, and none needs the whole. What the file is
(safetensors, torch's, nanoGPT's, on the hub) is read as `llmtrain average` reads it.

    load_initial_weights(open_weights("openai-community/gpt2"), model, config)
"""

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoints.checkpoint import Checkpoint, Reader
from llmtrain.checkpoints.gpt2_folder import CAUSAL_MASKS, load_shape, shape_of, transpose_conv1d
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.resolve import Repository, resolve
from llmtrain.checkpoints.tensors import ITEM_BYTES, to_float64
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.runtime.sharded import copy_full_tensor
from llmtrain.storage.run_folder import RunFolder

_EMBEDDINGS = ("wte.weight", "wpe.weight")


def open_weights(source: str) -> Checkpoint:
    """Open the weights that `init_from` names, from headers; download them if they are on the hub.

    Raises:
        UserError: they do not exist, or cannot be read.
        RunFailed: the hub cannot be reached.
    """
    found = resolve(source, key="init_from")
    if isinstance(found, RunFolder):
        raise UserError(
            f"init_from: {source} is a run, which contains many weights",
            hint="name one of them: a folder in its snapshots/ or averages/",
        )
    return (
        found.download() if isinstance(found, Repository) else open_checkpoint(found, step=0)
    )


def load_initial_weights(source: Checkpoint, model: GPT, config: RunConfig) -> None:
    """Put the weights of `source` into a new model.

    Rows of a larger vocabulary keep their random values; of a longer context, the first positions are taken.

    Args:
        source: of `open_weights`.
        model: at step 0, spread over processes or not.
        config: its configuration, whose seed made its values.

    Raises:
        UserError: it is another model.
    """
    shape = (
        load_shape(source.folder)
        if source.config is None
        else shape_of(source.config, source.folder)
    )
    here, there = config.model.model_dump(), shape.model.model_dump()
    wrong = [
        f"model.{key}={there[key]}".lower()
        for key in ("n_layer", "n_head", "n_embd", "scale_attn_by_inverse_layer_idx")
        if here[key] != there[key]
    ]
    if config.model.vocab_size < shape.model.vocab_size:
        wrong.append(f"model.vocab_size={shape.model.vocab_size}")
    if config.data.block_size > shape.block_size:
        wrong.append(f"data.block_size={shape.block_size}")
    if wrong:
        raise UserError(
            f"{source.location} is another model than the config's",
            hint=" ".join(f"--set {each}" for each in wrong),
        )
    parameters = dict(model.named_parameters())
    names = {name.removeprefix("transformer."): name for name in source.tensors}
    with source.reader() as reader:
        for name, fresh in model.initial_weights(config.seed):
            stored = names.pop(name.removeprefix("transformer."), None)
            if stored is None:
                raise UserError(f"{source.location} holds no {name}", hint="is it a whole GPT-2?")
            copy_full_tensor(
                parameters[name],
                _fitted(_read(reader, source, stored), fresh, source.location, name),
            )
        for stored in names.values():
            if (
                stored.endswith("bias")
                and not stored.endswith(CAUSAL_MASKS)
                and _read(reader, source, stored).any()
            ):
                raise UserError(f"{source.location} has biases", hint="--set model.bias=true")


def _read(reader: Reader, source: Checkpoint, name: str) -> Tensor:
    """A stored tensor in float32, linear weights turned round as the model has them."""
    spec = source.tensors[name]
    raw = reader.read(
        name, 0, spec.count, np.empty(spec.count * ITEM_BYTES[spec.dtype], dtype=np.uint8)
    )
    values = np.empty(spec.count)
    to_float64(raw, spec.dtype, values)
    tensor = torch.from_numpy(values.astype(np.float32)).view(spec.shape)
    return transpose_conv1d(name, tensor)


def _fitted(value: Tensor, fresh: Tensor, location: str, name: str) -> Tensor:
    """`value` in the shape of `fresh`: of an embedding its first rows, or all of them before fresh ones."""
    if value.shape[name.endswith(_EMBEDDINGS) :] != fresh.shape[name.endswith(_EMBEDDINGS) :]:
        raise UserError(
            f"{location}: {name} has the shape {tuple(value.shape)}, not {tuple(fresh.shape)}",
            hint="its config.json and its weights do not belong together",
        )
    rows = min(len(value), len(fresh))
    fresh[:rows] = value[:rows]
    return fresh

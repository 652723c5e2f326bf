"""Checkpoints in torch's format: `pytorch_model.bin`, and training files of other trainers.

A tied weight, stored under two names, is kept under one, as safetensors requires.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.checkpoints.checkpoint import (
    TORCH_WEIGHTS_FILE,
    Checkpoint,
    Reader,
    check_shard,
    reject_outside_link,
    weights_files,
)
from llmtrain.checkpoints.nanogpt import to_gpt2
from llmtrain.checkpoints.state_dicts import DTYPES, read_state_dict, stored_position
from llmtrain.checkpoints.tensors import STORED_DTYPES, StoredArray, TensorSpec
from llmtrain.checkpoints.torch_load import load_torch

_HEADS = ("lm_head.weight", "embed_out.weight")
"""Output matrices; of a tied pair, Hugging Face stores the other one."""


class _Content(NamedTuple):
    """Content of the files of one checkpoint."""

    parts: dict[Path, dict[str, Tensor]]
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    position: tuple[int, int] | None = None


def open_torch(path: Path, step: int, location: str) -> Checkpoint:
    """Open a folder with `pytorch_model.bin`, whole or in shards, or one training file."""
    folder = path if path.is_dir() else path.parent
    content = _load_folder(path) if path.is_dir() else _load_training_file(path)
    tensors = {name: tensor for part in content.parts.values() for name, tensor in part.items()}
    tied = _tied_names(tensors)
    notes = list(content.notes)
    if tied and content.config is None and not path.is_dir():
        pairs = ", ".join(f"{name} (in {owner})" for name, owner in tied.items())
        notes.append(f"tensors that share their memory are stored once: {pairs}")
    layout: dict[str, dict[str, TensorSpec]] = {}
    for file, part in content.parts.items():
        output = f"{file.stem.replace('pytorch_model', 'model')}.safetensors"
        for name, tensor in part.items():
            if name not in tied:
                spec = TensorSpec(DTYPES[tensor.dtype], tuple(tensor.shape))
                layout.setdefault(output, {})[name] = spec
    return Checkpoint(
        step,
        location,
        folder,
        layout,
        tuple(content.parts),
        partial(_TorchReader, tensors),
        metadata={"format": "pt"} | tied,
        config=content.config,
        notes=tuple(notes),
        position=content.position,
    )


def _load_folder(path: Path) -> _Content:
    parts, ignored = {}, []
    for file, indexed in weights_files(path, TORCH_WEIGHTS_FILE).items():
        reject_outside_link(file)
        found = read_state_dict(file, load_torch(file))
        parts[file] = found.tensors
        ignored += found.ignored
        check_shard(file, set(parts[file]), indexed)
    return _Content(parts, notes=_ignored_note(ignored))


def _load_training_file(path: Path) -> _Content:
    document = load_torch(path)
    found = read_state_dict(path, document)
    converted = to_gpt2(path, document, found.tensors)
    notes = _ignored_note(found.ignored) + ((converted.note,) if converted.note else ())
    return _Content({path: converted.tensors}, converted.config, notes, stored_position(document))


def _ignored_note(keys: list[str]) -> tuple[str, ...]:
    text = f"these entries of the files are not averaged: {', '.join(dict.fromkeys(keys))}"
    return (text,) if keys else ()


def _tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each tied tensor's name to the name that owns its memory."""
    owners: dict[tuple[object, ...], str] = {}
    tied = {}
    for name in sorted(tensors, key=lambda name: (name.endswith(_HEADS), name)):
        tensor = tensors[name]
        if tensor.numel():
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if (owner := owners.setdefault(memory, name)) != name:
                tied[name] = owner
    return tied


class _TorchReader(Reader):
    """Reader of mapped tensors; it does not read every byte of a file, so it hashes nothing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Flattening copies a transposed tensor: keep the last one.
        self._flat = lru_cache(maxsize=1)(lambda name: tensors[name].reshape(-1))

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """See `Reader.read`; `buffer` is unused."""
        part = self._flat(name)[start:stop]
        bits = part.view(torch.uint16) if part.dtype == torch.bfloat16 else part
        return bits.numpy().view(STORED_DTYPES[DTYPES[part.dtype]])

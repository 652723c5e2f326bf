"""Checkpoints in torch's format: `pytorch_model.bin`, and `.pt` files of nanoGPT and others.

Files are loaded with `weights_only` and mapped into memory, without a fallback: a file that needs
more than tensors and plain containers is rejected. A tied weight, stored under two names, is kept
under one, as safetensors requires.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.checkpoints import gpt2_folder
from llmtrain.checkpoints.checkpoint import (
    TORCH_WEIGHTS_FILE,
    Checkpoint,
    Reader,
    check_shard,
    reject_outside_link,
    weights_files,
)
from llmtrain.checkpoints.tensors import STORED_DTYPES, StoredArray, TensorSpec
from llmtrain.errors import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PREFIXES = re.compile(r"^(_orig_mod\.|module\.)+")
"""Added to every name by torch.compile and DistributedDataParallel."""

_HEADS = ("lm_head.weight", "embed_out.weight")
"""Output matrices; of a tied pair, Hugging Face stores the other one."""


class _GPTConfig:
    """Inert replacement for the configuration class that build-nanogpt pickles."""


def open_torch(path: Path, step: int, location: str) -> Checkpoint:
    """Open a folder with `pytorch_model.bin`, whole or in shards, or one training checkpoint."""
    config = None
    if path.is_dir():
        folder, parts = path, _load_folder(path)
    else:
        tensors, config = _load_training_file(path)
        folder, parts = path.parent, {path: tensors}
    tensors = {name: tensor for part in parts.values() for name, tensor in part.items()}
    tied = _tied_names(tensors)
    layout: dict[str, dict[str, TensorSpec]] = {}
    for file, part in parts.items():
        output = f"{file.stem.replace('pytorch_model', 'model')}.safetensors"
        for name, tensor in part.items():
            if name not in tied:
                spec = TensorSpec(_DTYPES[tensor.dtype], tuple(tensor.shape))
                layout.setdefault(output, {})[name] = spec
    reader = partial(_TorchReader, tensors)
    metadata = {"format": "pt"} | tied
    return Checkpoint(
        step, location, folder, layout, tuple(parts), reader, metadata=metadata, config=config
    )


def _load_folder(path: Path) -> dict[Path, dict[str, Tensor]]:
    parts = {}
    for file, indexed in weights_files(path, TORCH_WEIGHTS_FILE).items():
        if indexed is not None:
            reject_outside_link(file)
        parts[file] = _state_dict(file, _load(file))
        check_shard(file, set(parts[file]), indexed)
    return parts


def _load_training_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of `{'model': state_dict, …}` or of a bare state dict.

    If the file records the model's shape, convert to Hugging Face's GPT-2 and return its config.
    """
    document = _load(path)
    sections = document if isinstance(document, dict) else {}
    keys = [key for key in ("model", "net", "state_dict") if key in sections]
    tensors = _state_dict(path, document[keys[0]] if keys else document)
    shape = _recorded_shape(path, sections)
    if shape is None:
        return tensors, None
    if "transformer.wte.weight" in tensors:
        tensors = {
            name: gpt2_folder.transpose_conv1d(name, tensor)
            for name, tensor in tensors.items()
            if not name.endswith(gpt2_folder.CAUSAL_MASKS)
        }
        if not shape.model.bias:
            tensors |= gpt2_folder.zero_biases(tensors)
    return tensors, gpt2_folder.hugging_face_config(shape)


def _load(path: Path) -> Any:
    """Unpickle tensors and plain containers only, with the tensors mapped from the file."""
    try:
        _reject_compressed(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        replacements: list[Any] = [
            (_GPTConfig, name) for name in unknown if name.rpartition(".")[2] == "GPTConfig"
        ]
        with torch.serialization.safe_globals(replacements):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged or hostile files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "re-save the weights as safetensors: only `weights_only` files are read"
        raise UserError(f"cannot read {path} as tensors: {reason}", hint=hint) from None


def _reject_compressed(path: Path) -> None:
    """Raise on a zip bomb: torch never compresses its files."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more bytes than the file has")


def _state_dict(path: Path, document: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict without the prefixes of wrappers."""
    stored = document.items() if isinstance(document, dict) else ()
    tensors: dict[str, Tensor] = {}
    size = path.stat().st_size
    for key, tensor in stored:
        if not isinstance(tensor, Tensor):
            continue
        name = _PREFIXES.sub("", str(key))
        if name in tensors:
            raise UserError(f"{path} contains {name} twice, once as {key}", hint="keep one of them")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.nbytes > size:
            raise UserError(
                f"{path}: {name} is not a dense tensor of numbers in this file: "
                f"{tensor.dtype}, {tensor.layout}, {tensor.nbytes:,} bytes",
                hint="do not trust this file, or re-save the tensor dense and .contiguous()",
            )
        tensors[name] = tensor.detach()
    if not tensors:
        hint = "expected a state dict, or one under the key 'model'"
        raise UserError(f"{path} contains no weights", hint=hint)
    return tensors


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
        return bits.numpy().view(STORED_DTYPES[_DTYPES[part.dtype]])


def _recorded_shape(path: Path, document: Mapping[str, Any]) -> gpt2_folder.Shape | None:
    """Return the shape from nanoGPT's `model_args` or build-nanogpt's `config`, if recorded."""
    settings = document.get("model_args") or document.get("config")
    values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if not {*gpt2_folder.SIZES, "block_size"} <= values.keys():
        return None
    own = {"bias": values.get("bias", True)}
    names = {"model_type": "gpt2", "n_positions": values["block_size"], "llmtrain": own}
    shape = gpt2_folder.shape_of({**values, **names}, path)
    return replace(shape, eot=min(50256, shape.model.vocab_size - 1))

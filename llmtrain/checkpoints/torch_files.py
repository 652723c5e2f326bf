"""Checkpoints in torch's own format: `pytorch_model.bin`, and the `.pt` files of nanoGPT's family.

Why apart: only these need torch. They are opened with `weights_only` and memory-mapped, with no
fall-back: a file that needs more than tensors and plain containers to be read is refused.

    checkpoint = open_training_file(Path("ckpt_1000.pt"), step=1000)

Their pages count as memory of this process while they are mapped, unlike those of safetensors, but the
kernel takes them back when it needs them.

A tied weight that such a file holds under two names is kept under one, as safetensors demands.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.checkpoints.checkpoint import Checkpoint, Reader
from llmtrain.checkpoints.gpt2_folder import Shape, hugging_face_config
from llmtrain.checkpoints.header import TensorSpec
from llmtrain.checkpoints.numbers import STORED_DTYPES, StoredArray
from llmtrain.checkpoints.open import require_promised
from llmtrain.config.schema import ModelConfig
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
_PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before every name."""

_HEADS = ("lm_head.weight", "embed_out.weight")
"""Output matrices: of a tied pair, Hugging Face stores the other."""

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Linear in nanoGPT, Conv1D (in, out) in Hugging Face's GPT-2."""


MASKS = (".attn.bias", ".attn.masked_bias")
"""Buffers of older GPT-2 files: the causal mask."""


class _Settings:
    """Stands in for a file's own configuration class: its values are taken, its code never runs."""


def open_torch_shards(
    folder: Path, shards: Mapping[Path, set[str] | None], *, step: int, location: str
) -> Checkpoint:
    """`pytorch_model.bin`, whole or in shards.

    Raises:
        UserError: damaged, not readable with `weights_only`, or not what the index says.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for path, promised in shards.items():
        weights = _tensors_of(path, _load(path))
        if promised is not None:
            require_promised(path, set(weights), promised)
        name = path.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        parts[name] = weights
    return _checkpoint(step, location, folder, parts, tuple(shards))


def open_training_file(path: Path, *, step: int) -> Checkpoint:
    """A training checkpoint of nanoGPT, build-nanogpt or the like: `{'model': state_dict, …}`, or weights alone.

    Where the file says its model's shape, names and layouts become those of Hugging Face's GPT-2.

    Raises:
        UserError: damaged, not readable with `weights_only`, or without weights.
    """
    document = _load(path)
    weights = document
    if isinstance(document, dict):
        weights = next(
            (document[key] for key in ("model", "net", "state_dict") if key in document), document
        )
    tensors = _tensors_of(path, weights)
    shape = _gpt2_shape(path, document) if isinstance(document, dict) else None
    if shape is not None and "transformer.wte.weight" in tensors:
        tensors = {
            name: tensor.t() if name.endswith(_TRANSPOSED) else tensor
            for name, tensor in tensors.items()
            if not name.endswith(MASKS)
        }
        if not shape.model.bias:
            tensors |= _absent_biases(tensors)
    config = hugging_face_config(shape) if shape is not None else None
    return _checkpoint(
        step, str(path), path.parent, {"model.safetensors": tensors}, (path,), config
    )


def _load(path: Path) -> Any:
    """Unpickle tensors and plain containers only, the tensors mapped from the file."""
    try:
        _refuse_bombs(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # build-nanogpt stores its GPTConfig object; an inert class takes its place.
        stand_ins: list[Any] = [
            (_Settings, name) for name in unknown if name.rpartition(".")[2] == "GPTConfig"
        ]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        Exception
    ) as error:  # torch has no exception of its own for files that are damaged or hostile
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot read {path} as tensors: {reason}",
            hint="files that need more than weights_only are refused; re-save the weights as safetensors",
        ) from None


def _refuse_bombs(path: Path) -> None:
    """Raise a ValueError where a file of torch unpacks to more than it is: torch never compresses its own."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more bytes than it has")


def _tensors_of(path: Path, document: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, without wrappers' prefixes.

    Raises:
        UserError: it is none, or holds an unknown dtype.
    """
    if not isinstance(document, dict) or not any(
        isinstance(value, Tensor) for value in document.values()
    ):
        raise UserError(
            f"{path} holds no weights", hint="expected a state dict, or one under the key 'model'"
        )
    tensors = {}
    for key, value in document.items():
        if not isinstance(value, Tensor):
            continue
        name = str(key)
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if value.dtype not in _DTYPES or value.layout != torch.strided:
            raise UserError(
                f"{path}: {name} is of {value.dtype}, {value.layout}",
                hint="only dense numbers can be averaged",
            )
        if value.nbytes > path.stat().st_size:
            raise UserError(
                f"{path}: {name} claims {value.nbytes:,} bytes in a file of {path.stat().st_size:,}",
                hint="do not trust this file, or re-save the tensor with .contiguous()",
            )
        if name in tensors:
            raise UserError(
                f"{path} holds {name} twice, once as {key}",
                hint="which one is meant cannot be known",
            )
        tensors[name] = value.detach()
    return tensors


def _checkpoint(
    step: int,
    location: str,
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    files: tuple[Path, ...],
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Drop second names of tied weights and describe what remains."""
    metadata = {"format": "pt"}
    by_memory: dict[tuple[object, ...], str] = {}
    everything = {name: tensor for part in parts.values() for name, tensor in part.items()}
    for name in sorted(everything, key=lambda name: (name.endswith(_HEADS), name)):
        tensor = everything[name]
        memory = (
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel()
            else (name,)
        )
        kept = by_memory.setdefault(memory, name)
        if kept != name:
            metadata[name] = kept
            del everything[name]
    layout = {
        filename: {
            name: TensorSpec(_DTYPES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in part.items()
            if name in everything
        }
        for filename, part in parts.items()
    }
    layout = {filename: specs for filename, specs in layout.items() if specs}

    def reader() -> AbstractContextManager[Reader]:
        return _reader(everything)

    return Checkpoint(
        step, location, folder, layout, files, reader, metadata=metadata, config=config
    )


@contextmanager
def _reader(tensors: Mapping[str, Tensor]) -> Iterator[Reader]:
    yield _TorchReader(tensors)


class _TorchReader:
    """Ranges of numbers of mapped tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._flat: tuple[str, Tensor] | None = None

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """See `Reader.read`; `buffer` is not used."""
        tensor = self._tensors[name]
        if tensor.is_contiguous():
            flat = tensor.view(-1)
        else:
            known = self._flat  # read once: another thread may replace it
            flat = known[1] if known and known[0] == name else tensor.reshape(-1)
            self._flat = (name, flat)
        part = flat[start:stop]
        raw: StoredArray = (
            part.view(torch.uint16).numpy() if part.dtype == torch.bfloat16 else part.numpy()
        )
        return raw.view(STORED_DTYPES[_DTYPES[tensor.dtype]])

    def start_hashing(self) -> None:
        """Nothing: torch maps these files, and what is read of them is not all of their bytes."""

    def hashes(self) -> dict[Path, str]:
        """None are known from reading."""
        return {}


def _gpt2_shape(path: Path, document: Mapping[str, Any]) -> Shape | None:
    """The model's shape from nanoGPT's `model_args` or build-nanogpt's `config`; None where absent."""
    settings = document.get("model_args") or document.get("config")
    values = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if not {"n_layer", "n_head", "n_embd", "vocab_size", "block_size"} <= values.keys():
        return None
    try:
        model = ModelConfig(
            **{key: int(values[key]) for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
            bias=bool(values.get("bias", True)),
            scale_attn_by_inverse_layer_idx=bool(
                values.get("scale_attn_by_inverse_layer_idx", False)
            ),
        )
        block_size = int(values["block_size"])
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path}: its model_args are no shape of a GPT-2: {dict(values)!r:.200}",
            hint="the file is damaged",
        ) from None
    return Shape(model, block_size, min(50256, model.vocab_size - 1))


def _absent_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the biases that Hugging Face's GPT-2 always has."""
    names = (*_TRANSPOSED, "ln_1.weight", "ln_2.weight", "ln_f.weight")
    return {
        name.removesuffix("weight") + "bias": torch.zeros(tensor.shape[-1], dtype=tensor.dtype)
        for name, tensor in tensors.items()
        if name.endswith(names)
    }

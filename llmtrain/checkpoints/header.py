"""The header of a safetensors file, read strictly and written: which tensor lies at which bytes.

Why our own: a window of checkpoints is compared and summed by byte ranges, without importing torch
(which takes longer than averaging a small model) and without trusting the file: a header that
overlaps, leaves the file, or has an odd size is an error before anything is read.

    header = read_header(Path("model.safetensors")); header.tensors["transformer.wte.weight"].shape

Format: 8 bytes little-endian length, a JSON object of that length {name: {dtype, shape, data_offsets}}
with the optional text map "__metadata__", then the tensors' bytes without holes
(the format section of the safetensors documentation).
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of one number of each dtype that is understood here."""

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is, wherever it lies."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.count * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a safetensors file."""

    start: int
    """Position of its first byte in the file."""

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape alone, to compare with those of other files."""
        return TensorSpec(self.dtype, self.shape)


@dataclass(frozen=True)
class Header:
    """The tensors of one file in the order of their bytes, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; nothing else of it is read.

    Raises:
        UserError: the file is missing, cut short, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise _damaged(path, f"its header cannot have {length} bytes in a file of {size:,}")
            document = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            hint="a complete folder of weights has this file",
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged(path, "its metadata is not a map of texts")
    return Header(_stored_tensors(document, 8 + length, size, path), metadata)


def _stored_tensors(
    document: dict[str, Any], data: int, size: int, path: Path
) -> dict[str, StoredTensor]:
    """Check each entry, and that together they cover the bytes from `data` to `size` once."""
    found = []
    for name, entry in document.items():
        try:
            dtype, shape, (start, end) = (
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
        except (TypeError, KeyError, ValueError):
            raise _damaged(path, f"tensor {name!r} lacks dtype, shape or offsets") from None
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise UserError(
                f"{path}: tensor {name!r} has the dtype {dtype!r}",
                hint=f"understood are {', '.join(ITEM_BYTES)}",
            )
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise _damaged(path, f"tensor {name!r} has an impossible shape or offset")
        tensor = StoredTensor(dtype, shape, data + start)
        if tensor.bytes != end - start:
            raise _damaged(
                path, f"tensor {name!r} of {tensor.spec} does not fit its {end - start:,} bytes"
            )
        found.append((start, end, name, tensor))
    found.sort(key=lambda item: item[:3])
    position = 0
    for start, end, name, _ in found:
        if start != position:
            raise _damaged(path, f"tensor {name!r} overlaps another or leaves a hole")
        position = end
    if data + position != size:
        raise _damaged(path, f"it has {size:,} bytes and its header describes {data + position:,}")
    return {name: tensor for _, _, name, tensor in found}


def encode_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The first bytes of a file that holds `specs` in that order, and where each tensor then lies."""
    position = 0
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, spec in specs.items():
        offsets = [position, position + spec.bytes]
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    stored = {}
    for name, spec in specs.items():
        stored[name] = StoredTensor(spec.dtype, spec.shape, start)
        start += spec.bytes
    return struct.pack("<Q", len(text)) + text, stored


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name stands twice")
    return document


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged: {what}",
        hint="restore the file; `llmtrain verify` tells which files are whole",
    )

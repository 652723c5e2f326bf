"""Safetensors files: strict header, encoding, and reading by byte ranges without torch.

Why not the safetensors library: its torch import takes longer than averaging a small model, and its
memory map counts as memory of this process and crashes it if the file is truncated meanwhile.

Format: 8 bytes little-endian length, a JSON object {name: {dtype, shape, data_offsets}} of that
length with the optional map "__metadata__", then the tensors' bytes without holes.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.checkpoints.checkpoint import (
    Checkpoint,
    check_shard,
    reject_outside_link,
    weights_files,
)
from llmtrain.checkpoints.tensors import ITEM_BYTES, STORED_DTYPES, StoredArray, TensorSpec
from llmtrain.errors import UserError
from llmtrain.storage.integrity import SequentialHash

MAX_HEADER_BYTES = 100_000_000
"""Limit of the reference implementation."""


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """Dtype, shape and position of a tensor in a file."""

    start: int
    """Position of the first byte."""

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape without the position, comparable across files."""
        return TensorSpec(self.dtype, self.shape)


@dataclass(frozen=True)
class Header:
    """Tensors of one file in stored order, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_safetensors(path: Path, step: int, location: str) -> Checkpoint:
    """Open one safetensors file, or `model.safetensors` or its shards in a folder."""
    folder, files = (path, weights_files(path)) if path.is_dir() else (path.parent, {path: None})
    layout: dict[str, dict[str, TensorSpec]] = {}
    places: dict[str, tuple[Path, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    for file, indexed in files.items():
        reject_outside_link(file)
        header = read_header(file)
        check_shard(file, set(header.tensors), indexed)
        layout[file.name] = {name: tensor.spec for name, tensor in header.tensors.items()}
        places |= {name: (file, tensor) for name, tensor in header.tensors.items()}
        metadata |= header.metadata

    def reader() -> SafetensorsReader:
        return SafetensorsReader(places)

    return Checkpoint(step, location, folder, layout, tuple(files), reader, metadata=metadata)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        UserError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"its header cannot have {length} bytes in a file of {size:,}")
            document = json.loads(file.read(length), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", hint="check that the folder is complete"
        ) from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(value) is not str for value in metadata.values()):
        raise _damaged(path, "its metadata does not map names to strings")
    return Header(_stored_tensors(path, document, 8 + length, size), metadata)


def _stored_tensors(
    path: Path, entries: Mapping[str, Any], data: int, size: int
) -> dict[str, StoredTensor]:
    """Return the tensors in stored order; they must cover the bytes from `data` to `size` once."""
    tensors = {name: _stored_tensor(path, name, entry, data) for name, entry in entries.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes, item[0]))
    position = data
    for name, tensor in ordered:
        if tensor.start != position:
            raise _damaged(path, f"tensor {name!r} overlaps another or leaves a hole")
        position += tensor.bytes
    if position != size:
        raise _damaged(path, f"its header describes {position:,} bytes and it has {size:,}")
    return dict(ordered)


def _stored_tensor(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(
            f"{path}: tensor {name!r} has the unsupported dtype {dtype!r}",
            hint=f"supported are {', '.join(ITEM_BYTES)}",
        )
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise _damaged(path, f"tensor {name!r} has an impossible shape or offset")
    tensor = StoredTensor(dtype, shape, data + start)
    if tensor.bytes != end - start:
        raise _damaged(path, f"tensor {name!r} of {tensor.spec} does not fit its bytes")
    return tensor


def encode_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the header of a file with the tensors `specs` in this order, and their positions."""
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


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice")
    return document


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} is damaged: {problem}",
        hint="restore the file; run `llmtrain verify` to find other damaged files",
    )


class SafetensorsReader:
    """Reader of byte ranges."""

    def __init__(self, places: Mapping[str, tuple[Path, StoredTensor]]) -> None:
        self._places = places
        self._descriptors: dict[Path, int] = {}
        self._hashes: dict[Path, SequentialHash] = {}

    def __enter__(self) -> "SafetensorsReader":
        for path in {path for path, _ in self._places.values()}:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """Read into `buffer`; see `Reader.read`."""
        path, tensor = self._places[name]
        width = ITEM_BYTES[tensor.dtype]
        target = buffer[: (stop - start) * width]
        position = tensor.start + start * width
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptors[path], [target[done:].data], position + done)
            if count == 0:
                raise UserError(f"{path} was truncated during the read", hint="restore the file")
            done += count
        if path in self._hashes:
            self._hashes[path].update(position, target.data)
        raw: StoredArray = target.view(STORED_DTYPES[tensor.dtype])
        return raw

    def start_hashing(self) -> None:
        """Hash the headers now and the tensors as `read` returns them."""
        for path in self._descriptors:
            start = min(tensor.start for file, tensor in self._places.values() if file == path)
            self._hashes[path] = SequentialHash()
            self._hashes[path].update(0, os.pread(self._descriptors[path], start, 0))

    def hashes(self) -> dict[Path, str]:
        """See `Reader.hashes`."""
        sizes = {path: os.fstat(self._descriptors[path]).st_size for path in self._hashes}
        found = {path: digest.hexdigest(sizes[path]) for path, digest in self._hashes.items()}
        return {path: digest for path, digest in found.items() if digest is not None}

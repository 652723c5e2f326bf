"""Safetensors files: headers, and reading by byte ranges without torch.

Why not the library's tensors: its memory map counts as memory of this process, and crashes it if
the file is truncated meanwhile. The library only parses and checks the header.

Format: 8 bytes little-endian length, a JSON object {name: {dtype, shape, data_offsets}} of that
length with the optional map "__metadata__", then the tensors' bytes without holes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llmtrain.checkpoints.checkpoint import (
    Checkpoint,
    check_shard,
    reject_outside_link,
    weights_files,
)
from llmtrain.checkpoints.tensors import ITEM_BYTES, STORED_DTYPES, StoredArray, TensorSpec
from llmtrain.errors import UserError
from llmtrain.storage.integrity import SequentialHash


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """Dtype, shape and position of a tensor in a file."""

    start: int
    """Position of the first byte."""


def open_safetensors(path: Path, step: int, location: str) -> Checkpoint:
    """Open one safetensors file, or `model.safetensors` or its shards in a folder."""
    folder, files = (path, weights_files(path)) if path.is_dir() else (path.parent, {path: None})
    layout: dict[str, dict[str, TensorSpec]] = {}
    places: dict[str, tuple[Path, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    for file, indexed in files.items():
        reject_outside_link(file)
        tensors, file_metadata = read_header(file)
        check_shard(file, set(tensors), indexed)
        layout[file.name] = {n: TensorSpec(each.dtype, each.shape) for n, each in tensors.items()}
        places |= {name: (file, tensor) for name, tensor in tensors.items()}
        metadata |= file_metadata

    def reader() -> SafetensorsReader:
        return SafetensorsReader(places)

    return Checkpoint(step, location, folder, layout, tuple(files), reader, metadata=metadata)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file in stored order, and its metadata."""
    try:
        with path.open("rb") as file, safe_open(path, framework="np"):  # checks the header
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", hint="check that the folder is complete"
        ) from None
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is damaged: {error}",
            hint="restore the file; run `llmtrain verify` to find other damaged files",
        ) from None
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {}
    for name in sorted(entries, key=lambda name: (*entries[name]["data_offsets"], name)):
        entry = entries[name]
        if entry["dtype"] not in ITEM_BYTES:
            raise UserError(
                f"{path}: tensor {name!r} has the unsupported dtype {entry['dtype']}",
                hint=f"convert it to one of {', '.join(ITEM_BYTES)}",
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), start)
    return tensors, metadata


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return document


def encode_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the header of a file with the tensors `specs` in this order, and their positions."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends = dict(zip(specs, accumulate(spec.bytes for spec in specs.values()), strict=True))
    for name, spec in specs.items():
        offsets = [ends[name] - spec.bytes, ends[name]]
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {
        name: StoredTensor(spec.dtype, spec.shape, len(header) + ends[name] - spec.bytes)
        for name, spec in specs.items()
    }


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

"""Safetensors files: headers, and reading by byte ranges without torch.

Why not the library's tensors: its memory map counts as memory of this process, and crashes it if
the file is truncated meanwhile. The library only parses and checks the header.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llmtrain.checkpoints.checkpoint import (
    Checkpoint,
    Reader,
    check_shard,
    recorded_digests,
    reject_outside_link,
    require_listed,
    weights_files,
)
from llmtrain.checkpoints.tensors import ITEM_BYTES, STORED_DTYPES, StoredArray, TensorSpec
from llmtrain.errors import UserError
from llmtrain.storage.integrity import Algorithm, Digest, RunningDigest

_PIECE_BYTES = 1 << 20
"""Bytes read and hashed at a time, so that hashing finds them in the processor's cache."""


def open_safetensors(path: Path, step: int, location: str) -> Checkpoint:
    """Open one safetensors file, or `model.safetensors` or its shards in a folder."""
    folder = path if path.is_dir() else path.parent
    recorded = recorded_digests(folder)
    files = weights_files(path) if path.is_dir() else {path: None}
    layout: dict[str, dict[str, TensorSpec]] = {}
    metadata: dict[str, str] = {}
    for file, indexed in files.items():
        reject_outside_link(file)
        layout[file.name], file_metadata = read_header(file)
        check_shard(file, set(layout[file.name]), indexed)
        metadata |= file_metadata
    if path.is_dir():
        require_listed(files, recorded)
    reader = partial(SafetensorsReader, folder, layout)
    return Checkpoint(
        step, location, folder, layout, tuple(files), reader, metadata=metadata, recorded=recorded
    )


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Return the tensors of a safetensors file in stored order, and its metadata."""
    try:
        with path.open("rb") as file, safe_open(path, framework="np"):  # checks the header
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=_unique_keys)
    except (OSError, SafetensorError, ValueError) as error:
        hint = "restore the file; run `llmtrain verify PATH` to find damaged files"
        raise UserError(f"cannot read {path}: {error}", hint=hint) from None
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {}
    for name in sorted(entries, key=lambda name: (*entries[name]["data_offsets"], name)):
        entry = entries[name]
        if entry["dtype"] not in ITEM_BYTES:
            message = f"{path}: tensor {name!r} has the unsupported dtype {entry['dtype']}"
            raise UserError(message, hint=f"convert it to one of {', '.join(ITEM_BYTES)}")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = TensorSpec(entry["dtype"], tuple(entry["shape"]), start)
    return tensors, metadata


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return document


def encode_header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorSpec]]:
    """Return the header of a file with the tensors `specs` in this order, and their positions."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, spec in specs.items():
        offsets[name] = [end, end + spec.bytes]
        end += spec.bytes
        shape = list(spec.shape)
        entries[name] = {"dtype": spec.dtype, "shape": shape, "data_offsets": offsets[name]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + offset for name, (offset, _) in offsets.items()}
    return header, {name: replace(spec, start=starts[name]) for name, spec in specs.items()}


class SafetensorsReader(Reader):
    """Reader of byte ranges; not thread-safe."""

    def __init__(self, folder: Path, layout: Mapping[str, Mapping[str, TensorSpec]]) -> None:
        self._folder = folder
        self._layout = layout
        self._file_of = {name: file for file, specs in layout.items() for name in specs}
        self._files: dict[str, FileIO] = {}
        self._running: dict[str, RunningDigest] = {}

    def __enter__(self) -> Self:
        paths = {name: self._folder / name for name in self._layout}
        self._files = {name: path.open("rb", buffering=0) for name, path in paths.items()}
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """Read into `buffer`; see `Reader.read`."""
        file = self._file_of[name]
        spec = self._layout[file][name]
        width = ITEM_BYTES[spec.dtype]
        target = buffer[: (stop - start) * width]
        position = spec.start + start * width
        for first in range(0, len(target), _PIECE_BYTES):
            self._read_piece(file, position + first, target[first : first + _PIECE_BYTES].data)
        raw: StoredArray = target.view(STORED_DTYPES[spec.dtype])
        return raw

    def _read_piece(self, file: str, position: int, piece: memoryview) -> None:
        read = 0
        self._files[file].seek(position)
        while read < len(piece):
            count = self._files[file].readinto(piece[read:])
            if not count:
                raise UserError(f"{self._folder / file} is truncated", hint="restore the file")
            read += count
        if file in self._running:
            self._running[file].update(position, piece)

    def start_hashing(self, algorithms: Mapping[str, Algorithm]) -> None:
        """Hash the headers now and the tensors as `read` returns them."""
        for name in algorithms.keys() & self._files.keys():
            self._running[name] = RunningDigest(algorithms[name])
            length = min((spec.start for spec in self._layout[name].values()), default=0)
            self._read_piece(name, 0, memoryview(bytearray(length)))

    def digests(self) -> dict[Path, Digest]:
        """See `Reader.digests`."""
        found = {}
        for name, running in self._running.items():
            digest = running.digest(os.fstat(self._files[name].fileno()).st_size)
            if digest is not None:
                found[self._folder / name] = digest
        return found

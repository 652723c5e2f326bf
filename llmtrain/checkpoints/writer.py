"""Write an average: a Hugging Face folder whose tensors arrive in chunks."""

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Self

from llmtrain.checkpoints.checkpoint import (
    COMPANION_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    reject_outside_link,
)
from llmtrain.checkpoints.safetensors_files import encode_header
from llmtrain.checkpoints.tensors import FLOATS, ITEM_BYTES, StoredArray, TensorSpec
from llmtrain.storage.file_systems import link_or_copy, unless_unsupported
from llmtrain.storage.integrity import Digest, RunningDigest
from llmtrain.storage.json_files import read_json, write_json

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Values of --dtype, and the safetensors dtype of each."""

_FLUSH_BYTES = 8 << 20

Layout = Mapping[str, Mapping[str, TensorSpec]]
"""Tensors by file name, in stored order."""


def output_layout(newest: Checkpoint, *, dtype: str | None) -> Layout:
    """Return the files of an average: those of its newest input."""
    layout = {
        file: {
            name: TensorSpec(dtype, spec.shape) if dtype and spec.dtype in FLOATS else spec
            for name, spec in specs.items()
        }
        for file, specs in newest.layout.items()
    }
    if len(layout) == 1:
        return {WEIGHTS_FILE: next(iter(layout.values()))}  # without an index
    return layout


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors: the size of an average on disk, except for headers."""
    return sum(spec.bytes for specs in layout.values() for spec in specs.values())


def copy_companions(newest: Checkpoint, target: Path, dtype: str | None) -> None:
    """Copy config, tokenizer, generation and origin files; record a new dtype in the config."""
    if newest.config is not None:
        write_json(target / CONFIG_FILE, newest.config)
    elif newest.folder.is_dir():
        for path in sorted(p for pattern in COMPANION_FILES for p in newest.folder.glob(pattern)):
            if path.is_file():
                reject_outside_link(path)
                _copy_or_link(path, target / path.name)
    config = target / CONFIG_FILE
    if dtype is not None and config.exists():
        torch_name = next(name for name, short in DTYPES.items() if short == dtype)
        document = read_json(config)
        key = "torch_dtype" if "torch_dtype" in document and "dtype" not in document else "dtype"
        write_json(config, document | {key: torch_name})


def _copy_or_link(source: Path, target: Path) -> None:
    """Copy a file, or link a shared file of a run; the config is copied to be modified."""
    is_shared = source.name != CONFIG_FILE and source.lstat().st_nlink > 1
    (link_or_copy if is_shared else shutil.copyfile)(source, target)


class _OutputFile(NamedTuple):
    stream: FileIO
    size: int
    running: RunningDigest


@dataclass
class WeightsWriter:
    """Weights files of one folder, created on entry and open for writing at any position."""

    folder: Path
    layout: Layout
    metadata: Mapping[str, str]
    _files: dict[str, _OutputFile] = field(default_factory=dict, init=False)
    _places: dict[str, tuple[_OutputFile, TensorSpec]] = field(default_factory=dict, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        with self._stack:  # closes the files if one of them cannot be created
            for file, specs in self.layout.items():
                self._create(self.folder / file, specs)
            self._stack = self._stack.pop_all()
        if len(self.layout) > 1:
            weight_map = {name: file for file, specs in self.layout.items() for name in specs}
            sizes = {"total_size": layout_bytes(self.layout)}
            write_json(self.folder / INDEX_FILE, {"metadata": sizes, "weight_map": weight_map})
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _create(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, stored = encode_header(specs, {"format": "pt"} | dict(self.metadata))
        size = len(header) + sum(spec.bytes for spec in specs.values())
        stream = self._stack.enter_context(path.open("xb", buffering=0))
        if hasattr(os, "posix_fallocate"):
            with unless_unsupported("space reservation", path):
                os.posix_fallocate(stream.fileno(), 0, size)
        stream.truncate(size)  # without a reservation, the disk may fill up later
        file = self._files[path.name] = _OutputFile(stream, size, RunningDigest())
        self._places |= {name: (file, spec) for name, spec in stored.items()}
        self._write(file, 0, memoryview(header))

    def write(self, name: str, start: int, raw: StoredArray) -> None:
        """Write stored numbers at element `start` of a tensor; not thread-safe."""
        file, spec = self._places[name]
        self._write(file, spec.start + start * ITEM_BYTES[spec.dtype], raw.data.cast("B"))

    def _write(self, file: "_OutputFile", position: int, data: memoryview) -> None:
        file.running.update(position, data)
        file.stream.seek(position)
        written = 0
        while written < len(data):
            written += file.stream.write(data[written:])
        first, end = position // _FLUSH_BYTES, (position + written) // _FLUSH_BYTES
        if sys.platform == "linux" and end > first:  # start writing to disk without waiting for it
            start, length = first * _FLUSH_BYTES, (end - first) * _FLUSH_BYTES
            os.posix_fadvise(file.stream.fileno(), start, length, os.POSIX_FADV_DONTNEED)

    def digests(self) -> dict[str, Digest]:
        """Return the digest by name of each file that was written completely and in order."""
        found = {name: file.running.digest(file.size) for name, file in self._files.items()}
        return {name: digest for name, digest in found.items() if digest is not None}

"""Write an average: a Hugging Face folder whose tensors arrive in chunks.

Every file gets its header and full size first, so a disk that is too small fails at once. Files are
hashed during the write.

    with WeightsWriter(folder, layout, metadata) as writer:
        writer.write("lm_head.weight", 0, raw)
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llmtrain.checkpoints.checkpoint import (
    COMPANION_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    reject_outside_link,
)
from llmtrain.checkpoints.safetensors_files import StoredTensor, encode_header
from llmtrain.checkpoints.tensors import FLOATS, ITEM_BYTES, StoredArray, TensorSpec
from llmtrain.storage.integrity import SequentialHash
from llmtrain.storage.json_files import read_json, write_json

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Values of --dtype, and the safetensors dtype of each."""

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
                shutil.copyfile(path, target / path.name)
    config = target / CONFIG_FILE
    if dtype is not None and config.exists():
        torch_name = next(name for name, short in DTYPES.items() if short == dtype)
        document = read_json(config)
        key = "torch_dtype" if "torch_dtype" in document and "dtype" not in document else "dtype"
        write_json(config, document | {key: torch_name})


class _OpenFile(NamedTuple):
    name: str
    size: int
    hash: SequentialHash


class WeightsWriter:
    """Weights files of one folder, open for writing at any position."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        metadata: Mapping[str, str],
        hashes: dict[str, str] | None = None,
    ) -> None:
        """Prepare a writer; files are created on entry.

        Args:
            folder: an existing folder.
            layout: the files to create.
            metadata: header metadata of each file.
            hashes: receives the SHA-256 of each file written in order, when the writer closes.
        """
        self._folder = folder
        self._layout = layout
        self._metadata = {"format": "pt"} | dict(metadata)
        self._places: dict[str, tuple[int, StoredTensor]] = {}
        self._hashes = {} if hashes is None else hashes
        self._open: dict[int, _OpenFile] = {}
        """By descriptor."""

    def __enter__(self) -> "WeightsWriter":
        try:
            for file, specs in self._layout.items():
                self._create(self._folder / file, specs)
        except BaseException:
            self.__exit__()
            raise
        if len(self._layout) > 1:
            weight_map = {name: file for file, specs in self._layout.items() for name in specs}
            sizes = {"total_size": layout_bytes(self._layout)}
            write_json(self._folder / INDEX_FILE, {"metadata": sizes, "weight_map": weight_map})
        return self

    def __exit__(self, *exception: object) -> None:
        while self._open:
            descriptor, file = self._open.popitem()
            os.close(descriptor)
            if (digest := file.hash.hexdigest(file.size)) is not None:
                self._hashes[file.name] = digest

    def _create(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, stored = encode_header(specs, self._metadata)
        size = len(header) + sum(spec.bytes for spec in specs.values())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        file = self._open[descriptor] = _OpenFile(path.name, size, SequentialHash())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS cannot reserve space: the disk may fill up later
            os.ftruncate(descriptor, size)
        os.pwrite(descriptor, header, 0)
        file.hash.update(0, header)
        self._places |= {name: (descriptor, tensor) for name, tensor in stored.items()}

    def write(self, name: str, start: int, raw: StoredArray) -> None:
        """Write stored numbers at element `start` of a tensor; not thread-safe."""
        descriptor, tensor = self._places[name]
        position = tensor.start + start * ITEM_BYTES[tensor.dtype]
        remaining = raw.data.cast("B")
        self._open[descriptor].hash.update(position, remaining)
        while remaining:
            count = os.pwrite(descriptor, remaining, position)
            if sys.platform == "linux":  # start writing to disk without waiting for it
                os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
            remaining, position = remaining[count:], position + count

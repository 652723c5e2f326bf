"""An average on disk: a Hugging Face folder whose tensors are written piece by piece.

Why: every file is laid out and given its full size before the first number comes, so that a disk that
is too small says so at once; and hashed while it is written, not read again for it.

    with WeightsWriter(folder, layout, metadata) as writer: writer.write("lm_head.weight", 0, raw)
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.checkpoints.header import FLOATS, ITEM_BYTES, StoredTensor, TensorSpec, encode_header
from llmtrain.checkpoints.numbers import StoredArray
from llmtrain.checkpoints.open import refuse_links_out
from llmtrain.checkpoints.weights_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from llmtrain.errors import UserError
from llmtrain.storage.integrity import SequentialHash
from llmtrain.storage.json_files import read_json, write_json

CARRIED_OVER = (
    "config.json",
    "generation_config.json",
    "training.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of the newest input that an average needs to be loaded; never code."""

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What --dtype may say."""

Layout = Mapping[str, Mapping[str, TensorSpec]]
"""File name → the tensors it holds, in order."""

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def bytes_of(text: str) -> int:
    """A size as people write it: `500MB`, `5GB`, `2GiB`.

    Raises:
        UserError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size <= 0:
        raise UserError(f"{text!r} is no size", hint="such as 500MB, 5GB or 2GiB")
    return size


def output_layout(newest: Checkpoint, *, dtype: str | None, max_shard: int | None) -> Layout:
    """The files of an average: those of its newest input, or shards of at most `max_shard` bytes.

    A tensor larger than that has a shard of its own.
    """
    layout = {
        filename: {name: _converted(spec, dtype) for name, spec in specs.items()}
        for filename, specs in newest.layout.items()
    }
    if len(layout) == 1:
        layout = {WEIGHTS_FILE: next(iter(layout.values()))}  # a single file needs no index
    if max_shard is None:
        return layout
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in ((name, spec) for specs in layout.values() for name, spec in specs.items()):
        if shards[-1] and sum(held.bytes for held in shards[-1].values()) + spec.bytes > max_shard:
            shards.append({})
        shards[-1][name] = spec
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout: what an average takes on disk, but for a few kilobytes."""
    return sum(spec.bytes for specs in layout.values() for spec in specs.values())


def _converted(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    return TensorSpec(dtype, spec.shape) if dtype and spec.dtype in FLOATS else spec


@dataclass(frozen=True)
class _Written:
    """A file that is being written."""

    name: str
    size: int
    hash: SequentialHash


class WeightsWriter:
    """The weights files of one folder, open for writing at any place."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        metadata: Mapping[str, str],
        hashes: dict[str, str] | None = None,
    ) -> None:
        """Nothing is written before the writer is entered.

        Args:
            folder: an existing folder.
            layout: the files.
            metadata: of each file.
            hashes: takes the SHA-256 of each file whose numbers were written first to last.
        """
        self._folder = folder
        self._layout = layout
        self._metadata = {"format": "pt"} | dict(metadata)
        self._places: dict[str, tuple[int, StoredTensor]] = {}
        self._hashes = {} if hashes is None else hashes
        self._written: dict[int, _Written] = {}
        """By descriptor."""

    def __enter__(self) -> "WeightsWriter":
        try:
            for filename, specs in self._layout.items():
                self._create(self._folder / filename, specs)
        except BaseException:
            self.__exit__()
            raise
        if len(self._layout) > 1:
            self._write_index()
        return self

    def __exit__(self, *exception: object) -> None:
        while self._written:
            descriptor, file = self._written.popitem()
            os.close(descriptor)
            digest = file.hash.hexdigest(file.size)
            if digest is not None:
                self._hashes[file.name] = digest

    def _create(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, stored = encode_header(specs, self._metadata)
        size = len(header) + sum(spec.bytes for spec in specs.values())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        written = self._written[descriptor] = _Written(path.name, size, SequentialHash())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS: the disk may turn out to be full later
            os.ftruncate(descriptor, size)
        os.pwrite(descriptor, header, 0)
        written.hash.update(0, header)
        self._places |= {name: (descriptor, tensor) for name, tensor in stored.items()}

    def _write_index(self) -> None:
        """The map from tensors to shards that transformers reads."""
        weight_map = {name: filename for filename, specs in self._layout.items() for name in specs}
        document = {
            "metadata": {"total_size": layout_bytes(self._layout)},
            "weight_map": weight_map,
        }
        write_json(self._folder / INDEX_FILE, document)

    def write(self, name: str, start: int, raw: StoredArray) -> None:
        """Put stored numbers at index `start` of a tensor; one thread at a time may call this."""
        descriptor, tensor = self._places[name]
        position = tensor.start + start * ITEM_BYTES[tensor.dtype]
        remaining = raw.data.cast("B")
        self._written[descriptor].hash.update(position, remaining)
        while remaining:
            count = os.pwrite(descriptor, remaining, position)
            if (
                sys.platform == "linux"
            ):  # begins to write out what is not on the disk yet, and does not wait
                os.posix_fadvise(descriptor, position, count, os.POSIX_FADV_DONTNEED)
            remaining, position = remaining[count:], position + count


def carry_over(newest: Checkpoint, target: Path, dtype: str | None) -> None:
    """Copy configuration, tokenizer, generation and origin files; note a new dtype in the config."""
    if newest.config is not None:
        write_json(target / CONFIG_FILE, newest.config)
    elif newest.folder.is_dir():
        for pattern in CARRIED_OVER:
            for path in sorted(newest.folder.glob(pattern)):
                if path.is_file():
                    refuse_links_out(path)
                    shutil.copyfile(path, target / path.name)
    config = target / CONFIG_FILE
    if dtype is not None and config.exists():
        named = next(name for name, short in DTYPES.items() if short == dtype)
        document = read_json(config)
        key = "torch_dtype" if "torch_dtype" in document and "dtype" not in document else "dtype"
        write_json(config, document | {key: named})

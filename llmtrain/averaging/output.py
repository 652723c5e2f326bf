"""An average on disk: a Hugging Face folder whose tensors are written piece by piece, and its provenance.

Why: the merge produces numbers in whatever order its threads finish, so every file is laid out and
given its full size before the first number comes; a disk that is too small says so at once.

    with WeightsWriter(folder, {"model.safetensors": specs}) as writer: writer.write(name, 0, raw)
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from llmtrain.averaging.header import ITEM_BYTES, StoredTensor, TensorSpec, encode_header
from llmtrain.averaging.numbers import Raw
from llmtrain.errors import RunFailed

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

Layout = Mapping[str, Mapping[str, TensorSpec]]
"""File name → the tensors it holds, in order."""


class WeightsWriter:
    """The weights files of one folder, open for writing at any place."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._places: dict[str, tuple[int, StoredTensor]] = {}
        self._descriptors: list[int] = []

    def __enter__(self) -> "WeightsWriter":
        try:
            for filename, specs in self._layout.items():
                self._create(self._folder / filename, specs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _create(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, stored = encode_header(specs, {"format": "pt"})
        size = len(header) + sum(spec.bytes for spec in specs.values())
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors.append(descriptor)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            raise RunFailed(
                f"cannot write {size:,} bytes to {path.parent.parent}: {error.strerror}",
                hint="make room on the disk, or write elsewhere with --out",
            ) from None
        os.pwrite(descriptor, header, 0)
        self._places |= {name: (descriptor, tensor) for name, tensor in stored.items()}

    def write(self, name: str, start: int, raw: Raw) -> None:
        """Put stored numbers at index `start` of a tensor; any thread may call this."""
        descriptor, tensor = self._places[name]
        position = tensor.start + start * ITEM_BYTES[tensor.dtype]
        remaining = raw.data.cast("B")
        while remaining:
            count = os.pwrite(descriptor, remaining, position)
            remaining, position = remaining[count:], position + count


def carry_over(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, generation and origin files from the newest input."""
    for pattern in CARRIED_OVER:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)

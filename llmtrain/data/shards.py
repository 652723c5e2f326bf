"""Token shards: a header of 1024 bytes, then uint16 tokens, as in llm.c and modded-nanogpt.

Why positioned reads: the pages of a memory map count as memory of the process, and a file that is
truncated under a map kills the process instead of raising.
"""

import contextlib
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import ShardRecord, SplitRecord, shard_name
from llmtrain.errors import UserError
from llmtrain.storage import commit, integrity
from llmtrain.storage.file_systems import fsync_path

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_SHARD_TOKENS = 2**31 - 1
"""Largest token count that fits the header's int32."""

TOKEN = np.dtype("<u2")
TOKEN_BYTES = TOKEN.itemsize
_DAMAGED = "check it with llmtrain verify; restore it or prepare the data again"


def header(tokens: int) -> bytes:
    """Return a shard's header: 256 little-endian int32 values, zero after the first three."""
    return struct.pack("<3i", MAGIC, VERSION, tokens).ljust(HEADER_BYTES, b"\0")


def shard_bytes(tokens: int) -> int:
    """Return the file size of a shard."""
    return HEADER_BYTES + TOKEN_BYTES * tokens


def shard_problem(folder: Path, shard: ShardRecord) -> str | None:
    """Return what is wrong with a shard's size or header, or None. Its tokens are not read."""
    path = folder / shard.name
    if not path.is_file():
        return f"{path} is missing"
    expected, size = shard_bytes(shard.tokens), path.stat().st_size
    if size != expected:
        return f"{path} has {size:,} bytes instead of {expected:,} ({shard.tokens:,} tokens)"
    with path.open("rb") as file:
        if file.read(HEADER_BYTES) != header(shard.tokens):
            return f"{path} has another header than {[MAGIC, VERSION, shard.tokens]}"
    return None


@dataclass
class ShardWriter:
    """Writer of one split's documents; a shard ends with the document that fills it.

    A shard is written under a temporary name, flushed to disk, renamed and passed to `on_shard`.
    """

    folder: Path
    split: str
    shard_tokens: int
    finished: list[ShardRecord]
    on_shard: Callable[[ShardRecord], None]
    _file: BinaryIO | None = None
    _tokens: int = 0
    _documents: int = 0
    _text_bytes: int = 0

    def add(self, tokens: npt.NDArray[np.uint16], text_bytes: int, *, ends_document: bool) -> None:
        """Append the tokens of a document, or of a part of it."""
        if self._file is None:
            temporary = commit.temporary_path(self._path)
            temporary.unlink(missing_ok=True)
            self._file = temporary.open("xb", buffering=1 << 20)
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(tokens.astype(TOKEN, copy=False).data)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        if self._tokens > MAX_SHARD_TOKENS:
            raise UserError(
                f"a document exceeds the {MAX_SHARD_TOKENS:,} tokens of a shard",
                hint="split the document, or lower --shard-tokens",
            )
        if ends_document:
            self._documents += 1
            if self._tokens >= self.shard_tokens:
                self._finish_shard()

    def close(self) -> SplitRecord:
        """Finish the last shard and return the record of the split."""
        if self._file is not None:
            self._finish_shard()
        return SplitRecord.from_shards(self.finished)

    def abort(self) -> None:
        """Delete the unfinished shard, which frees space on a full disk."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # flushing the buffer fails again on a full disk
                self._file.close()
            self._file = None
            commit.temporary_path(self._path).unlink()

    @property
    def _path(self) -> Path:
        return self.folder / shard_name(self.split, len(self.finished))

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(header(self._tokens))
        self._file.close()
        self._file = None
        temporary = commit.temporary_path(self._path)
        fsync_path(temporary)
        record = ShardRecord(
            name=self._path.name,
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            blake3=integrity.blake3_of(temporary),
        )
        temporary.replace(self._path)
        fsync_path(self.folder)
        self.on_shard(record)
        self.finished.append(record)
        self._tokens = self._documents = self._text_bytes = 0


class Tokens(Protocol):
    """A random-access sequence of tokens."""

    def __len__(self) -> int: ...
    def read(self, start: int, length: int) -> npt.NDArray[np.integer[Any]]:
        """Return tokens `start` to `start + length`."""


@dataclass(frozen=True)
class TokenFile:
    """A file of uint16 tokens that begin at byte `offset`."""

    path: Path
    tokens: int
    offset: int
    record: ShardRecord | None = None
    """The shard's record in its manifest; None for nanoGPT's files."""


class TokenReader:
    """The tokens of one split as one array on disk. Thread-safe; keeps no tokens in memory."""

    def __init__(self, files: tuple[TokenFile, ...], vocab_size: int = 1 << 16) -> None:
        """Open the files of one split, in order. Reading an id >= `vocab_size` is an error."""
        self._files = files
        self._vocab_size = vocab_size
        self._ends = list(accumulate(file.tokens for file in files))
        self._descriptors: list[int] = []
        self.close = weakref.finalize(self, _close_all, self._descriptors)
        """Close the files, as garbage collection does."""
        for file in files:
            self._descriptors.append(os.open(file.path, os.O_RDONLY))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> npt.NDArray[np.uint16]:
        """Return tokens `start` to `start + length`, shape (length,), across shards."""
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        tokens = np.empty(length, dtype=TOKEN)
        done = 0
        while done < length:
            index = bisect_right(self._ends, start + done)
            first = start + done - (self._ends[index] - self._files[index].tokens)
            count = min(length - done, self._files[index].tokens - first)
            part = tokens[done : done + count]
            self._fill(part, index, first)
            if part.max() >= self._vocab_size:
                position = int((part >= self._vocab_size).argmax())
                raise UserError(
                    f"{self._files[index].path} contains id {part[position]} at token "
                    f"{first + position:,}, beyond the vocabulary of {self._vocab_size:,}",
                    hint=_DAMAGED,
                )
            done += count
        return tokens

    def _fill(self, target: npt.NDArray[np.uint16], index: int, first: int) -> None:
        file = self._files[index]
        position = file.offset + first * TOKEN_BYTES
        view = target.view(np.uint8).data
        while view:
            count = os.preadv(self._descriptors[index], [view], position)
            if count == 0:
                raise UserError(
                    f"{file.path} ends at byte {position:,}, before its last token", hint=_DAMAGED
                )
            view = view[count:]
            position += count


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

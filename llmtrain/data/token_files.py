"""Token files: 1024 bytes of header, then uint16 tokens; written once, read at random.

Why this layout: llm.c and modded-nanogpt read it, and nanoGPT's headerless files can be read too.
Reading is by positioned reads rather than a memory map: a map's pages count as the process's memory
and grow with the file, and a file cut short under a map kills the process instead of raising.

    TokenReader((TokenFile(Path("train-00000.bin"), tokens=100, offset=HEADER_BYTES),)).read(0, 65)
"""

import contextlib
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import ShardRecord, SplitRecord, TokenizerRecord, shard_name
from llmtrain.errors import UserError
from llmtrain.storage import commit, integrity

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_SHARD_TOKENS = 2**31 - 1
"""What the header's int32 can say."""

_SCAN_BYTES = 1 << 24
_TOKEN = np.dtype("<u2")
TOKEN_BYTES = _TOKEN.itemsize
_HEADER_INT = np.dtype("<i4")


def header(tokens: int) -> bytes:
    """The first 1024 bytes of a shard: 256 little-endian int32, of which three are used."""
    values = np.zeros(HEADER_BYTES // 4, dtype=_HEADER_INT)
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


# --- writing -----------------------------------------------------------------------------------


class ShardWriter:
    """Writes the documents of one split into shards; a shard ends with the document that fills it.

    A shard is written under a temporary name, flushed to disk, and renamed when it is whole.

    Args:
        finished: the shards that are in the folder already.
        on_shard: called with each shard once it is durable.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int,
        finished: Sequence[ShardRecord] = (),
        on_shard: Callable[[ShardRecord], None] = lambda record: None,
    ) -> None:
        self.shards = list(finished)
        self._on_shard = on_shard
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._tokens = self._documents = self._text_bytes = 0

    def add(self, tokens: npt.NDArray[np.uint16], text_bytes: int, *, ends_document: bool) -> None:
        """Append the tokens of a document or of a part of one (its last part ends it).

        Raises:
            UserError: one document has more tokens than a shard's header can say.
        """
        if self._file is None:
            self._file = self._staging.open("wb", buffering=1 << 20)
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(tokens.astype(_TOKEN, copy=False).data)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        if self._tokens > MAX_SHARD_TOKENS:
            raise UserError(
                f"one document fills a shard beyond {MAX_SHARD_TOKENS:,} tokens",
                hint="split that document, or lower --shard-tokens",
            )
        if ends_document:
            self._documents += 1
            if self._tokens >= self._shard_tokens:
                self._finish_shard()

    def close(self) -> SplitRecord:
        """Finish the last shard; the record of all of them."""
        if self._file is not None:
            self._finish_shard()
        return SplitRecord.of(self.shards)

    def abort(self) -> None:
        """Drop the shard that is not finished. On a full disk, its room is needed."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered still does not fit
                self._file.close()
            self._file = None
            self._staging.unlink()

    @property
    def _name(self) -> str:
        return shard_name(self._split, len(self.shards))

    @property
    def _staging(self) -> Path:
        return self._folder / f"{commit.TEMPORARY_PREFIX}{self._name}"

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(header(self._tokens))
        self._file.close()
        self._file = None
        commit.fsync_path(self._staging)
        record = ShardRecord(
            name=self._name,
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            sha256=integrity.sha256_of(self._staging),
        )
        self._staging.replace(self._folder / self._name)
        commit.fsync_path(self._folder)
        self._on_shard(record)
        self.shards.append(record)
        self._tokens = self._documents = self._text_bytes = 0


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """A file of uint16 tokens that begin at byte `offset`."""

    path: Path
    tokens: int
    offset: int


class TokenReader:
    """The tokens of one split as one array on disk. Safe to share between threads; holds no tokens."""

    def __init__(self, token_files: tuple[TokenFile, ...], vocab_size: int = 1 << 16) -> None:
        """Open the files.

        Args:
            token_files: of one split, in order.
            vocab_size: ids from this on are refused when they are read.
        """
        self._files = token_files
        self._vocab_size = vocab_size
        self._ends = list(accumulate(file.tokens for file in token_files))
        self._descriptors: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        for file in token_files:
            self._descriptors.append(os.open(file.path, os.O_RDONLY))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> npt.NDArray[np.uint16]:
        """Tokens `start` to `start + length`, shape (length,), across shards.

        Raises:
            IndexError: the range is not inside the split.
            UserError: a file has become shorter since it was opened, or holds an id beyond the vocabulary.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        tokens = np.empty(length, dtype=_TOKEN)
        done = 0
        while done < length:
            index = bisect_right(self._ends, start + done)
            first = start + done - (self._ends[index] - self._files[index].tokens)
            count = min(length - done, self._files[index].tokens - first)
            part = tokens[done : done + count]
            self._fill(part, index, first)
            if (
                part.max() >= self._vocab_size
            ):  # of a window: a thousandth of what the model does with it
                raise self._beyond_vocabulary(part, index, first)
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
                    f"{file.path} ends at byte {position:,}, before its last token",
                    hint="the file is damaged: llmtrain verify says which; restore it or prepare it again",
                )
            view = view[count:]
            position += count

    def _beyond_vocabulary(self, part: npt.NDArray[np.uint16], index: int, first: int) -> UserError:
        place = int((part >= self._vocab_size).argmax())
        return UserError(
            f"{self._files[index].path} holds id {part[place]} at token {first + place:,}, beyond the vocabulary of "
            f"{self._vocab_size:,}",
            hint="the file is damaged or of another tokenizer: llmtrain verify tells; prepare it again",
        )

    def close(self) -> None:
        """Close the files; reading is over. Also happens when the reader is garbage-collected."""
        self._close()


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def shard_problem(folder: Path, shard: ShardRecord) -> str | None:
    """What is wrong with a shard by its size and header, or None. Contents are not read."""
    path = folder / shard.name
    if not path.is_file():
        return f"{path} is missing"
    expected, size = HEADER_BYTES + TOKEN_BYTES * shard.tokens, path.stat().st_size
    if size != expected:
        return f"{path} has {size:,} bytes instead of {expected:,} ({shard.tokens:,} tokens)"
    with path.open("rb") as file:
        found = file.read(HEADER_BYTES)
    if found != header(shard.tokens):
        values = np.frombuffer(found, dtype=_HEADER_INT)[:3].tolist()
        return f"{path} has the header {values} instead of {[MAGIC, VERSION, shard.tokens]}"
    return None


def content_problem(folder: Path, shard: ShardRecord, tokenizer: TokenizerRecord) -> str | None:
    """What is wrong with a shard by its contents, or None: hash, ids beyond the vocabulary, documents."""
    path = folder / shard.name
    if integrity.sha256_of(path) != shard.sha256:
        return f"{path} has another SHA-256 than when it was written"
    largest, documents = 0, 0
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while content := file.read(_SCAN_BYTES):
            tokens = np.frombuffer(content, dtype=_TOKEN)
            largest = max(largest, int(tokens.max()))
            documents += int(np.count_nonzero(tokens == tokenizer.eot))
    if largest >= tokenizer.vocab_size:
        return f"{path} holds token {largest}, beyond the vocabulary of {tokenizer.vocab_size:,}"
    if documents != shard.documents:
        return f"{path} holds {documents:,} documents instead of {shard.documents:,}"
    return None

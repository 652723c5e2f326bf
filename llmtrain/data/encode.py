"""Documents to tokens: an ordered stream of pieces, encoded by threads.

Why: documents are cut into pieces of about a megabyte, so that a book and a tweet cost the same
memory; threads encode them (the encoder releases Python's lock), and the results come out in the
order the documents went in. So the tokens do not depend on the number of workers.

    for piece, tokens in encoded(pieces(documents, in_val), load_tokenizer("gpt2"), workers=2): ...
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmtrain.data.tokenizer import PIECE_BYTES, Tokenizer, cut
from llmtrain.errors import UserError

_CHUNKS_AHEAD = 4
"""Chunks in flight for each worker: enough that none waits for the one before it to be written."""

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a huge one."""

    text: bytes | memoryview
    split: str
    ends_document: bool


def pieces(documents: Iterable[memoryview], in_val: npt.NDArray[np.bool_]) -> Iterator[Piece]:
    """The documents (UTF-8) in order, each in its split; `in_val` has shape (documents,)."""
    for document, val in zip(documents, in_val.tolist(), strict=True):
        split = "val" if val else "train"
        parts = cut(document)
        part = next(parts)
        for following in parts:
            yield Piece(part, split, ends_document=False)
            part = following
        yield Piece(part, split, ends_document=True)


def _chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces of about a megabyte together: the unit of work of a thread."""
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= PIECE_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_chunk(tokenizer: Tokenizer, chunk: list[Piece]) -> list[Tokens]:
    """The tokens of each piece, end-of-text after the last one of a document."""
    results = []
    for piece in chunk:
        try:
            tokens = tokenizer.encode(str(piece.text, "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"a document is not valid UTF-8 ({error.reason}, after {bytes(piece.text[:40])!r})",
                hint="write the source again as UTF-8, or leave that document out",
            ) from None
        results.append(np.append(tokens, np.uint16(tokenizer.eot)) if piece.ends_document else tokens)
    return results


def encoded(stream: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Piece, Tokens]]:
    """Every piece with its tokens, in order; a bounded number of chunks is encoded ahead.

    Raises:
        UserError: a document is not valid UTF-8.
    """
    pending: deque[tuple[list[Piece], Future[list[Tokens]]]] = deque()

    def oldest() -> Iterator[tuple[Piece, Tokens]]:
        chunk, future = pending.popleft()
        yield from zip(chunk, future.result(), strict=True)

    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for chunk in _chunks(stream):
                pending.append((chunk, pool.submit(encode_chunk, tokenizer, chunk)))
                if len(pending) >= _CHUNKS_AHEAD * workers:
                    yield from oldest()
            while pending:
                yield from oldest()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

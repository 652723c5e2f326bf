"""Documents to tokens: what is done with one partition of the input, on any machine.

Why one function of a task: every engine calls it, so what comes out cannot depend on the engine.
Documents are cut into pieces of about a megabyte, so that a book and a tweet cost the same memory;
threads encode them (the encoder releases Python's lock), and the results come out in the order the
documents went in. So the tokens do not depend on the number of workers either.

    for batch in in_order(encode_partition, [EncodeTask(partition, "text", places, "gpt2", workers=2)]): ...
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import SPLITS
from llmtrain.data.readers import Partition, read_partition
from llmtrain.errors import UserError
from llmtrain.model.tokenizer import CHUNK_BYTES, Tokenizer, load_tokenizer, split_text

_CHUNKS_AHEAD = 4
"""Chunks in flight for each worker: enough that none waits for the one before it to be written."""

_COUNTED = 1000
"""Documents between two signs of life while they are only read."""

WRITTEN = len(SPLITS)
"""The place of a document that is in a finished shard already; else its split's index in `SPLITS`."""

Tokens = npt.NDArray[np.uint16]
Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Where the work is done: calls a function with each task; what they give, in the order of the tasks."""

    def __call__(
        self, function: Callable[[Task], Iterator[Result]], tasks: Iterable[Task]
    ) -> Generator[Result, None, None]:
        """The results of all tasks, one after the other."""


def locally(
    function: Callable[[Task], Iterator[Result]], tasks: Iterable[Task]
) -> Generator[Result, None, None]:
    """The engine of one machine: a task at a time, which uses its own threads."""
    for task in tasks:
        yield from function(task)


# --- counting ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountTask:
    """Count the documents of a partition, at most `limit`."""

    partition: Partition
    field: str
    limit: int | None


def count_documents(task: CountTask) -> Iterator[tuple[int, bool]]:
    """Pairs of more documents read, and whether the partition is done. They are read, and so checked.

    Raises:
        UserError: see `read_partition`.
    """
    known = [span.documents for span in task.partition if span.documents is not None]
    if len(known) == len(task.partition):
        yield sum(known), True
        return
    documents = islice(read_partition(task.partition, task.field), task.limit)
    while (count := sum(1 for _ in islice(documents, _COUNTED))) == _COUNTED:
        yield count, False
    yield count, True


# --- encoding ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeTask:
    """Encode the documents of a partition.

    Attributes:
        places: where each goes, shape (documents,): the index of its split in `SPLITS`, or `WRITTEN`.
        tokenizer: its name.
        workers: threads.
    """

    partition: Partition
    field: str
    places: npt.NDArray[np.uint8]
    tokenizer: str
    workers: int


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a huge one."""

    text: bytes | memoryview
    split: str
    ends_document: bool


@dataclass(frozen=True)
class Encoded:
    """The tokens of a piece, end-of-text after the last one of a document."""

    tokens: Tokens
    split: str
    text_bytes: int
    ends_document: bool


def encode_partition(task: EncodeTask) -> Iterator[list[Encoded]]:
    """The tokens of a partition in order, about a megabyte of text at a time.

    Raises:
        UserError: see `read_partition`; or a document is not valid UTF-8.
    """
    tokenizer = load_tokenizer(task.tokenizer)
    documents = read_partition(task.partition, task.field)
    written = int(np.argmax(task.places != WRITTEN))
    for done in range(0, written, _COUNTED):
        deque(islice(documents, min(_COUNTED, written - done)), maxlen=0)
        yield []
    pending: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(task.workers, thread_name_prefix="tokenize") as pool:
        try:
            for chunk in _chunks(_pieces(documents, task.places[written:], task.partition)):
                pending.append(pool.submit(_encode_chunk, tokenizer, chunk))
                if len(pending) >= _CHUNKS_AHEAD * task.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pieces(
    documents: Iterator[bytes | memoryview], places: npt.NDArray[np.uint8], partition: Partition
) -> Iterator[Piece]:
    for place in places.tolist():
        document = next(documents, None)
        if document is None:
            raise UserError(
                f"{partition[-1].path} holds fewer documents than when it was first read",
                hint="leave the source as it is until the last shard is written",
            )
        if place == WRITTEN:
            continue
        parts = split_text(document)
        part = next(parts)
        for following in parts:
            yield Piece(part, SPLITS[place], ends_document=False)
            part = following
        yield Piece(part, SPLITS[place], ends_document=True)


def _chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces of about a megabyte together: the unit of work of a thread."""
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece.text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode_chunk(tokenizer: Tokenizer, chunk: list[Piece]) -> list[Encoded]:
    results = []
    for piece in chunk:
        try:
            tokens = tokenizer.encode(str(piece.text, "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"a document is not valid UTF-8 ({error.reason}, after {bytes(piece.text[:40])!r})",
                hint="write the source again as UTF-8, or leave that document out",
            ) from None
        if piece.ends_document:
            tokens = np.append(tokens, np.uint16(tokenizer.eot))
        results.append(Encoded(tokens, piece.split, len(piece.text), piece.ends_document))
    return results

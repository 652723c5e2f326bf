"""Count and encode the documents of one partition, on any machine.

Every engine calls these functions, so the output does not depend on the engine. Documents are divided
into chunks of about a megabyte, so a book needs as much memory as a short text. Threads encode
the chunks (the encoder releases the GIL), and results are returned in document order, so the output
does not depend on the number of threads.

    task = EncodeTask(partition, "text", split_ids, "gpt2", threads=2)
    for batch in run_locally(encode_partition, [task]): ...
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

_BATCHES_PER_THREAD = 4
"""Batches queued per thread, so that no thread waits until the previous result is written."""

_PROGRESS_DOCUMENTS = 1000
"""Documents between two progress reports while documents are only read."""

WRITTEN = len(SPLITS)
"""Split id of a document that a finished shard already contains."""

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


class Engine(Protocol):
    """An executor: calls a function with each task and yields the results in the order of the tasks."""

    def __call__(
        self, function: Callable[[TaskT], Iterator[ResultT]], tasks: Iterable[TaskT]
    ) -> Generator[ResultT, None, None]:
        """Yield the results of all tasks in order."""


def run_locally(
    function: Callable[[TaskT], Iterator[ResultT]], tasks: Iterable[TaskT]
) -> Generator[ResultT, None, None]:
    """Run one task at a time in this process; a task uses its own threads."""
    for task in tasks:
        yield from function(task)


def read_documents(partition: Partition, field: str) -> Iterator[bytes | memoryview]:
    """Yield the documents of a partition that are counted and encoded, as UTF-8.

    Apply data filters here, and disable the shortcut in `count_documents`, which counts without
    reading.
    """
    return read_partition(partition, field)


# --- counting ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CountTask:
    """Count the documents of a partition, at most `limit`."""

    partition: Partition
    field: str
    limit: int | None


def count_documents(task: CountTask) -> Iterator[tuple[int, bool]]:
    """Yield pairs: number of further documents, and true for the partition's last pair.

    Documents are read and checked, except where the file's metadata contains their number.

    Raises:
        UserError: see `read_partition`.
    """
    recorded = [each.documents for each in task.partition if each.documents is not None]
    if len(recorded) == len(task.partition):
        yield sum(recorded), True
        return
    documents = islice(read_documents(task.partition, task.field), task.limit)
    while (count := _skip(documents, _PROGRESS_DOCUMENTS)) == _PROGRESS_DOCUMENTS:
        yield count, False
    yield count, True


def _skip(documents: Iterator[bytes | memoryview], count: int) -> int:
    """Read up to `count` documents and return their number."""
    return sum(1 for _ in islice(documents, count))


# --- encoding ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeTask:
    """Encode the documents of a partition.

    Attributes:
        split_ids: for each document the index of its split in `SPLITS`, or `WRITTEN`.
        tokenizer: name of the tokenizer.
    """

    partition: Partition
    field: str
    split_ids: npt.NDArray[np.uint8]
    tokenizer: str
    threads: int


@dataclass(frozen=True)
class TextChunk:
    """A document, or a part of a large one."""

    text: bytes | memoryview
    split: str
    ends_document: bool


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of a chunk, with end-of-text if it ends a document."""

    tokens: npt.NDArray[np.uint16]
    split: str
    text_bytes: int
    ends_document: bool


def encode_partition(task: EncodeTask) -> Iterator[list[EncodedChunk]]:
    """Yield the tokens of a partition in order, in batches of about a megabyte of text.

    Raises:
        UserError: see `read_partition`; or a document is not valid UTF-8.
    """
    tokenizer = load_tokenizer(task.tokenizer)
    documents = read_documents(task.partition, task.field)
    first = int(np.argmax(task.split_ids != WRITTEN))
    for done in range(0, first, _PROGRESS_DOCUMENTS):
        _skip(documents, min(_PROGRESS_DOCUMENTS, first - done))
        yield []
    pending: deque[Future[list[EncodedChunk]]] = deque()
    with ThreadPoolExecutor(task.threads, thread_name_prefix="tokenize") as pool:
        try:
            for batch in _batches(_chunks(documents, task.split_ids[first:], task.partition)):
                pending.append(pool.submit(_encode_batch, tokenizer, batch))
                if len(pending) >= _BATCHES_PER_THREAD * task.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _chunks(
    documents: Iterator[bytes | memoryview], split_ids: npt.NDArray[np.uint8], partition: Partition
) -> Iterator[TextChunk]:
    for split_id in split_ids.tolist():
        document = next(documents, None)
        if document is None:
            raise UserError(
                f"{partition[-1].path} contains fewer documents than when it was first read",
                hint="do not change the source until the last shard is written",
            )
        if split_id == WRITTEN:
            continue
        parts = split_text(document)
        part = next(parts)
        for following in parts:
            yield TextChunk(part, SPLITS[split_id], ends_document=False)
            part = following
        yield TextChunk(part, SPLITS[split_id], ends_document=True)


def _batches(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Group consecutive chunks to about a megabyte: the unit of work of a thread."""
    batch: list[TextChunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_batch(tokenizer: Tokenizer, batch: list[TextChunk]) -> list[EncodedChunk]:
    results = []
    for chunk in batch:
        try:
            tokens = tokenizer.encode(str(chunk.text, "utf-8"))
        except UnicodeDecodeError as error:
            start = bytes(chunk.text[:40])
            raise UserError(
                f"a document is not valid UTF-8 ({error.reason}, after {start!r})",
                hint="convert the source to UTF-8, or remove that document",
            ) from None
        if chunk.ends_document:
            tokens = np.append(tokens, np.uint16(tokenizer.eot))
        results.append(EncodedChunk(tokens, chunk.split, len(chunk.text), chunk.ends_document))
    return results

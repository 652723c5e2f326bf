"""Count and encode the documents of one partition, on any machine.

Documents are divided into chunks of about a megabyte, so a book needs no more memory than a short
text. Threads encode the chunks (the encoder releases the GIL). Results keep the order of the
documents, so the output depends neither on the engine nor on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import SPLITS
from llmtrain.data.readers import Partition, group_by_size, read_partition
from llmtrain.errors import UserError
from llmtrain.model.tokenizer import CHUNK_BYTES, Tokenizer, load_tokenizer, split_text

_BATCHES_PER_THREAD = 4  # so that no thread waits until the previous result is written
_PROGRESS_DOCUMENTS = 1000
WRITTEN = len(SPLITS)
"""Split id of a document that a finished shard already contains."""

ResultT = TypeVar("ResultT")
Task = Callable[[], Iterator[ResultT]]


class Engine(Protocol):
    """An executor of tasks."""

    def __call__(self, tasks: Iterable[Task[ResultT]]) -> Generator[ResultT, None, None]:
        """Run the tasks, possibly in parallel, and yield their results in order."""


def run_locally(tasks: Iterable[Task[ResultT]]) -> Generator[ResultT, None, None]:
    """Run one task at a time in this process; a task uses its own threads."""
    for task in tasks:
        yield from task()


def read_documents(partition: Partition, field: str) -> Iterator[bytes | memoryview]:
    """Yield the documents that are counted and encoded; data filters belong here."""
    return read_partition(partition, field)


def count_documents(
    partition: Partition, field: str, limit: int | None
) -> Iterator[tuple[int, bool]]:
    """Yield pairs: a number of further documents, and true for the partition's last pair.

    Up to `limit` documents are read and checked, unless the metadata contains their number.
    """
    if all(each.documents is not None for each in partition):
        yield sum(each.documents or 0 for each in partition), True
        return
    documents = islice(read_documents(partition, field), limit)
    while group := list(map(len, islice(documents, _PROGRESS_DOCUMENTS))):
        yield len(group), False
    yield 0, True


@dataclass(frozen=True)
class TextChunk:
    """A document, or a part of a large one."""

    text: bytes | memoryview
    split_id: int
    ends_document: bool


@dataclass(frozen=True)
class EncodedChunk:
    """The tokens of a chunk, with end-of-text if it ends a document."""

    tokens: npt.NDArray[np.uint16]
    split_id: int
    text_bytes: int
    ends_document: bool


def encode_partition(
    partition: Partition, field: str, split_ids: npt.NDArray[np.uint8], tokenizer: str, threads: int
) -> Iterator[list[EncodedChunk]]:
    """Yield the tokens of a partition in order, in batches of about a megabyte of text.

    `split_ids` contains the index in `SPLITS`, or `WRITTEN`, for each document.
    """
    documents = read_documents(partition, field)
    first = int(np.argmax(split_ids != WRITTEN))
    for done in range(0, first, _PROGRESS_DOCUMENTS):
        deque(islice(documents, min(_PROGRESS_DOCUMENTS, first - done)), maxlen=0)
        yield []
    encoder = load_tokenizer(tokenizer)
    pending: deque[Future[list[EncodedChunk]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="tokenize") as pool:
        try:
            chunks = _chunks(documents, split_ids[first:], partition)
            for batch in group_by_size(chunks, lambda chunk: len(chunk.text), CHUNK_BYTES):
                pending.append(pool.submit(_encode_batch, encoder, batch))
                if len(pending) >= _BATCHES_PER_THREAD * threads:
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
        for part, following in pairwise(chain(split_text(document), [None])):
            assert part is not None
            yield TextChunk(part, split_id, ends_document=following is None)


def _encode_batch(tokenizer: Tokenizer, batch: list[TextChunk]) -> list[EncodedChunk]:
    results = []
    for chunk in batch:
        try:
            tokens = tokenizer.encode(str(chunk.text, "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"a document is not UTF-8 text: {error}", hint="remove it") from None
        if chunk.ends_document:
            tokens = np.append(tokens, np.uint16(tokenizer.eot))
        results.append(EncodedChunk(tokens, chunk.split_id, len(chunk.text), chunk.ends_document))
    return results

"""The work of one preparation: count, split, tokenize, write, from where an earlier one was interrupted.

Why it knows no threads and no machines: an engine calls two functions (`count_documents`,
`encode_partition`) with tasks and gives back what they give, in order; what is written depends on
that order alone. Only this process writes.

    manifest = Build(source, plan, staging, locally, 2, Need(), print, print).run()
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Self

import datasets
import numpy as np
import numpy.typing as npt

from llmtrain.data.encode import (
    WRITTEN,
    CountTask,
    Encoded,
    EncodeTask,
    Engine,
    count_documents,
    encode_partition,
)
from llmtrain.data.journal import Journal
from llmtrain.data.manifest import SPLITS, Manifest, PrepareSpec, SplitRecord
from llmtrain.data.readers import Partition, partitions_of
from llmtrain.data.sources import Source
from llmtrain.data.staging import Need, Staging
from llmtrain.data.token_files import TOKEN_BYTES, ShardWriter
from llmtrain.errors import UserError


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is.

    First documents are read (`total_documents` is not known yet), then tokenized and written;
    `tokens` and `text_bytes` are those written so far.
    """

    documents: int
    total_documents: int | None
    tokens: int
    text_bytes: int

    @classmethod
    def whole(cls, manifest: Manifest) -> Self:
        """The progress when all is written."""
        splits = manifest.train, manifest.val
        documents = sum(split.documents for split in splits)
        tokens, text_bytes = (
            sum(split.tokens for split in splits),
            sum(split.text_bytes for split in splits),
        )
        return cls(documents, documents, tokens, text_bytes)

    def plus(self, batch: list[Encoded]) -> Self:
        """The progress after one more batch is written."""
        return replace(
            self,
            documents=self.documents + sum(part.ends_document for part in batch),
            tokens=self.tokens + sum(len(part.tokens) for part in batch),
            text_bytes=self.text_bytes + sum(part.text_bytes for part in batch),
        )


@dataclass(frozen=True)
class Build:
    """One preparation: what is read, where it is built, who does the work (and with how many threads
    a task), how much space it needs, and who is told.
    """

    source: Source
    plan: PrepareSpec
    staging: Staging
    engine: Engine
    workers: int
    need: Need
    on_note: Callable[[str], None]
    on_progress: Callable[[PrepareProgress], None]

    def run(self) -> Manifest:
        """Write every shard that is not finished yet; the manifest of all of them.

        Raises:
            UserError: the source cannot be read, or holds no text.
            OSError: something cannot be written.
        """
        journal = Journal.open(self.staging.journal, self.staging.shards, self.plan, self.on_note)
        partitions = partitions_of(
            self.source.spans(lambda read: self.on_progress(PrepareProgress(read, None, 0, 0)))
        )
        counts = self._counts(partitions, journal)
        if not sum(counts):
            raise UserError("the source holds no documents", hint="name a source with text in it")
        split = self.plan.split
        in_val = validation_documents(sum(counts), split.val_fraction, split.seed)
        places = places_to_write(in_val, journal)
        finished = sum(map(len, journal.shards.values()))
        if finished:
            self.on_note(f"resumed at shard {finished + 1:,} ({journal.tokens:,} tokens done)")
        # Closed at once, whatever happens: an engine then calls off what nobody waits for any more.
        with closing(
            self.engine(encode_partition, self._tasks(partitions, counts, places))
        ) as batches:
            records = self._write(batches, journal, len(places))
        if not sum(record.text_bytes for record in records.values()):
            shutil.rmtree(self.staging.shards)
            raise UserError(
                "the source holds no text: every document is empty", hint="is it the right field?"
            )
        return Manifest(**dict(self.plan), train=records["train"], val=records["val"])

    def _counts(self, partitions: list[Partition], journal: Journal) -> list[int]:
        """Documents of each partition, up to the one in which the limit is reached."""
        layout = _layout(partitions)
        if journal.layout == layout:
            return journal.counts
        limit, counts, read = self.plan.source.limit_documents, [0], 0
        tasks = (CountTask(partition, self.source.field, limit) for partition in partitions)
        with closing(self.engine(count_documents, tasks)) as results:
            for more, partition_done in results:
                counts[-1] += more
                read += more
                if limit is not None and read >= limit:
                    counts[-1] -= read - limit
                    break
                self.on_progress(PrepareProgress(read, None, 0, 0))
                if partition_done:
                    counts.append(0)
        journal.set_counts(counts, layout)
        return counts

    def _tasks(
        self, partitions: list[Partition], counts: list[int], places: npt.NDArray[np.uint8]
    ) -> Iterator[EncodeTask]:
        """A task for each partition of which something is still to be written."""
        ends = list(accumulate(counts))
        for partition, count, end in zip(partitions, counts, ends, strict=False):
            part = places[end - count : end]
            if (part != WRITTEN).any():
                name = self.plan.tokenizer.name
                yield EncodeTask(partition, self.source.field, part, name, self.workers)

    def _write(
        self, batches: Iterable[list[Encoded]], journal: Journal, total: int
    ) -> dict[str, SplitRecord]:
        """Write what comes into the shards of both splits; their records."""
        before = [record for split in SPLITS for record in journal.shards[split]]
        progress = PrepareProgress(
            sum(record.documents for record in before),
            total,
            journal.tokens,
            sum(record.text_bytes for record in before),
        )
        with ExitStack() as stack:
            writers = {split: self._writer(split, journal) for split in SPLITS}
            for writer in writers.values():
                stack.callback(writer.abort)
            for batch in batches:
                for part in batch:
                    writers[part.split].add(
                        part.tokens, part.text_bytes, ends_document=part.ends_document
                    )
                progress = progress.plus(batch)
                expected = progress.tokens * total // max(progress.documents, 1)
                self.need.bytes = TOKEN_BYTES * (expected - journal.tokens)
                self.on_progress(progress)
            return {split: writer.close() for split, writer in writers.items()}

    def _writer(self, split: str, journal: Journal) -> ShardWriter:
        shards, size = self.staging.shards, self.plan.shard_tokens
        return ShardWriter(shards, split, size, journal.shards[split], journal.add_shard)


def validation_documents(documents: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which documents are validation, shape (documents,): those of `datasets`' train_test_split.

    Raises:
        UserError: nothing would be left for training.
    """
    in_val = np.zeros(documents, dtype=np.bool_)
    if fraction > 0:
        index = datasets.Dataset.from_dict({"document": np.arange(documents)})
        try:
            parts = index.train_test_split(test_size=fraction, seed=seed, shuffle=True)
        except ValueError:
            raise UserError(
                f"of {documents:,} document(s) none is left to train on with a val fraction of {fraction}",
                hint="--val-fraction 0 keeps all for training; or give more documents, or a smaller share",
            ) from None
        in_val[parts["test"].with_format("numpy")["document"][:]] = True
    return in_val


def places_to_write(in_val: npt.NDArray[np.bool_], journal: Journal) -> npt.NDArray[np.uint8]:
    """Where each document goes, shape (documents,): see `EncodeTask`. Finished shards hold the first ones."""
    places = in_val.astype(np.uint8)
    for place, split in enumerate(SPLITS):
        finished = sum(record.documents for record in journal.shards[split])
        places[np.flatnonzero(in_val == place)[:finished]] = WRITTEN
    return places


def _layout(partitions: list[Partition]) -> str:
    """Hex hash of how the input is cut; counts of another layout mean nothing."""
    described = [
        [(Path(span.path).name, span.bytes, span.start, span.end) for span in partition]
        for partition in partitions
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()

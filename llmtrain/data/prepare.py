"""Prepare token shards: open the source, count, split, encode, write shards, commit.

Documents are encoded in parallel, and this process alone writes them, in order. The output depends
only on the documents, the tokenizer and the seed, and a few megabytes per thread are in memory. The
folder gets its final name when its last byte is durable. After a kill or on a full disk, the next
preparation resumes after the last finished shard, with the same result.

    manifest = prepare("openwebtext", Path("data/openwebtext"))
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import build_folder, read_manifest_at
from llmtrain.data.encode import (
    WRITTEN,
    EncodedChunk,
    Engine,
    Task,
    count_documents,
    encode_partition,
    run_locally,
)
from llmtrain.data.journal import Journal
from llmtrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    PrepareSpec,
    SplitRecord,
    SplitRule,
)
from llmtrain.data.options import PrepareOptions
from llmtrain.data.readers import Partition, partitions_of
from llmtrain.data.shards import TOKEN_BYTES, ShardWriter
from llmtrain.data.sources import OPENWEBTEXT_HUB, DocumentSource, open_source
from llmtrain.data.staging import StagingFolder, existing_data, staged
from llmtrain.data.token_data import tokenizer_record
from llmtrain.errors import UserError
from llmtrain.runtime.hardware import available_cores
from llmtrain.storage.urls import is_url, local_path, upload

PUBLISHED_OPENWEBTEXT = {"train": 9_035_582_198, "val": 4_434_897}
"""Tokens of nanoGPT's preparation of OpenWebText, and of this one with its default options."""

_DEFAULT_OPTIONS = PrepareOptions()

Log = Callable[[str], None]


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a preparation: documents are counted (`total_documents` is None), then written.

    `tokens` and `text_bytes` count what is written.
    """

    documents: int
    total_documents: int | None
    tokens: int
    text_bytes: int

    @classmethod
    def complete(cls, manifest: Manifest) -> Self:
        """Return the progress of a finished preparation."""
        total = SplitRecord.from_shards(manifest.shards)
        return cls(total.documents, total.documents, total.tokens, total.text_bytes)

    def advanced(self, batch: list[EncodedChunk]) -> Self:
        """Return the progress after one more batch was written."""
        return replace(
            self,
            documents=self.documents + sum(chunk.ends_document for chunk in batch),
            tokens=self.tokens + sum(len(chunk.tokens) for chunk in batch),
            text_bytes=self.text_bytes + sum(chunk.text_bytes for chunk in batch),
        )


OnProgress = Callable[[PrepareProgress], None]


def _ignore(_: object) -> None:
    return None


def prepare(
    source: str,
    out: Path | str,
    options: PrepareOptions = _DEFAULT_OPTIONS,
    *,
    on_progress: OnProgress = _ignore,
    log: Log = _ignore,
) -> Manifest:
    """Write the tokens of `source` to the folder or URL `out` and return the manifest.

    If `out` already contains this data, nothing is written. The shards of a URL are built locally,
    then copied.

    Args:
        source: see `sources.open_source`.
        out: the data folder.
        options: see `PrepareOptions`.
        on_progress: called every few megabytes; may raise to stop.
        log: called with messages for the user.

    Raises:
        UserError: the source cannot be read, or `out` contains other data.
        RunFailed: the disk is full or failed.
    """
    url = str(out) if is_url(str(out)) else None
    folder = Path(local_path(str(out))) if url is None else build_folder(url)
    with staged(folder) as staging:
        documents = open_source(
            source, options.text_field, options.limit_documents, staging.documents
        )
        spec = PrepareSpec(
            tokenizer=tokenizer_record(options.tokenizer),
            source=documents.record,
            split=SplitRule(val_fraction=options.val_fraction, seed=options.seed),
            shard_tokens=options.shard_tokens,
        )
        manifest = existing_data(folder, spec) if url is None else _existing_at_url(url, spec)
        if manifest is not None:
            log(f"{out} already contains this data: nothing to do")
            staging.discard_shards()
            return manifest
        manifest = _built_earlier(folder, spec) if url else None
        if manifest is None:
            _log_source(source, documents, log)
            manifest = _Build(documents, spec, options, staging, on_progress, log).run()
            staging.commit(manifest)
        if url is not None:
            log(f"copying the shards to {url}")
            complete = PrepareProgress.complete(manifest)
            upload(folder, url, last=MANIFEST_FILE, before_each=lambda: on_progress(complete))
            shutil.rmtree(folder)
    return manifest


def _existing_at_url(url: str, spec: PrepareSpec) -> Manifest | None:
    manifest = read_manifest_at(url)
    if manifest is not None:
        manifest.require_spec(spec, url)
    return manifest


def _built_earlier(folder: Path, spec: PrepareSpec) -> Manifest | None:
    """Return the manifest of data built earlier but not copied; delete data of another spec."""
    try:
        return existing_data(folder, spec)
    except UserError:
        shutil.rmtree(folder)
        return None


def _log_source(source: str, documents: DocumentSource, log: Log) -> None:
    if skipped := documents.skipped:
        log(f"skipping {len(skipped)} file(s) of unknown kinds, such as {skipped[0]}")
    files = documents.record.files
    size = sum(file.bytes for file in files)
    log(f"reading {source}: {len(files):,} file(s), {size / 1e6:,.1f} MB")


@dataclass(frozen=True)
class _Build:
    """The shards of one spec, written to a staging folder."""

    source: DocumentSource
    spec: PrepareSpec
    options: PrepareOptions
    staging: StagingFolder
    on_progress: OnProgress
    log: Log

    def run(self) -> Manifest:
        """Write the shards that are not finished and return the manifest of all shards."""
        self.staging.remaining_bytes = sum(file.bytes for file in self.source.record.files)
        with self._engine() as engine:
            journal = Journal.open(self.staging.journal, self.staging.shards, self.spec, self.log)
            partitions = partitions_of(self.source.fetch(self._on_read))
            counts = self._count(engine, partitions, journal)
            if not sum(counts):
                raise UserError("the source contains no documents", hint="name a source with text")
            split_ids = assign_splits(sum(counts), self.spec.split, journal)
            if finished := journal.finished:
                tokens = sum(record.tokens for record in finished)
                self.log(f"resumed at shard {len(finished) + 1:,} ({tokens:,} tokens done)")
            tasks = self._encode_tasks(partitions, counts, split_ids)
            train, val = self._write_shards(engine, tasks, journal, len(split_ids))
        if not train.text_bytes + val.text_bytes:
            self.staging.discard_shards()
            raise UserError(
                "the source contains no text: every document is empty", hint="check --text-field"
            )
        return Manifest(**dict(self.spec), train=train, val=val)

    def _on_read(self, documents: int) -> None:
        self.on_progress(PrepareProgress(documents, None, 0, 0))

    @contextmanager
    def _engine(self) -> Iterator[Engine]:
        if self.options.engine == "local":
            yield run_locally
            return
        from llmtrain.data.ray_engine import connect_ray  # ray is an optional dependency

        with connect_ray(self.options.ray_address) as engine:
            yield engine

    def _count(self, engine: Engine, partitions: list[Partition], journal: Journal) -> list[int]:
        """Return the documents of each partition, up to the one that reaches the limit."""
        described = [
            [(Path(each.path).name, each.bytes, each.start, each.end) for each in partition]
            for partition in partitions
        ]
        layout = hashlib.sha256(repr(described).encode()).hexdigest()
        if journal.layout == layout:
            return journal.counts
        limit, counts, read = self.options.limit_documents, [0], 0
        tasks = (partial(count_documents, each, self.source.field, limit) for each in partitions)
        with closing(engine(tasks)) as results:
            for count, ends_partition in results:
                counts[-1] += count
                read += count
                if limit is not None and read >= limit:
                    counts[-1] -= read - limit
                    break
                self._on_read(read)
                if ends_partition:
                    counts.append(0)
        journal.set_counts(counts, layout)
        return counts

    def _encode_tasks(
        self, partitions: list[Partition], counts: list[int], split_ids: npt.NDArray[np.uint8]
    ) -> Iterator[Task[list[EncodedChunk]]]:
        """Yield a task for each partition with documents that are not written yet."""
        threads = 1 if self.options.engine == "ray" else self.options.workers or available_cores()
        for partition, count, end in zip(partitions, counts, accumulate(counts), strict=False):
            ids = split_ids[end - count : end]
            if (ids != WRITTEN).any():
                field, tokenizer = self.source.field, self.spec.tokenizer.name
                yield partial(encode_partition, partition, field, ids, tokenizer, threads)

    def _write_shards(
        self,
        engine: Engine,
        tasks: Iterable[Task[list[EncodedChunk]]],
        journal: Journal,
        total_documents: int,
    ) -> list[SplitRecord]:
        """Encode the documents, write the shards of both splits, and return the splits' records."""
        done = SplitRecord.from_shards(journal.finished)
        progress = PrepareProgress(done.documents, total_documents, done.tokens, done.text_bytes)
        with ExitStack() as stack:
            writers = [self._writer(split, journal, stack) for split in SPLITS]
            # Close the generator on any exception, so that the engine cancels its queued tasks.
            for batch in stack.enter_context(closing(engine(tasks))):
                for chunk in batch:
                    writers[chunk.split_id].add(
                        chunk.tokens, chunk.text_bytes, ends_document=chunk.ends_document
                    )
                progress = progress.advanced(batch)
                expected = progress.tokens * total_documents // max(progress.documents, 1)
                written = sum(record.tokens for record in journal.finished)
                self.staging.remaining_bytes = TOKEN_BYTES * (expected - written)
                self.on_progress(progress)
            return [writer.close() for writer in writers]

    def _writer(self, split: str, journal: Journal, stack: ExitStack) -> ShardWriter:
        folder, size, finished = self.staging.shards, self.spec.shard_tokens, journal.shards[split]
        writer = ShardWriter(folder, split, size, list(finished), journal.add_shard)
        stack.callback(writer.abort)
        return writer


def assign_splits(documents: int, split: SplitRule, journal: Journal) -> npt.NDArray[np.uint8]:
    """Return the split id of each document; the first ones are in the finished shards."""
    is_val = validation_documents(documents, split)
    split_ids = is_val.astype(np.uint8)
    for split_id, name in enumerate(SPLITS):
        finished = sum(record.documents for record in journal.shards[name])
        split_ids[np.flatnonzero(is_val == split_id)[:finished]] = WRITTEN
    return split_ids


def validation_documents(documents: int, split: SplitRule) -> npt.NDArray[np.bool_]:
    """Return which documents `datasets`' train_test_split would hold out, shape (documents,)."""
    val_documents = math.ceil(split.val_fraction * documents)
    if val_documents >= documents:
        raise UserError(
            f"val fraction {split.val_fraction} leaves none of {documents:,} document(s) for train",
            hint="lower it, add documents, or use --val-fraction 0 to train on all of them",
        )
    is_val = np.zeros(documents, dtype=np.bool_)
    if val_documents:
        order = np.random.default_rng(split.seed).permutation(documents)
        is_val[order[:val_documents]] = True
    return is_val


def openwebtext_mismatch(manifest: Manifest) -> str | None:
    """Return a warning if OpenWebText with default options has unexpected token counts."""
    record, default = manifest.source, _DEFAULT_OPTIONS
    is_default = (
        record.id == f"hub:{OPENWEBTEXT_HUB}"
        and record.limit_documents is None
        and manifest.tokenizer.name == default.tokenizer
        and manifest.split == SplitRule(val_fraction=default.val_fraction, seed=default.seed)
    )
    found = {split: manifest.split_record(split).tokens for split in SPLITS}
    expected = PUBLISHED_OPENWEBTEXT
    if not is_default or found == expected:
        return None
    return (
        f"this is not the published OpenWebText: {found['train']:,} train and {found['val']:,} val "
        f"tokens instead of {expected['train']:,} and {expected['val']:,}, so losses will differ"
    )

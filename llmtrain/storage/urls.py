"""Files behind URLs (`s3://`, `gs://`, `hf://`, …) through fsspec; `file://` means a local path."""

import hashlib
import io
import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.commit import temporary_path
from llmtrain.storage.disk import NO_ROOM
from llmtrain.storage.file_systems import fsync_path

_CHUNK_BYTES = 1 << 22


def is_url(path: str) -> bool:
    """Return whether `path` is a URL other than `file://…`."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """Return `path` without a `file://` prefix."""
    return path.removeprefix("file://")


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0]
        raise UserError(f"cannot open {url}: {error}", hint=f"pip install {package}") from None
    except ValueError as error:
        hint = "use s3://, gs://, hf:// or file://; fsspec's documentation lists others"
        raise UserError(f"cannot open {url}: {error}", hint=hint) from None
    return system, path


@contextmanager
def url_errors(url: str) -> Iterator[None]:
    """Replace an exception of any storage backend with a UserError that names the URL."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise UserError(
            f"cannot read {url}: {str(error) or type(error).__name__}",
            hint="check that it exists and that this machine has credentials to read it",
        ) from error


@contextmanager
def open_url(url: str) -> Iterator[Any]:
    """Open the file at a URL as a binary stream with `seek` and `readline`."""
    system, path = file_system(url)
    with system.open(path, "rb") as file, io.BufferedReader(file) as buffered:
        yield buffered


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL."""

    url: str
    name: str
    """Path relative to the requested folder."""
    bytes: int
    version: str
    """Hash of the store's metadata (times, tags), which changes with the content."""


def list_files(url: str) -> list[RemoteFile]:
    """Return the files that a file, folder or glob URL matches, sorted, without hidden files."""
    system, path = file_system(url)
    with url_errors(url):
        listed = (system.glob if has_magic(path) else system.find)(path, detail=True)
    infos = {each: info for each, info in sorted(listed.items()) if info["type"] == "file"}
    base = posixpath.commonpath([posixpath.dirname(each) for each in infos]) if infos else ""
    found = []
    for each, info in infos.items():
        name = posixpath.relpath(each, base or ".")
        version = hashlib.sha256(repr(sorted(info.items(), key=str)).encode()).hexdigest()
        if not any(part.startswith(".") for part in name.split("/")):
            found.append(RemoteFile(system.unstrip_protocol(each), name, info["size"], version))
    if not found:
        hint = "name a file, a folder or a glob in quotes"
        raise UserError(f"{url}: no such file or folder", hint=hint)
    return found


def download(url: str, path: Path, *, problem: Callable[[Path], str | None]) -> None:
    """Copy the file at `url` to `path`, durably, and check the copy before it gets its name."""
    partial = temporary_path(path)
    partial.unlink(missing_ok=True)
    with partial.open("xb") as target, url_errors(url), open_url(url) as source:
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
    if found := problem(partial):
        partial.unlink()
        raise UserError(f"{url}: {found}", hint="upload or prepare it again")
    fsync_path(partial)
    partial.replace(path)


def upload(
    folder: Path, url: str, *, last: str, before_each: Callable[[], None] = lambda: None
) -> None:
    """Copy the files of `folder` to `url`; the file named `last` marks the upload as complete.

    Existing files are overwritten. `before_each` is called before each file and may raise to stop.
    """
    system, base = file_system(url)
    names = sorted(path.name for path in folder.iterdir() if path.name != last)
    with _upload_errors(url, folder):
        system.makedirs(base, exist_ok=True)
    for name in [*names, last]:
        before_each()
        with _upload_errors(url, folder):
            size, target = (folder / name).stat().st_size, f"{base.rstrip('/')}/{name}"
            system.put_file(str(folder / name), target)
            if system.size(target) != size:
                raise OSError(f"{name} has {system.size(target):,} bytes instead of {size:,}")


@contextmanager
def _upload_errors(url: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RunFailed(
            f"cannot write {url}: {str(error) or type(error).__name__}",
            hint=f"the files are complete in {folder}: run the same command again to upload them",
        ) from error

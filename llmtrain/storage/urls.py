"""Files behind URLs (`s3://`, `gs://`, `hf://`, `memory://`, …), read through fsspec.

Why: a corpus in a bucket need not be copied to be tokenized, and on a cluster there is often no other
disk to share. `file://` is a path of this machine like any other.

    with open_url("s3://bucket/web.jsonl") as file: ...
"""

import hashlib
import io
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from typing import Any

import fsspec
from fsspec.registry import known_implementations

from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.disk import NO_ROOM


def is_url(path: str) -> bool:
    """Whether `path` names something that is not a path of this machine."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """`path`, or for `file://…` the path that it stands for."""
    return path.removeprefix("file://")


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        UserError: fsspec knows no such scheme, or the package for it is not installed.
    """
    scheme = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0]
        raise UserError(
            f"{url} cannot be read or written: {error}", hint=f"pip install {package}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{url}: {error}",
            hint="s3://, gs://, hf:// and file:// are usual; see fsspec for others",
        ) from None
    return system, path


@contextmanager
def reading(url: str) -> Iterator[None]:
    """What goes wrong while a URL is read becomes an error that names it; every store has errors of its own.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise UserError(
            f"{url} cannot be read: {str(error) or type(error).__name__}",
            hint="is it there, and do the credentials of this machine allow to read it?",
        ) from error


@contextmanager
def open_url(url: str) -> Iterator[Any]:
    """The bytes of a file behind a URL, with `seek` and `readline`."""
    system, path = file_system(url)
    with system.open(path, "rb") as file, io.BufferedReader(file) as buffered:
        yield buffered


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL.

    Attributes:
        name: relative to the folder that was asked for.
        version: hex hash of what the store says of it (its times and tags), which changes with the content.
    """

    url: str
    name: str
    bytes: int
    version: str


def list_files(url: str) -> list[RemoteFile]:
    """What the URL of a file, a folder or a glob means, in the order of paths; hidden files are left out.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    system, path = file_system(url)
    with reading(url):
        listed = (
            system.glob(path, detail=True) if has_magic(path) else system.find(path, detail=True)
        )
        infos = {each: info for each, info in sorted(listed.items()) if info["type"] == "file"}
        base = posixpath.commonpath([posixpath.dirname(each) for each in infos]) if infos else ""
        found = [
            RemoteFile(
                system.unstrip_protocol(each),
                posixpath.relpath(each, base or "."),
                info["size"],
                hashlib.sha256(repr(sorted(info.items(), key=str)).encode()).hexdigest(),
            )
            for each, info in infos.items()
        ]
    found = [
        file for file in found if not any(part.startswith(".") for part in file.name.split("/"))
    ]
    if not found:
        raise UserError(
            f"{url}: no such file or folder", hint="name a file, a folder or a glob in quotes"
        )
    return found

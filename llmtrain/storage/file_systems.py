"""File systems without locks, permissions or flushes: warn once and continue.

Examples: Lustre mounted without flock, CIFS, some FUSE file systems.
"""

import errno
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from llmtrain.errors import StorageWarning

Feature = Literal["file locks", "file permissions", "flushes", "space reservation"]

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_ERRORS: dict[Feature, set[int]] = {
    "file locks": {*_UNSUPPORTED, errno.ENOLCK},
    "file permissions": {*_UNSUPPORTED, errno.EPERM},
    "flushes": {*_UNSUPPORTED, errno.EBADF, errno.EACCES},  # EACCES: a folder that is not readable
    "space reservation": _UNSUPPORTED,
}
_NO_LINKS = {*_UNSUPPORTED, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK}
"""Errors of hard links: unsupported, across file systems, or too many for one file."""
_CONSEQUENCES: dict[Feature, str] = {
    "file locks": "nothing prevents two commands from writing to one folder, so run only one",
    "file permissions": "new files have the permissions of the mount",
    "flushes": "a power loss may damage the newest files",
    "space reservation": "the disk may fill up during a write",
}
_WARNED: set[tuple[Feature, int]] = set()
_WARNED_LOCK = threading.Lock()


@contextmanager
def unless_unsupported(feature: Feature, path: Path) -> Iterator[None]:
    """Warn if the file system of `path` rejects an operation because it lacks `feature`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ERRORS[feature]:
            raise
        _warn_once(feature, path)


def _warn_once(feature: Feature, path: Path) -> None:
    device = 0
    with suppress(OSError):  # the file was renamed meanwhile
        device = path.parent.stat().st_dev
    with _WARNED_LOCK:
        if (feature, device) in _WARNED:
            return
        _WARNED.add((feature, device))
    message = f"the file system of {path.parent} does not support {feature}"
    warnings.warn(f"{message}: {_CONSEQUENCES[feature]}", StorageWarning, stacklevel=2)


def fsync(descriptor: int, path: Path) -> None:
    """Flush an open file or folder to the disk."""
    with unless_unsupported("flushes", path):
        os.fsync(descriptor)


def fsync_path(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    with unless_unsupported("flushes", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Create a folder and its missing parents, durably."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_path(folder.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as another name of the file `source`, or as a copy if links do not work."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)

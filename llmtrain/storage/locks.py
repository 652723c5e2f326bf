"""Locks on files, which the kernel releases when the process ends for any reason.

A lock also ties a process to a folder: `require_held` fails if the folder was moved or deleted.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.file_systems import make_folders, unless_unsupported
from llmtrain.storage.safe_files import open_regular

LOCK_FILE = ".lock"

_HELD: dict[Path, tuple[Path, IO[bytes]]] = {}
"""Lock files by the absolute path of their folder."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock `folder`, or raise UserError. The kernel drops the lock when the process ends."""
    with disk_errors(folder):
        make_folders(folder)
        file = open_locked(folder / LOCK_FILE, folder)
    with file, holding(file, folder / LOCK_FILE, folder):
        yield


def is_locked(folder: Path) -> bool:
    """Return whether a running process is inside `locked_folder(folder)`."""
    try:
        with os.fdopen(open_regular(folder / LOCK_FILE, os.O_RDONLY), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (UserError, OSError):  # no lock, not a lock file, or no support for locks
        return False
    return False


def open_locked(path: Path, what: Path, *, flags: int = 0, wait: bool = False) -> IO[bytes]:
    """Open or create a file and lock it until it is closed.

    If another process has locked it, wait or raise a UserError about `what`. `flags` are added to
    those of the open call. A file with several names, such as `cp -al` creates, is not written to,
    but replaced.
    """
    while True:
        file = os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT | flags), "r+b")
        try:
            with unless_unsupported("file locks", path):
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise _in_use(what, file.read(20)) from None
        if is_named(file, path):
            if os.fstat(file.fileno()).st_nlink <= 1:
                return file
            path.unlink()
        file.close()  # renamed or removed, here or by the process that held it: open the new file


def _in_use(what: Path, content: bytes) -> UserError:
    holder = content.decode() if content.isdigit() else "unknown"
    message = f"{what} is in use by another llmtrain process (pid {holder})"
    return UserError(message, hint="wait for it, stop it, or choose another folder")


@contextlib.contextmanager
def try_locked(path: Path) -> Iterator[None]:
    """Lock an existing file; raise UserError or OSError if that is impossible for any reason."""
    with os.fdopen(open_regular(path, os.O_RDWR), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_named(file, path):
            raise FileNotFoundError(path)
        yield


@contextlib.contextmanager
def holding(file: IO[bytes], path: Path, what: Path) -> Iterator[None]:
    """Write this process's id to a locked file, and register its folder for `require_held`."""
    folder = path.parent.absolute()
    with disk_errors(what):
        file.truncate(0)
        # Unbuffered, so that closing the file cannot fail a second time.
        os.write(file.fileno(), str(os.getpid()).encode())
    _HELD[folder] = (folder / path.name, file)
    try:
        yield
    finally:
        del _HELD[folder]


def require_held(path: Path) -> None:
    """Raise RunFailed if a locked folder that contains `path` was moved or deleted."""
    absolute = path.absolute()
    for folder in (*reversed(absolute.parents), absolute):
        if folder in _HELD and not is_held(folder):
            raise RunFailed(
                f"{folder} was moved or deleted while this command was writing to it",
                hint="run the command again with the folder's new path",
            )


def is_held(folder: Path) -> bool:
    """Return whether this process is inside `locked_folder(folder)` and it was not moved."""
    lock, file = _HELD.get(folder.absolute(), (None, None))
    return lock is not None and file is not None and is_named(file, lock)


def is_named(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False

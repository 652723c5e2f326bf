"""Atomic commits of files and folders: write under a temporary name, flush, rename. Also locks.

Why: a run must survive a kill between any two system calls. Anything with its final name is
complete and durable. Temporary names start with `.tmp-`; the next command that writes there
removes or resumes the unfinished work of a killed process.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from llmtrain.errors import UserError
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.integrity import INTEGRITY_FILE, write_integrity

TEMPORARY_PREFIX = ".tmp-"
_REPLACED_PREFIX = f"{TEMPORARY_PREFIX}replaced-"
_LOCK = ".lock"


@contextlib.contextmanager
def staged_folder(
    target: Path,
    *,
    replace: bool = False,
    needed: int | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder; at the end add its `integrity.json` and rename it to `target`.

    If the block raises, the temporary folder is removed and `target` is unchanged. `needed` is the
    size in bytes. A block that knows the digests of its files calls `write_integrity` itself.
    """
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already")
    with disk_errors(target, needed=needed):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            message = f"cannot create the directory {target.parent}: {error.strerror}"
            raise UserError(message, hint="choose another output path") from None
        remove_abandoned(target.parent)
        with temporary_folder(target) as folder:
            yield folder
            _record_and_flush(folder)
            commit_folder(folder, target, replace=replace)


@contextlib.contextmanager
def temporary_folder(
    target: Path, *, resumable: bool = False, wait: bool = False
) -> Iterator[Path]:
    """Lock and yield the temporary folder next to `target`, to be renamed by `commit_folder`.

    If `resumable`, keep existing content, and keep the folder at the end unless it is empty. If
    another process builds `target`, `wait` for it or raise UserError.
    """
    folder = temporary_path(target)
    # `remove_abandoned` deletes the folder of any lock that matches `.tmp-*.lock`.
    lock = target.with_name(f".{target.name}{_LOCK}" if resumable else f"{folder.name}{_LOCK}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, target, wait=wait):
        if not resumable:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=resumable)
        try:
            yield folder
        finally:
            if not resumable:
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it is not empty, or it was renamed
                folder.rmdir()


def temporary_path(target: Path) -> Path:
    """Return the temporary name of `target`."""
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}")


def commit_folder(folder: Path, target: Path, *, replace: bool = False) -> None:
    """Rename a folder with flushed files to `target`, durably."""
    fsync_path(folder)
    old = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
    if replace and target.exists():
        target.rename(old)
    folder.rename(target)
    fsync_path(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _record_and_flush(folder: Path) -> None:
    record = folder / INTEGRITY_FILE
    files = [path for path in folder.rglob("*") if path.is_file() and path != record]
    with ThreadPoolExecutor(1) as pool:  # flush and hash at the same time
        flushed = pool.map(fsync_path, files)
        if not record.exists():
            write_integrity(folder)
        list(flushed)
    for path in files:
        path.chmod(record.stat().st_mode)  # safetensors creates files that only their owner reads
    for path in (record, *(path for path in folder.rglob("*") if path.is_dir())):
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Create or replace one file; a reader sees the old content or the new."""
    encoded = content.encode() if isinstance(content, str) else content
    # Two processes may write the same file: each has its own temporary name, the last one wins.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.randbits(32)}-{path.name}")
    with disk_errors(path, needed=len(encoded)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_files(path.parent, f"[0-9]*-{glob.escape(path.name)}")
        with _open_locked(temporary, wait=True, optional=True) as file:
            try:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
                fsync_path(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def _remove_abandoned_files(parent: Path, pattern: str) -> None:
    for path in parent.glob(f"{TEMPORARY_PREFIX}{pattern}"):
        # An error means that its writer is running, or that it is a folder or not ours.
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still_named(file, path):
                path.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a committed folder; if this is interrupted, no incomplete folder has its name."""
    deleted = folder.with_name(f"{TEMPORARY_PREFIX}deleted-{folder.name}")
    shutil.rmtree(deleted, ignore_errors=True)
    folder.rename(deleted)
    shutil.rmtree(deleted)


def remove_leftovers(parent: Path) -> None:
    """Delete the temporary files and folders of killed processes in `parent`.

    A folder whose replacement was not committed gets its name back.
    """
    remove_abandoned(parent)
    _remove_abandoned_files(parent, "*")
    live = {lock.stem for lock in parent.glob(f"{TEMPORARY_PREFIX}*{_LOCK}")}
    for path in parent.glob(f"{_REPLACED_PREFIX}*"):
        target = parent / path.name.removeprefix(_REPLACED_PREFIX)
        if not target.exists():
            path.rename(target)
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir() and path.name not in live:
            shutil.rmtree(path)


def remove_abandoned(parent: Path) -> None:
    """Delete only the temporary folders in `parent` whose lock a killed `staged_folder` left."""
    for lock in parent.glob(f"{TEMPORARY_PREFIX}*{_LOCK}"):
        # An error means that its process is running, or that the lock is not ours.
        with contextlib.suppress(UserError, OSError), _locked(lock, lock):
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock `folder`, or raise UserError. The kernel drops the lock when the process ends."""
    lock = folder / _LOCK
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.touch()
    with _locked(lock, folder, keep=True):
        yield


def is_locked(folder: Path) -> bool:
    """Return whether a running process is inside `locked_folder(folder)`."""
    try:
        with (folder / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextlib.contextmanager
def _locked(lock: Path, what: Path, *, keep: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `lock`; remove it afterwards unless `keep`."""
    try:
        file = _open_locked(lock, wait=wait)
    except BlockingIOError:
        holder = lock.read_text().strip() if lock.exists() else ""
        message = f"{what} is in use by another llmtrain process (pid {holder or 'unknown'})"
        raise UserError(message, hint="wait for it, stop it, or choose another folder") from None
    with file:
        try:
            with disk_errors(what):
                file.truncate(0)
                # Unbuffered, so that closing the file cannot fail a second time.
                os.write(file.fileno(), str(os.getpid()).encode())
            yield
        finally:
            if not keep:
                lock.unlink(missing_ok=True)


def _open_locked(path: Path, *, wait: bool, optional: bool = False) -> IO[bytes]:
    """Open or create a file and lock it until it is closed.

    If another process has locked it, wait or raise BlockingIOError. If `optional`, continue without
    a lock on a file system that does not support locks.
    """
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not optional:
                file.close()
                raise
        if _still_named(file, path):
            return file
        file.close()  # renamed or removed by the process that held the lock: open the new file


def _still_named(file: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False

"""Files that are either whole or not there: atomic commit, the lock and the names in a run.

Why: a run must survive a kill between any two system calls. Whatever carries its final name is
complete and durable; what was being written carries a name that starts with `.tmp-` and is
removed by the next command that writes there.

    with staged_folder(run.snapshot(1000)) as folder: save_weights(model, folder)
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

from llmtrain.errors import UserError
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.integrity import INTEGRITY_FILE, write_integrity

TEMPORARY_PREFIX = ".tmp-"
_REPLACED_PREFIX = f"{TEMPORARY_PREFIX}replaced-"
_LOCK = ".lock"
"""After a temporary name: held while a process builds what has that name."""
_NOT_LOCKED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESTALE)
"""The file system knows no locks, and so nothing of others is removed from it; or (NFS) the file is gone."""


# --- commit ------------------------------------------------------------------------------------


def fsync_path(path: Path) -> None:
    """Flush a file or a folder (its list of names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_folder(
    target: Path,
    *,
    replace: bool = False,
    needed: int | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Give a temporary folder beside `target`; when the block ends well, make it `target` at once.

    The folder gets its `integrity.json`, is flushed, renamed, and its parent flushed. When the
    block raises, the temporary folder is removed and `target` is as it was.

    Args:
        target: the final name.
        replace: whether a folder of that name gives way once the new one is durable.
        needed: bytes that will be written, if known.
        hashes: SHA-256 of files by name, from whoever wrote them; filled before the block ends.

    Raises:
        FileExistsError: `target` exists and is not to be replaced.
        UserError: its parent is no folder, or another process is writing `target`.
        WriteFailed: the disk is full or cannot be written to; see `disk.writing`.
    """
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already")
    with disk_errors(target, needed=needed):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise UserError(
                f"cannot make the folder {target.parent}: {error.strerror}",
                hint="choose another place to write to",
            ) from None
        remove_abandoned(target.parent)
        staging = target.parent / f"{TEMPORARY_PREFIX}{target.name}"
        with _locked(target.parent / f"{staging.name}{_LOCK}", target):
            yield from _staged(staging, target, hashes)


def _staged(staging: Path, target: Path, hashes: Mapping[str, str] | None) -> Iterator[Path]:
    """What `staged_folder` does once no other process can be at it."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        with ThreadPoolExecutor(1) as pool:  # the disk takes in what is being hashed
            flushed = pool.map(fsync_path, [path for path in staging.rglob("*") if path.is_file()])
            write_integrity(staging, hashes)
            list(flushed)
        for path in staging.rglob("*"):
            if path.is_file():  # safetensors lets nobody but its owner read what it writes
                path.chmod((staging / INTEGRITY_FILE).stat().st_mode)
        for path in [
            staging / INTEGRITY_FILE,
            *(p for p in staging.rglob("*") if p.is_dir()),
            staging,
        ]:
            fsync_path(path)
        old = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
        if target.exists():
            target.rename(old)
        staging.rename(target)
        fsync_path(target.parent)
        if old.exists():
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace (or create) one file so that a reader sees the old content or the new, never a part.

    Raises:
        WriteFailed: the disk is full or cannot be written to; see `disk.writing`.
    """
    encoded = content.encode() if isinstance(content, str) else content
    # Two processes may write the same file: each under a name of its own, and the last one stays.
    staging = path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
    with disk_errors(path, needed=len(encoded)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_files(path.parent, re.escape(path.name))
        with _held_open(staging) as file:
            try:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
                staging.replace(path)
                fsync_path(path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    staging.unlink()
                raise


def _held_open(staging: Path) -> BinaryIO:
    """An empty file to write to; that it is locked until it is closed says that it is not abandoned."""
    while True:
        file = staging.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NOT_LOCKED:
                raise
        if _is_named(file, staging):
            file.truncate(0)
            return file
        file.close()  # removed, or what a process of the same number on another machine has written


def _is_named(file: IO[Any], path: Path) -> bool:
    """Whether an open file still has the name under which it was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _remove_abandoned_files(parent: Path, name: str = ".+") -> None:
    """Delete what `write_atomically` wrote directly in `parent`, to be `name` (a pattern), when it was killed."""
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if _is_for_a_file(path, name):
            with (
                contextlib.suppress(OSError),
                path.open("r+b") as file,
            ):  # else it lives, or is not ours
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(file, path):
                    path.unlink()


def _is_for_a_file(path: Path, name: str = ".+") -> bool:
    """Whether a path is named as `write_atomically` names what is to be `name` (a pattern)."""
    named = re.fullmatch(rf"{re.escape(TEMPORARY_PREFIX)}\d+-{name}", path.name)
    return named is not None and path.suffix != _LOCK and path.is_file()


def remove_folder(folder: Path) -> None:
    """Delete a committed folder: renamed first, so that a kill half-way leaves no damaged one."""
    doomed = folder.parent / f"{TEMPORARY_PREFIX}deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Delete what an earlier, killed process left under a temporary name directly in `parent`.

    A folder that was about to be replaced, and whose successor did not get its name, comes back.
    What a living process is building stays.
    """
    remove_abandoned(parent)
    _remove_abandoned_files(parent)
    live = {lock.name.removesuffix(_LOCK) for lock in parent.glob(f"{TEMPORARY_PREFIX}*{_LOCK}")}
    for path in parent.glob(f"{_REPLACED_PREFIX}*"):
        target = parent / path.name.removeprefix(_REPLACED_PREFIX)
        if not target.exists():
            path.rename(target)
    for path in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if path.name.removesuffix(_LOCK) in live or _is_for_a_file(path):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may have been a file that has its name now


def remove_abandoned(parent: Path) -> None:
    """Delete what `staged_folder` built directly in `parent` when its process was killed, and nothing else."""
    for lock in parent.glob(f"{TEMPORARY_PREFIX}*{_LOCK}"):
        with (
            contextlib.suppress(UserError, OSError),
            _locked(lock, lock),
        ):  # else it lives, or is not ours
            shutil.rmtree(parent / lock.name.removesuffix(_LOCK), ignore_errors=True)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone. The kernel drops the lock however the process ends.

    Raises:
        UserError: another process holds it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    with _locked(folder / ".lock", folder, keep=True):
        yield


def is_locked(folder: Path) -> bool:
    """Whether a living process holds `folder` as `exclusive` does."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextlib.contextmanager
def _locked(lock: Path, what: Path, *, keep: bool = False) -> Iterator[None]:
    """Hold the file `lock`, which is removed afterwards unless it is to be kept."""
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed it since it was opened, and another made one of that name.
            if not _is_named(file, lock):
                raise BlockingIOError
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{what} is in use by another llmtrain process (pid {file.read().strip() or 'unknown'})",
                hint="wait for it, stop it, or choose another folder",
            ) from None
        with disk_errors(what):
            file.truncate(0)
            os.write(
                file.fileno(), str(os.getpid()).encode()
            )  # unbuffered: closing must not fail again
        try:
            yield
        finally:
            if not keep:
                lock.unlink(missing_ok=True)

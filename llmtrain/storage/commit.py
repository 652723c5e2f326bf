"""Atomic commits of files and folders: write under a temporary name, flush, rename.

Why: a run must survive a kill between any two system calls. Anything with its final name is
complete and durable. Temporary names start with `.tmp-`; the next command that writes there
removes or resumes the unfinished work of a killed process.

A folder is built inside a build folder, `.tmp-NUMBER-NAME` or, if it can be resumed, `.tmp-NAME`.
Its lock file marks it as llmtrain's: a folder without this marker is neither used nor deleted.
"""

import contextlib
import glob
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.file_systems import fsync, fsync_path, make_folders, unless_unsupported
from llmtrain.storage.integrity import INTEGRITY_FILE, write_integrity
from llmtrain.storage.locks import holding, open_locked, require_held, try_locked
from llmtrain.storage.safe_files import delete, is_real_folder

TEMPORARY_PREFIX = ".tmp-"
_MARKER = ".building"
RESUMABLE = ".resumable"
"""Marker of a build folder that the next process resumes."""
_MARKERS = (_MARKER, RESUMABLE)
_BUILD_NAME = re.compile(r"\.tmp-\d+-(.+)", re.DOTALL)
_NEW, _OLD = "new", "old"
"""Names in a build folder: the new folder, and the one that it replaces."""


@contextlib.contextmanager
def writing(target: Path, *, needed: int | None = None) -> Iterator[None]:
    """Replace disk errors with clear ones; fail if a locked folder above `target` was moved.

    `needed` is the size in bytes.
    """
    require_held(target)
    with disk_errors(target, needed=needed):
        try:
            yield
        except Exception:
            require_held(target)
            raise


@contextlib.contextmanager
def staged_folder(
    target: Path,
    *,
    replace: bool = False,
    needed: int | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder; at the end add its `integrity.json` and rename it to `target`.

    If the block raises, the temporary folder is removed and `target` is unchanged. `needed` is the
    size in bytes. If the block has computed digests, it calls `write_integrity` itself.
    """
    if os.path.lexists(target) and not replace:
        raise FileExistsError(f"{target} exists already")
    with writing(target, needed=needed):
        try:
            make_folders(target.parent)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            message = f"cannot create the directory {target.parent}: {error.strerror}"
            raise UserError(message, hint="choose another output path") from None
        remove_abandoned(target.parent, target)
        with _build_folder(target) as build:
            folder = build / _NEW
            folder.mkdir()
            yield folder
            _record_and_flush(folder)
            commit_folder(folder, target, replaced=build / _OLD if replace else None)


@contextlib.contextmanager
def _build_folder(target: Path) -> Iterator[Path]:
    """Create and lock a folder with an unpredictable name next to `target`; finally delete it."""
    build = target.with_name(f"{TEMPORARY_PREFIX}{secrets.randbits(32)}-{target.name}")
    build.mkdir()
    try:
        with _marked(build, target, _MARKER):
            yield build
    finally:
        with contextlib.suppress(OSError):  # it was moved; the next command deletes it
            _delete_build(build)


@contextlib.contextmanager
def temporary_folder(target: Path, *, wait: bool = False) -> Iterator[Path]:
    """Lock and yield the build folder `.tmp-NAME` next to `target`, with its existing content.

    It remains at the end unless it is empty. If another process builds `target`, `wait` for it or
    raise UserError. Also raise UserError if the existing folder has no marker.
    """
    build = temporary_path(target)
    make_folders(target.parent)
    with _marked(build, target, RESUMABLE, wait=wait):
        try:
            yield build
        finally:
            if {path.name for path in build.glob("*")} == {RESUMABLE}:
                _delete_build(build)


@contextlib.contextmanager
def _marked(build: Path, target: Path, marker: str, *, wait: bool = False) -> Iterator[None]:
    """Create `build` if it is missing, and hold the lock file that marks it."""
    while True:
        with contextlib.suppress(FileExistsError):
            build.mkdir()
        _require_ours(build, marker)
        try:
            file = open_locked(build / marker, target, wait=wait)
            break
        except FileNotFoundError:  # the process that held the lock has deleted the folder
            continue
    with file, holding(file, build / marker, target):
        yield


def _require_ours(build: Path, marker: str) -> None:
    """Raise UserError unless `build` is missing, or is an empty or marked folder."""
    if not os.path.lexists(build):
        return  # another process cleaned up just now
    if is_real_folder(build) and (os.path.lexists(build / marker) or not any(build.iterdir())):
        return
    raise UserError(
        f"cannot build in {build}: it is a link, or no llmtrain command marked it as its own",
        hint="move it away"
        if build.is_symlink()
        else f"move it away; to resume an earlier version's work, run touch {build / marker}",
    )


def temporary_path(target: Path) -> Path:
    """Return the temporary name of `target`."""
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}")


def commit_folder(folder: Path, target: Path, *, replaced: Path | None = None) -> None:
    """Rename a folder with flushed files to `target`, durably.

    An existing folder is first renamed to `replaced`, if given.
    """
    fsync_path(folder)
    require_held(folder)
    if replaced is not None and os.path.lexists(target):
        rename_durably(target, replaced)
    folder.rename(target)
    fsync_path(target.parent)


def _record_and_flush(folder: Path) -> None:
    record = folder / INTEGRITY_FILE
    files = [path for path in folder.rglob("*") if path.is_file() and path != record]
    with ThreadPoolExecutor(1) as pool:  # flush and hash at the same time
        flushed = pool.map(fsync_path, files)
        if not record.exists():
            write_integrity(folder)
        list(flushed)
    # safetensors creates files that only their owner reads. Files with several names are shared.
    for path in (path for path in files if path.stat().st_nlink <= 1):
        with unless_unsupported("file permissions", path):
            path.chmod(record.stat().st_mode)
    for path in (record, *(path for path in folder.rglob("*") if path.is_dir())):
        fsync_path(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Create or replace one file; a reader sees the old content or the new."""
    encoded = content.encode() if isinstance(content, str) else content
    # Two processes may write the same file: each has its own temporary name, the last one wins.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.randbits(32)}-{path.name}")
    with writing(path, needed=len(encoded)):
        make_folders(path.parent)
        _remove_abandoned_files(path.parent, f"[0-9]*-{glob.escape(path.name)}")
        with open_locked(temporary, path, flags=os.O_EXCL, wait=True) as file:
            try:
                file.write(encoded)
                file.flush()
                fsync(file.fileno(), temporary)
                require_held(path)
                temporary.replace(path)
                fsync_path(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def _remove_abandoned_files(parent: Path, pattern: str) -> None:
    for path in parent.glob(f"{TEMPORARY_PREFIX}{pattern}"):
        # Skip files in use and anything that is not a regular file with one name.
        with contextlib.suppress(UserError, OSError), try_locked(path):
            path.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a committed folder; if this is interrupted, no incomplete folder has its name."""
    with writing(folder), _build_folder(folder) as build:
        rename_durably(folder, build / "deleted")


def rename_durably(path: Path, target: Path) -> None:
    """Rename a file or folder, and flush the change of names."""
    require_held(path)
    fsync_path(target.parent)  # first the marker of a build folder, by which it is found again
    path.rename(target)
    for parent in dict.fromkeys((target.parent, path.parent)):  # the new name first
        fsync_path(parent)


def remove_leftovers(parent: Path) -> None:
    """Delete the temporary files and folders of killed processes in `parent`.

    A folder whose replacement was not committed gets its name back.
    """
    for build in _builds(parent):
        _restore_replaced(build)
    remove_abandoned(parent)
    _remove_leftovers_of_earlier_versions(parent)
    _remove_abandoned_files(parent, "*")


def remove_abandoned(parent: Path, target: Path | None = None) -> None:
    """Delete only the build folders in `parent` that a killed `staged_folder` left.

    Raise UserError if a running process builds `target`.
    """
    for build in _named_builds(parent):
        with contextlib.suppress(OSError):  # it is not empty
            build.rmdir()  # of a process killed before it created the marker or after it removed it
    for build in _builds(parent):
        try:
            with try_locked(build / _MARKER):
                _restore_replaced(build)
                _delete_build(build)
        except BlockingIOError:
            if _target(build) == target:
                with contextlib.suppress(FileNotFoundError):  # it has just ended
                    open_locked(build / _MARKER, _target(build)).close()
        except (UserError, OSError):
            continue  # it cannot be locked, or it is gone


def _named_builds(parent: Path) -> list[Path]:
    found = parent.glob(f"{TEMPORARY_PREFIX}*-*")
    return [path for path in found if _BUILD_NAME.fullmatch(path.name) and is_real_folder(path)]


def _builds(parent: Path) -> list[Path]:
    return [path for path in _named_builds(parent) if os.path.lexists(path / _MARKER)]


def _target(build: Path) -> Path:
    match = _BUILD_NAME.fullmatch(build.name)
    assert match is not None, "build folders are found by this pattern"
    return build.with_name(match[1])


def _restore_replaced(build: Path) -> None:
    old, target = build / _OLD, _target(build)
    if os.path.lexists(old) and not os.path.lexists(target):
        rename_durably(old, target)


def clear(build: Path) -> None:
    """Delete everything in a build folder except its markers."""
    for path in build.iterdir():
        if path.name not in _MARKERS:
            delete(path)


def _delete_build(build: Path) -> None:
    clear(build)  # first, so that an interruption leaves a marked folder
    for name in _MARKERS:
        (build / name).unlink(missing_ok=True)
    build.rmdir()


def _remove_leftovers_of_earlier_versions(parent: Path) -> None:
    """Handle `.tmp-NAME` with `.tmp-NAME.lock`, `.tmp-replaced-NAME` and `.tmp-deleted-NAME`."""
    for path in filter(is_real_folder, parent.glob(f"{TEMPORARY_PREFIX}replaced-*")):
        target = parent / path.name.removeprefix(f"{TEMPORARY_PREFIX}replaced-")
        delete(path) if os.path.lexists(target) else rename_durably(path, target)
    for path in filter(is_real_folder, parent.glob(f"{TEMPORARY_PREFIX}deleted-*")):
        delete(path)
    for lock in parent.glob(f"{TEMPORARY_PREFIX}*.lock"):
        if is_real_folder(folder := lock.with_suffix("")):
            with contextlib.suppress(UserError, OSError), try_locked(lock):
                delete(folder)

"""Disks that are full, over quota or read-only: one error with the bytes needed and available."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmtrain.errors import WriteFailed

NO_ROOM = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space in your quota",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
}
"""Hints by error number: no space, over quota, beyond the limit on file sizes."""
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def disk_errors(target: Path, *, needed: int | None = None) -> Iterator[None]:
    """Replace disk errors with a WriteFailed that names `target`; pass other exceptions through.

    Include the clean-up of a failed write in the block, so that its bytes count as free.
    `needed` is the total size in bytes, if known.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in NO_ROOM:
            hint = NO_ROOM[number]
        elif number in _FORBIDDEN and concerns(target, getattr(error, "filename", None)):
            hint = "make that folder writable"
        else:
            raise
        room = "" if needed is None else f"{needed:,} bytes needed, "
        room += f"{free_bytes(target):,} bytes free"
        raise WriteFailed(
            f"cannot write {target}: {os.strerror(number)} ({room})",
            hint=f"{hint}, or write elsewhere; the same command resumes from completed work",
        ) from error


def require_room(target: Path, needed: int) -> None:
    """Raise WriteFailed if the disk of `target` has fewer than `needed` bytes free."""
    if free_bytes(target) < needed:
        with disk_errors(target, needed=needed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def free_bytes(target: Path) -> int:
    """Return the free bytes on the disk of `target`, which need not exist."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def concerns(target: Path, filename: str | None) -> bool:
    """Return whether a path is `target`, above or below it, or a temporary name of it."""
    if filename is None:
        return False
    path, target = Path(filename).absolute(), target.absolute()
    if target.parent not in path.parents:
        return path in target.parents
    name = path.parts[len(target.parent.parts)]
    return name == target.name or (name.startswith(".") and target.name in name)


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error.__context__, OSError):  # torch raises a second error when it closes a file
        return error.__context__.errno
    match = _RUST_ERRNO.search(str(error))
    return int(match[1]) if match else None

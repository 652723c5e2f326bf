"""A disk that is full, limited or not to be written to: one line with what was needed and what is free.

Why one place: every writer can meet such a disk, at a `mkdir` as well as at the last byte, and each has
its own exception for it (Python's an `errno`, Rust's libraries a text). The answer is always the same.

    with writing(target, needed=model_bytes): save_file(tensors, target)
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmtrain.errors import WriteFailed

NO_ROOM = {
    errno.ENOSPC: "make room there, or write elsewhere",
    errno.EDQUOT: "make room in your quota there, or write elsewhere",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or write elsewhere",
}
"""What the errors of writing mean (no space, no quota, a file beyond the limit on its size) and what to do."""
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def disk_errors(target: Path, *, needed: int | None = None) -> Iterator[None]:
    """Say in one line that `target` could not be written because of its disk; let other errors through.

    Wrap it around the clean-up of a failed write, so that what is called free is free for the next try.

    Args:
        target: the final name of what is written; the block writes it, or under temporary names beside it.
        needed: bytes in all, where they are known.

    Raises:
        WriteFailed: the disk is full, over quota, limited, or not to be written to.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in NO_ROOM:
            hint = NO_ROOM[number]
        elif number in _FORBIDDEN and _concerns(target, getattr(error, "filename", None)):
            hint = "make that folder writable, or write elsewhere"
        else:
            raise
        raise WriteFailed(
            f"cannot write {target}: {os.strerror(number)} ({_room(target, needed)})",
            hint=f"{hint}; what is complete is kept, and the same command goes on from there",
        ) from error


def require_room(target: Path, needed: int) -> None:
    """Raise a WriteFailed when the disk of `target` has fewer than `needed` bytes free."""
    if free_bytes(target) < needed:
        with disk_errors(target, needed=needed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def free_bytes(target: Path) -> int:
    """Bytes that can be written where `target` lies, or would."""
    return shutil.disk_usage(
        next(path for path in (target, *target.absolute().parents) if path.exists())
    ).free


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(
        error.__context__, OSError
    ):  # torch fails once more in closing a file, and tells only that
        return error.__context__.errno
    match = _RUST_ERRNO.search(str(error))
    return int(match[1]) if match else None


def _concerns(target: Path, filename: str | None) -> bool:
    """Whether a path that was refused is `target`, above or below it, or at a temporary name of it."""
    if filename is None:
        return False
    path, target = Path(filename).absolute(), target.absolute()
    if path == target or path in target.parents or target in path.parents:
        return True
    beside = path.relative_to(target.parent).parts if target.parent in path.parents else ()
    return bool(beside) and beside[0].startswith(".") and target.name in beside[0]


def _room(target: Path, needed: int | None) -> str:
    free = f"{free_bytes(target):,} bytes free"
    return free if needed is None else f"{needed:,} bytes needed, {free}"

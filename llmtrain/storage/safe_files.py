"""Safe access to files and folders from outside, such as those of an extracted run archive.

The rule: a run folder, and any folder above it, may be a symbolic link. Below it, commands write
only to real folders and to regular files with one name, so nothing outside the run can change.
Links to single snapshots are followed when reading; deleting one deletes only the link.
"""

import errno
import os
import shutil
import stat
from pathlib import Path

from llmtrain.errors import UserError

_NOT_A_FILE = {errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR}
"""Errors of opening links (EMLINK on BSD), sockets and folders."""


def open_own(path: Path, flags: int) -> int:
    """Open a file for writing; raise UserError unless it is a regular file with one name."""
    descriptor = open_regular(path, flags)
    if os.fstat(descriptor).st_nlink > 1:  # some FUSE file systems report zero names
        os.close(descriptor)
        raise _not_own(path)
    return descriptor


def open_regular(path: Path, flags: int) -> int:
    """Open a file; raise UserError unless it is a regular file, which may have several names."""
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: a FIFO would block
    try:
        descriptor = os.open(path, flags | safe, 0o666)
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise _not_own(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_own(path)
    return descriptor


def _not_own(path: Path) -> UserError:
    problem = f"cannot write {path}: it is a link, has several names, or is not a regular file"
    return UserError(problem, hint="delete it; llmtrain creates its own file")


def read_regular(path: Path) -> bytes:
    """Return the content of a file or of a link to one; raise OSError for a FIFO or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return file.read()


def is_real_folder(path: Path) -> bool:
    """Return whether `path` is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def make_own_folder(path: Path) -> None:
    """Create a folder unless it exists; replace a link to a folder, whose target is kept."""
    if path.is_symlink():
        path.unlink()
    path.mkdir(exist_ok=True)


def reject_links(root: Path, path: Path) -> None:
    """Raise UserError if `path`, or a folder between `root` and it, is a symbolic link."""
    below = [each for each in (path, *path.parents) if root in each.parents]
    for each in below:
        if each.is_symlink():
            raise UserError(
                f"cannot write to {each}: it is a symbolic link inside {root}",
                hint=f"replace it with a real folder; {root} itself may be a link",
            )


def delete(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder with its content."""
    if is_real_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink()

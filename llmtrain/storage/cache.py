"""The user's cache folder, and digests of large files that are computed once per machine.

A digest is cached by the file's device, inode, size, mtime and ctime. Why ctime: a copy can
preserve the size and the mtime, but no program can set the ctime.
"""

import hashlib
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from llmtrain.errors import UserError, WriteFailed
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.integrity import Algorithm, Digest, digest_of

_SETTLED_NS = 3_000_000_000
"""Age from which a ctime identifies one version; some file systems store whole seconds."""


def cache_folder() -> Path:
    """Return this user's cache: $LLMTRAIN_CACHE, else `llmtrain` in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("LLMTRAIN_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmtrain"


def file_identity(path: Path) -> tuple[int, ...]:
    """Return device, inode, size, mtime and ctime: equal as long as the file is unchanged."""
    info = path.stat()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def cached_digest(path: Path, algorithm: Algorithm = "blake3") -> Digest:
    """Return the digest of a file; compute it only if the file changed since the last time."""
    # Without a usable cache, the next call computes it again. RuntimeError: no home folder.
    with suppress(OSError, UnicodeDecodeError, RuntimeError):
        known = _entry(file_identity(path), algorithm).read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return Digest(algorithm, known)
    return computed_digest(path, algorithm)


def computed_digest(path: Path, algorithm: Algorithm = "blake3") -> Digest:
    """Read a file and return its digest; cache it for `cached_digest`."""
    before = file_identity(path)
    digest = digest_of(path, algorithm)
    settled = time.time_ns() - before[-1] > _SETTLED_NS
    if settled and file_identity(path) == before:
        with suppress(OSError, UserError, WriteFailed, RuntimeError):
            write_atomically(_entry(before, algorithm), digest.hex)
    return digest


def _entry(identity: tuple[int, ...], algorithm: Algorithm) -> Path:
    """Return the file with a cached digest, in a folder that only this user can change."""
    folder = cache_folder() / "digests"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be changed by other users")
    return folder / hashlib.sha256(f"{algorithm} {identity}".encode()).hexdigest()

"""The user's cache folder, and digests of large files that are computed once per machine.

A digest is cached by the file's device, inode, size, mtime and ctime. Why ctime: a copy can
preserve the size and the mtime, but no program can set the ctime.
"""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from llmtrain.errors import WriteFailed
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
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def cached_digest(path: Path, algorithm: Algorithm = "blake3") -> Digest:
    """Return the digest of a file; compute it only if the file changed since the last time."""
    entry = _entry(file_identity(path), algorithm)
    with suppress(OSError, UnicodeDecodeError):  # not cached, or damaged: compute it
        if re.fullmatch(r"[0-9a-f]{64}", known := entry.read_text()):
            return Digest(algorithm, known)
    return computed_digest(path, algorithm)


def computed_digest(path: Path, algorithm: Algorithm = "blake3") -> Digest:
    """Read a file and return its digest; cache it for `cached_digest`."""
    before = file_identity(path)
    digest = digest_of(path, algorithm)
    settled = time.time_ns() - before[-1] > _SETTLED_NS
    if settled and file_identity(path) == before:
        with suppress(OSError, WriteFailed):  # the next call computes it again
            write_atomically(_entry(before, algorithm), digest.hex)
    return digest


def _entry(identity: tuple[int, ...], algorithm: Algorithm) -> Path:
    name = hashlib.sha256(f"{algorithm} {identity}".encode()).hexdigest()
    return cache_folder() / "digests" / name

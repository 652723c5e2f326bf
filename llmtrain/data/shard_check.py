"""Compare token shards with the hashes in their manifests while training or evaluation runs.

Each machine keeps a list of intact shards, so a shard is hashed once and again after any change.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from llmtrain.data.manifest import ShardRecord
from llmtrain.data.shards import TokenFile
from llmtrain.errors import UserError
from llmtrain.storage.cache import cache_folder
from llmtrain.storage.commit import write_atomically

_POLL_SECONDS = 0.1


class ShardCheck:
    """Hashes of `files`, compared by a background thread. Files without a record are skipped."""

    def __init__(self, files: Iterable[TokenFile]) -> None:
        """Start the comparison. Each distinct file is hashed once."""
        self._thread = ThreadPoolExecutor(1, "shard-check")
        records = {file.path: file.record for file in files if file.record is not None}
        self._results: list[Future[str | None]] = [
            self._thread.submit(_problem, path, record) for path, record in records.items()
        ]

    @property
    def is_running(self) -> bool:
        """True until every file is compared."""
        return not all(result.done() for result in self._results)

    def raise_problem(self) -> None:
        """Raise a UserError if a file compared so far differs from its record."""
        for result in self._results:
            if result.done() and (problem := result.result()):
                raise UserError(
                    f"the data has changed since it was prepared: {problem}",
                    hint="restore the shard, or prepare the data again and start a new run",
                )

    def wait(self, poll: Callable[[], None]) -> None:
        """Wait for all comparisons, then do `raise_problem`; `poll` may raise to stop waiting."""
        while wait(self._results, _POLL_SECONDS).not_done:
            poll()
            self.raise_problem()
        self.raise_problem()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel the comparisons that have not started."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def require_intact(files: Iterable[TokenFile], poll: Callable[[], None] = lambda: None) -> None:
    """Raise a UserError if one of `files` differs from its record; see `ShardCheck.wait`."""
    with ShardCheck(files) as check:
        check.wait(poll)


def _problem(path: Path, record: ShardRecord) -> str | None:
    """Return an error message if a shard differs from its record; remember an intact one."""
    try:
        before = _fingerprint(path, record)
        if _read_fingerprint(path) == before:
            return None
        if problem := record.hash_problem(path):
            return problem
        if _fingerprint(path, record) != before:
            return f"{path} changed while it was read"
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    # Without a usable cache, the next start hashes the shard again.
    with suppress(OSError, RuntimeError, UserError):
        write_atomically(_cache_file(path), before)
    return None


def _fingerprint(path: Path, record: ShardRecord) -> str:
    """Return a hash of a shard's recorded hash and of all metadata that a change would alter.

    Unlike the modification time, programs cannot set the inode's change time (`ctime`).
    """
    info = path.stat()
    times = info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns
    identity = f"{path.resolve()} {times} {record.blake3} {record.sha256}"
    return hashlib.sha256(os.fsencode(identity)).hexdigest()


def _read_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of a shard when it was last intact, or None."""
    try:
        return _cache_file(path).read_text(encoding="ascii")
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the user has no home folder
        return None


def _cache_file(path: Path) -> Path:
    """Return the file with a shard's fingerprint, in a folder that only this user can change."""
    folder = cache_folder() / "intact-shards"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be changed by other users")
    return folder / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]

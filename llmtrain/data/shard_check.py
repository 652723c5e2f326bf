"""Compare token shards with the hashes in their manifests while training or evaluation runs.

Each machine caches the hashes, so a shard is hashed once and again after any change.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from llmtrain.data.manifest import ShardRecord
from llmtrain.data.shards import TokenFile
from llmtrain.errors import UserError
from llmtrain.storage.cache import cached_digest

_POLL_SECONDS = 0.1


class ShardCheck:
    """Background comparison of `files` with their recorded hashes; others are skipped."""

    def __init__(self, files: Iterable[TokenFile]) -> None:
        """Start the comparison; hash each distinct file once."""
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
    """Return an error message if a shard differs from its record."""
    try:
        return record.hash_problem(path, cached_digest)
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"

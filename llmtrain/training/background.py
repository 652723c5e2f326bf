"""A thread that writes one folder at a time while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llmtrain.runtime.distributed import World


class BackgroundWriter:
    """Base of the writers; all processes make the same calls in the same order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pool = ThreadPoolExecutor(1, "writer")
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread; the previous write must have ended."""
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Block until the last folder is durable, or raise what failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise the error of the last write if it has finished on all processes."""
        done = self._writing is None or self._writing.done()
        if self._world.sums([done])[0] == self._world.size:
            self.wait()

    def close(self) -> None:
        """Wait for the thread to end."""
        self._pool.shutdown()

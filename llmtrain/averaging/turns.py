"""Threads that do the same work and pass each file in one order, so that it is read, written and hashed as it lies.

Why not a queue for each file: a thread would hand over every piece to another and wait for it. Here each does
all of a piece, and waits only where the one before it is still at the same file.

    turns = OrderedAccess(stopped); in_threads(worker, 2, stopped)  # worker: `with turns.of(number): file.write(piece)`
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress


def in_threads(worker: Callable[[], None], count: int, stopped: threading.Event) -> None:
    """Run `worker` in so many threads; when one fails, or a signal comes, `stopped` is set and ends the others.

    Raises:
        Exception: what the first that failed raised.
    """
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in as_completed([pool.submit(worker) for _ in range(count)]):
                with suppress(_Stopped):  # the one that stopped it comes first, and tells why
                    future.result()
        finally:
            stopped.set()


class _Stopped(Exception):
    """Another thread has failed, so that a turn will never come."""


class OrderedAccess:
    """Lets the threads through one at a time, in the order of the pieces.

    A file is read, written and hashed first to last by it, and not by one thread waiting for the other
    at each piece: the second follows the first half a piece behind, at another input.
    """

    def __init__(self, stopped: threading.Event) -> None:
        """The turn is that of piece 0; `stopped` ends all waiting."""
        self._stopped = stopped
        self._next = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Wait until all pieces before `number` have been here."""
        with self._changed:
            while self._next != number:
                if self._stopped.is_set():
                    raise _Stopped
                self._changed.wait(0.1)
        yield
        with self._changed:
            self._next = number + 1
            self._changed.notify_all()

"""Detect other processes that take the cores of the compute threads and slow training down.

Threads wait for each other after every operation. If they spin while waiting, a thread that lost
its core blocks the others, and two threads can be slower than one.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_SECONDS = 5.0
"""Training time between two comparisons."""
_WAITING = 0.25
"""Smallest share of their time that ready threads wait for a core."""
_SLOWDOWN = 0.5
"""Largest speed, relative to the fastest so far, that counts as slow."""

CoreTimes = tuple[int, int]


def core_times() -> CoreTimes:
    """Return the nanoseconds that the threads of this process ran, and waited for a core.

    Both are 0 on systems without Linux's scheduler statistics.
    """
    running = waiting = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            ran, waited, _ = map(int, path.read_text().split())
            running, waiting = running + ran, waiting + waited
    return running, waiting


def threads_spin() -> bool:
    """Return whether compute threads spin while they wait for each other."""
    chosen = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    return not chosen and "GOMP_SPINCOUNT" not in os.environ


class ContentionDetector:
    """Detector of other processes, from the speed of training and the waiting time of threads."""

    def __init__(
        self, threads: int, *, spinning: bool, read: Callable[[], CoreTimes] = core_times
    ) -> None:
        self._threads, self._spinning, self._read = threads, spinning and threads > 1, read
        self._tokens, self._seconds, self._fastest = 0, 0.0, 0.0
        self._before, self._warned = read(), False

    def check(self, tokens: int, seconds: float) -> str | None:
        """Add training on `tokens` that took `seconds`; return a warning, at most once."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if self._warned or self._seconds < _SECONDS:
            return None
        rate, before, self._before = self._tokens / self._seconds, self._before, self._read()
        self._tokens, self._seconds = 0, 0.0
        self._fastest = max(self._fastest, rate)
        ran, waited = (max(b - a, 0) for a, b in zip(before, self._before, strict=True))
        waiting = waited / max(ran + waited, 1)
        is_slow = self._spinning or rate <= _SLOWDOWN * self._fastest
        self._warned = waiting >= _WAITING and is_slow
        return self._warning(rate, waiting) if self._warned else None

    def _warning(self, rate: float, waiting: float) -> str:
        fastest = f" instead of {self._fastest:,.0f}" if rate < self._fastest else ""
        hint = "stop those processes"
        if self._spinning:
            hint += ", or restart with OMP_WAIT_POLICY=PASSIVE"
        elif self._threads > 1:
            hint += ", or restart with OMP_NUM_THREADS=1"
        return (
            f"other processes slow this run down: {rate:,.0f} tokens/s{fastest}; its threads wait "
            f"for a core {waiting:.0%} of the time; {hint}"
        )

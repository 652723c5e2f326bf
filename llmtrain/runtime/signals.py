"""Signals and a time limit that stop work at the next safe point.

Why: Slurm, spot machines and Ctrl-C all send one signal and expect a saved training checkpoint.
The handler sets a flag, which long work checks. A second signal stops the process at once.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self

OUT_OF_TIME = 124
"""Exit code after the time limit, as in timeout(1)."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupted(Exception):
    """Raised at a safe point. `exit_code` is 128 + signal, or `OUT_OF_TIME`."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Interrupt:
    """Context that records the first signal; the second one has its default effect.

    If another rank received the signal first, this one handles its own even after the context.
    `agree` maps this rank's exit code to the one of all ranks (0: continue).
    """

    def __init__(
        self,
        max_seconds: float | None = None,
        *,
        quiet: bool = False,
        agree: Callable[[int], int] = lambda code: code,
    ) -> None:
        self.received: int | None = None
        self._agree = agree
        self._quiet = quiet
        self._signal_expected = self._raises = False
        self._deadline = time.monotonic() + max_seconds if max_seconds is not None else None
        self._previous: dict[int, _Handler] = {}

    @property
    def exit_code(self) -> int:
        """Exit code of stopping now; 0 to continue."""
        if self.received is not None:
            return 128 + self.received
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return OUT_OF_TIME if late else 0

    def check(self) -> None:
        """Raise Interrupted if a signal arrived or the time limit has passed."""
        if code := self._agree(self.exit_code):
            timeout = code == OUT_OF_TIME
            self._signal_expected = self.received is None and not timeout
            raise Interrupted(_reason(code), code)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Raise Interrupted in the block when a signal arrives, between any two Python operations.

        Use it only in the main thread of a single process, for work that can be abandoned at any
        point.
        """
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self._quiet and not self._signal_expected:
            _print_unbuffered(b"stopping at the next safe point; a second signal stops at once\n")
        for each, previous in self._previous.items():
            default = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
            signal.signal(each, previous if self._signal_expected else default)
        if self._raises:
            raise Interrupted(_reason(self.exit_code), self.exit_code)

    def __enter__(self) -> Self:
        # Signals that nohup or a shell's `&` disabled stay ignored.
        active = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        self._previous = {each: signal.signal(each, self._handle) for each in active}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._signal_expected and self.received is None:
            return  # its own signal must not end this process before it has printed the outcome
        for each, previous in self._previous.items():
            signal.signal(each, previous)


def _reason(exit_code: int) -> str:
    timeout = exit_code == OUT_OF_TIME
    return "time limit reached" if timeout else signal.Signals(exit_code - 128).name


def _print_unbuffered(message: bytes) -> None:
    """Write to standard error, even while the signal interrupts a print."""
    if sys.__stderr__ is None:  # closed from the start: descriptor 2 may be a data file
        return
    with contextlib.suppress(OSError):  # closed later
        os.write(sys.__stderr__.fileno(), message)

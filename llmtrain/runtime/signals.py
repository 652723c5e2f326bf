"""A signal, or a limit on time, that ends the work at the next safe place instead of in its middle.

Why: Slurm, a spot machine and Ctrl-C all send one signal and expect the state to be saved. The
handler only sets a flag; long work asks for it. A second signal leaves at once.

    with Interrupt(max_seconds=3600) as interrupt: ...; interrupt.check()
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

_Handler = Callable[[int, FrameType | None], object] | int | None
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

OUT_OF_TIME = 124
"""Exit code when the limit on time was reached; that of timeout(1)."""


class Interrupted(Exception):
    """Raised where work can be left; `exit_code` says why: 128 + signal, or `OUT_OF_TIME`."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Interrupt:
    """While active, the first of the signals is remembered; the second has its usual effect.

    Where another process was the reason to leave, the first signal to this one is awaited even afterwards.
    """

    def __init__(
        self,
        max_seconds: float | None = None,
        *,
        quiet: bool = False,
        agree: Callable[[int], int] = lambda code: code,
    ) -> None:
        """Listen from `with` on.

        Args:
            max_seconds: treat the end of this time as a signal; None: no limit.
            quiet: do not say that a signal came.
            agree: of the exit code of this process, that of all (0: nobody leaves).
        """
        self.received: int | None = None
        self._agree = agree
        self._quiet = quiet
        self._is_to_come = False
        self._deadline = time.monotonic() + max_seconds if max_seconds is not None else None
        self._previous: dict[int, _Handler] = {}

    @property
    def exit_code(self) -> int:
        """That of leaving now: 0 while there is no reason to leave."""
        if self.received is not None:
            return 128 + self.received
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return OUT_OF_TIME if late else 0

    def check(self) -> None:
        """Raise `Interrupted` if a signal came or the time is over."""
        if code := self._agree(self.exit_code):
            reason = "the time is over" if code == OUT_OF_TIME else signal.Signals(code - 128).name
            # Another process had the reason to leave; a signal to this one may still be on its way.
            self._is_to_come = self.received is None and code != OUT_OF_TIME
            raise Interrupted(reason, code)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # Unbuffered, because the signal may have come in the middle of a print. The terminal may be gone, and
        # the `tee` of a pipe ended by the same Ctrl-C: an exception here would be raised in the middle of a step.
        if not self._quiet and not self._is_to_come:
            with contextlib.suppress(OSError):
                os.write(
                    2, b"stopping at the next safe place; the same signal again leaves at once\n"
                )
        for each, handler in self._previous.items():
            usual = signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL
            signal.signal(each, handler if self._is_to_come else usual)

    def __enter__(self) -> "Interrupt":
        # What nohup, or a shell's `&`, told us to ignore stays ignored.
        heard = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        self._previous = {each: signal.signal(each, self._remember) for each in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_to_come and self.received is None:
            return  # else it would end this process before it has told what became of the work
        for each, handler in self._previous.items():
            signal.signal(each, handler)

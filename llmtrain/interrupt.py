"""A signal that ends the work at the next safe place instead of in the middle of it.

Why: Slurm, a spot machine and Ctrl-C all send one signal and expect the state to be saved. The
handler only sets a flag; long work asks for it. A second signal leaves at once.

    with Interrupt() as interrupt: ...; interrupt.check()
"""

import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Raised where work can be left; `signal` is what was received."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell has it."""
        return 128 + self.signal


class Interrupt:
    """While active, the first SIGINT or SIGTERM is remembered; the second has its usual effect."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in _SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    def __enter__(self) -> "Interrupt":
        self._previous = {each: signal.signal(each, self._remember) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)  # type: ignore[arg-type]  # what signal() itself returned

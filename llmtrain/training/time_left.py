"""Prediction of the remaining time of a run."""

from collections import deque
from statistics import median

WINDOW = 15
"""Log intervals. In simulated runs, 9 jumped twice as much, and 25 was not more accurate."""


class TimeLeft:
    """Prediction from the median speed of recent log intervals and the mean pause per step.

    Why both: evaluations and saves are regular, but a single slow interval is not.
    """

    def __init__(self) -> None:
        self._seconds_per_step: deque[float] = deque(maxlen=WINDOW)
        self._steps = 0
        self._paused = 0.0

    def add(self, steps: int, seconds: float, paused: float) -> None:
        """Add a log interval of `seconds`, including `paused` seconds of evaluating and saving."""
        self._seconds_per_step.append((seconds - paused) / steps)
        self._steps += steps
        self._paused += paused

    def predict(self, steps: int) -> float:
        """Return the seconds that the next `steps` take."""
        return steps * (median(self._seconds_per_step) + self._paused / self._steps)

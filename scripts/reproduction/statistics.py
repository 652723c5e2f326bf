"""Means with their standard errors over seeds, and the rule for what counts.

Why paired: the same seed gives both sides the same initial weights and data, so their difference varies
far less from seed to seed than either does.

    paired({1: 1.60, 2: 1.62}, {1: 1.66, 2: 1.69}).verdict  # "gain"
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    error: float | None
    """Standard error of the mean; None with one seed."""
    seeds: int

    def __str__(self) -> str:
        spread = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.mean:.4f}{spread}"

    @property
    def signed(self) -> str:
        """As a difference, with its sign."""
        return ("−" if self.mean < 0 else "+") + str(
            Estimate(abs(self.mean), self.error, self.seeds)
        )

    @property
    def verdict(self) -> str:
        """Of a difference of losses: it counts where it is at least two standard errors."""
        if self.error is None:
            return "one seed"
        if abs(self.mean) < 2 * self.error or self.mean == 0:
            return "no difference"
        return "gain" if self.mean < 0 else "loss"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error (sample standard deviation over √n); None of nothing."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean of ours minus theirs over the seeds that both have."""
    return estimate([loss - theirs[seed] for seed, loss in ours.items() if seed in theirs])

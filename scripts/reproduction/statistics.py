"""Means with standard errors over seeds, and the rule for verdicts.

Differences are paired by seed: both sides share initial weights and data, so their difference
varies far less between seeds than either side.

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
        """The difference with its sign."""
        return ("−" if self.mean < 0 else "+") + str(
            Estimate(abs(self.mean), self.error, self.seeds)
        )

    @property
    def verdict(self) -> str:
        """The verdict on a loss difference: it counts from two standard errors on."""
        if self.error is None:
            return "one seed"
        if abs(self.mean) < 2 * self.error or self.mean == 0:
            return "no difference"
        return "gain" if self.mean < 0 else "loss"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Return mean and standard error (sample standard deviation / √n); None without values."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Return the mean of ours minus theirs over the seeds that both have."""
    return estimate([loss - theirs[seed] for seed, loss in ours.items() if seed in theirs])

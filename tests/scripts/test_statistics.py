"""The experiments' statistics: paired differences, standard errors, verdicts, names of rates."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reproduction.plan import text
from reproduction.statistics import Estimate, estimate, paired


@given(st.dictionaries(st.integers(0, 9), st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=2))
def test_a_difference_counts_from_two_standard_errors_on(
    losses: dict[int, tuple[float, float]],
) -> None:
    ours, theirs = ({seed: pair[side] for seed, pair in losses.items()} for side in (0, 1))
    found = paired(ours, theirs | {99: 1.0})
    differences = [a - b for a, b in losses.values()]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert found == Estimate(statistics.fmean(differences), error, len(losses))
    counts = abs(found.mean) >= 2 * error and found.mean != 0
    assert found.verdict == (("gain" if found.mean < 0 else "loss") if counts else "no difference")


def test_one_seed_or_none_has_no_verdict() -> None:
    one = paired({1: 1.5}, {1: 1.6, 2: 1.0})
    assert one is not None and (one.signed, one.verdict) == ("−0.1000", "one seed")
    assert estimate([]) is None
    assert str(estimate([1.0, 1.2])) == "1.1000 ± 0.1000"


@pytest.mark.parametrize(
    ("rate", "written"), [(6e-3, "6e-3"), (1e-2 / 3, "3.3e-3"), (0.2, "2e-1"), (9.96e-4, "1e-3")]
)
def test_rates_are_formatted_with_two_digits(rate: float, written: str) -> None:
    assert text(rate) == written

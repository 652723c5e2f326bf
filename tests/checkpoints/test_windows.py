"""Windows of steps, compared with a brute-force definition."""

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.checkpoints.windows import (
    describe_steps,
    disjoint_windows,
    possible_spacings,
    sliding_windows,
)

STEPS = st.sets(st.integers(1, 60), max_size=25).map(sorted)


@given(STEPS, st.integers(1, 12), st.integers(1, 6))
def test_sliding_windows_are_all_complete_windows(steps: list[int], every: int, size: int) -> None:
    expected = [
        tuple(last - j * every for j in reversed(range(size)))
        for last in steps
        if all(last - j * every in steps for j in range(size))
    ]
    assert sliding_windows(steps, every=every, size=size) == expected


@given(STEPS, st.integers(1, 12), st.integers(1, 6))
def test_disjoint_windows_share_no_step_and_are_ordered(
    steps: list[int], every: int, size: int
) -> None:
    windows = disjoint_windows(steps, every=every, size=size)
    flat = [step for window in windows for step in window]
    assert flat == sorted(set(flat))
    assert set(windows) <= set(sliding_windows(steps, every=every, size=size))


def test_disjoint_windows_equal_the_papers_script() -> None:
    steps = list(range(100, 1300, 100))
    assert disjoint_windows(steps, every=100, size=5) == [
        (100, 200, 300, 400, 500),
        (600, 700, 800, 900, 1000),
    ]


def test_disjoint_windows_stay_on_one_grid() -> None:
    assert disjoint_windows(list(range(20, 200, 20)), every=60, size=2) == [(20, 80)]
    assert disjoint_windows(list(range(20, 300, 20)), every=60, size=2) == [(20, 80), (140, 200)]


@given(STEPS, st.integers(2, 6))
def test_possible_spacings_are_those_with_a_window(steps: list[int], size: int) -> None:
    expected = [every for every in range(1, 61) if sliding_windows(steps, every=every, size=size)]
    assert possible_spacings(steps, size) == expected[:7]


def test_thousands_of_irregular_steps_and_absurd_windows_take_no_time() -> None:
    steps = sorted(random.Random(1).sample(range(1, 10**12), 10_000))
    start = time.monotonic()
    assert possible_spacings(steps, 5) == []
    assert len(possible_spacings(list(range(1, 10_000)), 5)) == 7
    assert sliding_windows(steps, every=1, size=2**63) == []
    assert sliding_windows(steps, every=2**63, size=2) == []
    assert time.monotonic() - start < 20


def test_describe_steps() -> None:
    assert describe_steps([]) == "none"
    assert describe_steps([5]) == "5"
    assert describe_steps([20, 40, 60, 80, 95]) == "20 to 80 every 20, 95"
    assert describe_steps([1000, 2000]) == "1,000, 2,000"
    assert describe_steps([1, 2, 4, 8, 9, 10]) == "1, 2, 4, 8 to 10 every 1"

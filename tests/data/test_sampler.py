"""The data order: tested without files and torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.dataloader import read_windows
from llmtrain.data.sampler import Sampler, n_windows, small_split, validation_windows
from llmtrain.errors import UserError


class CountingTokens:
    """Tokens 0, 1, 2, …, which identify a window."""

    def __init__(self, n_tokens: int) -> None:
        self._tokens = np.arange(n_tokens, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        assert start >= 0 and start + length <= len(self._tokens)
        return self._tokens[start : start + length]


def epoch_rows(sampler: Sampler, epoch: int) -> np.ndarray:
    k = sampler.windows_per_epoch
    first, last = epoch * k // sampler.batch_size, ((epoch + 1) * k - 1) // sampler.batch_size
    rows = np.concatenate([sampler.rows(step) for step in range(first, last + 1)])
    return rows[epoch * k - first * sampler.batch_size :][:k]


@settings(max_examples=30)
@given(
    st.integers(2, 400),
    st.integers(1, 40),
    st.integers(5, 50),
    st.integers(-(2**70), 2**70),
    st.integers(0, 3),
)
def test_an_epoch_contains_every_window_once(
    n: int, block: int, size: int, seed: int, epoch: int
) -> None:
    if n < block + 1:
        return
    rows = np.sort(epoch_rows(Sampler(n, block, size, seed), epoch))
    assert rows[0] < block
    assert np.all(np.diff(rows) == block)
    assert rows[-1] + block + 1 <= n
    # An epoch omits fewer tokens than two windows contain.
    assert n - (len(rows) * block + 1) < 2 * block


def test_rows_do_not_depend_on_the_batch_size() -> None:
    whole = Sampler(100_000, 16, 12, seed=3)
    halves = Sampler(100_000, 16, 6, seed=3)
    again = np.concatenate([halves.rows(20), halves.rows(21)])
    assert np.array_equal(whole.rows(10), again)
    assert np.array_equal(whole.rows(10), whole.rows(10))


def test_epochs_and_seeds_differ() -> None:
    orders = [
        epoch_rows(Sampler(10_000, 10, 97, seed), epoch) for seed in (1, 2) for epoch in (0, 1)
    ]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert np.mean(a // 10 == b // 10) < 0.02
    offsets = {int(epoch_rows(Sampler(1_000, 64, 11, 0), epoch).min()) for epoch in range(200)}
    assert len(offsets) > 55


def test_a_batch_may_hold_several_epochs() -> None:
    rows = Sampler(100, 10, 30, seed=5).rows(0)
    assert Sampler(100, 10, 30, seed=5).windows_per_epoch == 9
    for epoch in range(3):
        assert len(np.unique(rows[9 * epoch : 9 * epoch + 9])) == 9


def reference_row(sampler: Sampler, row: int) -> int:
    """Return the same row computed with Python's integers."""
    golden, ones = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        z = (x + golden) & ones
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ones
        z = (z ^ z >> 27) * 0x94D049BB133111EB & ones
        return z ^ z >> 31

    n, block = sampler.n_tokens, sampler.block_size
    count = (n - block) // block
    key = mix((mix(sampler.seed & ones) + row // count) & ones)
    x = row % count
    for i in range(1, 65):
        round_key = mix((key + i * golden) & ones)
        partner = (round_key % count - x) % count
        if mix(round_key ^ max(x, partner)) >> 63:
            x = partner
    return mix(key) % block + x * block


def test_order_of_published_runs() -> None:
    """The order of published runs must never change."""
    openwebtext = Sampler(9_035_582_198, 1024, 384, seed=1337)
    assert openwebtext.rows(0)[:3].tolist() == [6254420899, 295451555, 6641776547]
    assert Sampler(100, 10, 9, seed=5).rows(1).tolist() == [24, 64, 4, 44, 54, 74, 84, 14, 34]


@pytest.mark.parametrize(
    "sampler", [Sampler(9_035_582_198, 1024, 8, seed=1337), Sampler(5_000, 10, 7, seed=-1)]
)
def test_the_order_equals_the_reference(sampler: Sampler) -> None:
    for step in (0, 1, 71, 10**6):
        expected = [
            reference_row(sampler, step * sampler.batch_size + i) for i in range(sampler.batch_size)
        ]
        assert sampler.rows(step).tolist() == expected


def chi_square(counts: np.ndarray) -> float:
    """Return the standardized statistic, about normal(0, 1) for uniform `counts`."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.slow
@pytest.mark.parametrize("windows", [5, 24, 97, 256])
def test_positions_are_uniform(windows: int) -> None:
    # counts[i, j]: epochs with window j at position i.
    counts = np.zeros((windows, windows))
    sampler = Sampler((windows + 1) * 4, 4, windows, seed=11)
    assert sampler.windows_per_epoch == windows
    for epoch in range(20 * windows if windows < 100 else 4 * windows):
        counts[np.arange(windows), sampler.rows(epoch) // 4] += 1
    assert abs(chi_square(counts)) < 5


def test_neighbours_are_independent() -> None:
    rows = epoch_rows(Sampler(4 * 20_001, 4, 100, seed=2), 0) // 4
    steps = np.diff(rows) % 20_000
    assert abs(chi_square(np.bincount(steps * 20 // 20_000, minlength=20))) < 5
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.03


def test_data_of_one_window() -> None:
    assert Sampler(11, 10, 3, seed=0).rows(0).tolist() == [0, 0, 0]
    offsets = {row for step in range(50) for row in Sampler(15, 10, 4, seed=0).rows(step).tolist()}
    assert offsets == {0, 1, 2, 3, 4}
    with pytest.raises(UserError, match=r"has 10 tokens, fewer than one window of 11"):
        Sampler(10, 10, 1, seed=0)


def test_windows_are_read_at_their_starts() -> None:
    windows = read_windows(CountingTokens(100), np.array([0, 50, 93]), 6)
    assert windows.dtype == np.int64
    assert windows.tolist() == [list(range(i, i + 7)) for i in (0, 50, 93)]


@given(st.integers(0, 500), st.integers(1, 60))
def test_validation_predicts_each_token_once(n: int, block: int) -> None:
    windows = validation_windows(n, block)
    assert n_windows(n, block) == len(windows)
    predicted = [
        token for start, length, _ in windows for token in range(start + 1, start + length)
    ]
    assert predicted == list(range(1, n))
    assert all(2 <= length <= block + 1 and new == length - 1 for _, length, new in windows)
    assert all(length == block + 1 for _, length, _ in windows[:-1])


@given(st.integers(0, 500), st.integers(2, 60), st.data())
def test_strided_windows_predict_each_token_once_in_full_context(
    n: int, block: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, block - 1))
    windows = validation_windows(n, block, stride)
    ends = [start + length for start, length, _ in windows]
    predicted = [
        t for end, (_, _, new) in zip(ends, windows, strict=True) for t in range(end - new, end)
    ]
    assert predicted == list(range(1, n))
    assert all(new <= stride and length == block + 1 for _, length, new in windows[1:])


def test_huge_steps_do_not_overflow() -> None:
    rows = Sampler(10**13, 1024, 512, seed=1).rows(10**9)
    assert rows.min() >= 0
    assert rows.max() + 1025 <= 10**13


def test_fewer_than_ten_samples_are_reported() -> None:
    assert small_split(0, "window") is None  # an empty split has its own warning
    assert small_split(10, "window") is None
    assert "9 window(s) are too few for a reliable loss" in (small_split(9, "window") or "")

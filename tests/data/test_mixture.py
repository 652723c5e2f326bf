"""Mixtures of sources: exact shares, epochs per source, a pure function of the step."""

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparations import prepare

from llmtrain.config.sections import DataConfig
from llmtrain.data.dataloader import training_sampler
from llmtrain.data.sampler import Sampler, divide_rows
from llmtrain.data.token_data import open_data, open_training_data
from llmtrain.errors import UserError

SHARES = st.lists(st.integers(1, 300), max_size=4).map(
    lambda parts: [Fraction(n, 1201) for n in parts]
)


@given(SHARES, st.integers(0, 10**12), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_rows_are_divided_once_and_in_order(
    shares: list[Fraction], first: int, counts: list[int]
) -> None:
    """However a range is cut, each source's rows have no gap and no repetition."""
    cuts = [first + sum(counts[:n]) for n in range(len(counts) + 1)]
    parts = [divide_rows(a, b, shares) for a, b in itertools.pairwise(cuts)]
    whole = divide_rows(cuts[0], cuts[-1], shares)
    for (start, stop), ranges in zip(whole, zip(*parts, strict=True), strict=True):
        assert [start, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), stop]
    for part, count in zip(parts, counts, strict=True):
        assert sum(stop - start for start, stop in part) == count
        assert all(start <= stop for start, stop in part)


@given(SHARES, st.integers(1, 10**9))
def test_shares_are_exact_up_to_one_row_per_source(shares: list[Fraction], rows: int) -> None:
    for share, (start, stop) in zip(shares, divide_rows(0, rows, shares)[1:], strict=True):
        assert start == 0
        assert abs(stop - rows * share) <= len(shares)


@pytest.fixture
def old(tmp_path: Path, text_file: Path) -> Path:
    prepare(str(text_file), tmp_path / "old", tokenizer="byte", val_fraction=0.5)
    return tmp_path / "old"


def test_a_batch_contains_windows_of_each_source(data_folder: Path, old: Path) -> None:
    config = DataConfig(
        path=str(data_folder), block_size=16, mix=[{"path": str(old), "weight": 0.25}]
    )
    data = open_training_data(config)
    tokens, main = data.train_tokens(), open_data(data_folder)
    sampler = training_sampler(data, 16, 8, seed=3)
    alone = Sampler(open_data(old).tokens("train"), 16, 8, seed=3)
    for step in range(50):
        rows = sampler.rows(step)
        of_main = rows[rows < main.tokens("train")]
        assert len(of_main) == 6
        others = rows[rows >= main.tokens("train")] - main.tokens("train")
        assert others.tolist() == alone.windows(2 * step, 2).tolist()
        expected = open_data(old).reader("train").read(int(others[0]), 17)
        assert np.array_equal(tokens.read(int(others[0]) + main.tokens("train"), 17), expected)
    assert data.sha256 != main.sha256
    assert open_training_data(config).sha256 == data.sha256


def test_a_single_source_is_sampled_as_without_a_mixture(data_folder: Path) -> None:
    data = open_training_data(DataConfig(path=str(data_folder), block_size=16))
    assert data.sha256 == open_data(data_folder).sha256
    for step in (0, 7, 10_000):
        expected = Sampler(data.tokens("train"), 16, 8, seed=3).rows(step)
        assert np.array_equal(training_sampler(data, 16, 8, seed=3).rows(step), expected)


def test_a_different_tokenizer_is_rejected(
    data_folder: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmtrain.data.token_data as module

    real = module.open_data
    monkeypatch.setattr(
        module,
        "open_data",
        lambda path: replace(real(path), tokenizer="gpt2") if path == old else real(path),
    )
    config = DataConfig(path=str(data_folder), mix=[{"path": str(old), "weight": 0.25}])
    with pytest.raises(UserError, match="contains tokens of gpt2"):
        open_training_data(config)


def test_weights_leave_a_share(data_folder: Path) -> None:
    mix = [{"path": "a", "weight": 0.6}, {"path": "b", "weight": 0.4}]
    with pytest.raises(ValueError, match="must be below 1"):
        DataConfig(path=str(data_folder), mix=mix)

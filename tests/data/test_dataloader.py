"""The data loader returns the sampler's batches for any sequence of steps, and prefetches."""

import os
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.config.schedules import block_size
from llmtrain.config.schema import RunConfig
from llmtrain.data.dataloader import DataLoader, read_windows, training_sampler
from llmtrain.data.token_data import open_training_data
from llmtrain.runtime.distributed import World

Build = Callable[..., Any]

WORLDS = [World(), World(rank=1, size=2)]
STEPS = st.lists(
    st.tuples(st.integers(1, 11), st.integers(0, 9), st.sampled_from([1, 2, 4]), st.integers(0, 2)),
    min_size=1,
    max_size=10,
)
"""Unrelated steps, skipped batches, micro-batch sizes, and micro-batches to abandon first."""


class Reference:
    """The ranks' parts of batches, read without a data loader."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.data = open_training_data(config.data)
        self.tokens = self.data.train_tokens()
        self.sampler = training_sampler(
            self.data, config.data.block_size, config.batch_size, config.seed
        )

    def part(self, world: World, step: int, batch: int) -> np.ndarray:
        starts = world.local_rows(self.sampler.rows(batch))
        return read_windows(self.tokens, starts, block_size(step, self.config.data))


@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_each_step_returns_its_own_batch(
    tiny: Build, world: World, steps: list[tuple[int, int, int, int]]
) -> None:
    reference = Reference(tiny(data__block_warmup={"start": 4, "steps": 8, "multiple_of": 2}))
    loader = DataLoader(reference.config, reference.data, world)
    for step, skipped, size, abandoned in steps:
        batch = step - 1 + skipped
        list(islice(loader.micro_batches(step, batch, size), abandoned))  # as after out-of-memory
        parts = list(loader.micro_batches(step, batch, size))
        assert {len(part) for part in parts} == {size}
        assert np.array_equal(np.concatenate(parts), reference.part(world, step, batch))
        following = np.concatenate(list(loader.micro_batches(step + 1, batch + 1, size)))
        assert np.array_equal(following, reference.part(world, step + 1, batch + 1))


def test_the_next_micro_batch_is_prefetched(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(tiny())
    loader = DataLoader(reference.config, reference.data, World())
    whole = {step: reference.part(World(), step, step - 1) for step in (1, 2, 12)}
    parts = loader.micro_batches(1, 0, 4)
    for following, expected in [((1, 4), whole[1][:4]), ((2, 0), whole[1][4:])]:
        assert np.array_equal(next(parts), expected)
        loader._thread.submit(lambda: None).result()  # runs after the prefetch
        micro_batch, future = loader._prefetched or pytest.fail("nothing was prefetched")
        assert future.done()
        assert (micro_batch.step, micro_batch.first) == following
    monkeypatch.setattr(loader, "_read", lambda each: pytest.fail(f"{each} was not prefetched"))
    assert np.array_equal(next(loader.micro_batches(2, 1, 4)), whole[2][:4])


def test_prefetching_stops_after_the_last_step_and_after_close(tiny: Build) -> None:
    config = tiny()
    loader = DataLoader(config, open_training_data(config.data), World())
    assert len(list(loader.micro_batches(12, 11, 4))) == 2
    assert loader._prefetched is None
    next(loader.micro_batches(1, 0, 4))
    loader.close()
    loader._thread.shutdown(wait=True)
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(loader.micro_batches(5, 4, 4))


def test_a_read_error_is_raised_once(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(tiny())
    loader = DataLoader(reference.config, reference.data, World())

    def fail(each: object) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(loader, "_read", fail)
        with pytest.raises(OSError, match="Input/output"):
            list(loader.micro_batches(1, 0, 4))
    windows = np.concatenate(list(loader.micro_batches(1, 0, 4)))
    assert np.array_equal(windows, reference.part(World(), 1, 0))

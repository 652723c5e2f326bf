"""Batches read ahead are those of the sampler, whatever step comes next; what cannot be read is told."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import Build

from llmtrain.config import RunConfig
from llmtrain.data.mixture import MixtureSampler, open_training_data, train_tokens
from llmtrain.data.sampler import batch
from llmtrain.training.batches import Batches
from llmtrain.training.distributed import World
from llmtrain.training.schedules import block_size

WORLDS = [World(), World(rank=1, size=2)]
STEPS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=20)
"""Steps, and how many batches were passed over before each: neither needs to follow from the one before."""


def expected(config: RunConfig, world: World, step: int, number: int) -> np.ndarray:
    data = open_training_data(config.data)
    sampler = MixtureSampler(data, config.data.block_size, config.batch_size, config.seed)
    return batch(train_tokens(data), world.share(sampler.rows(number)), block_size(step, config.data))


@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_each_step_gets_its_own_batch(tiny: Build, world: World, steps: list[tuple[int, int]]) -> None:
    config = tiny(data__block_warmup={"start": 4, "steps": 8, "multiple_of": 2})
    batches = Batches(config, open_training_data(config.data), world)
    for step, passed in steps:
        for _ in range(2):  # a step that ran out of memory asks for its batch again
            windows = batches.of(step, step - 1 + passed)
            assert np.array_equal(windows, expected(config, world, step, step - 1 + passed))
        following = batches.of(step + 1, step + passed)
        assert np.array_equal(following, expected(config, world, step + 1, step + passed))


def test_the_next_batch_is_read_before_it_is_asked_for(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    batches = Batches(config, open_training_data(config.data), World())
    batches.of(1, 0)
    batches._thread.submit(lambda: None).result()  # it comes after what was begun
    monkeypatch.setattr(batches, "_read", lambda *asked: pytest.fail(f"{asked} was not read ahead"))
    assert np.array_equal(batches.of(2, 1), expected(config, World(), 2, 1))


def test_a_batch_that_cannot_be_read_is_told_when_its_step_comes(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    batches = Batches(config, open_training_data(config.data), World())

    def fails(step: int, number: int) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(batches, "_read", fails)
        with pytest.raises(OSError, match="Input/output"):
            batches.of(1, 0)
    assert np.array_equal(batches.of(1, 0), expected(config, World(), 1, 0))

"""Batches read ahead are those of the sampler, whatever step comes next; what cannot be read is told."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_training import Build

from llmtrain.config.schedules import block_size
from llmtrain.config.schema import RunConfig
from llmtrain.data.batches import Batches
from llmtrain.data.mixture import MixtureSampler, open_training_data, train_tokens
from llmtrain.data.sampler import batch
from llmtrain.runtime.distributed import World

WORLDS = [World(), World(rank=1, size=2)]
STEPS = st.lists(
    st.tuples(st.integers(1, 11), st.integers(0, 9), st.sampled_from([1, 2, 4]), st.integers(0, 2)),
    min_size=1,
    max_size=20,
)
"""Steps, how many batches were passed over before each, sequences at a time, and how many parts are taken in vain.

None needs to follow from the one before.
"""


def expected(config: RunConfig, world: World, step: int, number: int) -> np.ndarray:
    """The share of batch `number`, in the length of `step`."""
    data = open_training_data(config.data)
    sampler = MixtureSampler(data, config.data.block_size, config.batch_size, config.seed)
    return batch(
        train_tokens(data), world.local_rows(sampler.rows(number)), block_size(step, config.data)
    )


def opened(config: RunConfig, world: World | None = None) -> Batches:
    return Batches(config, open_training_data(config.data), world or World())


@pytest.mark.parametrize("world", WORLDS)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_each_step_gets_its_own_batch(
    tiny: Build, world: World, steps: list[tuple[int, int, int, int]]
) -> None:
    config = tiny(data__block_warmup={"start": 4, "steps": 8, "multiple_of": 2})
    batches = opened(config, world)
    for step, passed, size, taken in steps:
        number = step - 1 + passed
        list(
            zip(range(taken), batches.of(step, number, size), strict=False)
        )  # memory runs out in the midst of it
        parts = list(batches.of(step, number, size))
        assert {len(part) for part in parts} == {size}
        assert np.array_equal(np.concatenate(parts), expected(config, world, step, number))
        assert np.array_equal(
            np.concatenate(list(batches.of(step + 1, number + 1, size))),
            expected(config, world, step + 1, number + 1),
        )


def test_what_comes_next_is_read_before_it_is_asked_for(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    batches = opened(config)
    whole = {step: expected(config, World(), step, step - 1) for step in (1, 2, 12)}
    parts = batches.of(1, 0, 4)
    for following, taken in [((1, 4), whole[1][:4]), ((2, 0), whole[1][4:])]:
        assert np.array_equal(next(parts), taken)
        batches._thread.submit(lambda: None).result()  # it comes after what was begun
        place, future = batches._ahead or pytest.fail("nothing is read ahead")
        assert future.done()
        assert (place.step, place.first) == following
    monkeypatch.setattr(batches, "_read", lambda place: pytest.fail(f"{place} was not read ahead"))
    assert np.array_equal(next(batches.of(2, 1, 4)), whole[2][:4])


def test_nothing_is_read_after_the_last_step_or_once_it_is_closed(tiny: Build) -> None:
    config = tiny()
    batches = opened(config)
    assert len(list(batches.of(12, 11, 4))) == 2
    assert batches._ahead is None
    next(batches.of(1, 0, 4))
    batches.close()
    batches._thread.shutdown(wait=True)
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(batches.of(5, 4, 4))


def test_tokens_that_cannot_be_read_are_told_when_their_step_comes(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    batches = opened(config)

    def fails(place: object) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(batches, "_read", fails)
        with pytest.raises(OSError, match="Input/output"):
            list(batches.of(1, 0, 4))
    assert np.array_equal(
        np.concatenate(list(batches.of(1, 0, 4))), expected(config, World(), 1, 0)
    )

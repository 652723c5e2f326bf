"""Learning rate, block size and SPAM's reset factor as functions of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from llmtrain.config.schedules import block_size, learning_rate, reset_factor, tokens_until
from llmtrain.config.schema import RunConfig, SpamConfig
from llmtrain.config.sections import ScheduleConfig

SCHEDULE: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)


def rate(step: int, peak: float = 1.0, max_steps: int = 100, **schedule: object) -> float:
    return learning_rate(
        step, SCHEDULE.validate_python({"warmup_steps": 10} | schedule), peak, max_steps
    )


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ({"name": "constant"}, 1, 0.1),
        ({"name": "constant"}, 10, 1.0),
        ({"name": "constant"}, 100, 1.0),
        ({"name": "constant", "warmup_steps": 0}, 1, 1.0),
        ({"name": "cosine", "min_lr": 0.1}, 10, 1.0),
        ({"name": "cosine", "min_lr": 0.1}, 55, 0.55),
        ({"name": "cosine", "min_lr": 0.1}, 100, 0.1),
        ({"name": "cosine", "min_lr": 0.1}, 1000, 0.1),
        ({"name": "cosine", "horizon": 200}, 105, 0.5),
        ({"name": "linear"}, 55, 0.5),
        ({"name": "linear"}, 100, 0.0),
        ({"name": "inverse-sqrt"}, 40, 0.5),
        ({"name": "inverse-sqrt", "min_lr": 0.6}, 40, 0.6),
        ({"name": "wsd", "decay_steps": 20}, 80, 1.0),
        ({"name": "wsd", "decay_steps": 20}, 85, 0.5),
        ({"name": "wsd", "decay_steps": 20}, 100, 0.0),
        ({"name": "wsd", "decay_steps": 20, "shape": "linear", "min_lr": 0.2}, 90, 0.6),
        ({"name": "wsd", "decay_steps": 20, "shape": "cosine"}, 90, 0.5),
        ({"name": "cyclic", "cycle_steps": 5, "min_lr": 0.2}, 11, 1.0),
        ({"name": "cyclic", "cycle_steps": 5, "min_lr": 0.2}, 15, 0.2),
        ({"name": "cyclic", "cycle_steps": 5, "min_lr": 0.2}, 16, 1.0),
        ({"name": "cyclic", "cycle_steps": 5, "min_lr": 0.2}, 13, 0.6),
    ],
)
def test_hand_computed_rates(schedule: dict[str, object], step: int, expected: float) -> None:
    assert rate(step, **schedule) == pytest.approx(expected, abs=1e-12)


ANY_SCHEDULE = st.sampled_from(
    [
        {"name": "constant"},
        {"name": "cosine"},
        {"name": "linear"},
        {"name": "inverse-sqrt"},
        {"name": "wsd", "decay_steps": 30},
        {"name": "cyclic", "cycle_steps": 7},
    ]
)


@given(schedule=ANY_SCHEDULE, step=st.integers(1, 10_000), peak=st.floats(1e-6, 1.0))
def test_rate_is_between_zero_and_the_peak(
    schedule: dict[str, object], step: int, peak: float
) -> None:
    value = rate(step, peak=peak, max_steps=120, **schedule)
    assert 0.0 <= value <= peak * (1 + 1e-12)
    assert math.isfinite(value)


@given(name=st.sampled_from(["cosine", "linear"]), step=st.integers(11, 99))
def test_decay_is_monotonic(name: str, step: int) -> None:
    assert rate(step + 1, name=name) <= rate(step, name=name)


@given(st.integers(1, 64), st.integers(1, 40), st.integers(1, 9), st.integers(1, 50))
def test_block_size_grows_to_its_final_value(
    start: int, steps: int, multiple_of: int, step: int
) -> None:
    warmup = {"start": start, "steps": steps, "multiple_of": multiple_of}
    config = RunConfig.model_validate(
        {
            "name": "x",
            "data": {"path": "x", "block_size": 64, "block_warmup": warmup},
            "train": {"batch_sequences": 16},
        }
    )
    lengths = [block_size(each, config.data) for each in range(1, step + 1)]
    assert lengths == sorted(lengths)
    assert all(start <= length <= 64 for length in lengths)
    assert all(length % multiple_of == 0 or length in (start, 64) for length in lengths)
    assert lengths[0] == (start if steps > 1 else 64)
    assert block_size(steps, config.data) == 64
    assert tokens_until(step, config) == 16 * sum(lengths)


def test_rate_recovers_after_a_reset() -> None:
    spam = SpamConfig(reset_every=10, reset_warmup=4)
    factors = [reset_factor(step, spam) for step in range(1, 23)]
    assert factors[:10] == [1.0] * 10
    cosine = [0.5 * (1 - math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    assert factors[10:20] == pytest.approx([*cosine, *[1.0] * 6])
    assert factors[20:] == pytest.approx(cosine[:2])

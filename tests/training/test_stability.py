"""The watch alone: its z-score against numpy in float64, what it holds back, what it tells and when."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed
from llmtrain.training.spikes import MAX_SKIPPED_IN_A_ROW, SpikeDetector, robust_z

WINDOW = 8


def watch(action: str = "log", on_nonfinite: str = "skip") -> SpikeDetector:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "data": {"path": "x"},
            "train": {"batch_sequences": 16, "on_nonfinite": on_nonfinite},
            "spikes": {"action": action, "window": WINDOW, "threshold": 6.0},
        }
    )
    return SpikeDetector(config, torch.device("cpu"))


def feed(watched: SpikeDetector, values: list[tuple[float, float]], first: int = 1) -> list[bool]:
    return [
        bool(watched.check(first + i, torch.tensor(loss), torch.tensor(norm)))
        for i, (loss, norm) in enumerate(values)
    ]


CALM = [(3.0 + 0.01 * (i % 3), 1.0 + 0.1 * (i % 4)) for i in range(WINDOW)]
floats = st.floats(2.0**-7, 100.0, width=32)


@given(st.lists(st.tuples(floats, floats), min_size=9, max_size=9))
def test_the_z_score_equals_a_float64_oracle(rows: list[tuple[float, float]]) -> None:
    data = np.array(rows).T
    history, value = data[:, :8], data[:, 8]
    median = np.sort(history, axis=1)[:, 3]  # torch's median is the lower of the two in the middle
    deviation = np.sort(np.abs(history - median[:, None]), axis=1)[:, 3]
    expected = (value - median) / np.maximum(1.4826 * deviation, 1e-3 * median)
    found = robust_z(torch.tensor(value).float(), torch.tensor(history).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    watched = watch("skip")
    assert feed(watched, [(3.0, 1.0)] * (WINDOW - 1) + [(300.0, 1.0)]) == [False] * WINDOW
    assert watched.drain() == []


@pytest.mark.parametrize(("loss", "norm"), [(9.0, 1.0), (3.0, 50.0)])
def test_a_spike_of_either_number_is_told_and_held_back_as_asked(loss: float, norm: float) -> None:
    for action, held in (("ignore", False), ("log", False), ("skip", True)):
        watched = watch(action)
        feed(watched, CALM)
        assert feed(watched, [(loss, norm), CALM[0]], first=WINDOW + 1) == [held, False]
        incidents = watched.drain()
        told = [] if action == "ignore" else [(WINDOW + 1, "spike", action)]
        assert [(each.step, each.kind, each.action) for each in incidents] == told
        assert watched.drain() == []


def test_a_fall_is_no_spike() -> None:
    watched = watch("skip")
    feed(watched, CALM)
    assert feed(watched, [(0.1, 0.01)], first=WINDOW + 1) == [False]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.inf), (-math.inf, math.nan)])
def test_what_is_not_finite_is_held_back_and_does_not_blind_the_median(
    bad: tuple[float, float],
) -> None:
    watched = watch("skip")
    feed(watched, CALM)
    assert feed(watched, [bad, CALM[0]], first=WINDOW + 1) == [True, False]
    (incident,) = watched.drain()
    assert (incident.kind, incident.action) == ("nonfinite", "skip")
    assert bool(watched.history.isfinite().all())
    assert feed(watched, [(9.0, 1.0)], first=WINDOW + 3) == [True]


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_after_a_stop_every_step_is_held_back_until_the_host_knows(policy: str) -> None:
    watched = watch("log", on_nonfinite=policy)
    assert feed(watched, [(3.0, 1.0), (math.nan, 1.0), (3.0, 1.0), (3.0, 1.0)]) == [
        False,
        True,
        True,
        True,
    ]
    assert [each.step for each in watched.drain()] == [
        2
    ]  # the first; what came after it is no news
    watched.load(watched.state())
    assert feed(watched, [(3.0, 1.0)], first=2) == [False]


def test_a_run_without_updates_ends() -> None:
    watched = watch("skip")
    feed(watched, [(math.nan, 1.0)] * (MAX_SKIPPED_IN_A_ROW - 1))
    assert len(watched.drain()) == MAX_SKIPPED_IN_A_ROW - 1
    resumed = watch("skip")
    resumed.load({name: tensor.clone() for name, tensor in watched.state().items()})
    feed(resumed, [(math.nan, 1.0)], first=MAX_SKIPPED_IN_A_ROW)
    with pytest.raises(RunFailed, match="the last 100 updates up to step 100 were skipped"):
        resumed.drain()


@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=40), st.integers(0, 40)
)
def test_a_resumed_watch_decides_alike(values: list[tuple[float, float]], cut: int) -> None:
    """Whatever comes, also when the host reads at other steps: holds and incidents are the same."""
    whole, parts = watch("skip"), watch("skip")
    held = feed(whole, values)
    before = feed(parts, values[:cut])
    told = parts.drain()
    saved: dict[str, Tensor] = {name: tensor.clone() for name, tensor in parts.state().items()}
    resumed = watch("skip")
    resumed.load(saved)
    assert held == before + feed(resumed, values[cut:], first=cut + 1)
    # As text, because NaN is not equal to itself.
    assert [str(each) for each in whole.drain()] == [str(each) for each in told + resumed.drain()]

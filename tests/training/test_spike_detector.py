"""SpikeDetector: its z-score against numpy in float64, skipped updates, and events."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import REPOSITORY
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed
from llmtrain.training.spikes import MAX_SKIPPED_IN_A_ROW, SpikeDetector, robust_z

WINDOW = 8


def make_detector(action: str = "log", on_nonfinite: str = "skip") -> SpikeDetector:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "data": {"path": "x"},
            "train": {"batch_sequences": 16, "on_nonfinite": on_nonfinite},
            "spikes": {"action": action, "window": WINDOW, "threshold": 6.0},
        }
    )
    return SpikeDetector(config, torch.device("cpu"))


def feed(detector: SpikeDetector, values: list[tuple[float, float]], first: int = 1) -> list[bool]:
    return [
        bool(detector.check(first + i, torch.tensor(loss), torch.tensor(norm)))
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
    upper = np.sort(history, axis=1)[:, 5] - median
    deviation = np.maximum(1.4826 * deviation, upper)
    expected = (value - median) / np.maximum(deviation, 1e-3 * median)
    found = robust_z(torch.tensor(value).float(), torch.tensor(history).float())
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3)


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    detector = make_detector("skip")
    assert feed(detector, [(3.0, 1.0)] * (WINDOW - 1) + [(300.0, 1.0)]) == [False] * WINDOW
    assert detector.drain() == []


@pytest.mark.parametrize(("loss", "norm"), [(9.0, 1.0), (3.0, 50.0)])
def test_a_spike_of_either_number_follows_the_policy(loss: float, norm: float) -> None:
    for action, skipped in (("ignore", False), ("log", False), ("skip", True)):
        detector = make_detector(action)
        feed(detector, CALM)
        assert feed(detector, [(loss, norm), CALM[0]], first=WINDOW + 1) == [skipped, False]
        found = detector.drain()
        expected = [] if action == "ignore" else [(WINDOW + 1, "spike", action)]
        assert [(each.step, each.kind, each.action) for each in found] == expected
        assert detector.drain() == []


def test_a_drop_is_not_a_spike() -> None:
    detector = make_detector("skip")
    feed(detector, CALM)
    assert feed(detector, [(0.1, 0.01)], first=WINDOW + 1) == [False]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.inf), (-math.inf, math.nan)])
def test_nonfinite_numbers_are_skipped_and_kept_out_of_the_median(
    bad: tuple[float, float],
) -> None:
    detector = make_detector("skip")
    feed(detector, CALM)
    assert feed(detector, [bad, CALM[0]], first=WINDOW + 1) == [True, False]
    (event,) = detector.drain()
    assert (event.kind, event.action) == ("nonfinite", "skip")
    assert bool(detector.history.isfinite().all())
    assert feed(detector, [(9.0, 1.0)], first=WINDOW + 3) == [True]


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_after_a_stop_all_updates_are_skipped_until_the_host_drains(policy: str) -> None:
    detector = make_detector("log", on_nonfinite=policy)
    assert feed(detector, [(3.0, 1.0), (math.nan, 1.0), (3.0, 1.0), (3.0, 1.0)]) == [
        False,
        True,
        True,
        True,
    ]
    assert [each.step for each in detector.drain()] == [2]  # later ones do not count
    detector.load(detector.state())
    assert feed(detector, [(3.0, 1.0)], first=2) == [False]


def test_a_run_without_updates_fails() -> None:
    detector = make_detector("skip")
    feed(detector, [(math.nan, 1.0)] * (MAX_SKIPPED_IN_A_ROW - 1))
    assert len(detector.drain()) == MAX_SKIPPED_IN_A_ROW - 1
    resumed = make_detector("skip")
    resumed.load({name: tensor.clone() for name, tensor in detector.state().items()})
    feed(resumed, [(math.nan, 1.0)], first=MAX_SKIPPED_IN_A_ROW)
    with pytest.raises(RunFailed, match="the last 100 updates up to step 100 were skipped"):
        resumed.drain()


@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=40), st.integers(0, 40)
)
def test_a_resumed_detector_decides_the_same(values: list[tuple[float, float]], cut: int) -> None:
    """Also if the host drains at other steps."""
    whole, parts = make_detector("skip"), make_detector("skip")
    skipped = feed(whole, values)
    before = feed(parts, values[:cut])
    expected = parts.drain()
    saved: dict[str, Tensor] = {name: tensor.clone() for name, tensor in parts.state().items()}
    resumed = make_detector("skip")
    resumed.load(saved)
    assert skipped == before + feed(resumed, values[cut:], first=cut + 1)
    # As text, because NaN does not equal itself.
    assert [str(each) for each in whole.drain()] == [
        str(each) for each in expected + resumed.drain()
    ]


def demo_detector() -> SpikeDetector:
    """Return a detector with the default window (128) and threshold (10), as in the demo."""
    base = {"name": "x", "data": {"path": "x"}, "train": {"batch_sequences": 16}}
    return SpikeDetector(RunConfig.model_validate(base), torch.device("cpu"))


def demo_numbers() -> list[tuple[float, float]]:
    """Return the loss and gradient norm of each step of configs/demo.yaml."""
    lines = (REPOSITORY / "tests" / "files" / "demo_losses_and_norms.txt").read_text().splitlines()
    return [(float(loss), float(norm)) for loss, norm in map(str.split, lines)]


def test_a_healthy_run_has_no_spikes() -> None:
    """In the demo, the gradient norm grows tenfold, with heavy tails, while the loss falls."""
    detector = demo_detector()
    feed(detector, demo_numbers())
    assert [str(each) for each in detector.drain()] == []


@pytest.mark.parametrize("step", [140, 186, 206, 400, 880])
@pytest.mark.parametrize("factors", [(4.0, 1.0), (1.0, 50.0), (math.nan, 1.0)])
def test_a_spike_in_the_healthy_run_is_found_at_its_step(
    step: int, factors: tuple[float, float]
) -> None:
    detector, numbers = demo_detector(), demo_numbers()
    loss, norm = numbers[step - 1]
    numbers[step - 1] = loss * factors[0], norm * factors[1]
    feed(detector, numbers)
    assert [each.step for each in detector.drain()] == [step]

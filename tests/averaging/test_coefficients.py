"""Averaging weights: their sums, and the identities in their sources."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.averaging import coefficients
from llmtrain.averaging.coefficients import Shape

COUNT = st.integers(1, 60)
SHAPES: tuple[Shape, ...] = ("linear", "cosine", "1-sqrt", "inverse-sqrt")


@given(COUNT, st.floats(0, 0.999), st.floats(0, 1))
def test_weights_sum_to_1_and_are_not_negative(count: int, decay: float, share: float) -> None:
    ways = [
        coefficients.uniform(count),
        coefficients.linear(count),
        coefficients.exponential(count, decay),
        *(coefficients.decay(count, shape) for shape in SHAPES),
        coefficients.blend(coefficients.linear(count), share),
    ]
    for weights in ways:
        assert len(weights) == count
        assert math.isclose(math.fsum(weights), 1.0, rel_tol=1e-12)
        assert min(weights) >= 0.0


@given(
    st.integers(1, 40), st.floats(0, 0.99), st.lists(st.floats(-10, 10), min_size=40, max_size=40)
)
def test_exponential_equals_the_recursion(count: int, decay: float, values: list[float]) -> None:
    mean = values[0]
    for value in values[1:count]:
        mean = decay * mean + (1 - decay) * value
    weights = coefficients.exponential(count, decay)
    assert math.fsum(w * v for w, v in zip(weights, values, strict=False)) == pytest.approx(
        mean, abs=1e-9
    )


@given(COUNT)
def test_linear_decay_equals_the_uniform_mean(count: int) -> None:
    assert coefficients.decay(count, "linear") == pytest.approx(coefficients.uniform(count))


@given(
    st.integers(2, 30),
    st.sampled_from(SHAPES),
    st.lists(st.floats(-1, 1), min_size=30, max_size=30),
)
def test_decay_scales_the_displacements(count: int, shape: Shape, moves: list[float]) -> None:
    """WSM: the merge equals the same displacements scaled by the decayed rate."""
    positions = [0.0]
    for move in moves[: count - 1]:
        positions.append(positions[-1] + move)
    rate = {
        "linear": lambda i: 1 - i / count,
        "cosine": lambda i: (1 + math.cos(math.pi * i / count)) / 2,
        "1-sqrt": lambda i: 1 - math.sqrt(i / count),
        "inverse-sqrt": lambda i: 1 / math.sqrt(1 + i),
    }[shape]
    walked = math.fsum(rate(i) * moves[i - 1] for i in range(1, count))
    merged = math.fsum(
        w * p for w, p in zip(coefficients.decay(count, shape), positions, strict=True)
    )
    assert merged == pytest.approx(walked, abs=1e-9)


def test_known_values() -> None:
    assert coefficients.uniform(4) == [0.25] * 4
    assert coefficients.linear(3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert coefficients.exponential(3, 0.5) == [0.25, 0.25, 0.5]
    assert coefficients.decay(4, "1-sqrt") == pytest.approx(
        [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    )
    assert coefficients.blend([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert coefficients.decay_of_half_life(1000, 1000) == 0.5


def test_span_subtracts_the_earlier_mean() -> None:
    values = [3.0, 5.0, 7.0, 20.0]
    before, after = sum(values[:1]) / 1, sum(values) / 4
    weights = coefficients.span(1, 4)
    assert weights[0] * before + weights[1] * after == pytest.approx(sum(values[1:]) / 3)
    assert math.fsum(weights) == pytest.approx(1.0)

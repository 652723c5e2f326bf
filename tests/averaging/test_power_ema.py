"""Post-hoc power-function EMAs match the recursion."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.averaging.stored_averages import WIDEST, gamma_of, overlap, reconstruct, sigma_of


def recursion(values: np.ndarray, gamma: float) -> np.ndarray:
    """Return the EMA after each step t = 1, 2, …, with β(t) = (1 - 1/t)^(γ+1)."""
    mean, means = np.zeros(values.shape[1]), []
    for t, value in enumerate(values, start=1):
        beta = (1 - 1 / t) ** (gamma + 1)
        mean = beta * mean + (1 - beta) * value
        means.append(mean)
    return np.array(means)


@given(st.floats(0.01, WIDEST))
def test_width_and_exponent_are_inverse(sigma: float) -> None:
    assert sigma_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-9)


def test_published_pairs() -> None:
    """Karras et al. 2024: σ_rel 0.05 and 0.10 are γ 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


@given(st.floats(1, 100), st.floats(0, 20), st.floats(1, 100), st.floats(0, 20))
def test_overlap_equals_the_integral(
    time_a: float, gamma_a: float, time_b: float, gamma_b: float
) -> None:
    end = min(time_a, time_b)
    tau = (np.arange(20_000) + 0.5) / 20_000 * end
    profile_a = (gamma_a + 1) * (tau / time_a) ** gamma_a / time_a
    profile_b = (gamma_b + 1) * (tau / time_b) ** gamma_b / time_b
    numeric = float((profile_a * profile_b).sum() * end / 20_000)
    assert overlap(time_a, gamma_a, time_b, gamma_b) == pytest.approx(numeric, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.06, 0.08, 0.12, 0.2])
def test_reconstructs_emas_of_other_widths(sigma: float) -> None:
    generator = np.random.default_rng(0)
    steps, gammas = 400, (gamma_of(0.05), gamma_of(0.10))
    walk = np.cumsum(generator.normal(size=(steps, 50)), axis=0)
    stored_emas = {gamma: recursion(walk, gamma) for gamma in gammas}
    stored = [(float(t), gamma) for t in range(20, steps + 1, 20) for gamma in gammas]
    weights, error = reconstruct(stored, float(steps), gamma_of(sigma))
    got = sum(w * stored_emas[g][int(t) - 1] for w, (t, g) in zip(weights, stored, strict=True))
    wanted = recursion(walk, gamma_of(sigma))[-1]
    assert math.isclose(sum(weights), 1.0, rel_tol=1e-9)
    assert error < 0.05
    spread = np.linalg.norm(walk[-1] - wanted)
    assert np.linalg.norm(got - wanted) < 0.05 * spread


def test_reconstructs_a_stored_ema() -> None:
    stored = [(100.0, 6.0), (200.0, 6.0), (100.0, 16.0), (200.0, 16.0)]
    weights, error = reconstruct(stored, 200.0, 6.0)
    assert weights == pytest.approx([0, 1, 0, 0], abs=1e-4)
    assert error < 1e-3

"""Power-function EMAs of any length from two stored ones, after training.

Why: the best length of an EMA is not known before the run. An EMA whose memory grows with training,
β(t) = (1 - 1/t)^(γ+1), weights past time τ by a power of it, p(τ) = (γ+1) τ^γ / t^(γ+1). Profiles
of two γ stored along the run span, nearly, those of other γ, so that a least-squares fit of the
profiles gives the weights with which to add the stored averages.

    weights, error = reconstruct([(100, 16.97), (100, 6.94), (200, 16.97), (200, 6.94)], 200, 10.0)

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv 2312.02696), section 3 and appendix C. σ_rel is the width of the profile as a share of t.
"""

import math
from collections.abc import Sequence

import numpy as np

WIDEST = 1.0 / math.sqrt(12.0)
"""σ_rel of γ = 0, the uniform mean of everything."""

_SINGULAR = 1e-9
"""Relative size below which directions of the fit are dropped: stored averages have 24 bits."""


def sigma_of(gamma: float) -> float:
    """σ_rel of an exponent: √(γ + 1) / ((γ + 2) √(γ + 3))."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ ≥ 0 of a width σ_rel in (0, 1/√12], by bisection (σ falls as γ rises)."""
    low, high = 0.0, 2.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2.0
        low, high = (middle, high) if sigma_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2.0


def overlap(time_a: float, gamma_a: float, time_b: float, gamma_b: float) -> float:
    """∫ p_a(τ) p_b(τ) dτ of two profiles that end at times a and b."""
    if time_a > time_b:
        time_a, gamma_a, time_b, gamma_b = time_b, gamma_b, time_a, gamma_a
    factor = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    return factor * math.pow(time_a / time_b, gamma_b) / time_b


def reconstruct(
    stored: Sequence[tuple[float, float]], time: float, gamma: float
) -> tuple[list[float], float]:
    """Weights of stored averages, given as (time, γ), whose sum is nearest to the EMA of (time, γ).

    Returns:
        One weight for each stored average, summing to 1, and the distance of the profile they make
        from the wanted one, as a share of the latter's norm.
    """
    matrix = np.array([[overlap(*a, *b) for b in stored] for a in stored])
    wanted = np.array([overlap(*a, time, gamma) for a in stored])
    scale = 1.0 / np.sqrt(np.diag(matrix))  # profiles of unit norm: early ones are narrow and tall
    solution, *_ = np.linalg.lstsq(matrix * np.outer(scale, scale), wanted * scale, rcond=_SINGULAR)
    weights = solution * scale
    weights /= weights.sum()
    norm = overlap(time, gamma, time, gamma)
    residual = max(float(norm - 2.0 * weights @ wanted + weights @ matrix @ weights), 0.0)
    return [float(weight) for weight in weights], math.sqrt(residual / norm)

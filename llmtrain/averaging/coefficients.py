"""Averaging weights: how much of each checkpoint goes into an average. Pure functions of numbers.

Why apart: what a method *is* fits in a line of algebra and is tested as such; how tensors are read
and summed is the same for all of them (`merge.py`).

    uniform(5)  # [0.2, 0.2, 0.2, 0.2, 0.2]

Every function gives one weight c_i for each of n checkpoints θ_0 … θ_(n-1), oldest first; the average
is Σ c_i θ_i and the weights sum to 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

Shape = Literal["linear", "cosine", "1-sqrt", "inverse-sqrt"]

_SHAPES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda i, n: 1.0 - i / n,
    "cosine": lambda i, n: 0.5 * (1.0 + math.cos(math.pi * i / n)),
    "1-sqrt": lambda i, n: 1.0 - math.sqrt(i / n),
    "inverse-sqrt": lambda i, n: 1.0 / math.sqrt(1.0 + i) if i < n else 0.0,
}
"""Learning rate, as a share of the constant one, on the way into checkpoint i of n."""


def uniform(count: int) -> list[float]:
    """LAWA, the mean of the last k checkpoints, and SWA, the mean of all from some step on: c_i = 1/n.

    Source: LAWA: Kaddour 2022, "Stop Wasting My Time!" (arXiv 2209.14981); Sanyal et al. 2023
    (arXiv 2306.03241), with k = 5 in their code. SWA: Izmailov et al. 2018 (arXiv 1803.05407).
    """
    return [1.0 / count] * count


def linear(count: int) -> list[float]:
    """Newer checkpoints count more: c_i = (i + 1) / (1 + 2 + … + n).

    Source: the weighted mean of Li et al. 2025, "Model Merging in Pre-training" (arXiv 2505.12082).
    """
    total = count * (count + 1) // 2
    return [(i + 1) / total for i in range(count)]


def exponential(count: int, decay: float) -> list[float]:
    """EMA over checkpoints: c_0 = d^(n-1), c_i = (1 - d) d^(n-1-i) for i > 0.

    What m ← d·m + (1 - d)·θ_i gives when it starts from m = θ_0.

    Args:
        count: n, checkpoints.
        decay: d, in [0, 1), per checkpoint.
    """
    return recursive([0.0] + [decay] * (count - 1))


def warmed_up_decays(count: int, decay: float) -> list[float]:
    """Decay at each update n = 0, 1, … of an online EMA: min(d, 1 - (1 + n)^(-2/3)).

    Source: the code of Sanyal et al. 2023. The first is 0: the first update copies.
    """
    return [min(decay, 1.0 - (1.0 + update) ** (-2.0 / 3.0)) for update in range(count)]


def recursive(decays: Sequence[float]) -> list[float]:
    """The weights of m ← d_i·m + (1 - d_i)·θ_i, i = 0, 1, … with d_0 = 0: c_i = (1 - d_i) Π_(j>i) d_j."""
    weights = []
    remaining = 1.0
    for decay in reversed(decays):
        weights.append((1.0 - decay) * remaining)
        remaining *= decay
    return weights[::-1]


def decay_of_half_life(half_life: float, every: int) -> float:
    """Decay per checkpoint with which a weight halves in `half_life` steps: 2^(-every / half_life)."""
    return math.pow(2.0, -every / half_life)


def decay(count: int, shape: Shape) -> list[float]:
    """The merge of constant-LR checkpoints that equals decaying the learning rate over them.

    Scaling the displacement into checkpoint i (from i - 1) by w_i, for a non-increasing w with
    w_0 = 1 and w_n = 0, is the average with c_i = w_i - w_(i+1). Shapes: linear 1 - i/n (which is
    the uniform mean), cosine (1 + cos(πi/n))/2, 1-sqrt 1 - √(i/n), inverse-sqrt 1/√(1 + i).

    Source: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging"
    (arXiv 2507.17634).
    """
    rates = [_SHAPES[shape](i, count) for i in range(count)] + [0.0]
    return [rates[i] - rates[i + 1] for i in range(count)]


def blend(weights: Sequence[float], share: float) -> list[float]:
    """An average mixed with its newest checkpoint: (1 - λ)·c_i, and λ more for the last.

    Args:
        weights: c_i.
        share: λ in [0, 1], the share of the newest checkpoint.
    """
    mixed = [(1.0 - share) * weight for weight in weights]
    mixed[-1] += share
    return mixed


def span(updates_before: int, updates_until: int) -> list[float]:
    """Weights of two running means whose combination is the mean of what lies between them.

    With m_a the mean of the first a updates and m_b of the first b: mean over (a, b] is
    (b·m_b - a·m_a) / (b - a).

    Source: icefall's averaging of checkpoints with `model_avg` (k2-fsa).
    """
    length = updates_until - updates_before
    return [-updates_before / length, updates_until / length]

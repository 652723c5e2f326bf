"""Averaging weights: the share of each checkpoint in an average, as pure functions of numbers.

Each function returns one weight c_i for each of n checkpoints θ_0 … θ_(n-1), oldest first. The
average is Σ c_i θ_i, and the weights sum to 1.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from llmtrain.errors import UserError

Shape = Literal["linear", "cosine", "1-sqrt", "inverse-sqrt"]

_SHAPES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda i, n: 1.0 - i / n,
    "cosine": lambda i, n: 0.5 * (1.0 + math.cos(math.pi * i / n)),
    "1-sqrt": lambda i, n: 1.0 - math.sqrt(i / n),
    "inverse-sqrt": lambda i, n: 1.0 / math.sqrt(1.0 + i) if i < n else 0.0,
}
"""Learning rate of the displacement into checkpoint i of n, as a share of the constant rate."""

_EXAMPLE = 'such as {"1000": 0.25, "2000": 0.75}, or [0.25, 0.75] for a window, oldest first'


def uniform(count: int) -> list[float]:
    """Return the weights of LAWA and SWA: c_i = 1/n.

    Source: LAWA: Kaddour 2022, "Stop Wasting My Time!" (arXiv 2209.14981); Sanyal et al. 2023
    (arXiv 2306.03241), with k = 5 in their code. SWA: Izmailov et al. 2018 (arXiv 1803.05407).
    """
    return [1.0 / count] * count


def linear(count: int) -> list[float]:
    """Return weights that grow with the step: c_i = (i + 1) / (1 + 2 + … + n).

    Source: the weighted mean of Li et al. 2025, "Model Merging in Pre-training" (arXiv 2505.12082).
    """
    total = count * (count + 1) // 2
    return [(i + 1) / total for i in range(count)]


def exponential(count: int, decay: float) -> list[float]:
    """Return the weights of m ← d·m + (1 - d)·θ_i, started at m = θ_0.

    c_0 = d^(n-1), and c_i = (1 - d) d^(n-1-i) for i > 0, with `decay` d in [0, 1) per checkpoint.
    """
    weights, remaining = [], 1.0
    for _ in range(count - 1):
        weights.append((1.0 - decay) * remaining)
        remaining *= decay
    return [remaining, *weights[::-1]]


def decay_of_half_life(half_life: float, every: int) -> float:
    """Return the decay per checkpoint that halves a weight in `half_life` training steps."""
    return math.pow(2.0, -every / half_life)


def decay(count: int, shape: Shape) -> list[float]:
    """Return weights for constant-LR checkpoints that emulate a learning-rate decay over them.

    Scaling the displacement into checkpoint i (from i - 1) by w_i, for a non-increasing w with
    w_0 = 1 and w_n = 0, is the average with c_i = w_i - w_(i+1). Shapes: linear 1 - i/n (the
    uniform mean), cosine (1 + cos(πi/n))/2, 1-sqrt 1 - √(i/n), inverse-sqrt 1/√(1 + i).

    Source: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging"
    (arXiv 2507.17634).
    """
    rates = [_SHAPES[shape](i, count) for i in range(count)] + [0.0]
    return [rates[i] - rates[i + 1] for i in range(count)]


def blend(weights: Sequence[float], share: float) -> list[float]:
    """Mix an average with its newest checkpoint: (1 - λ)·c_i, plus λ for the last, λ in [0, 1]."""
    mixed = [(1.0 - share) * weight for weight in weights]
    mixed[-1] += share
    return mixed


def span(updates_before: int, updates_until: int) -> list[float]:
    """Return the weights of two running means whose combination is the mean of the span between.

    With m_a the mean of the first a updates and m_b of the first b, the mean over (a, b] is
    (b·m_b - a·m_a) / (b - a).

    Source: icefall's averaging of checkpoints with `model_avg` (k2-fsa).
    """
    length = updates_until - updates_before
    return [-updates_before / length, updates_until / length]


def read_weights(path: Path) -> dict[int, float] | list[float]:
    """Read custom weights from JSON: by step (returned ascending), or by position in a window."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}", hint=_EXAMPLE) from None
    by_step = isinstance(document, dict)
    values = list(document.values()) if by_step else document
    if (
        not isinstance(values, list)
        or not values
        or not all(type(v) in (int, float) and -1e300 < v < 1e300 for v in values)
        or (by_step and not all(key.isdecimal() for key in document))
    ):
        raise UserError(f"{path} does not contain weights", hint=_EXAMPLE)
    total = math.fsum(values)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise UserError(f"the weights in {path} sum to {total:g}", hint="make them sum to 1")
    if by_step:
        return {int(key): float(document[key]) for key in sorted(document, key=int)}
    return [float(value) for value in values]


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs as a dict; raise a ValueError if two keys are equal as numbers."""
    numbers = [int(key) if key.isdecimal() else key for key, _ in pairs]
    if len(set(numbers)) != len(numbers):
        raise ValueError("a step appears twice")
    return dict(pairs)

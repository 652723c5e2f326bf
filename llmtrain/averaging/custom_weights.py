"""Averaging weights from a file that a person or another program wrote.

Why: a method that is not built in should need no code: JSON with a weight for each step, or a list
of weights for a window, oldest first. They must sum to 1, and are used as they are.

    read_weights(Path("weights.json"))  # {1000: 0.25, 2000: 0.75}
"""

import json
import math
from pathlib import Path

from llmtrain.errors import UserError

_EXAMPLE = 'such as {"1000": 0.25, "2000": 0.75}, or [0.25, 0.75] for a window, oldest first'


def read_weights(path: Path) -> dict[int, float] | list[float]:
    """Weights by step, ascending, or by place in a window.

    Raises:
        UserError: unreadable, not of that form, not finite, or not summing to 1.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the weights in {path}: {error}", hint=_EXAMPLE) from None
    values = list(document.values()) if isinstance(document, dict) else document
    numbers = isinstance(values, list) and all(
        type(v) in (int, float) and -1e300 < v < 1e300 for v in values
    )
    if (
        not numbers
        or not values
        or (isinstance(document, dict) and not all(k.isdecimal() for k in document))
    ):
        raise UserError(f"{path} does not hold weights", hint=_EXAMPLE)
    total = math.fsum(values)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise UserError(f"the weights in {path} sum to {total:g}", hint="they must sum to 1")
    if isinstance(document, dict):
        return {
            step: float(weight) for step, weight in sorted((int(k), w) for k, w in document.items())
        }
    return [float(value) for value in values]


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys, as numbers, are all different."""
    numbers = [int(key) if key.isdecimal() else key for key, _ in pairs]
    if len(set(numbers)) != len(numbers):
        raise ValueError("a step stands twice")
    return dict(pairs)

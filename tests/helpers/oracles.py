"""Reference average: whole tensors in float64, one after the other."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def average_of(
    models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Σ c_i θ_i of every float tensor, in float64; other tensors are the last model's."""
    result = {}
    for name, tensor in models[-1].items():
        if not tensor.is_floating_point():
            result[name] = tensor
            continue
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for model, weight in zip(models, weights, strict=True):
            total += weight * model[name].double()
        result[name] = total
    return result


def ulps(got: Tensor, exact: Tensor) -> int:
    """Return the largest distance from `exact` (float64), in units in the last place of `got`."""
    if got.numel() == 0:
        return 0
    rounded = exact.to(got.dtype)  # torch rounds to float32 first: prefer what is at least as near
    nearer = (got.double() - exact).abs() <= (rounded.double() - exact).abs()
    rounded = torch.where(nearer, got, rounded)
    if got.dtype == torch.float64:
        ordered = [_ordered(t.view(torch.int64).numpy().astype(object), 63) for t in (got, rounded)]
    elif got.dtype == torch.float32:
        ordered = [
            _ordered(t.view(torch.int32).numpy().astype(np.int64), 31) for t in (got, rounded)
        ]
    else:
        ordered = [
            _ordered(t.view(torch.int16).numpy().astype(np.int64), 15) for t in (got, rounded)
        ]
    return int(abs(ordered[0] - ordered[1]).max())


def _ordered(bits: np.ndarray, sign: int) -> np.ndarray:
    """Sign-and-magnitude bits as integers in the order of the numbers."""
    return np.where(bits < 0, -(bits + (1 << sign)), bits)

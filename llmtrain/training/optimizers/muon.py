"""Muon: the matrices of the blocks move along an orthogonalised momentum, all else as AdamW moves it.

Why our own where `torch.optim.Muon` exists: that one can neither leave out a step by a number on the device
(`found_inf`, as fused AdamW does) nor orthogonalise a matrix that is spread over processes. The arithmetic
is torch's, operation by operation; the tests hold it to torch's, bit for bit.

    optimizer = Muon(groups, config.optimizer, config.optimizer.muon); optimizer.step()
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from llmtrain.config.schema import MuonConfig, OptimizerConfig
from llmtrain.runtime.device import resolve_precision
from llmtrain.runtime.sharded import full_tensor, shard_like, to_local

UPDATE_RMS = 0.2
"""Root mean square of an update at a learning rate of 1, as AdamW's is in practice (arXiv 2502.16982, 2.2)."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_TINY = 1e-7


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly U·Vᵀ of a matrix U·S·Vᵀ: its singular values come to lie between about 0.7 and 1.2.

    Source: the quintic Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon).

    Args:
        matrix: shape (rows, columns); it is computed in its precision.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_TINY)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(AdamW):
    """Muon for some parameter groups, AdamW for the others; one learning rate serves both.

    Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the scale of an update, by which AdamW's
    learning rate and decoupled weight decay carry over: Liu et al. 2025 (arXiv 2502.16982, section 2.2).
    Each of several processes orthogonalises every matrix, gathered first where they lie in shards: the simplest
    way that is right, at the cost of the same work on each.
    """

    found_inf: Tensor | None = None
    """Set before a step, shape (), on the parameters' device: where it is 1, the step changes nothing."""

    def __init__(
        self, groups: list[dict[str, object]], config: OptimizerConfig, muon: MuonConfig
    ) -> None:
        """Take parameter groups as AdamW does.

        Args:
            groups: parameters, their weight decay, and `stacked`: of how many matrices, one above the other,
                each parameter consists; 0: AdamW moves it.
            config: what AdamW needs.
            muon: momentum.
        """
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.muon = muon
        device = self.param_groups[0]["params"][0].device
        self.precision = getattr(torch, resolve_precision("auto", device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As any optimizer: AdamW looks in the state of every parameter for its count of steps."""
        Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here computes a loss
        """One step; the gradients that Muon used are gone after it."""
        for group in self.param_groups:
            for parameter in group["params"] if group["stacked"] else ():
                if parameter.grad is not None:
                    self._move(parameter, group["stacked"], group["lr"], group["weight_decay"])
                    parameter.grad = None  # AdamW passes over what has none
        super().step()

    def _move(self, parameter: Tensor, stacked: int, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum, weight = map(
            to_local, (parameter.grad, state["momentum_buffer"], parameter)
        )
        beta = self.muon.momentum
        self._put(momentum, momentum.lerp(gradient, 1 - beta))
        update = (gradient.lerp(momentum, beta) if self.muon.nesterov else momentum).to(
            self.precision
        )
        # In bfloat16 half as much is sent, of what would be rounded to it anyway.
        matrices = full_tensor(parameter, update).chunk(stacked)
        direction = shard_like(
            parameter, torch.cat([orthogonalized(matrix) for matrix in matrices])
        )
        rows, columns = parameter.shape
        scale = UPDATE_RMS * math.sqrt(max(rows // stacked, columns))
        self._put(weight, (weight * (1 - lr * weight_decay)).add_(direction, alpha=-lr * scale))

    def _put(self, into: Tensor, new: Tensor) -> None:
        """Nothing of `new` gets through in a step that is held back: it may be NaN, and 0 · NaN is."""
        held = torch.zeros((), device=into.device) if self.found_inf is None else self.found_inf
        torch.where(held == 1, into, new, out=into)

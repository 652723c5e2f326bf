"""Muon: orthogonalized momentum for the matrices of the blocks, AdamW for all other parameters.

Why not `torch.optim.Muon`: it cannot skip an update by a flag on the device (`found_inf`), and it
cannot orthogonalize a sharded matrix. The tests compare the arithmetic with torch's bit for bit.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.config.schema import MuonConfig, OptimizerConfig
from llmtrain.runtime.device import resolve_precision
from llmtrain.runtime.sharded import full_tensor, shard_like, to_local
from llmtrain.training.optimizers.adamw import AdamW, Groups, decayed_parameters

UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1, as in AdamW (arXiv 2502.16982, section 2.2)."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return approximately U·Vᵀ of a matrix U·S·Vᵀ: all singular values between about 0.7 and 1.2.

    Source: the quintic Newton-Schulz iteration of Jordan et al. 2024
    (kellerjordan.github.io/posts/muon), in the precision of the matrix.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(AdamW):
    """Muon (Jordan et al. 2024) with the update scale of Liu et al. 2025 (arXiv 2502.16982).

    The scale makes AdamW's learning rate and weight decay valid for both kinds of groups.
    """

    fused_scaling = False

    def __init__(self, groups: Groups, config: OptimizerConfig, muon: MuonConfig) -> None:
        """Build it from AdamW's groups; `stacked` is the number of matrices per parameter, or 0."""
        super().__init__(groups, config)
        self.muon = muon
        device = self.param_groups[0]["params"][0].device
        self.precision = getattr(torch, resolve_precision("auto", device))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Skip AdamW's override, which expects a step count in the state of every parameter."""
        Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """Update all parameters and free the gradients that Muon used."""
        for group in self.param_groups:
            for parameter in group["params"] if group["stacked"] else ():
                if parameter.grad is not None:
                    self._step_matrix(parameter, group)
                    parameter.grad = None  # AdamW skips parameters without a gradient
        super().step()

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        stacked, lr, weight_decay = group["stacked"], group["lr"], group["weight_decay"]
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        tensors = (parameter.grad, state["momentum_buffer"], parameter)
        gradient, momentum, weight = map(to_local, tensors)
        beta = self.muon.momentum
        self._assign(momentum, momentum.lerp(gradient, 1 - beta))
        update = gradient.lerp(momentum, beta) if self.muon.nesterov else momentum
        # Rounding to bfloat16 before the gather halves the traffic without changing the result.
        matrices = full_tensor(parameter, update.to(self.precision)).chunk(stacked)
        direction = shard_like(parameter, torch.cat([orthogonalize(matrix) for matrix in matrices]))
        rows, columns = parameter.shape
        scale = UPDATE_RMS * math.sqrt(max(rows // stacked, columns))
        self._assign(weight, (weight * (1 - lr * weight_decay)).add_(direction, alpha=-lr * scale))

    def _assign(self, target: Tensor, new: Tensor) -> None:
        """Write `new` to `target` unless the step is skipped; `where`, because 0 · NaN is NaN."""
        skip = torch.zeros((), device=target.device) if self.found_inf is None else self.found_inf
        torch.where(skip == 1, target, new, out=target)


def build(model: nn.Module, config: OptimizerConfig) -> Muon:
    """Build Muon for a model: the query, key and value matrices of `c_attn` are separate."""
    assert config.muon is not None
    linear = decayed_parameters(model, "linear")
    decayed = decayed_parameters(model, config.decay)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        stacked = (3 if name.endswith("c_attn.weight") else 1) if name in linear else 0
        groups.setdefault((stacked, name in decayed), []).append(parameter)
    listed: Groups = [
        {"params": group, "stacked": stacked, "weight_decay": config.weight_decay * decays}
        for (stacked, decays), group in groups.items()
    ]
    return Muon(listed, config, config.muon)

"""AdamW: which weights decay, gradient clipping, and updates that the device can skip."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.config.schema import OptimizerConfig
from llmtrain.runtime.sharded import to_local

_NO_FUSED_SCALING = ("mps",)
"""Devices whose fused AdamW ignores `grad_scale` and `found_inf` (pytorch/pytorch#186360)."""
_EPS = 1e-6  # added to the norm before dividing by it, as in torch's `clip_grad_norm_`


Groups = list[dict[str, object]]


class AdamW(torch.optim.AdamW):
    """Fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    fused_scaling = True
    """True if `step` itself divides the gradients by `grad_scale`."""
    found_inf: Tensor | None = None
    """Set before a step, shape (), on the parameters' device: 1 skips the update."""
    grad_scale: Tensor | None = None

    def __init__(self, groups: Groups, config: OptimizerConfig) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    def lr_factor(self, step: int) -> float:
        """Return the factor on the scheduled learning rate at `step`."""
        return 1.0

    def gradient_norm(self) -> Tensor:
        """Return the 2-norm of all gradients: float32, shape (), equal on all ranks."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def update(self, step: int, norm: Tensor, *, clip: float, skip: Tensor) -> None:
        """Clip the gradients, update the weights unless `skip` is set, and free the gradients.

        Why: torch's fused AdamW reads the divisor and the skip flag on the device, so clipping
        takes no extra pass over the gradients and the host does not wait. A `clip` of 0 turns
        clipping off. `norm` and `skip` have shape ().
        """
        divisor = ((norm + _EPS) / clip).clamp(min=1) if clip else None
        self.found_inf = skip.float()
        unfused = norm.device.type in _NO_FUSED_SCALING
        if divisor is not None and (unfused or not self.fused_scaling):
            for gradient in self._gradients():
                to_local(gradient).div_(divisor)
            divisor = None
        self.grad_scale = divisor
        if unfused and skip:
            self.zero_grad()  # parameters without a gradient are left unchanged
        self.step()
        self.zero_grad()

    def _gradients(self) -> list[Tensor]:
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        return [parameter.grad for parameter in parameters if parameter.grad is not None]


def build(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Build AdamW for a model."""
    return AdamW(decay_groups(model, config), config)


def decay_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Return two parameter groups: with and without weight decay."""
    decayed, named = decayed_parameters(model, config.decay), list(model.named_parameters())
    with_decay = [p for name, p in named if name in decayed]
    without = [p for name, p in named if name not in decayed]
    group = {"params": with_decay, "weight_decay": config.weight_decay}
    return [group, {"params": without, "weight_decay": 0.0}]


def decayed_parameters(model: nn.Module, rule: str) -> set[str]:
    """Return the names of the parameters with weight decay.

    "linear": weights of linear layers (the paper); a tied matrix counts as the embedding.
    "matrices": all parameters with two or more dimensions, including embeddings (nanoGPT).
    """
    if rule == "matrices":
        return {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name in linear}

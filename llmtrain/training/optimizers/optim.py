"""The optimizer: which weights decay, which Muon moves, AdamW, SPAM's two remedies against spikes, and its step.

Why: decay on embeddings and norms is a different recipe, so the rule is one line of the config and
this file, and the groups are in the order of the model's parameters on every machine.

    optimizer = build_optimizer(model, config.optimizer)
    update(optimizer, step, gradient_norm(optimizer), clip=1.0, hold=torch.tensor(False))
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from llmtrain.config.schema import OptimizerConfig, SpamConfig
from llmtrain.runtime.sharded import to_local
from llmtrain.training.optimizers.muon import Muon

_BLIND = ("mps",)
"""Devices on which fused AdamW overlooks that it is to change nothing, or to divide (pytorch/pytorch#186360)."""
_TINY = 1e-6
"""Added to a norm before anything is divided by it, as torch's `clip_grad_norm_` does."""

SPAM_SETTLE_STEPS = 20
"""Steps after a reset in which nothing is cut: a second moment of few gradients calls every one a spike."""


class Spam(AdamW):
    """AdamW whose gradients are cut where they spike and whose moments begin again at intervals.

    Source: Huang et al. 2025 (arXiv 2501.06842), without its sparse momentum. For runs that spike:
    each reset costs some steps of progress, so it is no gain on a run that is stable without it. The
    learning rate's warm-up after a reset is `schedules.reset_factor`.
    """

    def __init__(
        self, groups: list[dict[str, object]], config: OptimizerConfig, spam: SpamConfig
    ) -> None:
        """Take parameter groups as AdamW does.

        Args:
            groups: parameters and their weight decay.
            config: what AdamW needs.
            spam: threshold and interval.
        """
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.spam = spam

    @torch.no_grad()
    def tame(self, step: int) -> None:
        """Before step `step` (from 1): reset the moments where that is due, else cut spiking gradients."""
        since = (step - 1) % self.spam.reset_every
        for parameter, moments in self.state.items():
            second = to_local(moments["exp_avg_sq"])
            if since == 0:
                for moment in (moments["step"], moments["exp_avg"], moments["exp_avg_sq"]):
                    moment.zero_()
            elif since >= SPAM_SETTLE_STEPS and parameter.grad is not None:
                # A second moment of zero has seen no gradient yet: nothing to compare with.
                limit = torch.where(second > 0, (self.spam.threshold * second).sqrt(), torch.inf)
                to_local(parameter.grad).clamp_(-limit, limit)


def decayed_parameters(model: nn.Module, rule: str) -> set[str]:
    """Names of the parameters that weight decay acts on.

    Args:
        model: the model; a tied matrix belongs to the embedding.
        rule: "linear": weights of linear layers (the paper); "matrices": every parameter of two
            dimensions or more, embeddings included (nanoGPT).
    """
    if rule == "matrices":
        return {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), SPAM or Muon, fused where the device has it."""
    decayed = decayed_parameters(model, config.decay)
    named = list(model.named_parameters())
    if config.muon is not None:
        return Muon(
            _muon_groups(named, decayed_parameters(model, "linear"), decayed, config),
            config,
            config.muon,
        )
    groups: list[dict[str, object]] = [
        {
            "params": [p for name, p in named if name in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    if config.spam is not None:
        return Spam(groups, config, config.spam)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _muon_groups(
    named: list[tuple[str, nn.Parameter]],
    matrices: set[str],
    decayed: set[str],
    config: OptimizerConfig,
) -> list[dict[str, object]]:
    """Muon's: the weights of linear layers. A query, a key and a value matrix lie in one: each counts by itself."""
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        stacked = (3 if name.endswith("c_attn.weight") else 1) if name in matrices else 0
        groups.setdefault((stacked, name in decayed), []).append(parameter)
    return [
        {"params": group, "stacked": stacked, "weight_decay": config.weight_decay * decays}
        for (stacked, decays), group in groups.items()
    ]


def gradient_norm(optimizer: AdamW) -> Tensor:
    """The 2-norm of all gradients as one vector, float32, shape (); the same on all processes they are spread over."""
    norm = torch.nn.utils.get_total_norm(_gradients(optimizer))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def update(optimizer: AdamW, step: int, norm: Tensor, *, clip: float, hold: Tensor) -> None:
    """One step with the gradients clipped to a norm, or, where it is held back, none; the gradients are used up.

    torch's fused AdamW takes both from the device: it divides a gradient where it reads it anyway, so that clipping
    takes no pass of its own over them, and nobody waits to learn whether there was a step.

    Args:
        optimizer: of `build_optimizer`.
        step: the step's number, from 1.
        norm: of the gradients, shape ().
        clip: the largest norm; 0: any. With SPAM, of what is left when spikes are cut.
        hold: whether to change nothing, shape ().
    """
    if isinstance(optimizer, Spam):
        optimizer.tame(step)
        norm = gradient_norm(optimizer)
    divisor = ((norm + _TINY) / clip).clamp(min=1) if clip else None
    optimizer.found_inf = hold.float()  # type: ignore[attr-defined]  # optional in torch
    blind = norm.device.type in _BLIND
    if divisor is not None and (blind or isinstance(optimizer, Muon)):
        for gradient in _gradients(optimizer):
            to_local(gradient).div_(divisor)
        divisor = None
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]  # optional as well
    if blind and hold:
        optimizer.zero_grad()  # what has no gradient is passed over
    optimizer.step()
    optimizer.zero_grad()


def _gradients(optimizer: AdamW) -> list[Tensor]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]

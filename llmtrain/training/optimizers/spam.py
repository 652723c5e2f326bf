"""SPAM: AdamW that clips spiking gradients and resets its moments at intervals.

Use it for runs that spike: each reset costs some steps of progress, so a stable run gains nothing.
"""

import torch
from torch import Tensor, nn

from llmtrain.config.schedules import reset_factor
from llmtrain.config.schema import OptimizerConfig, SpamConfig
from llmtrain.runtime.sharded import to_local
from llmtrain.training.optimizers.adamw import AdamW, Groups, decay_groups

SETTLE_STEPS = 20
"""Steps without clipping after a reset, until the second moment is large enough."""


class Spam(AdamW):
    """SPAM without its sparse momentum (Huang et al. 2025, arXiv 2501.06842)."""

    def __init__(self, groups: Groups, config: OptimizerConfig, spam: SpamConfig) -> None:
        super().__init__(groups, config)
        self.spam = spam

    def lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate's warm-up after a reset."""
        return reset_factor(step, self.spam)

    def update(self, step: int, norm: Tensor, *, clip: float, skip: Tensor) -> None:
        """Clip spikes, then clip the remaining norm and update as AdamW."""
        self.clip_spikes(step)
        super().update(step, self.gradient_norm(), clip=clip, skip=skip)

    @torch.no_grad()
    def clip_spikes(self, step: int) -> None:
        """Before step `step` (from 1), reset the moments if a reset is due, else clip spikes."""
        since = (step - 1) % self.spam.reset_every
        for parameter, moments in self.state.items():
            second = to_local(moments["exp_avg_sq"])
            if since == 0:
                for moment in (moments["step"], moments["exp_avg"], moments["exp_avg_sq"]):
                    moment.zero_()
            elif since >= SETTLE_STEPS and parameter.grad is not None:
                # An element with second moment zero has had no gradient yet, so it has no limit.
                limit = torch.where(second > 0, (self.spam.threshold * second).sqrt(), torch.inf)
                to_local(parameter.grad).clamp_(-limit, limit)


def build(model: nn.Module, config: OptimizerConfig) -> Spam:
    """Build SPAM for a model."""
    assert config.spam is not None
    return Spam(decay_groups(model, config), config, config.spam)

"""Averages of the weights that are kept while training.

Why here and not in the trainer: an online average and its post-hoc twin must be one arithmetic.
Every operation is a single float32 rounding (no fused multiply-add), so the same updates give the
same bits on every device and from stored checkpoints.

    ema = OnlineEma(EmaConfig(kind="ema", decay=0.9), model); ema.update(); ema.weights()
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config import EmaConfig


class OnlineEma:
    """Exponential moving average, in float32 on the model's device.

    e ← d·e + (1 − d)·θ with d = min(decay, 1 − (1 + n)^(−2/3)) at update n = 0, 1, …, so that the
    first update copies the weights. Source: the code of Sanyal et al. 2023 (arXiv 2306.03241).
    """

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        self.config = config
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @property
    def label(self) -> str:
        """Name in logs and on disk."""
        return self.config.label

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        decay = min(self.config.decay, 1.0 - (1.0 + self.updates) ** (-2.0 / 3.0))
        average = list(self._average.values())
        fresh = torch._foreach_mul(list(self._parameters.values()), 1.0 - decay)
        torch._foreach_mul_(average, decay)
        torch._foreach_add_(average, fresh)
        self.updates += 1

    def weights(self) -> Mapping[str, Tensor]:
        """The average by parameter name: the live tensors, not copies."""
        return self._average

    def load(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Continue from what a training state holds."""
        for name, tensor in self._average.items():
            tensor.copy_(weights[name])
        self.updates = updates

    def provenance(self, step: int) -> dict[str, Any]:
        """How the average came about, for the folder in which it is saved."""
        return {
            "method": "ema",
            "online": True,
            "decay": self.config.decay,
            "warmup": "min(decay, 1 - (1 + n)^(-2/3))",
            "updates": self.updates,
            "step": step,
        }


@contextmanager
def swapped_in(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `model` compute with `weights` inside the block; its own come back unchanged."""
    parameters = dict(model.named_parameters())
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]

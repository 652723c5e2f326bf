"""Averages of the weights that are kept while training.

Why here and not in the trainer: an online average and its post-hoc twin must be one arithmetic.
Each recursion is made of single float32 roundings (no fused multiply-add) and each mean is a sum in
float64, divided and rounded once, so the same weights give the same bits on every device, after a
resume, and from stored checkpoints.

    average = build_average(EmaConfig(kind="ema", decay=0.9), model, warmup_steps=100)
    average.update(step=101); average.weights()
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from llmtrain.averaging.power_ema import gamma_of
from llmtrain.config.sections import (
    AverageConfig,
    EmaConfig,
    LawaConfig,
    PowerEmaConfig,
    RunningMeanConfig,
    SwaConfig,
)
from llmtrain.runtime.sharded import load_shards, to_local

Weights = Mapping[str, Tensor]


class OnlineAverage(ABC):
    """What all online averages share: when they update, and where their state lies."""

    config: AverageConfig

    def __init__(self, config: AverageConfig, model: nn.Module, start: int) -> None:
        """Watch the parameters of `model`.

        Args:
            config: which average.
            model: on its device.
            start: the first step that may be an update.
        """
        self.config = config
        self.start = config.start if config.start is not None else start
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        """Of which each process averages its own part, where they are spread."""
        self._pinned = config.offload and any(p.is_cuda for p in self._parameters.values())

    def due(self, step: int) -> bool:
        """Whether the weights of this step are taken in."""
        return step >= self.start and step % self.config.every == 0

    def go_on_from(self, step: int) -> None:
        """At step `step`, after `load` if there was something: begin later where a branch has added the average.

        The updates so far were the last ones due, so their number says which was the first.
        """
        every = self.config.every
        first = (step // every - self.updates + 1) * every
        if first - every >= max(self.start, 1):
            self.start = first - every + 1

    @property
    def ready(self) -> bool:
        """Whether there is an average yet."""
        return self.updates > 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the model's present weights, those of `step`, into the average."""
        self._update(step)
        self.updates += 1

    @abstractmethod
    def _update(self, step: int) -> None: ...

    @abstractmethod
    def weights(self) -> Weights:
        """The average in float32 by parameter name, each process its part; not to be written to."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything, beside the number of updates, from which it can go on."""

    @abstractmethod
    def load(self, state: Weights, updates: int) -> None:
        """Go on from what `state` gave."""

    @abstractmethod
    def provenance(self, step: int) -> dict[str, Any]:
        """How the average came about, for the folder in which it is saved."""

    def residual(self) -> Weights | None:
        """What `weights` lost by its rounding to float32, where that is kept."""
        return None

    def _place(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy where the average lives: on the device, or in host memory."""
        value = to_local(parameter.detach())
        if not self.config.offload:
            return value.to(dtype, copy=True)
        home = torch.empty(value.shape, dtype=dtype, pin_memory=self._pinned)
        return home.copy_(value)

    def _fresh(self) -> list[Tensor]:
        """The model's weights where the average lives; float32."""
        values = [to_local(parameter.detach()) for parameter in self._parameters.values()]
        return [value.cpu() for value in values] if self.config.offload else values

    def _about(self, step: int, **more: Any) -> dict[str, Any]:
        return {
            "method": self.config.kind,
            "online": True,
            "step": step,
            "updates": self.updates,
            "every": self.config.every,
            **more,
        }


class _Recursive(OnlineAverage):
    """m ← d·m + (1 - d)·θ in float32; what d is says the sub-class. The first update copies."""

    def __init__(self, config: AverageConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        self._average = {
            name: self._place(p, torch.float32) for name, p in self._parameters.items()
        }

    @abstractmethod
    def _decay(self, step: int) -> float: ...

    @override
    def _update(self, step: int) -> None:
        decay = self._decay(step) if self.updates else 0.0
        average = list(self._average.values())
        fresh = torch._foreach_mul(self._fresh(), 1.0 - decay)
        torch._foreach_mul_(average, decay)
        torch._foreach_add_(average, fresh)

    @override
    def weights(self) -> Weights:
        return self._average

    @override
    def state(self) -> dict[str, Tensor]:
        return dict(self._average)

    @override
    def load(self, state: Weights, updates: int) -> None:
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
        self.updates = updates


class OnlineEma(_Recursive):
    """Exponential moving average; at update n = 0, 1, … the decay is min(decay, 1 - (1 + n)^(-2/3)).

    Source: the code of Sanyal et al. 2023 (arXiv 2306.03241).
    """

    config: EmaConfig

    @override
    def _decay(self, step: int) -> float:
        return float(min(self.config.decay, 1.0 - (1.0 + self.updates) ** (-2.0 / 3.0)))

    @override
    def provenance(self, step: int) -> dict[str, Any]:
        return self._about(
            step, decay=self.config.decay, warmup="min(decay, 1 - (1 + n)^(-2/3))", start=self.start
        )


class OnlinePowerEma(_Recursive):
    """Power-function EMA: at step t the decay is (1 - n/t)^(γ + 1), n being the steps per update.

    Source: Karras et al. 2024 (arXiv 2312.02696), equation 4. γ belongs to the width `sigma_rel`.
    """

    config: PowerEmaConfig

    def __init__(self, config: PowerEmaConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        self.gamma = gamma_of(config.sigma_rel)

    @override
    def _decay(self, step: int) -> float:
        time = step - max(self.start - 1, 0)
        return float(max(1.0 - self.config.every / time, 0.0) ** (self.gamma + 1.0))

    @override
    def provenance(self, step: int) -> dict[str, Any]:
        began = max(self.start - 1, 0)
        return self._about(step, sigma_rel=self.config.sigma_rel, gamma=self.gamma, start=began)


class OnlineMean(OnlineAverage):
    """Uniform mean of the weights from a step on, summed in float64: SWA, and the running mean.

    Source: Izmailov et al. 2018 (arXiv 1803.05407) for SWA; icefall for the running mean.
    """

    config: SwaConfig | RunningMeanConfig

    def __init__(self, config: SwaConfig | RunningMeanConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        self._sum = {
            name: torch.zeros_like(self._place(p, torch.float64))
            for name, p in self._parameters.items()
        }

    @override
    def _update(self, step: int) -> None:
        for total, fresh in zip(self._sum.values(), self._fresh(), strict=True):
            total.add_(fresh)

    @override
    def weights(self) -> Weights:
        return {name: (total / self.updates).float() for name, total in self._sum.items()}

    @override
    def residual(self) -> Weights | None:
        if isinstance(self.config, SwaConfig):
            return None
        means = {name: total / self.updates for name, total in self._sum.items()}
        return {name: (mean - mean.float().double()).float() for name, mean in means.items()}

    @override
    def state(self) -> dict[str, Tensor]:
        return dict(self._sum)

    @override
    def load(self, state: Weights, updates: int) -> None:
        for name, tensor in self._sum.items():
            tensor.copy_(state[name])
        self.updates = updates

    @override
    def provenance(self, step: int) -> dict[str, Any]:
        # The span that the mean covers is (start, step].
        return self._about(step, start=max(self.start - 1, 0))


class OnlineLawa(OnlineAverage):
    """Mean of the last k weights, N steps apart, from a bounded queue of copies in host memory.

    Source: Kaddour 2022 (arXiv 2209.14981). There is an average once the window is full.
    """

    config: LawaConfig

    def __init__(self, config: LawaConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        self._queue: deque[list[Tensor]] = deque(maxlen=config.window)

    @property
    @override
    def ready(self) -> bool:
        """Whether the window is full."""
        return len(self._queue) == self.config.window

    @override
    def _update(self, step: int) -> None:
        self._queue.append([self._place(p, torch.float32) for p in self._parameters.values()])

    @override
    def weights(self) -> Weights:
        means = {}
        for index, name in enumerate(self._parameters):
            total = self._queue[0][index].double()
            for held in list(self._queue)[1:]:
                total.add_(held[index])
            means[name] = (total / len(self._queue)).float()
        return means

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            f"{place}/{name}": tensor
            for place, held in enumerate(self._queue)
            for name, tensor in zip(self._parameters, held, strict=True)
        }

    @override
    def load(self, state: Weights, updates: int) -> None:
        self._queue.clear()
        for place in range(len(state) // len(self._parameters)):
            self._queue.append([state[f"{place}/{name}"].clone() for name in self._parameters])
        self.updates = updates

    @override
    def provenance(self, step: int) -> dict[str, Any]:
        last = step - step % self.config.every
        steps = [last - i * self.config.every for i in range(self.config.window)][::-1]
        return self._about(step, window=self.config.window, inputs=steps)


def build_average(config: AverageConfig, model: nn.Module, *, warmup_steps: int) -> OnlineAverage:
    """The online average that `config` describes, watching `model`.

    EMA and power-function EMA begin with the first step, the means once warm-up is over.
    """
    match config:
        case EmaConfig():
            return OnlineEma(config, model, start=1)
        case PowerEmaConfig():
            return OnlinePowerEma(config, model, start=1)
        case LawaConfig():
            return OnlineLawa(config, model, start=warmup_steps + 1)
        case SwaConfig() | RunningMeanConfig():
            return OnlineMean(config, model, start=warmup_steps + 1)


@contextmanager
def swapped_in(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let `model` compute with `weights` inside the block; its own come back unchanged.

    Args:
        model: spread over processes or not.
        weights: by parameter name, each process its part.
    """
    parameters = dict(model.named_parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        # FSDP gathers from the shards' own memory: they cannot be exchanged, only written over.
        kept = {
            name: to_local(parameter.detach()).clone() for name, parameter in parameters.items()
        }
        try:
            load_shards(model, weights)
            yield
        finally:
            load_shards(model, kept)
        return
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]

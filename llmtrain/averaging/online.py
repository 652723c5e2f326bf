"""Online averages: averages of the weights, updated during training.

A recursion rounds each operation to float32 (no fused multiply-add). A mean is a float64 sum,
divided and rounded once. So the same weights give the same bits on every device and after a resume,
and an online LAWA equals the average of stored checkpoints.
"""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from llmtrain.averaging.stored_averages import gamma_of
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
    """One average: its update steps and its state."""

    config: AverageConfig
    first_ready = 1
    """Number of updates before an average exists."""

    def __init__(self, config: AverageConfig, model: nn.Module, start: int) -> None:
        """Average the parameters of `model`, from step `start` unless the config sets another."""
        self.config = config
        self.start = config.start if config.start is not None else start
        self.updates = 0
        self._parameters = dict(model.named_parameters())
        """Each process averages its own shards."""
        self._tensors: dict[str, Tensor] = {}
        """State by parameter name."""

    def due(self, step: int) -> bool:
        """Return whether this step is an update."""
        return step >= self.start and step % self.config.every == 0

    def resume_at(self, step: int) -> None:
        """After `load`, move `start` to the first update if a branch added the average later.

        The updates so far are the last ones due before `step`, so their number gives the first.
        """
        every = self.config.every
        first = (step // every - self.updates + 1) * every
        if first - every >= max(self.start, 1):
            self.start = first - every + 1

    @property
    def ready(self) -> bool:
        """True once an average exists."""
        return self.updates >= self.first_ready

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the current weights, those of `step`."""
        self._update(step)
        self.updates += 1

    @abstractmethod
    def _update(self, step: int) -> None: ...

    @abstractmethod
    def weights(self) -> Weights:
        """Return the average in float32 by parameter name (local shards); do not modify it."""

    def residual(self) -> Weights | None:
        """Return the rounding error of `weights`, if it is stored."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to resume, except the number of updates."""
        return dict(self._tensors)

    def load(self, state: Weights, updates: int) -> None:
        """Resume from the result of `state`."""
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])
        self.updates = updates

    def provenance(self, step: int) -> dict[str, Any]:
        """Return the content of `provenance.json`."""
        method, every = self.config.kind, self.config.every
        common = {"method": method, "online": True, "step": step, "updates": self.updates}
        return common | {"every": every} | self._options(step)

    @abstractmethod
    def _options(self, step: int) -> dict[str, Any]: ...

    @property
    def _before_start(self) -> int:
        return max(self.start - 1, 0)

    def _copy(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy a parameter to the memory of the average: the device or the host."""
        value = to_local(parameter.detach())
        if not self.config.offload:
            return value.to(dtype, copy=True)
        return torch.empty(value.shape, dtype=dtype, pin_memory=value.is_cuda).copy_(value)

    def _current(self) -> list[Tensor]:
        """Return the current float32 weights in the memory of the average."""
        values = [to_local(parameter.detach()) for parameter in self._parameters.values()]
        return [value.cpu() for value in values] if self.config.offload else values


class _Recursive(OnlineAverage):
    """m ← d·m + (1 - d)·θ in float32; the first update copies."""

    def __init__(self, config: AverageConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        self._tensors = {name: self._copy(p, torch.float32) for name, p in self._parameters.items()}

    @abstractmethod
    def _decay(self, step: int) -> float: ...

    def _update(self, step: int) -> None:
        decay = self._decay(step) if self.updates else 0.0
        average = list(self._tensors.values())
        fresh = torch._foreach_mul(self._current(), 1.0 - decay)
        torch._foreach_mul_(average, decay)
        torch._foreach_add_(average, fresh)

    @override
    def weights(self) -> Weights:
        return self._tensors


class OnlineEma(_Recursive):
    """Exponential moving average with decay min(decay, 1 - (1 + n)^(-2/3)) at update n = 0, 1, ….

    Source: the code of Sanyal et al. 2023 (arXiv 2306.03241).
    """

    config: EmaConfig

    def _decay(self, step: int) -> float:
        return float(min(self.config.decay, 1.0 - (1.0 + self.updates) ** (-2.0 / 3.0)))

    def _options(self, step: int) -> dict[str, Any]:
        warmup = "min(decay, 1 - (1 + n)^(-2/3))"
        return {"decay": self.config.decay, "warmup": warmup, "start": self.start}


class OnlinePowerEma(_Recursive):
    """Power-function EMA with decay (1 - n/t)^(γ + 1) at step t, for n steps per update.

    Source: Karras et al. 2024 (arXiv 2312.02696), equation 4. γ follows from `sigma_rel`.
    """

    config: PowerEmaConfig

    @cached_property
    def gamma(self) -> float:
        """γ of the configured width."""
        return gamma_of(self.config.sigma_rel)

    def _decay(self, step: int) -> float:
        time = step - self._before_start
        return float(max(1.0 - self.config.every / time, 0.0) ** (self.gamma + 1.0))

    def _options(self, step: int) -> dict[str, Any]:
        sigma_rel = self.config.sigma_rel
        return {"sigma_rel": sigma_rel, "gamma": self.gamma, "start": self._before_start}


class OnlineMean(OnlineAverage):
    """Uniform mean of the weights from a step on, summed in float64 (SWA, running mean).

    Source: Izmailov et al. 2018 (arXiv 1803.05407) for SWA; icefall for the running mean.
    """

    config: SwaConfig | RunningMeanConfig

    def __init__(self, config: SwaConfig | RunningMeanConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        copies = {name: self._copy(p, torch.float64) for name, p in self._parameters.items()}
        self._tensors = {name: copy.zero_() for name, copy in copies.items()}

    def _update(self, step: int) -> None:
        for total, fresh in zip(self._tensors.values(), self._current(), strict=True):
            total.add_(fresh)

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        for name, total in self._tensors.items():
            yield name, total / self.updates

    @override
    def weights(self) -> Weights:
        return {name: mean.float() for name, mean in self._means()}

    @override
    def residual(self) -> Weights | None:
        if isinstance(self.config, SwaConfig):
            return None
        return {name: (mean - mean.float().double()).float() for name, mean in self._means()}

    def _options(self, step: int) -> dict[str, Any]:
        return {"start": self._before_start}  # the mean covers (start, step]


class OnlineLawa(OnlineAverage):
    """Mean of the last k weights, N steps apart, from a queue of copies in host memory.

    Source: Kaddour 2022 (arXiv 2209.14981).
    """

    config: LawaConfig

    def __init__(self, config: LawaConfig, model: nn.Module, start: int) -> None:
        super().__init__(config, model, start)
        self.first_ready = config.window
        self._queue: deque[list[Tensor]] = deque(maxlen=config.window)

    def _update(self, step: int) -> None:
        self._queue.append([self._copy(p, torch.float32) for p in self._parameters.values()])

    @override
    def weights(self) -> Weights:
        means = {}
        for index, name in enumerate(self._parameters):
            total = self._queue[0][index].double()
            for copies in itertools.islice(self._queue, 1, None):
                total.add_(copies[index])
            means[name] = (total / len(self._queue)).float()
        return means

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            f"{position}/{name}": tensor
            for position, copies in enumerate(self._queue)
            for name, tensor in zip(self._parameters, copies, strict=True)
        }

    @override
    def load(self, state: Weights, updates: int) -> None:
        self._queue.clear()
        for position in range(len(state) // len(self._parameters)):
            self._queue.append([state[f"{position}/{name}"].clone() for name in self._parameters])
        self.updates = updates

    def _options(self, step: int) -> dict[str, Any]:
        every, window = self.config.every, self.config.window
        last = step - step % every
        return {"window": window, "inputs": [last - i * every for i in range(window)][::-1]}


def build_average(config: AverageConfig, model: nn.Module, *, warmup_steps: int) -> OnlineAverage:
    """Return the online average of `model` that `config` describes.

    EMAs start at the first step, means after warm-up, unless the config sets `start`.
    """
    match config:
        case EmaConfig():
            return OnlineEma(config, model, 1)
        case PowerEmaConfig():
            return OnlinePowerEma(config, model, 1)
        case LawaConfig():
            return OnlineLawa(config, model, warmup_steps + 1)
        case SwaConfig() | RunningMeanConfig():
            return OnlineMean(config, model, warmup_steps + 1)


@contextmanager
def swapped_in(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Replace the weights of `model` inside the block, and restore them bitwise after it.

    `weights` are by parameter name; local shards if the model is sharded.
    """
    parameters = dict(model.named_parameters())
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())

    def put(values: Weights) -> None:
        if sharded:  # FSDP gathers from the memory of the shards: overwrite it in place
            load_shards(model, values)
            return
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.device)

    own = {
        name: to_local(parameter.detach()).clone() if sharded else parameter.data
        for name, parameter in parameters.items()
    }
    try:
        put(weights)
        yield
    finally:
        put(own)

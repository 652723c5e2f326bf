"""The data, schedule and averages sections, and the base class of all sections."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _whole_float_to_int(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole_float_to_int), Field(lt=2**63)]
"""Integer of at most 64 bits; whole floats such as 7e4 are accepted."""
Positive = Annotated[Int, Field(gt=0)]
Natural = Annotated[Int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: immutable, without unknown keys or implicit conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        """Yield the invalid combinations of keys."""
        yield from ()


class BlockWarmupConfig(Section):
    """Sequence-length warm-up (Li et al. 2021, arXiv 2108.06084): start with shorter sequences.

    Each window is truncated, so a step reads the same windows with and without warm-up.
    """

    start: Positive = 64
    steps: Positive
    """Step at which the linearly growing context reaches data.block_size."""
    multiple_of: Positive = 8
    """Lengths are rounded down to a multiple of this, which limits recompilation."""


class MixConfig(Section):
    """Additional data with a fixed share of every batch."""

    path: str
    """Folder as in data.path, with tokens of the same tokenizer."""
    weight: Annotated[float, Field(gt=0, lt=1)]
    """Share of the sequences; data.path has the rest."""


class DataConfig(Section):
    """Training and validation data."""

    path: str
    """Folder written by `llmtrain prepare`, or nanoGPT's folder with train.bin and val.bin."""
    block_size: Positive = 1024
    block_warmup: BlockWarmupConfig | None = None
    mix: list[MixConfig] = Field(default=[])
    """Validation uses only data.path."""

    def _problems(self) -> Iterator[str]:
        if (total := sum(each.weight for each in self.mix)) >= 1:
            yield f"the total weight of mix ({total:g}) must be below 1"
        start = self.block_warmup.start if self.block_warmup else 0
        if start > self.block_size:
            yield f"block_warmup.start ({start}) must not exceed block_size ({self.block_size})"


class _Schedule(Section):
    warmup_steps: Natural = 2000
    """Step at which the linear warm-up from 0 reaches the peak learning rate."""


class _DecaySchedule(_Schedule):
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay and after it."""
    horizon: Positive | None = None
    """Step at which the decay ends; default: train.max_steps."""


class ConstantSchedule(_Schedule):
    """Peak learning rate until the end."""

    name: Literal["constant"]


class CosineSchedule(_DecaySchedule):
    """Cosine or linear decay from the peak to `min_lr`, from the end of warm-up to the horizon."""

    name: Literal["cosine", "linear"]


class InverseSqrtSchedule(_Schedule):
    """peak · √(warmup_steps / step) after warm-up, but at least `min_lr`."""

    name: Literal["inverse-sqrt"]
    min_lr: NonNegative = 0.0


class WsdSchedule(_DecaySchedule):
    """Warmup-stable-decay: decay from the peak to `min_lr` in the last `decay_steps`."""

    name: Literal["wsd"]
    decay_steps: Positive
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"


class CyclicSchedule(_Schedule):
    """Linear decay from the peak to `min_lr`, restarted every `cycle_steps` (for SWA)."""

    name: Literal["cyclic"]
    cycle_steps: Positive
    min_lr: NonNegative = 0.0


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | InverseSqrtSchedule | WsdSchedule | CyclicSchedule,
    Field(discriminator="name"),
]


class _AverageConfig(Section):
    _label: ClassVar[str]
    every: Positive = 1
    """Steps between two updates, which happen at multiples of it."""
    start: Natural | None = None
    """First step that may be an update. Default: 1 for ema and power-ema, else after warm-up."""
    save_every: Positive | None = None
    """Steps between two saves, a multiple of checkpoint.snapshot_every. The last step is always
    saved. Default: checkpoint.state_every for ema, swa and lawa, else checkpoint.snapshot_every."""
    offload: bool = False
    """Keep the average in (pinned) host memory instead of on the device."""

    @property
    def label(self) -> str:
        """Name of the average in metrics and folders."""
        interval = "" if self.every == 1 else f"-every-{self.every}"
        return self._label.format(self, interval)


class EmaConfig(_AverageConfig):
    """Exponential moving average with decay min(decay, 1 - (1 + n)^(-2/3)) at update n."""

    _label = "ema-{0.decay:g}{1}"
    kind: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9


class SwaConfig(_AverageConfig):
    """Uniform mean of all weights from step `start` (stochastic weight averaging)."""

    _label = "swa-from-{0.start}{1}"
    kind: Literal["swa"]
    start: Natural


class LawaConfig(_AverageConfig):
    """Mean of the last `window` weights, `every` steps apart (LAWA), queued in host memory."""

    _label = "online-lawa-{0.window}x{0.every}"
    kind: Literal["lawa"]
    every: Positive
    window: Positive = 5
    offload: Literal[True] = True


class RunningMeanConfig(_AverageConfig):
    """Mean of all weights since warm-up, accumulated in float64.

    `llmtrain average --method dense` computes the mean of every step between two of them.
    """

    _label = "running-mean"
    kind: Literal["running-mean"]


class PowerEmaConfig(_AverageConfig):
    """Power-function EMA of relative width `sigma_rel`.

    `llmtrain average --method posthoc-ema` computes one of any width from two of them.
    """

    _label = "power-ema-{0.sigma_rel:g}"
    kind: Literal["power-ema"]
    sigma_rel: Annotated[float, Field(gt=0, lt=0.288)]


AverageConfig = Annotated[
    EmaConfig | SwaConfig | LawaConfig | RunningMeanConfig | PowerEmaConfig,
    Field(discriminator="kind"),
]

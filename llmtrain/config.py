"""The typed configuration of a run: every key, its type, its default, and which keys go together.

Why: a run that trained for a week on a default nobody chose is a lost week. Nothing is converted
silently, nothing unknown is accepted, and the resolved whole is enough to run it again. How it is
read from a file, and what a mistake is told, is in `config_file.py`.

    RunConfig.model_validate({"name": "x", "data": {"path": "data/x"}, "train": {"batch_sequences": 32}})
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _whole(value: object) -> object:
    """`7e4` is a float to YAML and a number of steps to a person."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions, no change once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DataConfig(Section):
    """What is trained on."""

    path: str
    """Folder that `llmtrain prepare` wrote (or nanoGPT's folder with train.bin and val.bin)."""
    block_size: Positive = 1024
    """Tokens of context in a training sample."""


class ModelConfig(Section):
    """The shape of the GPT-2; defaults: GPT-2 small without biases."""

    n_layer: Positive = 12
    n_head: Positive = 12
    n_embd: Positive = 768
    vocab_size: Positive = 50304
    """Rows of the embedding; may be padded above the tokenizer's vocabulary for speed."""
    bias: bool = False
    """Biases in linear layers and layer norms."""
    dropout: Fraction = 0.0
    scale_attn_by_inverse_layer_idx: bool = True
    """Divide the attention logits of layer i (from 0) by i + 1."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        return self


class OptimizerConfig(Section):
    """AdamW. `decay` says what weight decay acts on."""

    name: Literal["adamw"] = "adamw"
    lr: Rate = 6e-4
    """Peak learning rate."""
    betas: Betas = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NonNegative = 0.1
    decay: Literal["linear", "matrices"] = "linear"
    """linear: weights of linear layers only (the paper); matrices: embeddings too (nanoGPT)."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""


class _Schedule(Section):
    warmup_steps: Natural = 2000
    """The learning rate rises linearly from 0 and reaches its peak at this step."""


class ConstantSchedule(_Schedule):
    """The peak learning rate to the end."""

    name: Literal["constant"]


class _DecaySchedule(_Schedule):
    min_lr: NonNegative = 0.0
    """The learning rate at the end of the decay, and after it."""
    horizon: Positive | None = None
    """The step at which the decay ends; default: train.max_steps."""


class CosineSchedule(_DecaySchedule):
    """Half a cosine from the peak to `min_lr`, from the end of warm-up to the horizon."""

    name: Literal["cosine"]


class LinearSchedule(_DecaySchedule):
    """A straight line from the peak to `min_lr`, from the end of warm-up to the horizon."""

    name: Literal["linear"]


class InverseSqrtSchedule(_Schedule):
    """peak · √(warmup_steps / step) after warm-up, not below `min_lr`."""

    name: Literal["inverse-sqrt"]
    min_lr: NonNegative = 0.0


class WsdSchedule(_DecaySchedule):
    """Warm-up, stable, decay: the peak until `decay_steps` before the horizon, then down to `min_lr`."""

    name: Literal["wsd"]
    decay_steps: Positive
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"


class CyclicSchedule(_Schedule):
    """From the peak down to `min_lr` in a straight line every `cycle_steps` (for SWA)."""

    name: Literal["cyclic"]
    cycle_steps: Positive
    min_lr: NonNegative = 0.0


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | InverseSqrtSchedule | WsdSchedule | CyclicSchedule,
    Field(discriminator="name"),
]


class TrainConfig(Section):
    """How long, in what batches, on what."""

    max_steps: Positive = 70_000
    batch_tokens: Positive | None = None
    """Tokens a step over all micro-batches (a multiple of data.block_size), or:"""
    batch_sequences: Positive | None = None
    """Sequences a step over all micro-batches. One of the two is set."""
    micro_batch: Positive = 16
    """Sequences in one forward pass on one device."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights are float32 always. auto: bfloat16 where it is fast."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile. auto: on CUDA."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    @model_validator(mode="after")
    def _one_batch(self) -> "TrainConfig":
        if (self.batch_tokens is None) == (self.batch_sequences is None):
            raise ValueError("set exactly one of batch_tokens and batch_sequences")
        return self


class CheckpointConfig(Section):
    """What is saved, and when."""

    snapshot_every: Positive = 200
    """Steps between two snapshots (weights only, kept for averaging), once warm-up is over."""
    state_every: Positive = 1000
    """Steps between two full training states (for resuming)."""
    keep_states: Positive = 2


class _AverageConfig(Section):
    every: Positive = 1
    """Steps between two updates, which happen at multiples of it."""
    start: Natural | None = None
    """The first step that may be an update; default: see each kind."""
    save_every: Positive | None = None
    """Steps between two saves, a multiple of checkpoint.snapshot_every; default: see each kind. The
    last step is always saved."""
    offload: bool = False
    """Keep the average in (pinned) host memory instead of on the device."""

    def _spaced(self, label: str) -> str:
        return label if self.every == 1 else f"{label}-every-{self.every}"


class EmaConfig(_AverageConfig):
    """Exponential moving average, from the first step; saved at checkpoint.state_every.

    Source: the paper's code; decay at update n is min(decay, 1 - (1 + n)^(-2/3)).
    """

    kind: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return self._spaced(f"ema-{self.decay:g}")


class SwaConfig(_AverageConfig):
    """Uniform mean of all weights from step `start` on (SWA); saved at checkpoint.state_every."""

    kind: Literal["swa"]
    start: Natural

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return self._spaced(f"swa-from-{self.start}")


class LawaConfig(_AverageConfig):
    """Mean of the last `window` weights, `every` steps apart, once warm-up is over (LAWA).

    The weights wait in a queue in host memory. Saved at checkpoint.state_every.
    """

    kind: Literal["lawa"]
    every: Positive
    window: Positive = 5
    offload: Literal[True] = True

    @property
    def label(self) -> str:
        """The name under which it is logged and saved; not that of the post-hoc average."""
        return f"online-lawa-{self.window}x{self.every}"


class RunningMeanConfig(_AverageConfig):
    """Mean of all weights since warm-up, exact to float64; saved with each snapshot.

    From two of them, `llmtrain average --method dense` makes the mean over every step between.
    """

    kind: Literal["running-mean"]

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return "running-mean"


class PowerEmaConfig(_AverageConfig):
    """Power-function EMA of relative width `sigma_rel`; saved with each snapshot.

    From two of them, `llmtrain average --method posthoc-ema` makes one of any width.
    """

    kind: Literal["power-ema"]
    sigma_rel: Annotated[float, Field(gt=0, lt=0.288)]

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return f"power-ema-{self.sigma_rel:g}"


AverageConfig = Annotated[
    EmaConfig | SwaConfig | LawaConfig | RunningMeanConfig | PowerEmaConfig, Field(discriminator="kind")
]


class EvalConfig(Section):
    """Validation during training."""

    every: Positive = 1000
    """Steps between two evaluations. The last step is always evaluated."""
    tokens: Annotated[int, BeforeValidator(_whole), Field(ge=2)] | None = None
    """Use only this many tokens from the start of the val split; default: all of it."""
    batch: Positive = 16
    """Sequences in one forward pass of an evaluation."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "llmtrain"


class LogConfig(Section):
    """What is told while training."""

    every: Positive = 10
    """Steps between two lines of metrics."""
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    """Everything that decides a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run lies in runs/<name> unless --run-dir says otherwise; default: the file's name."""
    seed: Seed = 1337
    """Of the initial weights, the dropout and the data order."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule(name="cosine", min_lr=6e-5)
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    averages: list[AverageConfig] = []
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_size(self) -> int:
        """Sequences in one step."""
        return self.train.batch_sequences or (self.train.batch_tokens or 0) // self.data.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step."""
        return self.batch_size * self.data.block_size

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        tokens, block, micro = self.train.batch_tokens, self.data.block_size, self.train.micro_batch
        if tokens is not None and tokens % block:
            raise ValueError(
                f"train.batch_tokens {tokens:,} is not a multiple of data.block_size {block}: "
                f"{max(tokens // block, 1) * block:,} would be"
            )
        if self.batch_size % micro:
            fitting = [n for n in range(1, micro + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"a step of {self.batch_size} sequences does not divide into train.micro_batch {micro}: "
                f"{fitting[-1]} would"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> "RunConfig":
        schedule, steps = self.schedule, self.train.max_steps
        horizon = getattr(schedule, "horizon", None) or steps
        if schedule.warmup_steps >= min(horizon, steps):
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps:,} leaves nothing of the {min(horizon, steps):,} steps"
            )
        if isinstance(schedule, WsdSchedule) and schedule.warmup_steps + schedule.decay_steps > horizon:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps is {schedule.warmup_steps:,} + "
                f"{schedule.decay_steps:,}, more than the {horizon:,} steps"
            )
        if getattr(schedule, "min_lr", 0.0) > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr is above the peak, optimizer.lr {self.optimizer.lr:g}")
        return self

    @model_validator(mode="after")
    def _averages_fit(self) -> "RunConfig":
        labels = [average.label for average in self.averages]
        if repeated := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"averages holds {', '.join(sorted(repeated))} twice")
        for index, average in enumerate(self.averages):
            every = self.checkpoint.snapshot_every
            if average.save_every is not None and average.save_every % every:
                raise ValueError(
                    f"averages.{index}.save_every {average.save_every} is not a multiple of "
                    f"checkpoint.snapshot_every {every}"
                )
        return self


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key → value, in the order of the sections; for tables and comparisons."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    visit("", config.model_dump(mode="json"))
    return flat

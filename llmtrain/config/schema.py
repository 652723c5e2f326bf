"""The typed configuration of a run: all keys with type and default, and checks between them."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmtrain.config.sections import (
    AverageConfig,
    CosineSchedule,
    DataConfig,
    Fraction,
    Int,
    Natural,
    NonNegative,
    Positive,
    PowerEmaConfig,
    Rate,
    RunningMeanConfig,
    ScheduleConfig,
    Section,
    WsdSchedule,
)


class ModelConfig(Section):
    """Shape of the GPT-2 model; default: GPT-2 small without biases."""

    n_layer: Positive = 12
    n_head: Positive = 12
    n_embd: Positive = 768
    vocab_size: Positive = 50304
    """Rows of the embedding; may exceed the tokenizer's vocabulary for speed."""
    bias: bool = False
    dropout: Fraction = 0.0
    scale_attn_by_inverse_layer_idx: bool = True
    """Divide the attention logits of layer i (from 0) by i + 1."""
    activation: Literal["gelu_new", "gelu"] = "gelu_new"
    """gelu_new: GELU's tanh approximation (GPT-2); gelu: the exact GELU (nanoGPT)."""

    def _problems(self) -> Iterator[str]:
        if self.n_embd % self.n_head:
            yield f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})"


class SpamConfig(Section):
    """Additions of SPAM to AdamW (Huang et al. 2025, arXiv 2501.06842); defaults: its paper."""

    threshold: Rate = 5000.0
    """Clip a gradient g to √(threshold · v) if g² > threshold · v, with second moment v."""
    reset_every: Positive = 500
    """Steps between two resets of both moments to zero."""
    reset_warmup: Natural = 150
    """Steps of the cosine warm-up of the learning rate after a reset."""

    def _problems(self) -> Iterator[str]:
        if self.reset_warmup >= self.reset_every:
            yield f"reset_warmup ({self.reset_warmup}) must be < reset_every ({self.reset_every})"


class MuonConfig(Section):
    """Momentum of Muon (Jordan et al. 2024), which updates the matrices of the blocks."""

    momentum: Fraction = 0.95
    """Decay of the running mean of the gradients."""
    nesterov: bool = True


class OptimizerConfig(Section):
    """AdamW, SPAM (an extension of it), or Muon for matrices and AdamW for the rest."""

    name: Literal["adamw", "spam", "muon"] = "adamw"
    lr: Rate = 6e-4
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NonNegative = 0.1
    decay: Literal["linear", "matrices"] = "linear"
    """Weights that decay. linear: linear layers (the paper); matrices: embeddings too (nanoGPT)."""
    grad_clip: NonNegative = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    spam: SpamConfig | None = None
    muon: MuonConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_own_section(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        if name in ("spam", "muon") and values.get(name) is None:
            return values | {name: {}}
        return values

    def _problems(self) -> Iterator[str]:
        for key in ("spam", "muon"):
            if getattr(self, key) is not None and self.name != key:
                yield f"the section {key} has no effect with name: {self.name}"


class TrainConfig(Section):
    """Duration, batch size and hardware use."""

    max_steps: Positive = 70_000
    batch_tokens: Positive | None = None
    """Tokens in a step, a multiple of data.block_size. Set this or batch_sequences."""
    batch_sequences: Positive | None = None
    micro_batch: Literal["auto"] | Positive = 16
    """Sequences in a forward pass on one device. auto: find the fastest that fits at the start."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights are always float32. auto: bfloat16 if it is fast."""
    compile: Literal["auto", "cuda-graphs"] | bool = "auto"
    """torch.compile. auto: on CUDA only; cuda-graphs: with CUDA graphs, on one GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """Distribution of the weights. ddp: replicated; fsdp: sharded; hsdp: sharded in a machine,
    replicated across machines. auto: ddp if it fits into GPU memory, else fsdp."""
    activation_checkpointing: bool = False
    """Recompute the blocks in the backward pass to save memory."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """Reaction to a NaN or infinite loss or gradient norm, which never reaches the weights.
    skip: skip the step; rewind: as in `spikes`."""

    def _problems(self) -> Iterator[str]:
        if (self.batch_tokens is None) == (self.batch_sequences is None):
            yield "set exactly one of batch_tokens and batch_sequences"


class CheckpointConfig(Section):
    """Intervals of snapshots and training checkpoints."""

    snapshot_every: Positive = 200
    """Steps between two snapshots (weights only, kept for averaging) after warm-up."""
    state_every: Positive = 1000
    """Steps between two training checkpoints, from which a run resumes."""
    keep_states: Positive = 2


class SpikesConfig(Section):
    """Handling of steps with an unusually large loss or gradient norm (robust z-score)."""

    action: Literal["ignore", "log", "skip", "rewind"] = "log"
    """log: log it; skip: skip the update; rewind: return to an earlier training checkpoint and skip
    the batches since then (PaLM, Chowdhery et al. 2022, section 5.1)."""
    window: Annotated[Int, Field(ge=8, lt=2**63)] = 128
    """Number of previous steps to compare with. Detection starts after that many steps."""
    threshold: Rate = 10.0
    """Distance from the median in robust standard deviations: the larger of 1.4826 times the median
    deviation, and the distance from the median to the 84th percentile."""
    rewind_steps: Positive = 100
    """Minimum distance from the spike to the training checkpoint, unless the run or the previous
    rewind started later."""
    max_rewinds: Positive = 10
    """Maximum number of rewinds; the run fails at the next one."""


class EvalConfig(Section):
    """Validation during training."""

    every: Positive = 1000
    """Steps between two evaluations. The last step is always evaluated."""
    tokens: Annotated[Int, Field(ge=2, lt=2**63)] | None = None
    """Number of tokens from the start of the val split; default: all."""
    batch: Positive = 16


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "llmtrain"


class LogConfig(Section):
    """Logging during training."""

    every: Positive = 10
    sample_tokens: Natural = 0
    """Tokens to generate greedily at each evaluation, from the start of the val split."""
    tensorboard: bool = False
    """Write TensorBoard events to tensorboard/ in the run folder."""
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    """Complete configuration of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run folder, runs/<name>; default: name of the file."""
    seed: Natural = 1337
    init_from: str | None = None
    """Initial weights instead of random ones: a weights folder, a nanoGPT .pt file, or a GPT-2 on
    the hub (owner/name or owner/name@revision)."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule(name="cosine", min_lr=6e-5)
    train: TrainConfig
    spikes: SpikesConfig = SpikesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    averages: list[AverageConfig] = Field(default=[])
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def batch_size(self) -> int:
        """Sequences in a step."""
        return self.train.batch_sequences or (self.train.batch_tokens or 0) // self.data.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.data.block_size

    @property
    def may_rewind(self) -> bool:
        """True if training may return to an earlier training checkpoint."""
        return "rewind" in (self.spikes.action, self.train.on_nonfinite)

    def with_micro_batch(self, size: int) -> "RunConfig":
        """Return a copy with micro-batches of `size` sequences."""
        return self.model_copy(
            update={"train": self.train.model_copy(update={"micro_batch": size})}
        )

    def save_every(self, average: AverageConfig) -> int:
        """Return the number of steps between two saves of an online average."""
        snapshot, state = self.checkpoint.snapshot_every, self.checkpoint.state_every
        if isinstance(average, RunningMeanConfig | PowerEmaConfig):
            state = snapshot  # post-hoc averages combine them at the steps of snapshots
        return average.save_every or math.ceil(state / snapshot) * snapshot

    def _problems(self) -> Iterator[str]:
        yield from self._batch_problems()
        yield from self._schedule_problems()
        kept = (self.checkpoint.keep_states - 1) * self.checkpoint.state_every
        if self.may_rewind and kept < self.spikes.rewind_steps:
            yield (
                f"spikes.rewind_steps ({self.spikes.rewind_steps:,}) must not exceed "
                f"(checkpoint.keep_states - 1) · checkpoint.state_every ({kept:,}), the age of the "
                "oldest training checkpoint"
            )
        labels = [average.label for average in self.averages]
        if repeated := {label for label in labels if labels.count(label) > 1}:
            yield f"averages contains {', '.join(sorted(repeated))} twice"
        every = self.checkpoint.snapshot_every
        for index, average in enumerate(self.averages):
            if (average.save_every or 0) % every:
                key = f"averages.{index}.save_every ({average.save_every})"
                yield f"{key} must be a multiple of checkpoint.snapshot_every ({every})"

    def _batch_problems(self) -> Iterator[str]:
        tokens, block, micro = self.train.batch_tokens, self.data.block_size, self.train.micro_batch
        if tokens is not None and tokens % block:
            yield (
                f"train.batch_tokens ({tokens:,}) must be a multiple of data.block_size ({block}), "
                f"for example {max(tokens // block, 1) * block:,}"
            )
        if micro != "auto" and self.batch_size % micro:
            divisor = max(n for n in range(1, micro + 1) if self.batch_size % n == 0)
            sequences = f"{self.batch_size} sequences of a step"
            yield f"train.micro_batch ({micro}) must divide the {sequences}, for example {divisor}"
        if self.train.compile == "cuda-graphs" and self.data.block_warmup is not None:
            yield (
                "train.compile: cuda-graphs needs a constant block size, "
                "but data.block_warmup changes it"
            )

    def _schedule_problems(self) -> Iterator[str]:
        schedule, steps = self.schedule, self.train.max_steps
        horizon, warmup = getattr(schedule, "horizon", None) or steps, schedule.warmup_steps
        end, key = min(horizon, steps), "schedule.horizon" if horizon < steps else "train.max_steps"
        if warmup >= end:
            yield f"schedule.warmup_steps ({warmup:,}) must be smaller than {key} ({end:,})"
        if isinstance(schedule, WsdSchedule) and warmup + schedule.decay_steps > horizon:
            yield (
                f"schedule.warmup_steps + schedule.decay_steps ({warmup:,} + "
                f"{schedule.decay_steps:,}) must not exceed the {horizon:,} steps"
            )
        if getattr(schedule, "min_lr", 0.0) > self.optimizer.lr:
            yield f"schedule.min_lr must not exceed the peak, optimizer.lr ({self.optimizer.lr:g})"


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return the values by dotted key, in the order of the sections."""

    def items(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from items(f"{prefix}.{key}", inner)
        else:
            yield prefix.removeprefix("."), value

    return dict(items("", config.model_dump(mode="json")))

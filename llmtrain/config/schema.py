"""The typed configuration of a run: every key, its type, its default, and which keys go together.

Why: a run that trained for a week on a default nobody chose is a lost week. Nothing is converted
silently, nothing unknown is accepted, and the resolved whole is enough to run it again. How it is
read from a file, and what a mistake is told, is in `config_file.py`.

    RunConfig.model_validate({"name": "x", "data": {"path": "data/x"}, "train": {"batch_sequences": 32}})
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmtrain.config.averages import AverageConfig
from llmtrain.config.base import (
    Betas,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Section,
    Seed,
    whole,
)
from llmtrain.config.data import DataConfig


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


class SpamConfig(Section):
    """What SPAM adds to AdamW (Huang et al. 2025, arXiv 2501.06842), with the values of its paper."""

    threshold: Rate = 5000.0
    """A gradient is cut to √(threshold · second moment) where its square is above threshold times that moment."""
    reset_every: Positive = 500
    """Steps after which both moments begin again at zero."""
    reset_warmup: Natural = 150
    """Steps over which the learning rate comes back after a reset, in half a cosine."""

    @model_validator(mode="after")
    def _comes_back(self) -> "SpamConfig":
        if self.reset_warmup >= self.reset_every:
            raise ValueError(
                f"reset_warmup {self.reset_warmup} is not below reset_every {self.reset_every}: "
                "the learning rate would never come back"
            )
        return self


class MuonConfig(Section):
    """Momentum of Muon (Jordan et al. 2024), which moves the matrices of the blocks; its keys beside AdamW's."""

    momentum: Fraction = 0.95
    """Share of the old in the running mean of gradients."""
    nesterov: bool = True
    """Look ahead: mix the gradient of the step into the mean once more."""


class OptimizerConfig(Section):
    """AdamW, SPAM over it, or Muon for matrices and AdamW for the rest. `decay` says what weight decay acts on."""

    name: Literal["adamw", "spam", "muon"] = "adamw"
    lr: Rate = 6e-4
    """Peak learning rate."""
    betas: Betas = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NonNegative = 0.1
    decay: Literal["linear", "matrices"] = "linear"
    """linear: weights of linear layers only (the paper); matrices: embeddings too (nanoGPT)."""
    grad_clip: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    spam: SpamConfig | None = None
    """With name: spam only."""
    muon: MuonConfig | None = None
    """With name: muon only."""

    @model_validator(mode="before")
    @classmethod
    def _own_keys_have_defaults(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        if name in ("spam", "muon") and values.get(name) is None:
            return values | {name: {}}
        return values

    @model_validator(mode="after")
    def _own_keys_are_used(self) -> "OptimizerConfig":
        for key in ("spam", "muon"):
            if getattr(self, key) is not None and self.name != key:
                raise ValueError(f"the keys under {key} do nothing with name: {self.name}")
        return self


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
    ConstantSchedule
    | CosineSchedule
    | LinearSchedule
    | InverseSqrtSchedule
    | WsdSchedule
    | CyclicSchedule,
    Field(discriminator="name"),
]


class TrainConfig(Section):
    """How long, in what batches, on what."""

    max_steps: Positive = 70_000
    batch_tokens: Positive | None = None
    """Tokens a step over all micro-batches (a multiple of data.block_size), or:"""
    batch_sequences: Positive | None = None
    """Sequences a step over all micro-batches. One of the two is set."""
    micro_batch: Literal["auto"] | Positive = 16
    """Sequences in one forward pass on one device. auto: the fastest that fits, found when the run begins."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights are float32 always. auto: bfloat16 where it is fast."""
    compile: Literal["auto", "cuda-graphs"] | bool = "auto"
    """torch.compile. auto: on CUDA; cuda-graphs: and what it makes is replayed as CUDA graphs, on one GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How weights lie on several processes. ddp: whole on each; fsdp: in shards; hsdp: in shards within a
    machine, the same on each machine. auto: ddp where that fits the GPU, else fsdp."""
    activation_checkpointing: bool = False
    """Compute the blocks again in the backward pass instead of keeping what they computed: less memory."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """When loss or gradient norm is NaN or infinite; the weights never see it. skip: pass over the
    step; rewind: as under `spikes`."""

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


class SpikesConfig(Section):
    """Loss spikes: a loss or gradient norm far above those of the last steps, by a robust z-score."""

    action: Literal["ignore", "log", "skip", "rewind"] = "log"
    """log: say so; skip: leave the update out; rewind: go back to a saved state and pass over the
    batches since (PaLM, Chowdhery et al. 2022, section 5.1)."""
    window: Annotated[int, BeforeValidator(whole), Field(ge=8)] = 128
    """Steps looked back on; nothing is a spike before so many steps were taken."""
    threshold: Rate = 10.0
    """Distance above the median, in robust standard deviations (1.4826 times the median deviation)."""
    rewind_steps: Positive = 100
    """A rewind goes back at least so many steps before the spike, or to the beginning: of the run, or of the
    stretch since the last rewind."""
    max_rewinds: Positive = 10
    """The run stops when it would rewind more often."""


class EvalConfig(Section):
    """Validation during training."""

    every: Positive = 1000
    """Steps between two evaluations. The last step is always evaluated."""
    tokens: Annotated[int, BeforeValidator(whole), Field(ge=2)] | None = None
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
    sample_tokens: Natural = 0
    """Length of a greedy continuation of the beginning of the val split, told at each evaluation."""
    tensorboard: bool = False
    """Write tensorboard/ in the run's folder."""
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    """Everything that decides a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run lies in runs/<name> unless --run-dir says otherwise; default: the file's name."""
    seed: Seed = 1337
    """Of the initial weights, the dropout and the data order."""
    init_from: str | None = None
    """Weights to begin with instead of random ones: a folder of weights, a nanoGPT .pt file, or a public
    GPT-2 (owner/name or owner/name@revision). The schedule warms up anew."""
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
        """Sequences in one step."""
        return self.train.batch_sequences or (self.train.batch_tokens or 0) // self.data.block_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step."""
        return self.batch_size * self.data.block_size

    def with_micro_batch(self, size: int) -> "RunConfig":
        """The same run with micro-batches of `size` sequences."""
        return self.model_copy(
            update={"train": self.train.model_copy(update={"micro_batch": size})}
        )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        tokens, block, micro = self.train.batch_tokens, self.data.block_size, self.train.micro_batch
        if tokens is not None and tokens % block:
            raise ValueError(
                f"train.batch_tokens {tokens:,} is not a multiple of data.block_size {block}: "
                f"{max(tokens // block, 1) * block:,} would be"
            )
        if micro != "auto" and self.batch_size % micro:
            fitting = [n for n in range(1, micro + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"a step of {self.batch_size} sequences does not divide into train.micro_batch {micro}: "
                f"{fitting[-1]} would"
            )
        if self.train.compile == "cuda-graphs" and self.data.block_warmup is not None:
            raise ValueError(
                "train.compile cuda-graphs records one length, data.block_warmup trains at many"
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
        if (
            isinstance(schedule, WsdSchedule)
            and schedule.warmup_steps + schedule.decay_steps > horizon
        ):
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps is {schedule.warmup_steps:,} + "
                f"{schedule.decay_steps:,}, more than the {horizon:,} steps"
            )
        if getattr(schedule, "min_lr", 0.0) > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr is above the peak, optimizer.lr {self.optimizer.lr:g}"
            )
        return self

    @property
    def rewinds(self) -> bool:
        """Whether training may go back to an earlier state."""
        return "rewind" in (self.spikes.action, self.train.on_nonfinite)

    @model_validator(mode="after")
    def _rewind_fits(self) -> "RunConfig":
        kept = (self.checkpoint.keep_states - 1) * self.checkpoint.state_every
        if self.rewinds and kept < self.spikes.rewind_steps:
            raise ValueError(
                f"a rewind of spikes.rewind_steps {self.spikes.rewind_steps:,} steps needs older states than are "
                f"kept: (checkpoint.keep_states - 1) · checkpoint.state_every is {kept:,}"
            )
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

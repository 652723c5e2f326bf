"""The typed configuration of a run: defaults, then the YAML file, then each `--set a.b=c`, in that order.

Why: a run that trained for a week on a default nobody chose is a lost week. Every key is typed and
known, a wrong one stops the command with its file, its line and the nearest right name, and the
resolved whole is written to the run, where it is enough to run it again.

    config = load_config(Path("configs/demo.yaml"), overrides=["optimizer.lr=6e-3"])
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmtrain.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
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


class EmaConfig(Section):
    """Exponential moving average of the weights, kept during training.

    Source: the paper's code; decay at update n is min(decay, 1 - (1 + n)^(-2/3)).
    """

    kind: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9
    save_every: Positive | None = None
    """Steps between two saves, a multiple of checkpoint.snapshot_every; default: checkpoint.state_every
    rounded up to one. The last step is always saved."""

    @property
    def label(self) -> str:
        """The name under which it is logged and saved."""
        return f"ema-{self.decay:g}"


class EvalConfig(Section):
    """Validation during training."""

    every: Positive = 1000
    """Steps between two evaluations. The last step is always evaluated."""
    tokens: Positive | None = None
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
    seed: Natural = 1337
    """Of the initial weights, the dropout and the data order."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = CosineSchedule(name="cosine", min_lr=6e-5)
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    averages: list[EmaConfig] = []
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
        if isinstance(schedule, _DecaySchedule) and schedule.warmup_steps >= horizon:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps:,} leaves nothing of the {horizon:,} steps"
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


# --- reading -----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 in which `6e-4` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text and its node tree (for line numbers).

    Raises:
        UserError: not YAML, an object tag, a repeated key; with the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (loader.construct_document(node) if node is not None else None), node
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"{place}: not valid YAML: {problem}",
            hint="check indentation, quotes and brackets around that line",
        ) from None


def load_config(file: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML configuration and apply `section.key=value` overrides.

    Raises:
        UserError: the file cannot be read, or a key, a type or a combination is wrong.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"cannot read the config {file}: {reason}",
            hint="shipped ones lie in configs/, such as configs/demo.yaml",
        ) from None
    values, node = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no keys", hint="it should look like configs/demo.yaml")
    for override in overrides or []:
        _apply(values, override)
    values.setdefault("name", file.stem)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(_describe(dict(e), file, node, overrides or []) for e in error.errors()),
            hint="every key is explained in configs/demo.yaml",
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


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


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip("."):
        raise UserError(
            f"--set {override!r} is not section.key=value", hint="for example --set optimizer.lr=6e-3"
        )
    value, _ = parse_yaml(text, f"--set {path}")
    *parents, last = path.strip().split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            place = None
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(
            f"--set {path}: there is no such place in the config", hint="see `llmtrain pretrain --help`"
        )


def _describe(error: dict[str, Any], file: Path, node: yaml.Node | None, overrides: list[str]) -> str:
    """One pydantic error as `file, line n: key: what is wrong`."""
    schedules = {get_args(s.model_fields["name"].annotation)[0] for s in _schedule_classes()}
    kinds = {"ema", "function-wrap", "literal['auto']", "bool", "int", "float", "tuple"}
    location = [str(part) for part in error["loc"] if str(part) not in schedules | (kinds - {"bool"})]
    if location and location[-1] == "bool":
        location.pop()
    key = ".".join(location)
    if any(o.partition("=")[0].strip() == key for o in overrides):
        place = "--set"
    else:
        line = _line_of(node, location)
        place = f"{file}, line {line}" if line else str(file)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "there is no such key" + _nearest(location)
    elif error["type"] == "missing":
        message = "this key is required"
    elif error["type"] != "value_error":
        message = f"{message} (got {error['input']!r})"
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _schedule_classes() -> tuple[type[_Schedule], ...]:
    return get_args(get_args(ScheduleConfig)[0])


def _known_keys(location: list[str]) -> list[str]:
    """Names of the section in which the last part of `location` stands."""
    fields: dict[str, Any] = dict(RunConfig.model_fields)
    for part in location[:-1]:
        if part == "schedule":
            fields = {name: info for s in _schedule_classes() for name, info in s.model_fields.items()}
        elif part == "averages":
            fields = dict(EmaConfig.model_fields)
        elif part in fields and isinstance(fields[part].annotation, type):
            fields = dict(fields[part].annotation.model_fields)
    return list(fields)


def _nearest(location: list[str]) -> str:
    matches = difflib.get_close_matches(location[-1], _known_keys(location), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches and matches[0] != location[-1] else ""


def _line_of(node: yaml.Node | None, location: list[str]) -> int | None:
    """Line (from 1) of the deepest part of `location` that the file holds."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
    return line

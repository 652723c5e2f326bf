"""Estimate the memory of one device at each moment of a step that can be its peak.

Why moments: the large tensors never coexist. At the loss all activations exist and, in the first
micro-batch, only the head's gradient; at the end of the backward pass the reverse holds.

DDP keeps weights, optimizer and averages on every device, and gradients in buckets that are never
freed (`gradient_as_bucket_view=True`). FSDP2 shards float32 weights, gradients, optimizer and
averages, but keeps whole gradients while micro-batches accumulate. It gathers, in the precision of
matrix products, the embeddings for the whole step and two blocks: the current and the next one. A
block's gradients exist in that precision and in float32 while they are reduced. Not counted: the
CUDA context, buffers of NCCL and cuBLAS, fragmentation, Muon's copies of single matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from llmtrain.config.schema import RunConfig
from llmtrain.config.sections import AverageConfig, LawaConfig, RunningMeanConfig, SwaConfig
from llmtrain.errors import UserError
from llmtrain.planning.hardware import Parallel
from llmtrain.planning.sizes import (
    DOUBLE,
    FLOAT,
    Activations,
    Architecture,
    bytes_held,
    has_several_snapshots,
    moments,
)

LESS_MEMORY = (
    "see llmtrain plan; use --set train.activation_checkpointing=true, a smaller eval.batch or "
    "data.block_size, or train.parallel=fsdp on several GPUs"
)
"""Hint for a run that needs too much memory."""
USABLE = 0.9
"""Share of a device's memory to fill; the rest is for fragmentation and the CUDA context."""


@dataclass(frozen=True)
class Layout:
    """Devices, and how a run is spread over them."""

    devices: int
    parallel: Parallel
    item: int
    """Bytes of a matrix product's result: 4 in float32, 2 in bfloat16."""
    cuda: bool

    @property
    def sharded(self) -> bool:
        """True if weights, gradients and optimizer are divided among the devices."""
        return self.parallel == "fsdp" and self.devices > 1


@dataclass(frozen=True)
class Usage:
    """Bytes on one device at one moment."""

    moment: str
    weights: int = 0
    optimizer: int = 0
    averages: int = 0
    gradients: int = 0
    copies: int = 0
    """Weights in the precision of matrix products: autocast's copies, or gathered by FSDP."""
    activations: int = 0
    logits: int = 0
    """A chunk of logits and what the loss computes from it."""
    buffers: int = 0
    """FSDP's buffers for reducing gradients."""
    written: int = 0
    """The copy of weights that is written during training; on a GPU's host, not here."""

    total: int = field(init=False)

    def __post_init__(self) -> None:
        parts = (value for name, value in vars(self).items() if name != "moment")
        object.__setattr__(self, "total", sum(parts))


def peak(usages: Sequence[Usage]) -> Usage:
    """Return the moment with the highest total."""
    return max(usages, key=lambda usage: usage.total)


def device_memory(config: RunConfig, layout: Layout) -> list[Usage]:
    """Return the usage at each moment that can be the peak."""
    run = _Run(config, layout)
    return [*run.training(), *run.between_steps()]


def smallest_peak(config: RunConfig, layout: Layout) -> Usage:
    """Return the peak with the micro-batch of the config; `auto` counts as 1."""
    known = config.with_micro_batch(1) if config.train.micro_batch == "auto" else config
    return peak(device_memory(known, layout))


def shortage(peak: Usage, available: float) -> str | None:
    """Return a message if a peak exceeds the available bytes."""
    if peak.total <= available:
        return None
    figures = f"needs about {peak.total / 1e9:,.2f} GB, and {available / 1e9:,.2f} GB are free"
    return f"memory may run out: the peak, {peak.moment}, {figures}"


def host_memory(config: RunConfig, layout: Layout) -> int:
    """Return the host bytes of a GPU's process: offloaded averages and copies being saved."""
    run = _Run(config, layout)
    offloaded = sum(bytes_held(each) for each in config.averages if each.offload)
    return offloaded * run.share + run.resident.total + run.written


def check_batch(config: RunConfig, processes: int) -> None:
    """Raise UserError unless a batch divides among processes, and a share into micro-batches."""
    micro = config.train.micro_batch
    share, rest = divmod(config.batch_size, processes)
    if rest:
        in_tokens = config.train.batch_tokens is not None
        key = "batch_tokens" if in_tokens else "batch_sequences"
        unit = config.data.block_size if in_tokens else 1
        valid = [n * processes * unit for n in (share, share + 1) if n]
        raise UserError(
            f"train.{key} {config.batch_size * unit:,} is not divisible by {processes:,} "
            f"processes: try {' or '.join(map('{:,}'.format, valid))}",
            hint=f"--set train.{key}={valid[-1]}, or another number of processes",
        )
    if micro != "auto" and share % micro:
        fitting = next(n for n in range(min(micro, share), 0, -1) if share % n == 0)
        raise UserError(
            f"a step has {share:,} sequences for each of {processes:,} processes, "
            f"not divisible by train.micro_batch {micro}: try {fitting}",
            hint=f"--set train.micro_batch={fitting}",
        )


def micro_batch(config: RunConfig) -> int:
    """Return the sequences in one forward pass; the config must not leave them to `auto`."""
    size = config.train.micro_batch
    assert size != "auto", "resolve it first with RunConfig.with_micro_batch"
    return size


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """Return the number of forward passes of one device in one step."""
    return config.batch_size // (layout.devices * micro_batch(config))


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _update_bytes(average: AverageConfig) -> int:
    # A running mean and its residual are float32 results of a float64 quotient.
    return 2 * FLOAT + DOUBLE if isinstance(average, RunningMeanConfig) else FLOAT


class _Run:
    """Sizes that the moments share."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.model = Architecture(config.model, config.data.block_size)
        self.saved = Activations(config, micro_batch(config), layout.item, cuda=layout.cuda)
        self.averages = [each for each in config.averages if not (layout.cuda and each.offload)]
        self.share = self._sharded(self.model.parameters)
        """Parameters whose float32 weights are on one device."""
        residual = any(isinstance(each, RunningMeanConfig) for each in config.averages)
        self.written = (2 if residual else 1) * FLOAT * self.model.parameters
        """Bytes that the first process writes: weights and a running mean's residual."""
        # A CPU takes steps while it writes a snapshot.
        overlaps = not layout.cuda and has_several_snapshots(config)
        self.resident = Usage(
            "",
            weights=FLOAT * self.share,
            optimizer=FLOAT * self._sharded(moments(config, self.model)),
            averages=sum(map(bytes_held, self.averages)) * self.share,
            written=self.written if overlaps else 0,
        )

    def training(self) -> list[Usage]:
        """Return the moments of the forward and backward pass."""
        at = partial(replace, self.resident)
        model, saved, item, sharded = self.model, self.saved, self.layout.item, self.layout.sharded
        # FSDP exchanges gradients once a step: until then each process accumulates whole ones.
        accumulates = micro_batches(self.config, self.layout) > 1
        # Gradients that exist before the backward pass begins.
        held = self._buckets() or (FLOAT * model.parameters if accumulates else 0)
        tied = FLOAT * model.token_embedding
        # The head's gradient of the tied matrix is kept until the embedding's is added.
        kept = item * model.token_embedding if sharded else tied
        cast = item * model.token_embedding if not sharded and item != FLOAT else 0
        above = FLOAT * self._sharded(model.without_embeddings - model.block)
        own = item * model.block if item != FLOAT else 0
        others = FLOAT * self._sharded(model.parameters - model.token_embedding)
        return [
            at(
                moment="at the loss",  # everything is saved, and the head computes its gradients
                gradients=held + tied,
                copies=self._copies(forward=True) + cast,
                activations=saved.blocks + saved.head,
                logits=saved.loss,
            ),
            at(
                moment="in the last block's forward",
                gradients=held,
                copies=self._copies(forward=True),
                activations=saved.forward,
            ),
            at(
                moment="in the last block's backward",
                gradients=held + kept,
                copies=self._copies(forward=False),
                activations=saved.blocks + saved.recomputed + saved.block_backward,
                buffers=self._reduced(model.block),
            ),
            at(
                moment="in the first block's backward",  # the other blocks' gradients exist
                gradients=(held or above) + kept,
                copies=self._copies(forward=False) if sharded else own,
                activations=saved.block + saved.block_backward,
                buffers=self._reduced(model.block),
            ),
            at(
                # On a CPU the tied matrix's second gradient is sparse, with the stream's gradient
                # as values, and the sum is new.
                moment="at the end of backward",
                gradients=(held or others) + 2 * kept,
                copies=item * model.root if sharded else 0,
                activations=saved.stream,
                buffers=self._reduced(model.root),
            ),
        ]

    def between_steps(self) -> list[Usage]:
        """Return the moments of saving and of an evaluation, a forward pass over other data."""
        at = partial(replace, self.resident, gradients=self._buckets())
        averages = self.resident.averages
        updates = max(map(_update_bytes, self.averages), default=0) * self.share
        # Means are divided out, and FSDP's shards set aside.
        kinds = SwaConfig | RunningMeanConfig | LawaConfig
        means = any(isinstance(each, kinds) for each in self.config.averages)
        aside = self.layout.sharded and bool(self.config.averages)
        return [
            at(
                moment="when averages or weights are saved",
                averages=averages + updates,
                written=0 if self.layout.cuda else self.written,
            ),
            at(
                moment="in an evaluation",
                averages=averages + FLOAT * self.share * (means + aside),
                copies=self._copies(forward=True),
                activations=self.saved.evaluation(self.config.eval.batch),
            ),
        ]

    def _sharded(self, parameters: int) -> int:
        return math.ceil(parameters / self.layout.devices) if self.layout.sharded else parameters

    def _copies(self, *, forward: bool) -> int:
        """Return the bytes of weight copies for the blocks: autocast's, or gathered by FSDP."""
        model, item = self.model.model, self.layout.item
        if self.layout.sharded:
            return item * (self.model.root + min(2, model.n_layer) * self.model.block)
        if item == FLOAT:
            return 0
        if forward or not self.config.train.activation_checkpointing:
            return item * self.model.autocast
        # With checkpointing, only the current block's copies outlive the forward pass.
        return item * (self.model.autocast - (model.n_layer - 1) * 12 * model.n_embd**2)

    def _reduced(self, parameters: int) -> int:
        """Return the bytes of a gathered group's gradients before and after FSDP's reduction."""
        return (self.layout.item + FLOAT) * parameters if self.layout.sharded else 0

    def _buckets(self) -> int:
        """Return the bytes of DDP's gradient buckets."""
        replicated = self.layout.parallel == "ddp" and self.layout.devices > 1
        return FLOAT * self.share if replicated else 0

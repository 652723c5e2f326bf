"""Bytes on one device at the moments of a step that can be its peak.

Why moments: what is large is never all alive together. At the loss every activation is and, in the first
micro-batch on one device, no gradient but the head's; at the end of the backward pass it is the other way round.

    usages = device_memory(config, Layout(devices=8, parallel="fsdp", item=2, cuda=True)); peak(usages)

DDP: weights, optimizer and averages on every device; gradients lie in the buckets (views of them, as with
`gradient_as_bucket_view=True`), which are never given back. FSDP2: float32 weights, gradients, optimizer
and averages in shards, but gradients whole while micro-batches add up; gathered in the precision of
matrix products are the embeddings, for the whole step, and two blocks, the one at work and the next; a
block's gradients wait in that precision while their float32 copy is reduced. Not counted: the CUDA
context, NCCL's and cuBLAS's own buffers, fragmentation, the few copies of one matrix that Muon works with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from llmtrain.config.schema import RunConfig
from llmtrain.config.sections import AverageConfig, LawaConfig, RunningMeanConfig, SwaConfig
from llmtrain.planning.activations import FLOAT, Activations
from llmtrain.planning.architecture import Architecture

DOUBLE = 8
"""Bytes of a float64."""

USABLE = 0.9
"""Share of a device's memory that a plan may fill: it does not count the allocator's gaps and CUDA's context."""

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Layout:
    """On what a run is spread."""

    devices: int
    parallel: Parallel
    item: int
    """Bytes of a matrix product's result: 4 in float32, 2 in bfloat16."""
    cuda: bool

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimizer are divided among the devices."""
        return self.parallel == "fsdp" and self.devices > 1

    @property
    def replicated(self) -> bool:
        """Whether every device holds all of them, and gradients in buckets."""
        return self.parallel == "ddp" and self.devices > 1


@dataclass(frozen=True)
class Usage:
    """Bytes on one device at one moment."""

    moment: str
    weights: int = 0
    optimizer: int = 0
    averages: int = 0
    gradients: int = 0
    copies: int = 0
    """Of weights in the precision of matrix products: autocast's, or what FSDP gathered."""
    activations: int = 0
    logits: int = 0
    """Of a chunk, and what the loss makes of them."""
    buffers: int = 0
    """FSDP's, for reducing gradients."""
    written: int = 0
    """The copy of weights that is written while training goes on; on a GPU's host, not here."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = tuple(field.name for field in fields(Usage) if field.name != "moment")
"""What a usage is made of."""


def peak(usages: Sequence[Usage]) -> Usage:
    """The moment at which most is used."""
    return max(usages, key=lambda usage: usage.total)


def device_memory(config: RunConfig, layout: Layout) -> list[Usage]:
    """What is used at each moment that can be the peak.

    Args:
        config: the run.
        layout: devices, and how the run is spread over them.
    """
    run = _Run(config, layout)
    return [
        run.loss(),
        run.forward(),
        run.last_block(),
        run.first_block(),
        run.end(),
        run.averaging(),
        run.evaluating(),
    ]


def host_memory(config: RunConfig, layout: Layout) -> int:
    """Host memory for a process with a GPU: averages kept there, and the copies of what is being saved.

    Those are a state, and on the first process whole weights, with what a running mean lost by rounding.
    """
    run = _Run(config, layout)
    offloaded = sum(bytes_held(each) for each in config.averages if each.offload)
    return offloaded * run.share + run.resident.total + run.written


def micro_batch(config: RunConfig) -> int:
    """Sequences in one forward pass; of a config that says it."""
    size = config.train.micro_batch
    assert size != "auto", "a plan is of one number: RunConfig.with_micro_batch"
    return size


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """Forward passes of one device in one step."""
    return config.batch_size // (layout.devices * micro_batch(config))


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def moments(config: RunConfig, model: Architecture) -> int:
    """Numbers that the optimizer keeps: AdamW two of each parameter, Muon one of each in the blocks' matrices."""
    return 2 * model.parameters - (model.matrices if config.optimizer.muon is not None else 0)


def bytes_held(average: AverageConfig) -> int:
    """Bytes that an online average keeps of each parameter (`averaging/online.py`)."""
    match average:
        case SwaConfig() | RunningMeanConfig():
            return DOUBLE
        case LawaConfig():
            return FLOAT * average.window
        case _:
            return FLOAT


def _bytes_made(average: AverageConfig) -> int:
    """Bytes of each parameter that exist only while an average is updated or saved.

    A recursion scales a copy of the weights, a queue takes its newest before it drops its oldest, a mean is
    divided out; a running mean and what it lost by rounding are float32, both from a float64 quotient.
    """
    return 2 * FLOAT + DOUBLE if isinstance(average, RunningMeanConfig) else FLOAT


class _Run:
    """The sizes of which the moments are made; each method is one moment."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.model = Architecture(config.model, config.data.block_size)
        self.saved = Activations(
            self.model,
            micro_batch(config),
            layout.item,
            layout.cuda,
            config.train.activation_checkpointing,
        )
        self.here = [each for each in config.averages if not (layout.cuda and each.offload)]
        self.share = self._sharded(self.model.parameters)
        """Parameters whose float32 weights lie on one device."""
        self.resident = Usage(
            "",
            weights=FLOAT * self.share,
            optimizer=FLOAT * self._sharded(moments(config, self.model)),
            averages=sum(map(bytes_held, self.here)) * self.share,
        )
        residual = any(isinstance(each, RunningMeanConfig) for each in config.averages)
        self.written = (2 if residual else 1) * FLOAT * self.model.parameters
        """Copy of what the first process writes: whole weights, with what a running mean lost by rounding."""
        last_before_end = (config.train.max_steps - 1) // config.checkpoint.snapshot_every
        if (
            not layout.cuda
            and last_before_end * config.checkpoint.snapshot_every > config.schedule.warmup_steps
        ):
            self.resident = replace(
                self.resident, written=self.written
            )  # steps are taken while it is written
        accumulating = micro_batches(config, layout) > 1
        # FSDP exchanges gradients once a step: until then each process adds up whole ones.
        accumulated = FLOAT * self.model.parameters if accumulating else 0
        self.held_gradients = FLOAT * self.share if layout.replicated else accumulated
        """Gradients that are there before the backward pass begins."""
        self.tied = (layout.item if layout.sharded else FLOAT) * self.model.token_embedding
        """The head's gradient of the tied matrix, which waits for the embedding's: float32 until it is returned."""

    def _sharded(self, parameters: int) -> int:
        return math.ceil(parameters / self.layout.devices) if self.layout.sharded else parameters

    def _copies(self, *, forward: bool) -> int:
        """Copies of the weights that the blocks hold: autocast's, or what FSDP gathered."""
        if self.layout.sharded:
            gathered = self.model.root + min(2, self.model.model.n_layer) * self.model.block
            return self.layout.item * gathered
        if self.layout.item == FLOAT:
            return 0
        model = self.model.model
        # Autocast keeps them to the end of the forward pass, checkpointing none after it but of the block at work.
        keeps = forward or not self.saved.checkpointing
        dropped = 0 if keeps else (model.n_layer - 1) * 12 * model.n_embd**2
        return self.layout.item * (self.model.multiplied - dropped)

    def _reduced(self, parameters: int) -> int:
        """FSDP's gradients of a gathered group, as they came and as they are reduced."""
        return (self.layout.item + FLOAT) * parameters if self.layout.sharded else 0

    def loss(self) -> Usage:
        """All that is saved for the backward pass, while the head forms its gradients."""
        cast = self.layout.item * self.model.token_embedding
        return replace(
            self.resident,
            moment="at the loss",
            gradients=self.held_gradients + FLOAT * self.model.token_embedding,
            copies=self._copies(forward=True)
            + (0 if self.layout.sharded or self.layout.item == FLOAT else cast),
            activations=self.saved.blocks + self.saved.head,
            logits=self.saved.loss,
        )

    def forward(self) -> Usage:
        """Before the loss: of what the last block works with, most is not kept where it is computed again."""
        return replace(
            self.resident,
            moment="in the last block's forward",
            gradients=self.held_gradients,
            copies=self._copies(forward=True),
            activations=self.saved.forward,
        )

    def last_block(self) -> Usage:
        """The head is through, the activations of all blocks are there."""
        return replace(
            self.resident,
            moment="in the last block's backward",
            gradients=self.held_gradients + self.tied,
            copies=self._copies(forward=False),
            activations=self.saved.blocks + self.saved.recomputed + self.saved.block_backward,
            buffers=self._reduced(self.model.block),
        )

    def first_block(self) -> Usage:
        """All gradients but its own and the embeddings' are there, and autocast's copies are gone."""
        above = FLOAT * self._sharded(self.model.without_embeddings - self.model.block)
        own = self.layout.item * self.model.block if self.layout.item != FLOAT else 0
        return replace(
            self.resident,
            moment="in the first block's backward",
            gradients=(self.held_gradients or above) + self.tied,
            copies=self._copies(forward=False) if self.layout.sharded else own,
            activations=self.saved.block + self.saved.block_backward,
            buffers=self._reduced(self.model.block),
        )

    def end(self) -> Usage:
        """The tied matrix has two gradients, the second of which becomes their sum.

        On a CPU it has one and a sparse one, whose values are the gradient of the stream; their sum is new.
        """
        others = FLOAT * self._sharded(self.model.parameters - self.model.token_embedding)
        return replace(
            self.resident,
            moment="at the end of backward",
            gradients=(self.held_gradients or others) + 2 * self.tied,
            copies=self.layout.item * self.model.root if self.layout.sharded else 0,
            activations=self.saved.stream,
            buffers=self._reduced(self.model.root),
        )

    def averaging(self) -> Usage:
        """Averages are updated or saved; linear weights are turned round one by one, each in place of its copy."""
        return replace(
            self.resident,
            moment="when averages or weights are saved",
            averages=self.resident.averages
            + max(map(_bytes_made, self.here), default=0) * self.share,
            gradients=self._buckets,
            written=0 if self.layout.cuda else self.written,
        )

    def evaluating(self) -> Usage:
        """A forward pass of the validation data; a mean is divided out for it, and FSDP's shards put aside."""
        means = any(
            isinstance(each, SwaConfig | RunningMeanConfig | LawaConfig)
            for each in self.config.averages
        )
        aside = self.layout.sharded and bool(self.config.averages)
        return replace(
            self.resident,
            moment="in an evaluation",
            averages=self.resident.averages + FLOAT * self.share * (means + aside),
            gradients=self._buckets,
            copies=self._copies(forward=True),
            activations=self.saved.evaluation(self.config.eval.batch),
        )

    @property
    def _buckets(self) -> int:
        """Gradients between two steps: only what DDP never gives back."""
        return FLOAT * self.share if self.layout.replicated else 0

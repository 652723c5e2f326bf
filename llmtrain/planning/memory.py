"""Bytes on one device at the moments of a step that can be its peak.

Why moments: what is large is never all alive together. At the loss every activation is and, in the first
micro-batch on one device, no gradient; at the end of the backward pass it is the other way round.

    usages = device_memory(config, Layout(devices=8, parallel="fsdp", item=2, cuda=True)); peak(usages)

DDP: weights, optimizer and averages on every device; gradients lie in the buckets (views of them, as with
`gradient_as_bucket_view=True`), which are never given back. FSDP2: float32 weights, gradients, optimizer
and averages in shards; gathered in the precision of matrix products are the embeddings, for the whole
step, and two blocks, the one at work and the next; a block's gradients wait in that precision while
their float32 copy is reduced. Not counted: the CUDA context, NCCL's and cuBLAS's own buffers, fragmentation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from llmtrain.config import AverageConfig, LawaConfig, RunConfig, RunningMeanConfig, SwaConfig
from llmtrain.planning.activations import FLOAT, Activations
from llmtrain.planning.architecture import Architecture

DOUBLE = 8
"""Bytes of a float64."""

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
    """And the loss."""
    buffers: int = 0
    """FSDP's, for reducing gradients."""

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
    return [*_of_a_step(config, layout), *_between_steps(config, layout)]


def micro_batches(config: RunConfig, layout: Layout) -> int:
    """Forward passes of one device in one step."""
    return config.batch_size // (layout.devices * config.train.micro_batch)


def _resident(config: RunConfig, layout: Layout) -> Usage:
    """What is there all the time: float32 weights, AdamW's two moments, the online averages."""
    count = math.ceil(Architecture(config.model, config.data.block_size).parameters / _shards(layout))
    held = sum(bytes_held(each) for each in config.averages if not (layout.cuda and each.offload))
    return Usage("", weights=FLOAT * count, optimizer=2 * FLOAT * count, averages=held * count)


def _of_a_step(config: RunConfig, layout: Layout) -> list[Usage]:
    """At the loss, in the backward of the last and the first block, and where the embeddings get theirs."""
    model = Architecture(config.model, config.data.block_size)
    saved = Activations(model, config.train.micro_batch, layout.item, layout.cuda)
    accumulating = micro_batches(config, layout) > 1
    everywhere = FLOAT * math.ceil(model.parameters / _shards(layout))
    before = everywhere if layout.replicated or accumulating else 0
    tied = (layout.item if layout.sharded else FLOAT) * model.token_embedding
    block_copies = layout.item * model.block if layout.item != FLOAT else 0
    copies = _copies(model, layout)
    reduced = (layout.item + FLOAT) * model.block if layout.sharded else 0
    root = model.parameters - model.model.n_layer * model.block
    above = FLOAT * math.ceil((model.without_embeddings - model.block) / _shards(layout))
    resident = _resident(config, layout)
    return [
        replace(
            resident,
            moment="at the loss",
            gradients=before,
            copies=copies,
            activations=saved.blocks + saved.head,
            logits=saved.loss,
        ),
        replace(
            resident,
            moment="in the last block's backward",
            gradients=before + tied,
            copies=copies,
            activations=saved.blocks + saved.block_backward,
            buffers=reduced,
        ),
        replace(
            resident,
            moment="in the first block's backward",
            gradients=(before or above) + tied,
            copies=copies if layout.sharded else block_copies,
            activations=saved.block + saved.block_backward,
            buffers=reduced,
        ),
        # The tied matrix has a gradient from the head and one from the embedding; the sum takes the place of
        # one of them where it was cast from bfloat16, and is a third where it was not.
        replace(
            resident,
            moment="at the end of backward",
            gradients=(before or everywhere - FLOAT * math.ceil(model.token_embedding / _shards(layout))) + (3 if layout.item == FLOAT else 2) * tied,
            copies=layout.item * root if layout.sharded else 0,
            buffers=(layout.item + FLOAT) * root if layout.sharded else 0,
        ),
    ]


def _between_steps(config: RunConfig, layout: Layout) -> list[Usage]:
    """In an update or a save of averages, and in an evaluation; there are no gradients but in buckets."""
    model = Architecture(config.model, config.data.block_size)
    saved = Activations(model, config.train.micro_batch, layout.item, layout.cuda)
    resident = replace(
        _resident(config, layout), gradients=FLOAT * model.parameters if layout.replicated else 0
    )
    count = math.ceil(model.parameters / _shards(layout))
    here = [each for each in config.averages if not (layout.cuda and each.offload)]
    making = max((_made(each) for each in here), default=0) * count
    evaluated = FLOAT * count if any(isinstance(each, _MEANS) for each in config.averages) else 0
    return [
        replace(
            resident,
            moment="when averages are updated or saved",
            averages=resident.averages + making,
            buffers=_transposed(model, layout),
        ),
        replace(
            resident,
            moment="in an evaluation",
            averages=resident.averages + evaluated,
            copies=_copies(model, layout),
            activations=saved.evaluation(config.eval.batch),
        ),
    ]


def host_memory(config: RunConfig, layout: Layout) -> int:
    """Host memory for a process with a GPU: averages kept there, and the copy of a state being saved."""
    count = math.ceil(Architecture(config.model, config.data.block_size).parameters / _shards(layout))
    held = sum(bytes_held(each) for each in config.averages if each.offload)
    resident = _resident(config, layout)
    return held * count + resident.weights + resident.optimizer + resident.averages


_MEANS = (SwaConfig, RunningMeanConfig, LawaConfig)


def bytes_held(average: AverageConfig) -> int:
    """Bytes that an online average keeps of each parameter (`averaging/online.py`)."""
    match average:
        case SwaConfig() | RunningMeanConfig():
            return DOUBLE
        case LawaConfig():
            return FLOAT * average.window
        case _:
            return FLOAT


def _made(average: AverageConfig) -> int:
    """Bytes of each parameter that exist only while an average is updated or saved.

    A recursion scales a copy of the weights, a queue takes its newest before it drops its oldest, a mean is
    divided out; a running mean and what it lost by rounding are float32, both from a float64 quotient.
    """
    return 3 * FLOAT + DOUBLE - FLOAT if isinstance(average, RunningMeanConfig) else FLOAT


def _shards(layout: Layout) -> int:
    return layout.devices if layout.sharded else 1


def _copies(model: Architecture, layout: Layout) -> int:
    """Copies of weights that a forward pass holds: autocast's of all it multiplies, or FSDP's gathered."""
    if layout.sharded:
        root = model.parameters - model.model.n_layer * model.block
        return layout.item * (root + min(2, model.model.n_layer) * model.block)
    return layout.item * model.multiplied if layout.item != FLOAT else 0


def _transposed(model: Architecture, layout: Layout) -> int:
    """A saved folder's linear weights lie the other way round: on a CPU, a copy in the same memory."""
    return 0 if layout.cuda else FLOAT * 12 * model.model.n_embd**2 * model.model.n_layer

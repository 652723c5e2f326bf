"""Count parameters, FLOPs, activation bytes and disk usage without building the model.

Why: constants fitted to measurements hold only for the measured models. These formulas follow what
autograd saves in each operation. Per token of a block, with e bytes in a matrix product's result
(4, or 2 in bfloat16), width C, H heads and length T:

    layer norm ×2   float32 input (4·C), mean and 1/std (8)
    c_attn          cast input (e·C)
    attention       q, k, v (3·e·C), result (e·C, also the input of c_proj), logsumexp (4·H)
    c_fc            cast input (e·C)
    GELU            input (4·e·C); its result is the input of c_proj (4·e·C)
                                              sum: 2·4·C + 14·e·C + 16 + 4·H

Materialized attention saves q·scale, copies of k and v (3·e·C) and its weights (e·H·T) instead of
the logsumexp. Under bfloat16 autocast, every linear layer also keeps a 2-byte copy of its weights.
The formulas hold for the uncompiled model; torch.compile saves less: it recomputes and fuses.
"""

from dataclasses import dataclass

from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.config.sections import (
    AverageConfig,
    EmaConfig,
    LawaConfig,
    PowerEmaConfig,
    RunningMeanConfig,
    SwaConfig,
)
from llmtrain.model.chunk_sizes import (
    MAX_MATERIALIZED_LENGTH,
    rows_in_cache,
    rows_per_chunk,
    rows_per_slab,
    sequences_per_chunk,
)

FLOAT, DOUBLE = 4, 8
"""Bytes of a float32 and a float64."""


class Architecture:
    """Counts of one model with width C, vocabulary V, block size T and L layers."""

    def __init__(self, model: ModelConfig, block_size: int) -> None:
        width, layers, biases = model.n_embd, model.n_layer, int(model.bias)
        self.model, self.block_size = model, block_size
        self.token_embedding = model.vocab_size * width
        """Parameters V·C, shared with the output head."""
        self.block = 12 * width**2 + (2 + 11 * biases) * width
        """Parameters of a block: four linear layers, two norms, biases."""
        self.without_embeddings = layers * self.block + (1 + biases) * width
        self.parameters = self.token_embedding + block_size * width + self.without_embeddings
        """All parameters, with the tied matrix counted once."""
        self.root = self.parameters - layers * self.block
        self.matrices = layers * 12 * width**2
        self.autocast = self.matrices + 9 * biases * layers * width
        """Parameters of the blocks that autocast copies: linear layers with their biases."""
        self.stored = self.parameters + (1 - biases) * (11 * layers + 1) * width
        """Numbers in a weights folder, where a model without biases stores zeros for them."""

    def flops_per_token(self, length: int | None = None) -> int:
        """Return 6N + 12·L·C·T, the training FLOPs of a token (PaLM, 2022, appendix B)."""
        width = self.model.n_embd
        matrices = self.parameters - self.block_size * width
        return 6 * matrices + 12 * self.model.n_layer * width * (length or self.block_size)


class Activations:
    """Activation bytes of one micro-batch on one device."""

    def __init__(self, config: RunConfig, micro_batch: int, item: int, *, cuda: bool) -> None:
        """Derive all sizes; `item` is the bytes of a matrix product's result (2 in bfloat16)."""
        self._model, self._item, self._cuda = config.model, item, cuda
        self._kind = "cuda" if cuda else "cpu"
        self._length = config.data.block_size
        layers, width, dropout = self._model.n_layer, self._model.n_embd, self._model.dropout > 0
        tokens = micro_batch * self._length
        self._cast = item if item != FLOAT else 0
        """Bytes of a float32 number cast for a matrix product."""
        self._attention_weights = item * self._model.n_head * self._length
        """Bytes of a token's attention weights, T per head."""
        self._materialized = not cuda and item != FLOAT and self._length <= MAX_MATERIALIZED_LENGTH
        """Attention keeps its weights; see `materialized_attention` in llmtrain/model."""
        self._in_mlp = (4 * FLOAT + 8 * item) * width
        """Bytes per token: embedding, stream before and after attention, norm, GELU in and out."""
        self._in_attention = (3 * FLOAT + 5 * item) * width
        """Bytes per token: embedding, stream, norm, q, k, v, a copy of v, result."""

        self.stream = tokens * FLOAT * width
        kept = self._attention_weights if self._materialized else FLOAT * self._model.n_head
        per_token = (2 * FLOAT + 14 * item) * width + 4 * FLOAT + kept
        self.block = tokens * (per_token + (self._dropout() if dropout else 0))
        self.recomputed = self.block if config.train.activation_checkpointing else 0
        mask = (1 if cuda else FLOAT) * width if dropout else 0
        saved = self.stream if config.train.activation_checkpointing else self.block
        self.blocks = layers * saved + tokens * mask
        """Saved by all blocks and by the embedding's dropout."""
        self.head = tokens * (2 * FLOAT + self._cast + item) * width
        """The head's forward pass: the last norm's input, result, cast and gradient."""
        slab = rows_per_slab(self._model.vocab_size, self._kind) * width * (item + FLOAT)
        self.loss = self._logits(tokens, slab)
        """The chunked cross-entropy, which computes gradients in the forward pass."""
        attention = self._in_attention + 2 * self._attention_weights
        work = max(self._in_mlp, attention) if self._materialized else self._in_mlp
        self.forward = self.blocks * (layers - 1) // layers + tokens * work
        """The last block's forward pass, with what earlier blocks saved."""
        self.block_backward = self._block_backward(tokens)
        """Peak of a block's backward pass, beyond the saved activations."""

    def evaluation(self, batch: int) -> int:
        """Return the peak of a forward pass without gradients over `batch` sequences."""
        width, vocabulary = self._model.n_embd, self._model.vocab_size
        tokens = batch * self._length
        few = min(sequences_per_chunk(self._length * self._attention_weights), batch)
        weights = 2 * few * self._length * self._attention_weights
        attention = tokens * self._in_attention + weights if self._materialized else 0
        head = tokens * (FLOAT + self._cast) * width + self._cast * vocabulary * width
        softmax = FLOAT * self._softmax_rows(tokens) * vocabulary
        return max(tokens * self._in_mlp, attention, head + self._logits(tokens, 0) + softmax)

    def _block_backward(self, tokens: int) -> int:
        """Return the larger peak of the MLP's last matrix product and of materialized softmax.

        MLP: the gradient of the residual stream, its cast (with dropout also its masked copy), the
        gradients of GELU's result and of the weights. Softmax: (4·C + 11·e·C) per token are freed;
        the gradients of stream and v and two tensors of attention-weight size exist (net one with
        dropout).
        """
        width, e, dropout = self._model.n_embd, self._item, self._model.dropout > 0
        branch = self._cast + (e if dropout else 0)
        mlp = tokens * (FLOAT + branch + 4 * e) * width + 4 * e * width**2
        weights = (1 if dropout else 2) * self._attention_weights
        return max(mlp, tokens * (weights - 10 * e * width)) if self._materialized else mlp

    def _dropout(self) -> int:
        """Return the bytes per token that dropout adds to a block: two masks of width C.

        CUDA stores a mask in one byte and fuses attention. Elsewhere masks are floats, and
        attention keeps softmax, mask and product, and q, k, v in float32. Materialized attention
        keeps them in e bytes, and the softmax anyway.
        """
        width, e = self._model.n_embd, self._item
        if self._cuda:
            return 2 * width
        if self._materialized:
            return 2 * e * width + 2 * self._attention_weights
        softmax = FLOAT * self._model.n_head * self._length
        return 2 * e * width + 3 * softmax + 3 * (FLOAT - e) * width

    def _logits(self, tokens: int, slab: int) -> int:
        """Return a chunk of logits and the larger of its float32 gradients and `slab`."""
        vocabulary = self._model.vocab_size
        in_float32 = FLOAT * self._softmax_rows(tokens) * vocabulary if self._cast else 0
        return self._item * self._chunk_rows(tokens) * vocabulary + max(in_float32, slab)

    def _chunk_rows(self, tokens: int) -> int:
        vocabulary, kind = self._model.vocab_size, self._kind
        return rows_per_chunk(tokens, vocabulary, itemsize=self._item, device_type=kind)

    def _softmax_rows(self, tokens: int) -> int:
        """Return how many rows of logits share one softmax call."""
        rows = self._chunk_rows(tokens)
        return rows if self._cuda else min(rows, rows_in_cache(self._model.vocab_size))


@dataclass(frozen=True)
class SavedFolders:
    """Folders of one kind."""

    label: str
    count: int
    bytes_each: int

    @property
    def bytes(self) -> int:
        """Bytes of all folders."""
        return self.count * self.bytes_each


@dataclass(frozen=True)
class DiskUsage:
    """Folders on disk at the end of an uninterrupted run."""

    snapshots: SavedFolders
    averages: tuple[SavedFolders, ...]
    states: SavedFolders
    states_saved: int
    """Training checkpoints saved in total; older ones are deleted."""
    total: int
    largest: int
    """Highest number of bytes: the last state is durable before the oldest is deleted."""


def disk_usage(config: RunConfig) -> DiskUsage:
    """Return the tensor bytes that a run leaves on disk."""
    model = Architecture(config.model, config.data.block_size)
    held = sum(bytes_held(each) for each in config.averages) * model.parameters
    state = FLOAT * (model.parameters + moments(config, model)) + held
    # A run that may rewind also saves its first state.
    saved = len(_multiples(config.checkpoint.state_every, config)) + config.may_rewind
    states = SavedFolders("states", min(saved, config.checkpoint.keep_states), state)
    snapshots = SavedFolders("snapshots", len(snapshot_steps(config)), snapshot_bytes(config))
    averages = tuple(_saved_average(each, config) for each in config.averages)
    total = sum(folders.bytes for folders in (snapshots, *averages, states))
    largest = total + (state if saved > states.count else 0)
    return DiskUsage(snapshots, averages, states, saved, total, largest)


def moments(config: RunConfig, model: Architecture) -> int:
    """Return the size of the optimizer's moments: two per parameter, one in Muon's matrices."""
    return 2 * model.parameters - (model.matrices if config.optimizer.muon is not None else 0)


def bytes_held(average: AverageConfig) -> int:
    """Return the bytes per parameter of an online average."""
    if isinstance(average, SwaConfig | RunningMeanConfig):
        return DOUBLE
    return FLOAT * average.window if isinstance(average, LawaConfig) else FLOAT


def _multiples(every: int, config: RunConfig) -> list[int]:
    last = config.train.max_steps
    return [*range(every, last, every), last]


def snapshot_steps(config: RunConfig) -> list[int]:
    """Return the steps of snapshots: those after warm-up on the grid, and the last one."""
    steps = _multiples(config.checkpoint.snapshot_every, config)
    return [step for step in steps if step > config.schedule.warmup_steps]


def has_several_snapshots(config: RunConfig) -> bool:
    """Return whether a snapshot precedes that of the last step."""
    every, last = config.checkpoint.snapshot_every, config.train.max_steps
    return (last - 1) // every * every > config.schedule.warmup_steps


def snapshot_bytes(config: RunConfig) -> int:
    """Return the bytes of one weights folder."""
    return FLOAT * Architecture(config.model, config.data.block_size).stored


def _saved_average(average: AverageConfig, config: RunConfig) -> SavedFolders:
    grid = set(_multiples(config.save_every(average), config))
    steps = [s for s in snapshot_steps(config) if s in grid and _ready(average, s, config)]
    files = 2 if isinstance(average, RunningMeanConfig) else 1  # with the mean's residual
    return SavedFolders(f"averages/{average.label}", len(steps), files * snapshot_bytes(config))


def _ready(average: AverageConfig, step: int, config: RunConfig) -> bool:
    warmup = config.schedule.warmup_steps
    first = 1 if isinstance(average, EmaConfig | PowerEmaConfig) else warmup + 1
    start = average.start if average.start is not None else first
    updates = step // average.every - max(start - 1, 0) // average.every
    return updates >= (average.window if isinstance(average, LawaConfig) else 1)

"""Bytes that a training step keeps between forward and backward, from what autograd saves in the model.

Why by derivation: constants fitted to measurements are right for the models measured; what each
operation saves is right for all. For one token of one block, e being the bytes of a matrix product's
result (4, or 2 in bfloat16), C the width, H the heads:

    layer norm ×2   its input, the float32 residual stream (4·C), and mean and 1/std (8)
    c_attn          its input, cast to e (e·C)
    attention       q, k, v (3·e·C) and its result (e·C, which c_proj saves too), logsumexp (4·H)
    c_fc            its input, cast (e·C)
    GELU            its input (4·e·C); c_proj saves its result (4·e·C)
                                                 together 2·4·C + 14·e·C + 16 + 4·H

Attention by whole products (`by_products`) keeps q·scale and copies of k and v (3·e·C) too, and instead of
logsumexp its weights (e·H·T, T the length); the scores are gone. The head's loss (`llmtrain/head.py`) forms
its gradients in the forward pass, from a chunk of R rows of logits at a time (e·R·V, V the vocabulary): its
peak. Alive are its input (4·C a token), that cast, the gradient of that (e·C), the weight cast (e·V·C), and
the gradient of the weight, S rows of it as a product and in float32 ((e + 4)·S·C), in float32 (4·V·C). Kept
for the backward pass are the two gradients. Under bfloat16 autocast each weight of a linear layer is kept as
a 2-byte copy as well (`Architecture.multiplied`). For the uncompiled model: torch.compile recomputes and
fuses, and saves less.

    activations = Activations(architecture, micro_batch=16, item=2, cuda=True); activations.block
"""

from dataclasses import dataclass

from llmtrain.model.chunk_sizes import (
    MAX_MATERIALIZED_LENGTH,
    rows_in_cache,
    rows_per_chunk,
    rows_per_slab,
    sequences_per_chunk,
)
from llmtrain.planning.architecture import Architecture

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch on one device."""

    architecture: Architecture
    micro_batch: int
    item: int
    """Bytes of a matrix product's result: 4 in float32, 2 in bfloat16."""
    cuda: bool
    """Attention is fused with dropout, and a dropout mask is one byte: on CUDA only."""
    checkpointing: bool = False
    """Of a block only its input, the float32 stream, is kept; the rest is computed again in its backward."""

    @property
    def tokens(self) -> int:
        """Tokens in the micro-batch."""
        return self.micro_batch * self.architecture.block_size

    @property
    def by_products(self) -> bool:
        """Whether attention keeps its weights: `materialized_attention` of `llmtrain/model.py`."""
        return not self.cuda and self.item != FLOAT and self.architecture.block_size <= MAX_MATERIALIZED_LENGTH

    @property
    def block(self) -> int:
        """Saved by one block for its backward."""
        model, e = self.architecture.model, self.item
        attention = self._weights if self.by_products else FLOAT * model.n_head
        per_token = (2 * FLOAT + 14 * e) * model.n_embd + 4 * FLOAT + attention
        return self.tokens * (per_token + self._block_dropout)

    @property
    def blocks(self) -> int:
        """Saved by all blocks, and by the dropout of the embedding."""
        model = self.architecture.model
        mask = (1 if self.cuda else FLOAT) * model.n_embd if model.dropout else 0
        each = self.stream if self.checkpointing else self.block
        return model.n_layer * each + self.tokens * mask

    @property
    def recomputed(self) -> int:
        """What a block's backward computes again and keeps until it is through."""
        return self.block if self.checkpointing else 0

    @property
    def head(self) -> int:
        """Alive in the head's forward: the last layer norm's input and result, that cast, and its gradient."""
        return self.tokens * (2 * FLOAT + self._cast + self.item) * self.architecture.model.n_embd

    @property
    def loss(self) -> int:
        """What the head works with, chunk by chunk."""
        model = self.architecture.model
        slab = rows_per_slab(model.vocab_size, self._kind) * model.n_embd * (self.item + FLOAT)
        return self._logits(self.tokens, slab)

    @property
    def forward(self) -> int:
        """Alive in the last block's forward, beside what the blocks before it saved."""
        model = self.architecture.model
        before = self.blocks * (model.n_layer - 1) // model.n_layer
        return before + self.tokens * self._at_work

    @property
    def stream(self) -> int:
        """The residual stream, or its gradient."""
        return self.tokens * FLOAT * self.architecture.model.n_embd

    @property
    def block_backward(self) -> int:
        """Beyond what was saved, at the peak of a block's backward.

        That is in the MLP's last matrix product: the gradient of the residual stream, its cast for this
        branch (with dropout: its masked copy), the gradient of GELU's result, and that of the weights. Or it
        is in the softmax of attention by products: what was saved behind it is gone (4·C + 11·e·C a token),
        the gradients of stream and v, and two of the weights' size are there (with dropout one more than went).
        """
        model, e = self.architecture.model, self.item
        branch = self._cast + (e if model.dropout else 0)
        mlp = self.tokens * (FLOAT + branch + 4 * e) * model.n_embd + 4 * e * model.n_embd**2
        weights = (1 if model.dropout else 2) * self._weights
        attention = self.tokens * (weights - 10 * e * model.n_embd)
        return max(mlp, attention) if self.by_products else mlp

    def evaluation(self, batch: int) -> int:
        """Peak of a forward pass without gradients over `batch` sequences.

        In the MLP or attention of a block, or in the head: its input and that cast, its weight cast, a chunk of
        logits, and the logarithms of their softmax. Attention by products joins what it did for few sequences.
        """
        length = self.architecture.block_size
        tokens = batch * length
        head = tokens * (FLOAT + self._cast) * self.architecture.model.n_embd
        weight = self._cast * self.architecture.token_embedding
        few = min(sequences_per_chunk(length * self._weights), batch)
        attention = tokens * self._in_attention + 2 * few * length * self._weights
        block = max(tokens * self._in_mlp, attention if self.by_products else 0)
        probabilities = FLOAT * self._at_a_time(tokens) * self.architecture.model.vocab_size
        return max(block, head + weight + self._logits(tokens, 0) + probabilities)

    @property
    def _at_work(self) -> int:
        """A token's share of what is alive in a block's forward, saved or not; attention is that by products."""
        attention = self._in_attention + 2 * self._weights
        return max(self._in_mlp, attention) if self.by_products else self._in_mlp

    @property
    def _in_mlp(self) -> int:
        """Embedding, the stream before and after attention, its norm, and GELU's input and result."""
        return (4 * FLOAT + 8 * self.item) * self.architecture.model.n_embd

    @property
    def _in_attention(self) -> int:
        """By products, beside scores and weights: embedding, stream, norm, q, k, v, a copy of v, the result."""
        return (3 * FLOAT + 5 * self.item) * self.architecture.model.n_embd

    def _logits(self, tokens: int, slab: int) -> int:
        """A chunk of logits, and what is made of it: first gradients, in float32, then `slab` bytes of products."""
        vocabulary = self.architecture.model.vocab_size
        rows = rows_per_chunk(tokens, vocabulary, itemsize=self.item, device_type=self._kind)
        in_float32 = FLOAT * self._at_a_time(tokens) * vocabulary if self._cast else 0
        return self.item * rows * vocabulary + max(in_float32, slab)

    def _at_a_time(self, tokens: int) -> int:
        """Rows of logits whose softmax is computed together."""
        vocabulary = self.architecture.model.vocab_size
        rows = rows_per_chunk(tokens, vocabulary, itemsize=self.item, device_type=self._kind)
        return rows if self.cuda else min(rows, rows_in_cache(vocabulary))

    @property
    def _kind(self) -> str:
        return "cuda" if self.cuda else "cpu"

    @property
    def _cast(self) -> int:
        """Bytes of a float32 number cast for a matrix product; none where it stays what it is."""
        return self.item if self.item != FLOAT else 0

    @property
    def _weights(self) -> int:
        """A token's attention weights, T a head."""
        return self.item * self.architecture.model.n_head * self.architecture.block_size

    @property
    def _block_dropout(self) -> int:
        """A token's two masks of width C; off CUDA they are numbers, and attention is not fused.

        Unfused, it keeps the softmax, its mask and their product (T each a head), and q, k, v in float32;
        by products, in e, and the softmax is kept anyway.
        """
        model, e = self.architecture.model, self.item
        if not model.dropout:
            return 0
        if self.cuda:
            return 2 * model.n_embd
        if self.by_products:
            return 2 * e * model.n_embd + 2 * self._weights
        scores = 3 * FLOAT * model.n_head * self.architecture.block_size
        return 2 * e * model.n_embd + scores + 3 * (FLOAT - e) * model.n_embd

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

The loss keeps the log-probabilities (4·V); at its peak, in log-softmax's backward, they, the gradient
that comes in and the gradient that goes out are alive at once: 12·V. Under bfloat16 autocast each weight
of a linear layer is kept as a 2-byte copy as well (`Architecture.multiplied`). For the uncompiled model:
torch.compile recomputes and fuses, and saves less.

    activations = Activations(architecture, micro_batch=16, item=2, cuda=True); activations.block
"""

from dataclasses import dataclass

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
    def block(self) -> int:
        """Saved by one block for its backward."""
        model, e = self.architecture.model, self.item
        per_token = (2 * FLOAT + 14 * e) * model.n_embd + 4 * FLOAT + FLOAT * model.n_head
        return self.tokens * (per_token + self._block_dropout)

    @property
    def blocks(self) -> int:
        """Saved by all blocks, and by the dropout of the embedding."""
        model = self.architecture.model
        mask = (1 if self.cuda else FLOAT) * model.n_embd if model.dropout else 0
        each = self.tokens * FLOAT * model.n_embd if self.checkpointing else self.block
        return model.n_layer * each + self.tokens * mask

    @property
    def recomputed(self) -> int:
        """What a block's backward computes again and keeps until it is through."""
        return self.block if self.checkpointing else 0

    @property
    def head(self) -> int:
        """Saved by the last layer norm (its input) and the head (its input, cast)."""
        return self.tokens * (FLOAT + self.item) * self.architecture.model.n_embd

    @property
    def loss(self) -> int:
        """Log-probabilities and two gradients of their size, float32."""
        return self.tokens * 3 * FLOAT * self.architecture.model.vocab_size

    @property
    def block_backward(self) -> int:
        """Beyond what was saved, at the peak of a block's backward: the MLP's last matrix product.

        The gradient of the residual stream, its cast for this branch (with dropout: its masked copy), the
        gradient of GELU's result, and that of the weights.
        """
        model, e = self.architecture.model, self.item
        branch = (e if e != FLOAT else 0) + (e if model.dropout else 0)
        return self.tokens * (FLOAT + branch + 4 * e) * model.n_embd + 4 * e * model.n_embd**2

    def evaluation(self, batch: int) -> int:
        """Peak of a forward pass without gradients over `batch` sequences.

        In a block: stream, norm, and GELU's input and result; at the loss: logits in e, unless that is
        float32 already their float32 copy, and log-probabilities.
        """
        model, e = self.architecture.model, self.item
        block = (2 * FLOAT + 8 * e) * model.n_embd
        logits = (2 * FLOAT + (e if e != FLOAT else 0)) * model.vocab_size
        return batch * self.architecture.block_size * max(block, logits)

    @property
    def _block_dropout(self) -> int:
        """A token's two masks of width C; off CUDA they are numbers, and attention is not fused.

        Unfused, it keeps the softmax, its mask and their product (T each a head), and q, k, v in float32.
        """
        model, e = self.architecture.model, self.item
        if not model.dropout:
            return 0
        if self.cuda:
            return 2 * model.n_embd
        scores = 3 * FLOAT * model.n_head * self.architecture.block_size
        return 2 * e * model.n_embd + scores + 3 * (FLOAT - e) * model.n_embd

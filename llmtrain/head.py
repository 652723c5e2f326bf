"""The loss of the output head, in chunks: the logits of a batch never exist as a whole.

Why our own: in a small GPT-2 the head is most of the work and nearly all of the memory. Logits of a few
rows at a time stay in the cache, and what they are needed for, the loss and both gradients, is computed
while they are there; the backward pass only scales it.

    loss = linear_cross_entropy(hidden, weight, targets, ignore=-1)

Shapes in names: N rows, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BYTES_OF_CHUNK = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of the logits of a chunk: large enough for a fast matrix product, small beside everything else."""
_BYTES_IN_CACHE = 2 * 2**20
"""Of the float32 logits that a CPU turns into gradients at a time."""


@torch.compiler.disable
def linear_cross_entropy(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, *, ignore: int, fused: bool = False
) -> Tensor:
    """Mean cross-entropy of the logits hidden · weightᵀ in nats, float32, shape ().

    Matrix products are in autocast's type, where it is on; maxima, sums and the loss in float32; the
    gradient of the weight is added up over the chunks in float32.

    Args:
        hidden_NC: what the head is given.
        weight_VC: of the head.
        targets_N: ids of the right answers.
        ignore: rows with this target do not count.
        fused: use kernels of torch.compile between the matrix products.
    """
    kind = hidden_NC.device.type
    on = torch.is_autocast_enabled(kind)
    product = torch.get_autocast_dtype(kind) if on else hidden_NC.dtype
    loss: Tensor = _LinearCrossEntropy.apply(hidden_NC, weight_VC, targets_N, ignore, product, fused)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass, where somebody will want them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        ignore: int,
        product: torch.dtype,
        fused: bool,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.autocast(hidden_NC.device.type, enabled=False):
            loss, *gradients = _loss_and_gradients(
                hidden_NC.to(product), weight_VC.to(product), targets_N, ignore, wanted, fused
            )
        if wanted:
            ctx.save_for_backward(*gradients)
            ctx.types = hidden_NC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NC, weight_grad_VC = ctx.saved_tensors
        of_hidden, of_weight = ctx.types
        # In place: nobody else sees them, and a second tensor of the vocabulary's size is what is avoided here.
        hidden = hidden_grad_NC.mul_(upstream[0]).to(of_hidden)
        return hidden, weight_grad_VC.mul_(upstream[0]).to(of_weight), None, None, None, None


def _loss_and_gradients(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, ignore: int, wanted: bool, fused: bool
) -> tuple[Tensor, ...]:
    """The mean loss; if `wanted`, with its gradients: of the hidden states (N, C), of the weight (V, C) in float32."""
    counted_N = targets_N != ignore
    share = 1.0 / counted_N.sum()
    weights_N = torch.where(counted_N, share, 0.0)
    N, V = len(hidden_NC), len(weight_VC)
    rows = min(max(_BYTES_OF_CHUNK.get(hidden_NC.device.type, 2**26) // (V * hidden_NC.element_size()), 1), N)
    loss = hidden_NC.new_zeros((), dtype=torch.float32)
    logits_RV = hidden_NC.new_empty(rows, V)
    hidden_grad_NC = torch.empty_like(hidden_NC) if wanted else hidden_NC
    weight_grad_VC = torch.empty_like(weight_VC, dtype=torch.float32) if wanted else weight_VC
    product_VC = torch.empty_like(weight_VC) if wanted else weight_VC
    for first in range(0, N, rows):
        chunk = slice(first, first + rows)
        hidden_RC = hidden_NC[chunk]
        logits = torch.mm(hidden_RC, weight_VC.T, out=logits_RV[: len(hidden_RC)])
        targets_R = torch.where(counted_N[chunk], targets_N[chunk], 0)
        loss += _to_gradient(logits, targets_R, weights_N[chunk], wanted)
        if wanted:
            torch.mm(logits, weight_VC, out=hidden_grad_NC[chunk])
            torch.mm(logits.T, hidden_RC, out=product_VC)
            if first == 0:
                weight_grad_VC.copy_(product_VC)
            else:
                _add(weight_grad_VC, product_VC)
    return loss, hidden_grad_NC, weight_grad_VC


def _add(total: Tensor, part: Tensor) -> None:
    """total += part, of another type: by way of a buffer in the cache, where torch makes a copy of the whole."""
    rows = max(_BYTES_IN_CACHE // (4 * total.shape[1]), 1)
    buffer = total.new_empty(rows, total.shape[1])
    for into, some in zip(total.split(rows), part.split(rows), strict=True):
        into += buffer[: len(some)].copy_(some)


def _to_gradient(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor, wanted: bool) -> Tensor:
    """The weighted sum of the rows' losses, shape (); if `wanted`, the logits become its gradient, in place."""
    loss = logits_RV.new_zeros((), dtype=torch.float32)
    rows = max(_BYTES_IN_CACHE // (4 * logits_RV.shape[1]), 1)
    for first in range(0, logits_RV.shape[0], rows):
        some = slice(first, first + rows)
        x = logits_RV[some].float()
        target_R1, weight_R1 = targets_R[some, None], weights_R[some, None]
        largest_R1, right_R1 = x.amax(1, keepdim=True), x.gather(1, target_R1)
        x.sub_(largest_R1).exp_()
        sum_R1 = x.sum(1, keepdim=True)
        loss += ((sum_R1.log() + largest_R1 - right_R1) * weight_R1).sum()
        if wanted:
            x.mul_(weight_R1 / sum_R1).scatter_add_(1, target_R1, -weight_R1)
            logits_RV[some] = x
    return loss

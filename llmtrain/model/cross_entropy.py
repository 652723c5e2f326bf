"""The loss of the output head, in chunks: the logits of a batch never exist as a whole.

Why our own: in a small GPT-2 the head is most of the work and nearly all of the memory. Logits of a few
rows at a time stay in the cache, and what they are needed for, the loss and both gradients, is computed
while they are there; the backward pass only scales it.

    loss = linear_cross_entropy(hidden, weight, targets, ignore=-1)

Shapes in names: N rows, C width, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.model.sizes import rows_in_cache, rows_per_chunk, rows_per_slab


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
    if not (torch.is_grad_enabled() and (hidden_NC.requires_grad or weight_VC.requires_grad)):
        return _loss_alone(hidden_NC, weight_VC, targets_N, ignore, product)
    arguments = (hidden_NC, weight_VC, targets_N, ignore, product, fused)
    loss: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]  # so in torch
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass."""

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
        with torch.autocast(hidden_NC.device.type, enabled=False):
            loss, *gradients = _loss_and_gradients(
                hidden_NC.to(product), weight_VC.to(product), targets_N, ignore, fused
            )
        ctx.save_for_backward(*gradients)
        ctx.types = hidden_NC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NC, weight_grad_VC = ctx.saved_tensors
        of_hidden, of_weight = ctx.types
        # In place: nobody else sees them, and a second tensor of the vocabulary's size is what is avoided here.
        hidden = hidden_grad_NC.mul_(upstream[0]).to(of_hidden)
        return hidden, weight_grad_VC.mul_(upstream[0]).to(of_weight), None, None, None, None


def _loss_and_gradients(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, ignore: int, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss with its gradients: of the hidden states (N, C), of the weight (V, C) in float32."""
    counted_N = targets_N != ignore
    targets_N = torch.where(counted_N, targets_N, 0)
    shares_N = counted_N / counted_N.sum()
    loss = hidden_NC.new_zeros((), dtype=torch.float32)
    hidden_grad_NC = torch.empty_like(hidden_NC)
    weight_grad_VC = torch.empty_like(weight_VC, dtype=torch.float32)
    N, V = len(hidden_NC), len(weight_VC)
    rows = rows_per_chunk(N, V, item=hidden_NC.element_size(), kind=hidden_NC.device.type)
    logits_RV = hidden_NC.new_empty(rows, V)
    for first in range(0, N, rows):
        chunk = slice(first, first + rows)
        hidden_RC = hidden_NC[chunk]
        logits = torch.mm(hidden_RC, weight_VC.T, out=logits_RV[: len(hidden_RC)])
        loss += _to_gradient(logits, targets_N[chunk, None], shares_N[chunk, None], fused)
        torch.mm(logits, weight_VC, out=hidden_grad_NC[chunk])
        _add_products(weight_grad_VC, logits, hidden_RC, first=first == 0)
    return loss, hidden_grad_NC, weight_grad_VC


def _loss_alone(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, ignore: int, product: torch.dtype
) -> Tensor:
    """The mean loss. Autocast casts the weight, once for as long as it is on."""
    N, V, kind = len(hidden_NC), len(weight_VC), hidden_NC.device.type
    rows = rows_per_chunk(N, V, item=product.itemsize, kind=kind)
    loss = hidden_NC.new_zeros((), dtype=torch.float32)
    for hidden_RC, targets_R in zip(
        torch.split(hidden_NC, rows), torch.split(targets_N, rows), strict=True
    ):
        logits_RV = F.linear(hidden_RC, weight_VC)
        few = rows_in_cache(V) if kind == "cpu" else rows
        for some, right in zip(
            torch.split(logits_RV, few), torch.split(targets_R, few), strict=True
        ):
            loss += F.cross_entropy(some.float(), right, ignore_index=ignore, reduction="sum")
    return loss / (targets_N != ignore).sum()


def _to_gradient(logits_RV: Tensor, targets_R1: Tensor, shares_R1: Tensor, fused: bool) -> Tensor:
    """The weighted sum of the rows' losses, shape (); the logits become its gradient, in place."""
    if fused:
        return _fused_softmax()(logits_RV, targets_R1, shares_R1)
    if logits_RV.device.type != "cpu":
        return _softmax(logits_RV, targets_R1, shares_R1)
    rows = min(rows_in_cache(logits_RV.shape[1]), len(logits_RV))
    pieces = (torch.split(each, rows) for each in (logits_RV, targets_R1, shares_R1))
    # One buffer for all: memory that is given back and asked for again costs more than the arithmetic.
    rounded = logits_RV.dtype != torch.float32
    buffer_RV = (
        logits_RV.new_empty(rows, logits_RV.shape[1], dtype=torch.float32) if rounded else None
    )
    losses = []
    for logits, targets, shares in zip(*pieces, strict=True):
        x = None if buffer_RV is None else buffer_RV[: len(logits)].copy_(logits)
        losses.append(_softmax(logits, targets, shares, x))
    return torch.stack(losses).sum()


def _softmax(
    logits_RV: Tensor, targets_R1: Tensor, shares_R1: Tensor, x: Tensor | None = None
) -> Tensor:
    """`_to_gradient` of a piece, in float32: `x`, the logits or a copy of them, is overwritten."""
    x = logits_RV.float() if x is None else x
    right_R1, largest_R1 = x.gather(1, targets_R1), x.amax(1, keepdim=True)
    x = x.sub_(largest_R1).exp_()
    sum_R1 = x.sum(1, keepdim=True)
    right_R1 = right_R1 - largest_R1 - sum_R1.log()
    logits_RV.copy_(x.mul_(shares_R1 / sum_R1))
    # Not 1 less than what was rounded: the better the prediction, the more of it would be lost.
    right_gradient_R1 = torch.expm1(right_R1) * shares_R1
    rows_R = torch.arange(len(logits_RV), device=logits_RV.device)
    logits_RV.index_put_((rows_R, targets_R1[:, 0]), right_gradient_R1[:, 0].to(logits_RV.dtype))
    return -(right_R1 * shares_R1).sum()


@cache
def _fused_softmax() -> Callable[..., Tensor]:
    return torch.compile(_softmax)  # where it is needed: it takes a second to import the compiler


def _add_products(total_VC: Tensor, logits_RV: Tensor, hidden_RC: Tensor, *, first: bool) -> None:
    """total += logitsᵀ · hidden, in slabs: the products are rounded to another type, and need little memory so."""
    rows = rows_per_slab(len(total_VC), total_VC.device.type)
    products_SC, buffer_SC = (
        hidden_RC.new_empty(rows, total_VC.shape[1]),
        total_VC.new_empty(rows, total_VC.shape[1]),
    )
    for some_SC, logits_RS in zip(
        torch.split(total_VC, rows), torch.split(logits_RV, rows, 1), strict=True
    ):
        product_SC = torch.mm(logits_RS.T, hidden_RC, out=products_SC[: len(some_SC)])
        if first:
            some_SC.copy_(product_SC)
        else:  # torch would make the buffer itself, anew each time
            some_SC.add_(buffer_SC[: len(some_SC)].copy_(product_SC))

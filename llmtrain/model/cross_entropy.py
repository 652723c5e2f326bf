"""Fused output layer and cross-entropy, computed in chunks to avoid materializing all logits.

Why not torch's: the output layer is most of the work and nearly all of the memory of a small GPT-2.
A chunk of logits stays in the cache while the loss and both gradients are computed from it, so the
backward pass only scales them.

Shape suffixes: N rows, C width, V vocabulary, R rows of a chunk, S rows of a slab.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.model.chunk_sizes import rows_in_cache, rows_per_chunk, rows_per_slab

Collect = Callable[[Tensor], object]
"""Receiver of the losses of consecutive targets, float32, shape (rows,); 0 for ignored ones."""


def linear_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    ignore: int,
    fused: bool = False,
    collect: Collect | None = None,
) -> Tensor:
    """Return the mean cross-entropy of the logits hidden · weightᵀ in nats, float32, shape ().

    Matrix products use autocast's type. Softmax, loss and the accumulation of the weight gradient
    use float32. Rows whose target is `ignore` do not count. `fused` compiles the softmax. `collect`
    is called only without gradients.
    """
    device_type = hidden_NC.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_NC.dtype
    if not (torch.is_grad_enabled() and (hidden_NC.requires_grad or weight_VC.requires_grad)):
        return _loss_only(hidden_NC, weight_VC, targets_N, ignore, dtype, collect)
    arguments = (hidden_NC, weight_VC, targets_N, ignore, dtype, fused)
    loss: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]  # torch
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Autograd function that computes the gradients in its forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        targets_N: Tensor,
        ignore: int,
        dtype: torch.dtype,
        fused: bool,
    ) -> Tensor:
        with torch.autocast(hidden_NC.device.type, enabled=False):
            loss, *gradients = _loss_and_gradients(
                hidden_NC.to(dtype), weight_VC.to(dtype), targets_N, ignore, fused
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NC, weight_grad_VC = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        # In place, because a second tensor of this size would double the peak memory.
        hidden_grad = hidden_grad_NC.mul_(upstream[0]).to(hidden_dtype)
        weight_grad = weight_grad_VC.mul_(upstream[0]).to(weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None


def _loss_and_gradients(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, ignore: int, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss and its gradients for the hidden states and, in float32, the weight."""
    counted_N = targets_N != ignore
    targets_N = torch.where(counted_N, targets_N, 0)
    shares_N = counted_N / counted_N.sum()
    loss = hidden_NC.new_zeros((), dtype=torch.float32)
    hidden_grad_NC = torch.empty_like(hidden_NC)
    weight_grad_VC = torch.empty_like(weight_VC, dtype=torch.float32)
    N, V = len(hidden_NC), len(weight_VC)
    itemsize, device_type = hidden_NC.element_size(), hidden_NC.device.type
    rows = rows_per_chunk(N, V, itemsize=itemsize, device_type=device_type)
    logits_RV = hidden_NC.new_empty(rows, V)
    for first in range(0, N, rows):
        chunk = slice(first, first + rows)
        hidden_RC = hidden_NC[chunk]
        logits = torch.mm(hidden_RC, weight_VC.T, out=logits_RV[: len(hidden_RC)])
        loss += _logits_to_gradient(logits, targets_N[chunk, None], shares_N[chunk, None], fused)
        torch.mm(logits, weight_VC, out=hidden_grad_NC[chunk])
        _accumulate_product(weight_grad_VC, logits, hidden_RC, first=first == 0)
    return loss, hidden_grad_NC, weight_grad_VC


def _loss_only(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    ignore: int,
    dtype: torch.dtype,
    collect: Collect | None,
) -> Tensor:
    """Return the mean loss. Autocast caches the cast weight."""
    N, V, device_type = len(hidden_NC), len(weight_VC), hidden_NC.device.type
    rows = rows_per_chunk(N, V, itemsize=dtype.itemsize, device_type=device_type)
    loss = hidden_NC.new_zeros((), dtype=torch.float32)
    few = rows_in_cache(V) if device_type == "cpu" else rows
    chunks = zip(torch.split(hidden_NC, rows), torch.split(targets_N, rows), strict=True)
    for hidden_RC, targets_R in chunks:
        logits_RV = F.linear(hidden_RC, weight_VC)
        pieces = zip(torch.split(logits_RV, few), torch.split(targets_R, few), strict=True)
        for logits, targets in pieces:
            loss += cross_entropy(logits, targets, ignore, "sum", collect)
    return loss / (targets_N != ignore).sum()


def cross_entropy(
    logits_RV: Tensor, targets_R: Tensor, ignore: int, reduction: str, collect: Collect | None
) -> Tensor:
    """Return the same bits as `F.cross_entropy`, and pass the losses to `collect`."""
    log_softmax_RV = F.log_softmax(logits_RV.float(), dim=1)
    if collect is not None:
        collect(F.nll_loss(log_softmax_RV, targets_R, ignore_index=ignore, reduction="none"))
    return F.nll_loss(log_softmax_RV, targets_R, ignore_index=ignore, reduction=reduction)


def _logits_to_gradient(
    logits_RV: Tensor, targets_R1: Tensor, shares_R1: Tensor, fused: bool
) -> Tensor:
    """Overwrite the logits with the gradient of the loss; return the loss weighted by `shares`."""
    if fused:
        return _fused_softmax()(logits_RV, targets_R1, shares_R1)
    if logits_RV.device.type != "cpu":
        return _softmax(logits_RV, targets_R1, shares_R1)
    rows = min(rows_in_cache(logits_RV.shape[1]), len(logits_RV))
    chunks = (torch.split(each, rows) for each in (logits_RV, targets_R1, shares_R1))
    # Reuse one buffer: repeated allocation costs more than the arithmetic.
    is_rounded, shape = logits_RV.dtype != torch.float32, (rows, logits_RV.shape[1])
    buffer_RV = logits_RV.new_empty(shape, dtype=torch.float32) if is_rounded else None
    losses = []
    for logits, targets, shares in zip(*chunks, strict=True):
        x = None if buffer_RV is None else buffer_RV[: len(logits)].copy_(logits)
        losses.append(_softmax(logits, targets, shares, x))
    return torch.stack(losses).sum()


def _softmax(
    logits_RV: Tensor, targets_R1: Tensor, shares_R1: Tensor, x: Tensor | None = None
) -> Tensor:
    """Do `_logits_to_gradient` in float32, overwriting `x`: the logits or a float32 copy."""
    x = logits_RV.float() if x is None else x
    right_R1, largest_R1 = x.gather(1, targets_R1), x.amax(1, keepdim=True)
    x = x.sub_(largest_R1).exp_()
    sum_R1 = x.sum(1, keepdim=True)
    right_R1 = right_R1 - largest_R1 - sum_R1.log()
    logits_RV.copy_(x.mul_(shares_R1 / sum_R1))
    # expm1 is accurate for confident predictions; subtracting 1 from the rounded softmax is not.
    right_gradient_R1 = torch.expm1(right_R1) * shares_R1
    rows_R = torch.arange(len(logits_RV), device=logits_RV.device)
    logits_RV.index_put_((rows_R, targets_R1[:, 0]), right_gradient_R1[:, 0].to(logits_RV.dtype))
    return -(right_R1 * shares_R1).sum()


@cache
def _fused_softmax() -> Callable[..., Tensor]:
    return torch.compile(_softmax)  # lazily: importing the compiler takes a second


def _accumulate_product(
    total_VC: Tensor, logits_RV: Tensor, hidden_RC: Tensor, *, first: bool
) -> None:
    """Add logitsᵀ · hidden to the total, in slabs that bound the memory of products and casts."""
    rows, C = rows_per_slab(len(total_VC), total_VC.device.type), total_VC.shape[1]
    products_SC, buffer_SC = hidden_RC.new_empty(rows, C), total_VC.new_empty(rows, C)
    slabs = zip(torch.split(total_VC, rows), torch.split(logits_RV, rows, 1), strict=True)
    for total_SC, logits_RS in slabs:
        product_SC = torch.mm(logits_RS.T, hidden_RC, out=products_SC[: len(total_SC)])
        if first:
            total_SC.copy_(product_SC)
        else:  # add_ would allocate a new buffer for the cast
            total_SC.add_(buffer_SC[: len(total_SC)].copy_(product_SC))

"""The output head's cross-entropy, forward and backward: ours, whole logits, and libraries.

The head is most of a small GPT-2's work and nearly all of its memory. This command shows whether a
library has become the better choice.

    publish(measure(width=768, tokens=1024, vocabulary=50304, rounds=7), None)

Shapes in names: N rows, C width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from llmtrain.model.chunk_sizes import rows_per_chunk
from llmtrain.model.cross_entropy import linear_cross_entropy
from llmtrain.model.gpt import IGNORE
from llmtrain.runtime.device import Precision, resolve_device

from .loops import VOCABULARY
from .measure import Row, Side, Worker, not_measured, publish, require_cuda
from .piece import PRECISIONS, compare, in_float64, piece, require_precision
from .shapes import tokens_of

OURS, COMPILED, PLAIN = "llmtrain", "llmtrain, compiled", "whole logits"
TORCH, ROUNDED = "torch", "torch, rounded sums"
_ON_CUDA = {
    COMPILED: "torch",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
}
"""Sides that need a GPU, with their packages."""


def head(
    width: Annotated[
        int, typer.Option(min=1, help="Width of the hidden states; GPT-2 small has 768.")
    ] = 384,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a batch.", show_default="2048, on a GPU 16384"),
    ] = None,
    vocabulary: Annotated[int, typer.Option(min=2, help="Logits per token.")] = VOCABULARY,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure the output head: time with and without backward, added memory, error vs float64."""
    publish(measure(width, tokens or tokens_of("6x384"), vocabulary, rounds=rounds), json)


def measure(width: int, tokens: int, vocabulary: int, *, rounds: int) -> list[Row]:
    """Return the rows of one shape in each precision."""
    shape = f"head {width} × {vocabulary}, {tokens} tokens"
    missing = {name: reason for name in LOSSES if (reason := _missing(name))}
    found = [not_measured(shape, name, reason) for name, reason in missing.items()]
    for precision in PRECISIONS:
        if reason := require_precision(precision):
            found.append(not_measured(f"{shape}, {precision}", "", reason))
            continue
        sides = {
            name: Worker(one_loss, name, width, tokens, vocabulary, precision)
            for name in LOSSES
            if name not in missing and (name, precision) != (ROUNDED, "float32")
        }
        found += compare(f"{shape}, {precision}", sides, rounds, PLAIN)
    return found


def _missing(name: str) -> str | None:
    """Return why a side cannot be measured here, or None."""
    if name in (TORCH, ROUNDED) and not hasattr(nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no linear_cross_entropy in chunks"
    if name not in _ON_CUDA:
        return None
    return require_cuda() or (None if find_spec(_ON_CUDA[name]) else "it is not installed")


def one_loss(name: str, width: int, tokens: int, vocabulary: int, precision: Precision) -> Side:
    """Build a side with float32 weights and logits with a standard deviation of 2."""
    device = resolve_device("auto")
    torch.manual_seed(0)
    hidden_NC = torch.randn(tokens, width, device=device).requires_grad_()
    weight_VC = torch.randn(vocabulary, width, device=device).mul_(2 * width**-0.5).requires_grad_()
    targets_N = torch.randint(vocabulary, (tokens,), device=device)
    data = hidden_NC, weight_VC, targets_N
    times = 1 if device.type == "cpu" else 10
    forward, exact = partial(LOSSES[name], *data), partial(_exact, *data)
    return piece(forward, [hidden_NC, weight_VC], precision, exact, times)


def _exact(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, ...]:
    """Compute a few rows at a time."""
    hidden_NC, weight_VC = in_float64(hidden_NC), in_float64(weight_VC)
    total = torch.zeros((), dtype=torch.float64, device=hidden_NC.device)
    for hidden_RC, targets_R in zip(
        hidden_NC.split(256), targets_N.to(total.device).split(256), strict=True
    ):
        loss = F.cross_entropy(hidden_RC @ weight_VC.T, targets_R, reduction="sum") / len(targets_N)
        loss.backward()
        total += loss.detach()
    assert hidden_NC.grad is not None and weight_VC.grad is not None
    return total, hidden_NC.grad, weight_VC.grad


def _whole(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_NC, weight_VC).float(), targets_N)


def _torch(
    hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, *, rounded: bool = False
) -> Tensor:
    """Compute sums, softmax and gradients in float32, or `rounded` like the products."""
    hidden_NC, weight_VC = _cast(hidden_NC), _cast(weight_VC)
    kind, item = hidden_NC.device.type, hidden_NC.element_size()
    # torch's default for a CPU, 8 rows, takes 3 to 7 times as long.
    rows = (
        None
        if kind != "cpu"
        else rows_per_chunk(len(hidden_NC), len(weight_VC), itemsize=item, device_type=kind)
    )
    sums = hidden_NC.dtype if rounded else torch.float32
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_dtype=sums)
    return F.linear_cross_entropy(hidden_NC, weight_VC, targets_N, options=options)


def _liger(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden_NC, weight_VC, targets_N)


def _cut(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Compute with all gradient entries kept, as the authors advise for pre-training."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(_cast(hidden_NC), _cast(weight_VC), targets_N, impl="cce_kahan_full_c")


def _cast(tensor: Tensor) -> Tensor:
    """Cast to autocast's dtype if it is enabled, for libraries that do not cast."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    OURS: partial(linear_cross_entropy, ignore=IGNORE),
    COMPILED: partial(linear_cross_entropy, ignore=IGNORE, fused=True),
    PLAIN: _whole,
    TORCH: _torch,
    ROUNDED: partial(_torch, rounded=True),
    "liger-kernel": _liger,
    "cut-cross-entropy": _cut,
}
"""Function from hidden states (N, C), weight (V, C) and targets (N,) to the mean loss ()."""

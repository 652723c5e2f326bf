"""The output head alone, forward and backward: ours, beside whole logits and the heads of others.

Why: the head is most of the work of a small GPT-2 and nearly all of its memory, and there are libraries for
it. Whether one of them has become the better choice is a matter of one command.

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

from llmtrain.model.cross_entropy import linear_cross_entropy
from llmtrain.model.gpt import IGNORE
from llmtrain.model.chunk_sizes import rows_per_chunk
from llmtrain.runtime.device import Precision, resolve_device

from .loops import VOCABULARY
from .measure import Row, Side, Worker, not_measured, publish, require_cuda
from .piece import PRECISIONS, compare, in_float64, piece, require_precision
from .train import tokens_of

OURS, COMPILED, PLAIN = "llmtrain", "llmtrain, compiled", "whole logits"
TORCH, ROUNDED = "torch", "torch, rounded sums"
_ON_CUDA = {
    COMPILED: "torch",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
}
"""What needs a GPU, and the package that it comes with."""


def head(
    width: Annotated[
        int, typer.Option(min=1, help="Of the hidden states; GPT-2 small's is 768.")
    ] = 384,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="In a batch.", show_default="2048, on a GPU 16384")
    ] = None,
    vocabulary: Annotated[int, typer.Option(min=2, help="Logits a token.")] = VOCABULARY,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are measured.")] = 7,
    json: Annotated[
        Path | None, typer.Option(help="Write the figures to this file as well.")
    ] = None,
) -> None:
    """Measure the output head: time with and without backward, memory that it adds, error to float64."""
    publish(measure(width, tokens or tokens_of("6x384"), vocabulary, rounds=rounds), json)


def measure(width: int, tokens: int, vocabulary: int, *, rounds: int) -> list[Row]:
    """The rows of one shape, in each precision."""
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
    """Why a side cannot be measured here."""
    if name in (TORCH, ROUNDED) and not hasattr(nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no linear_cross_entropy in chunks"
    if name not in _ON_CUDA:
        return None
    return require_cuda() or (None if find_spec(_ON_CUDA[name]) else "it is not installed")


def one_loss(name: str, width: int, tokens: int, vocabulary: int, precision: Precision) -> Side:
    """Weights in float32, as a model has them; logits with a standard deviation of 2."""
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
    """A few rows at a time."""
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
    """Sums, softmax and gradients in float32, or `rounded` as the products are."""
    hidden_NC, weight_VC = _cast(hidden_NC), _cast(weight_VC)
    kind, item = hidden_NC.device.type, hidden_NC.element_size()
    # Its own choice for a CPU, 8 rows, takes 3 to 7 times as long.
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
    """As its authors advise for pre-training: no entry of the weight's gradient is left out for being small."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(_cast(hidden_NC), _cast(weight_VC), targets_N, impl="cce_kahan_full_c")


def _cast(tensor: Tensor) -> Tensor:
    """In autocast's type, where it is on: for those that take what they are given."""
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
"""Hidden states (N, C), weight (V, C) and targets (N,) to the mean loss, shape ()."""

"""Attention alone, in the model's two forms: materialized, and torch's fused kernel.

On a CPU the model chooses by length and precision (`MAX_MATERIALIZED_LENGTH`). This command shows
the length up to which the materialized form is faster here. With more --tokens, the size of the
attention matrix matters too, because the allocator may return such blocks to the system.

    publish(measure([256, 1024], width=384, tokens=2048, rounds=7), None)

Shapes in names: B sequences, T tokens, C width, H heads, D width of a head.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from llmtrain.model.gpt import materialized_attention
from llmtrain.runtime.device import Precision, resolve_device

from .measure import Row, Side, Worker, not_measured, publish
from .piece import PRECISIONS, compare, in_float64, piece, require_precision
from .shapes import tokens_of

PRODUCTS, FUSED = "materialized", "fused"
LENGTHS = [256, 512, 1024, 2048]
HEAD = 64
"""Width of a head in every GPT-2."""


def attention(
    length: Annotated[
        list[int], typer.Option(min=1, help="Tokens in a sequence; repeatable.")
    ] = LENGTHS,
    width: Annotated[int, typer.Option(min=HEAD, help="Model width, a multiple of 64.")] = 384,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a batch.", show_default="2048, on a GPU 16384"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure attention: time with and without backward, added memory, error vs float64."""
    publish(measure(length, width, tokens or tokens_of("6x384"), rounds=rounds), json)


def measure(lengths: list[int], width: int, tokens: int, *, rounds: int) -> list[Row]:
    """Return the rows of each precision and length."""
    found = []
    for precision in PRECISIONS:
        if reason := require_precision(precision):
            found.append(not_measured(f"attention, width {width}, {precision}", "", reason))
            continue
        for length in lengths:
            shape = max(tokens // length, 1), length, 3, width // HEAD, HEAD
            sides = {name: Worker(one_form, name, shape, precision) for name in (PRODUCTS, FUSED)}
            what = f"attention of {shape[0]} × {length} tokens, width {width}, {precision}"
            found += compare(what, sides, rounds, FUSED)
    return found


def one_form(name: str, shape: tuple[int, ...], precision: Precision) -> Side:
    """Build a side with queries, keys and values laid out in memory like the model's."""
    device = resolve_device("auto")
    torch.manual_seed(0)
    qkv = torch.randn(shape, device=device, dtype=getattr(torch, precision)).requires_grad_()
    upstream_BTC = torch.randn(*shape[:2], shape[3] * HEAD, device=device, dtype=qkv.dtype)

    def exact() -> tuple[Tensor, ...]:
        copy = in_float64(qkv)
        y_BTC = _attend(FUSED, copy)
        y_BTC.backward(upstream_BTC.to(copy))
        assert copy.grad is not None
        return y_BTC.detach(), copy.grad

    return piece(
        lambda: _attend(name, qkv), [qkv], precision, exact, times=5, upstream=upstream_BTC
    )


def _attend(name: str, qkv: Tensor) -> Tensor:
    """(B, T, 3, H, D) → (B, T, C)."""
    torch_attention = partial(F.scaled_dot_product_attention, is_causal=True)
    attend = materialized_attention if name == PRODUCTS else torch_attention
    q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y_BHTD = attend(q_BHTD, k_BHTD, v_BHTD, dropout_p=0.0, scale=HEAD**-0.5)
    return y_BHTD.transpose(1, 2).flatten(2)

"""The largest micro-batch that fits a GPU: ours, and that of a loop that keeps the logits.

measure("gpt2-small")
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.model.gpt import GPT
from llmtrain.runtime.device import resolve_device

from .measure import Figures, Row, Side, Worker, not_measured, require_cuda, rows
from .shapes import Shape, shape_of
from .train import OURS

_TARGETS = {(OURS, "sequences"): "≥ 2 × whole logits"}


def measure(model: str) -> list[Row]:
    """Return the rows of one model; on a CPU, an unmeasured row."""
    what = f"largest micro-batch of {model}"
    if reason := require_cuda():
        return [not_measured(what, OURS, reason)]
    shape = shape_of(model)
    taken: dict[str, list[Figures]] = {}
    for side, keep_logits in ((OURS, False), ("whole logits", True)):
        worker = Worker(largest, shape, keep_logits)
        taken[side] = [worker()]
        worker.close()  # the other side needs the whole GPU
    return rows(what, taken, "whole logits", _TARGETS)


def largest(shape: Shape, keep_logits: bool) -> Side:
    """Build a side that finds the largest fitting step (fused AdamW, bfloat16) to a sixteenth."""
    device = resolve_device("auto")
    config = ModelConfig(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    model = GPT(config, shape.block, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def loss_of(tokens: Tensor) -> Tensor:
        if keep_logits:
            return F.cross_entropy(model.logits(tokens).float().flatten(0, 1), tokens.flatten())
        loss: Tensor = model(tokens, tokens)
        return loss

    def step(sequences: int) -> None:
        tokens = torch.zeros((sequences, shape.block), dtype=torch.long, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(tokens)
        loss.backward()
        optimizer.step()

    def once() -> Figures:
        step(1)  # allocates the moments
        return {"sequences": float(_search(lambda sequences: _fits(step, sequences, optimizer)))}

    return once


def _fits(step: Callable[[int], None], sequences: int, optimizer: torch.optim.Optimizer) -> bool:
    try:
        step(sequences)
    except torch.OutOfMemoryError:
        return False
    finally:
        optimizer.zero_grad(set_to_none=True)
    return True


def _search(fits: Callable[[int], bool]) -> int:
    """Return the largest fitting number: double until one fails, then bisect."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        torch.cuda.empty_cache()
    while high - low > max(low // 16, 1):
        middle = (low + high) // 2
        torch.cuda.empty_cache()
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""Loss on fixed windows of a split, with the figures that make it comparable.

Why: two losses compare only when they come from the same tokens in the same windows. Every weight
set, raw or averaged, during training or after it, is measured by this one function.

    evaluate(model, reader, token_bytes, block_size=1024, batch=16, device=device, precision="float32")
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtrain.data.sampler import validation_windows
from llmtrain.data.shards import Tokens
from llmtrain.errors import UserError
from llmtrain.model.gpt import IGNORE
from llmtrain.runtime.device import Precision, autocast, to_device
from llmtrain.runtime.distributed import World


@dataclass(frozen=True)
class LossResult:
    """The loss of one set of weights on one split."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    tokens: int
    """Tokens predicted."""
    bytes: int
    """Bytes of text those tokens stand for (end-of-text stands for none)."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where it does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """loss · tokens / (bytes · ln 2)."""
        return self.loss * self.tokens / (self.bytes * math.log(2)) if self.bytes else math.nan


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: Tokens,
    token_bytes: npt.NDArray[np.int64],
    *,
    block_size: int,
    stride: int | None = None,
    batch: int,
    device: torch.device,
    precision: Precision,
    world: World | None = None,
    limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Loss of `model` on a split: each token but the first is predicted once, in disjoint windows or strided.

    The mean is accumulated in float64 over batches. The model is left in the mode it was in.

    Args:
        model: on `device`; gives the mean loss of (tokens, targets), as `GPT.forward` does.
        reader: the split's tokens.
        token_bytes: bytes of text of each token id, shape (vocabulary,).
        block_size: tokens of context in a window.
        stride: tokens predicted in a window after the first; those before them are context only. None: all.
        batch: windows in one forward pass.
        device: where the model is.
        precision: of matrix products.
        world: the processes that share the windows; all call this together. None: this one alone.
        limit: use only the first so many tokens of the split.
        on_progress: called with windows done and windows in all; may raise to stop, on all processes alike.

    Raises:
        UserError: the split holds fewer than two tokens.
    """
    n_tokens = min(len(reader), limit or len(reader))
    if n_tokens < 2:
        raise UserError(
            f"the split holds {n_tokens} tokens: nothing can be predicted",
            hint="prepare the data with a larger --val-fraction",
        )
    started = time.perf_counter()
    world = world or World()
    windows = validation_windows(n_tokens, block_size, stride)
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    counts: list[int] = []
    n_bytes = 0
    try:
        with autocast(device, precision):  # around all batches: the weights are cast once
            for first in range(0, len(windows), world.size * batch):
                mine = first + world.rank * batch
                # Weights may be in shards: who has no windows left computes with the others all the same.
                some = windows[mine : mine + batch] or windows[:1]
                tokens, targets = _fill(reader, some, block_size)
                loss = model(to_device(tokens, device), to_device(targets, device))
                if mine < len(windows):
                    counted = targets[targets != IGNORE]
                    losses.append(
                        loss
                    )  # read at the end: a GPU need not be waited for at each batch
                    counts.append(counted.size)
                    n_bytes += int(token_bytes[counted].sum())
                if on_progress is not None:
                    on_progress(min(first + world.size * batch, len(windows)), len(windows))
    finally:
        model.train(was_training)
    total = math.fsum(loss.item() * count for loss, count in zip(losses, counts, strict=True))
    nats, predicted, text = world.sums([total, sum(counts), n_bytes])
    return LossResult(nats / predicted, int(predicted), int(text), time.perf_counter() - started)


def _fill(
    reader: Tokens, windows: list[tuple[int, int, int]], block_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs and targets of shape (windows, block_size); targets that are not counted are ignored."""
    tokens = np.zeros((len(windows), block_size), dtype=np.int64)
    targets = np.full((len(windows), block_size), IGNORE, dtype=np.int64)
    for row, (start, length, predicted) in enumerate(windows):
        window = reader.read(start, length)
        tokens[row, : length - 1] = window[:-1]
        targets[row, length - 1 - predicted : length - 1] = window[-predicted:]
    return tokens, targets

"""Which tokens are in batch `step`: a pure function of (seed, step).

Why: when the order of the data is a function and not a state, nothing has to be saved, a resumed
run sees the very batches it would have seen, and neither ranks nor micro-batches change them.

An epoch is K consecutive windows of `block_size + 1` tokens (neighbours share one token, so that
each token is predicted once), beginning at a random offset drawn for that epoch, in an order drawn
for that epoch. K = (n_tokens - block_size) // block_size is the same for every offset below
`block_size`, so the epoch and the place in it follow from the row by one division. The order is a
"swap-or-not" shuffle (Hoang, Morris, Rogaway 2012): a keyed permutation of [0, K) computed row by
row in 64-bit integer arithmetic, with no memory and no dependence on a library's generator.

    windows = batch(reader, Sampler(len(reader), 1024, 384, seed=1337).rows(step), 1024)
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.errors import UserError

_ROUNDS = 64
"""After r rounds a row's place is uniform to about K^1.5 * 2^(-r/2): 64 leave no visible trace."""

_U64 = np.uint64
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Tokens(Protocol):
    """What a batch is read from; `llmtrain.data.shards.TokenReader` is one."""

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def read(self, start: int, length: int) -> npt.NDArray[np.integer[Any]]:
        """Tokens `start` to `start + length`."""
        ...


@dataclass(frozen=True)
class Sampler:
    """The endless sequence of training windows over `n_tokens` tokens.

    Attributes:
        n_tokens: tokens of the split.
        block_size: tokens that a window predicts; it holds one more.
        batch_size: windows (sequences) of one step, over all ranks and micro-batches.
        seed: the order; any integer.

    Raises:
        UserError: the split is shorter than one window.
    """

    n_tokens: int
    block_size: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert self.block_size > 0 and self.batch_size > 0
        if self.n_tokens < self.block_size + 1:
            raise UserError(
                f"the data has {self.n_tokens:,} tokens, fewer than one window of {self.block_size + 1:,} "
                "(block_size + 1)",
                hint="prepare more text, or lower data.block_size",
            )

    @property
    def windows_per_epoch(self) -> int:
        """K of the module's docstring; 1 for data shorter than two windows."""
        return max(1, (self.n_tokens - self.block_size) // self.block_size)

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """First token of each window of batch `step` (from 0), shape (batch_size,).

        A batch may begin in one epoch and end in the next, or hold several.
        """
        assert step >= 0
        return self.windows(step * self.batch_size, self.batch_size)

    def windows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """First token of each of the rows `first` to `first + count` of the endless sequence, shape (count,)."""
        row = first + np.arange(count, dtype=_U64)
        in_epoch = _U64(self.windows_per_epoch)
        epoch_key = _mix(_mix(_U64(self.seed & _MASK)) + row // in_epoch)
        # Data shorter than two windows has fewer offsets to choose from than block_size.
        offsets = min(self.block_size, self.n_tokens - self.windows_per_epoch * self.block_size)
        window = _shuffle(row % in_epoch, in_epoch, epoch_key)
        start: npt.NDArray[np.uint64] = _mix(epoch_key) % _U64(offsets) + window * _U64(
            self.block_size
        )
        return start.astype(np.int64)


def batch(tokens: Tokens, rows: npt.NDArray[np.int64], block_size: int) -> npt.NDArray[np.int64]:
    """The windows that begin at `rows`, shape (len(rows), block_size + 1).

    Inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    windows = np.empty((len(rows), block_size + 1), dtype=np.int64)
    for i, start in enumerate(rows.tolist()):
        windows[i] = tokens.read(start, block_size + 1)
    return windows


def validation_windows(
    n_tokens: int, block_size: int, stride: int | None = None
) -> list[tuple[int, int, int]]:
    """(start, length, predicted) of windows over a split that predict each token but the first once.

    A window of `length` tokens is at most `block_size + 1` and predicts its last `predicted`. Disjoint windows
    (no `stride`) predict all but their first, and the next one begins with the last token of the one before.
    With a `stride`, every window after the first predicts so many, with the tokens before them as context.
    Empty below two tokens.
    """
    stride = stride or block_size
    ends = [*range(block_size + 1, n_tokens, stride), n_tokens] if n_tokens > 1 else []
    before = [1, *ends]
    windows = []
    for end, last in zip(ends, before, strict=False):
        start = max(0, end - block_size - 1) if stride < block_size else last - 1
        windows.append((start, end - start, end - last))
    return windows


def _mix(x: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function: 64 bits in, 64 well-mixed bits out; arithmetic wraps on purpose."""
    z = np.atleast_1d(np.asarray(x, dtype=_U64)) + _U64(_GOLDEN)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


def _shuffle(
    index: npt.NDArray[np.uint64], count: np.uint64, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Where `index` goes in the permutation of [0, count) that `key` names, element by element.

    Each round pairs x with (pivot - x) mod count and swaps the pair, or not, by one bit that both
    of its members agree on; so every round, and the whole, is a permutation.
    """
    x = index
    for round_ in range(1, _ROUNDS + 1):
        round_key = _mix(key + _U64(round_ * _GOLDEN & _MASK))
        partner = (round_key % count + count - x) % count
        bit = _mix(round_key ^ np.maximum(x, partner)) >> _U64(63)
        x = np.where(bit == 1, partner, x)
    return x

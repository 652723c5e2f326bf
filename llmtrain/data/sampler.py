"""The order of the training data: the windows of batch `step` as a pure function of (seed, step).

No sampler state is saved, a resumed run draws the same batches, and ranks and micro-batches only
slice a batch.

An epoch contains K consecutive windows of `block_size + 1` tokens. Neighbours share one token, so
each token is predicted once. The offset of the first window and the order of the windows are drawn
per epoch. K = (n_tokens - block_size) // block_size is the same for every offset below
`block_size`, so one division maps a row to its epoch and its position in it. The order is a
"swap-or-not" shuffle (Hoang, Morris, Rogaway 2012): a keyed permutation of [0, K), computed per row
in 64-bit integers, without memory and independent of any library's generator.

With a mixture (`data.mix`), each further source has a share w of the rows. Row r belongs to the
first further source if floor((r + 1)·w) > floor(r·w), as that source's row floor(r·w). The other
rows are renumbered and assigned to the next source by its share of the remainder, and finally to
the main source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np
import numpy.typing as npt

from llmtrain.errors import UserError

_ROUNDS = 64
"""After r rounds, positions are uniform up to about K^1.5 * 2^(-r/2); 64 rounds leave no bias."""

_FEWEST_SAMPLES = 10

_U64 = np.uint64
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampler:
    """The endless sequence of training windows over `n_tokens` tokens.

    A window predicts `block_size` tokens. `batch_size` counts windows per step, over all ranks. A
    split shorter than one window raises a UserError.
    """

    n_tokens: int
    block_size: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        assert self.block_size > 0 and self.batch_size > 0
        if self.n_tokens < self.block_size + 1:
            raise UserError(
                f"the data has {self.n_tokens:,} tokens, fewer than one window of "
                f"{self.block_size + 1:,} (block_size + 1)",
                hint="prepare more text, or lower data.block_size",
            )

    @property
    def windows_per_epoch(self) -> int:
        """K in the module docstring; 1 if the data is shorter than two windows."""
        return max(1, (self.n_tokens - self.block_size) // self.block_size)

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the first token of each window of batch `step` (from 0), shape (batch_size,)."""
        assert step >= 0
        return self.windows(step * self.batch_size, self.batch_size)

    def windows(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the first token of rows `first` to `first + count`, shape (count,)."""
        row = first + np.arange(count, dtype=_U64)
        in_epoch = _U64(self.windows_per_epoch)
        epoch_key = _mix(_mix(_U64(self.seed & _MASK)) + row // in_epoch)
        # Data shorter than two windows has fewer possible offsets than block_size.
        offsets = min(self.block_size, self.n_tokens - self.windows_per_epoch * self.block_size)
        window = _shuffle(row % in_epoch, in_epoch, epoch_key)
        offset = _mix(epoch_key) % _U64(offsets)
        return np.asarray(offset + window * _U64(self.block_size), dtype=np.int64)


@dataclass(frozen=True)
class MixtureSampler:
    """A sampler over concatenated sources: the main one, then the ones with `shares`."""

    samplers: Sequence[Sampler]
    shares: Sequence[Fraction]

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the first token of each window of batch `step` (from 0), shape (batch_size,)."""
        batch_size, parts, offset = self.samplers[0].batch_size, [], 0
        ranges = divide_rows(step * batch_size, (step + 1) * batch_size, self.shares)
        for sampler, (start, stop) in zip(self.samplers, ranges, strict=True):
            parts.append(sampler.windows(start, stop - start) + offset)
            offset += sampler.n_tokens
        return np.concatenate(parts)


def divide_rows(first: int, last: int, shares: Sequence[Fraction]) -> list[tuple[int, int]]:
    """Divide rows `first` to `last` (exclusive) of a mixture among its sources.

    `shares` excludes the main source. Return a range of each source's own rows, the main one first.
    """
    ranges, remainder = [], Fraction(1)
    for share in shares:
        relative = share / remainder
        start, stop = floor(first * relative), floor(last * relative)
        ranges.append((start, stop))
        first, last, remainder = first - start, last - stop, remainder - share
    return [(first, last), *ranges]


def small_split(samples: int, unit: str) -> str | None:
    """Return a warning if a split has too few documents or windows for a reliable loss, else None.

    The relative error of a standard error from n independent samples is 1/sqrt(2(n - 1)): a quarter
    or more below 10 samples.
    """
    if not 0 < samples < _FEWEST_SAMPLES:
        return None
    return (
        f"{samples} {unit}(s) are too few for a reliable loss: use at least {_FEWEST_SAMPLES}; "
        "prepare with a larger --val-fraction, or evaluate more tokens"
    )


def n_windows(tokens: int, block_size: int) -> int:
    """Return the number of disjoint `validation_windows`."""
    return -(-max(tokens - 1, 0) // block_size)


def validation_windows(
    n_tokens: int, block_size: int, stride: int | None = None
) -> list[tuple[int, int, int]]:
    """Return windows over a split that predict each token but the first exactly once.

    Each window is (start, length, predicted): it has at most `block_size + 1` tokens and predicts
    its last `predicted` ones. Without `stride`, windows share one token and predict all but their
    first. With `stride`, every window after the first predicts `stride` tokens and uses the tokens
    before them as context.
    """
    stride = stride or block_size
    ends = [*range(block_size + 1, n_tokens, stride), n_tokens] if n_tokens > 1 else []
    previous_ends = [1, *ends]
    windows = []
    for end, previous in zip(ends, previous_ends, strict=False):
        start = max(0, end - block_size - 1) if stride < block_size else previous - 1
        windows.append((start, end - start, end - previous))
    return windows


def _mix(x: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64's output function. The arithmetic wraps on purpose."""
    z = np.atleast_1d(np.asarray(x, dtype=_U64)) + _U64(_GOLDEN)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


def _shuffle(
    index: npt.NDArray[np.uint64], count: np.uint64, key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Map each `index` by the permutation of [0, count) with the given `key`.

    Each round pairs x with (pivot - x) mod count and swaps the pair if a bit computed from the pair
    is set. So each round is a permutation.
    """
    x = index
    for round_ in range(1, _ROUNDS + 1):
        round_key = _mix(key + _U64(round_ * _GOLDEN & _MASK))
        partner = (round_key % count + count - x) % count
        bit = _mix(round_key ^ np.maximum(x, partner)) >> _U64(63)
        x = np.where(bit == 1, partner, x)
    return x

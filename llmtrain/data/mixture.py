"""Training data of several folders in fixed shares: replay of earlier data, or a blend of sources.

Why: who goes on training a model on new text keeps what it knew by mixing in some of the old (Ibrahim et
al. 2024, arXiv 2403.08763). Which source a row of a batch comes from, and which of its windows, is a
function of the row's number, as it is for one source: nothing is saved, and each source is read in
epochs of its own.

    data = open_training_data(config.data); sampler = MixtureSampler(data, 1024, 384, seed=1337)

Row r belongs to the first further source, of share w, where floor((r + 1)·w) > floor(r·w), and is that
source's row floor(r·w). The rows left over are numbered anew and given to the next source in the same
way, by its share of what is left, and at last to the main one.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.config.sections import DataConfig
from llmtrain.data.copies import local_folder
from llmtrain.data.sampler import Sampler, Tokens
from llmtrain.data.shards import TokenData, open_data
from llmtrain.errors import UserError


def open_training_data(config: DataConfig) -> TokenData:
    """The folder `data.path`, and those of `data.mix` beside it, copied here first where they are URLs.

    Raises:
        UserError: a folder holds no data, or tokens of another tokenizer.
    """
    data = open_data(local_folder(config.path))
    if not config.mix:
        return data
    parts = []
    for each in config.mix:
        part = open_data(local_folder(each.path))
        if (part.tokenizer, part.vocab_size) != (data.tokenizer, data.vocab_size):
            raise UserError(
                f"{each.path} holds tokens of {part.tokenizer}, {config.path} of {data.tokenizer}",
                hint="prepare both with the same --tokenizer",
            )
        parts.append((part, Fraction(str(each.weight))))
    identity = json.dumps([data.sha256, *([part.sha256, str(share)] for part, share in parts)])
    return replace(data, sha256=hashlib.sha256(identity.encode()).hexdigest(), mix=tuple(parts))


def train_tokens(data: TokenData) -> Tokens:
    """Every train token: those of the main folder, then those of the others."""
    readers = [data.reader("train"), *(part.reader("train") for part, _ in data.mix)]
    return _Joined(readers) if data.mix else readers[0]


class MixtureSampler:
    """Like `Sampler`, whose rows it gives where there is one source; see the module."""

    def __init__(self, data: TokenData, block_size: int, batch_size: int, seed: int) -> None:
        """Take the sources of `open_training_data`.

        Raises:
            UserError: the train split of one is shorter than one window.
        """
        self._batch_size = batch_size
        self._shares = [share for _, share in data.mix]
        lengths = [part.tokens("train") for part in (data, *(part for part, _ in data.mix))]
        self._samplers = [Sampler(length, block_size, batch_size, seed) for length in lengths]
        self._offsets = [0, *accumulate(lengths)]

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """First token of each window of batch `step` (from 0) in `train_tokens`, shape (batch_size,)."""
        first = step * self._batch_size
        ranges = shared(first, first + self._batch_size, self._shares)
        return np.concatenate(
            [
                sampler.windows(start, stop - start) + offset
                for sampler, offset, (start, stop) in zip(
                    self._samplers, self._offsets[:-1], ranges, strict=True
                )
            ]
        )


def shared(first: int, last: int, shares: Sequence[Fraction]) -> list[tuple[int, int]]:
    """Which of its own rows each source gives to the rows `first` to `last`: the main one, then the others.

    Args:
        first: a row of the mixture.
        last: one past its last row.
        shares: of each source but the main one, which has the rest.
    """
    ranges, rest = [], Fraction(1)
    for share in shares:
        of_rest = share / rest
        start, stop = floor(first * of_rest), floor(last * of_rest)
        ranges.append((start, stop))
        first, last, rest = first - start, last - stop, rest - share
    return [(first, last), *ranges]


class _Joined:
    """Tokens one after the other; no window that a sampler gives lies in two."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self._parts = parts
        self._offsets = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._offsets[-1]

    def read(self, start: int, length: int) -> npt.NDArray[np.integer[Any]]:
        """See `Tokens.read`."""
        index = bisect_right(self._offsets, start) - 1
        return self._parts[index].read(start - self._offsets[index], length)

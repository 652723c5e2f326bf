"""Read the micro-batches of a step, prefetching the next one in a background thread.

Why: reading tokens from a slow disk between steps would leave the device idle. The next micro-batch
is a function of the step, so prefetching adds no state to save. A prefetched micro-batch of another
step is discarded.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llmtrain.config.schedules import block_size
from llmtrain.config.schema import RunConfig
from llmtrain.data.sampler import MixtureSampler, Sampler
from llmtrain.data.shards import Tokens
from llmtrain.data.token_data import TokenData
from llmtrain.runtime.distributed import World

Windows = npt.NDArray[np.int64]


def read_windows(tokens: Tokens, starts: npt.NDArray[np.int64], block_size: int) -> Windows:
    """Read the windows that begin at `starts`, shape (len(starts), block_size + 1).

    Inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    windows = np.empty((len(starts), block_size + 1), dtype=np.int64)
    for i, start in enumerate(starts.tolist()):
        windows[i] = tokens.read(start, block_size + 1)
    return windows


def training_sampler(
    data: TokenData, block_size: int, batch_size: int, seed: int
) -> MixtureSampler:
    """Return the sampler over `data.train_tokens()`; a source below one window is a UserError."""
    lengths = [source.tokens("train") for source in data.sources]
    samplers = [Sampler(length, block_size, batch_size, seed) for length in lengths]
    return MixtureSampler(samplers, [share for _, share in data.mix])


@dataclass(frozen=True)
class _MicroBatch:
    """Rows `first` to `first + size` of this rank's part of a batch, cut to the step's length."""

    step: int
    batch: int
    first: int
    size: int


class DataLoader:
    """This rank's part of each batch, in the sampler's order."""

    def __init__(self, config: RunConfig, data: TokenData, world: World) -> None:
        self._config = config
        self._rank_batch_size = config.batch_size // world.size
        self._tokens = data.train_tokens()
        sampler = training_sampler(data, config.data.block_size, config.batch_size, config.seed)
        self._starts = lru_cache(2)(lambda batch: world.local_rows(sampler.rows(batch)))
        self._thread = ThreadPoolExecutor(1, "dataloader")
        self._prefetched: tuple[_MicroBatch, Future[Windows]] | None = None

    def micro_batches(self, step: int, batch: int, size: int) -> Iterator[Windows]:
        """Yield the micro-batches of a step, each of shape (size, block size + 1).

        `step` (from 1) determines the sequence length. `batch` (from 0) differs from `step - 1`
        after batches were skipped.
        """
        for first in range(0, self._rank_batch_size, size):
            yield self._get(_MicroBatch(step, batch, first, size))

    def close(self) -> None:
        """Stop prefetching."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _get(self, wanted: _MicroBatch) -> Windows:
        """Return a micro-batch and start reading the next one."""
        # Clear first: a failed read is raised once, and the next call reads again.
        prefetched, self._prefetched = self._prefetched, None
        if prefetched and prefetched[0] == wanted:
            windows = prefetched[1].result()
        else:
            windows = self._thread.submit(self._read, wanted).result()
        following = self._following(wanted)
        if following is not None:
            self._prefetched = following, self._thread.submit(self._read, following)
        return windows

    def _following(self, each: _MicroBatch) -> _MicroBatch | None:
        if each.first + each.size < self._rank_batch_size:
            return _MicroBatch(each.step, each.batch, each.first + each.size, each.size)
        if each.step < self._config.train.max_steps:
            return _MicroBatch(each.step + 1, each.batch + 1, 0, each.size)
        return None

    def _read(self, each: _MicroBatch) -> Windows:
        starts = self._starts(each.batch)[each.first : each.first + each.size]
        return read_windows(self._tokens, starts, block_size(each.step, self._config.data))

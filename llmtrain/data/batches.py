"""The micro-batches of this process, each read by another thread while the one before is computed.

Why: after a pause for a log line nothing keeps the device busy while the host looks for tokens on a disk,
which may be at the other end of a network. What comes next is a function of the step, so that reading ahead
leaves nothing to save, and what was read for another step than the one that comes is left.

    batches = Batches(config, data, world)
    for windows in batches.of(step, batch, micro_batch): ...
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llmtrain.config.schedules import block_size
from llmtrain.config.schema import RunConfig
from llmtrain.data.mixture import MixtureSampler, train_tokens
from llmtrain.data.sampler import batch as windows_at
from llmtrain.data.shards import TokenData
from llmtrain.runtime.distributed import World

Windows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Place:
    """A micro-batch: some rows of this process's part of a batch, in the length of a step."""

    step: int
    batch: int
    first: int
    size: int


class Batches:
    """This process's part of each batch, in the sampler's order."""

    def __init__(self, config: RunConfig, data: TokenData, world: World) -> None:
        """Open the train split.

        Args:
            config: sizes and seed.
            data: the token shards.
            world: the processes that share a batch.

        Raises:
            UserError: a source is shorter than one window.
        """
        self._config = config
        self._share = config.batch_size // world.size
        self._tokens = train_tokens(data)
        sampler = MixtureSampler(data, config.data.block_size, config.batch_size, config.seed)
        self._rows = lru_cache(2)(lambda batch: world.local_rows(sampler.rows(batch)))
        self._thread = ThreadPoolExecutor(1, "batches")
        """The only one that reads."""
        self._ahead: tuple[_Place, Future[Windows]] | None = None

    def of(self, step: int, batch: int, size: int) -> Iterator[Windows]:
        """The micro-batches of a step, of `size` sequences each: shape (size, block size + 1).

        Args:
            step: from 1: it decides the length.
            batch: from 0; the two part where batches are passed over.
            size: divides this process's share of a batch.

        Raises:
            OSError: the tokens cannot be read.
        """
        for first in range(0, self._share, size):
            yield self._take(_Place(step, batch, first, size))

    def close(self) -> None:
        """Read no further."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self, place: _Place) -> Windows:
        """Its windows; meanwhile those that come after it are read."""
        ahead, self._ahead = (
            self._ahead,
            None,
        )  # a failure is told once, and tried again by who asks again
        future = ahead[1] if ahead and ahead[0] == place else self._thread.submit(self._read, place)
        windows = future.result()
        following = self._after(place)
        if following is not None:
            self._ahead = following, self._thread.submit(self._read, following)
        return windows

    def _after(self, place: _Place) -> _Place | None:
        if place.first + place.size < self._share:
            return _Place(place.step, place.batch, place.first + place.size, place.size)
        if place.step < self._config.train.max_steps:
            return _Place(place.step + 1, place.batch + 1, 0, place.size)
        return None

    def _read(self, place: _Place) -> Windows:
        rows = self._rows(place.batch)[place.first : place.first + place.size]
        return windows_at(self._tokens, rows, block_size(place.step, self._config.data))

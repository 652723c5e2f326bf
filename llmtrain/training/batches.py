"""The windows of each step of this process, read by another thread while the step before is computed.

Why: after a pause for a log line nothing keeps the device busy while the host looks for tokens on a disk,
which may be at the other end of a network. Which windows come next is a function of the step, so that
reading ahead leaves nothing to save, and what was read for another step than the one that comes is left.

    batches = Batches(config, data, world); windows = batches.of(step, batch)
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from llmtrain.config import RunConfig
from llmtrain.data.mixture import MixtureSampler, train_tokens
from llmtrain.data.sampler import batch as windows_at
from llmtrain.data.shards import TokenData
from llmtrain.training.distributed import World
from llmtrain.training.schedules import block_size

Windows = npt.NDArray[np.int64]


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
        self._config, self._world = config, world
        self._tokens = train_tokens(data)
        self._sampler = MixtureSampler(data, config.data.block_size, config.batch_size, config.seed)
        self._thread = ThreadPoolExecutor(1, "batches")
        """The only one that reads."""
        self._ahead: tuple[tuple[int, int], Future[Windows]] | None = None

    def of(self, step: int, batch: int) -> Windows:
        """Batch `batch` (from 0) in the length of step `step` (from 1): shape (sequences, block size + 1).

        The two part where batches are passed over. Meanwhile the next one of both is read.

        Raises:
            OSError: the tokens cannot be read.
        """
        asked, ahead = (step, batch), self._ahead
        future = ahead[1] if ahead and ahead[0] == asked else self._thread.submit(self._read, *asked)
        self._ahead = None  # a failure is told once, and tried again by who asks again
        windows = future.result()
        following = (step + 1, batch + 1)
        self._ahead = following, self._thread.submit(self._read, *following)
        return windows

    def _read(self, step: int, batch: int) -> Windows:
        rows = self._world.share(self._sampler.rows(batch))
        return windows_at(self._tokens, rows, block_size(step, self._config.data))

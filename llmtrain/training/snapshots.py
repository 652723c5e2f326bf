"""Snapshots and online averages: one Hugging Face folder each, of however many processes have the weights.

Why apart from the state: a state is read by the processes of a run and may lie in parts; these folders
are read by everything else, and are whole. They are written while training goes on: the loop waits for a
copy of the weights in host memory, and for the write before, so that there is one copy at most.

    writer = SnapshotWriter(model, world, shape); writer.save(run.snapshot(1000), parameters, origin)
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.checkpoints.checkpoint import RESIDUAL_FILE
from llmtrain.checkpoints.gpt2_folder import Origin, Shape, bytes_of, save_tensors, save_weights
from llmtrain.errors import WriteFailed
from llmtrain.runtime.distributed import World
from llmtrain.runtime.sharded import gather_on_rank_zero, to_local
from llmtrain.storage.commit import staged_folder
from llmtrain.training.metrics import MetricsLog


class SnapshotWriter:
    """Writes folders of weights one after the other; what fails is raised by the next call, on every process."""

    def __init__(self, model: nn.Module, world: World, shape: Shape) -> None:
        """Nothing is written yet.

        Args:
            model: says how the weights are spread over the processes.
            world: the processes, which make the same calls in the same order; the first one writes.
            shape: the model's shape.
        """
        self._parameters = dict(model.named_parameters())
        self._world, self._shape = world, shape
        self._pool = ThreadPoolExecutor(1, "snapshot")
        self._writing: Future[None] | None = None

    def save(
        self,
        target: Path,
        parts: Mapping[str, Tensor],
        origin: Origin,
        *,
        residual: Mapping[str, Tensor] | None = None,
        provenance: object = None,
    ) -> None:
        """Begin to write a folder of weights, once the one before is written.

        Args:
            target: the final name; a folder that is there gives way.
            parts: by parameter name, float32, each process its own; they may change once this returns.
            origin: goes to `training.json`.
            residual: of a running mean, what the rounding to float32 lost; by parameter name.
            provenance: of an average.

        Raises:
            WriteFailed: of the one before: the disk is full or cannot be written to.
        """
        self.wait()
        weights = self._copies(parts)
        lost = None if residual is None else self._copies(residual)
        device = next(iter(parts.values())).device
        copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # so in torch
        if copied is not None:
            copied.record(torch.cuda.current_stream(device))

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            needed = bytes_of(weights) + bytes_of(lost or {})
            with staged_folder(target, replace=True, needed=needed) as folder:
                save_weights(folder, weights, self._shape, origin, provenance)
                if lost is not None:
                    save_tensors(folder / RESIDUAL_FILE, lost, self._shape)

        self._writing = self._pool.submit(write if self._world.is_rank_zero else lambda: None)

    def wait(self) -> None:
        """Return once what was begun is durable.

        Raises:
            WriteFailed: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._world.on_rank_zero(writing.result)

    def check(self) -> None:
        """Raise what `wait` would, if it would not have to wait."""
        if self._writing is not None and self._world.on_rank_zero(self._writing.done):
            self.wait()

    def finish(self, log: MetricsLog, warn: Callable[[str], None], step: int) -> None:
        """Wait, and where there was no place on the disk, say so and go on; see `telling`."""
        with self.telling(log, warn, step):
            self.wait()

    @contextmanager
    def telling(self, log: MetricsLog, warn: Callable[[str], None], step: int) -> Iterator[None]:
        """Log weights for which this block learns that they found no place on the disk.

        As of the present `step`, since those of the log rise; the error names the weights'.
        """
        try:
            yield
        except WriteFailed as error:
            log.not_saved(step, error)
            warn(f"{error}. Training goes on without it: an average that needs it will say so")

    def close(self) -> None:
        """Let what was begun come to its end."""
        self._pool.shutdown()

    def _copies(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in host memory on the first process, which training does not change."""
        gathered = gather_on_rank_zero(
            self._parameters, {name: to_local(part.detach()) for name, part in parts.items()}
        )
        if not self._world.is_rank_zero:
            return {}
        # What was gathered from shards is a copy already.
        return {n: t if isinstance(parts[n], DTensor) else _copy(t) for n, t in gathered.items()}


def _copy(tensor: Tensor) -> Tensor:
    """In host memory; from CUDA it arrives later, into pinned memory, while the host goes on."""
    home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return home.copy_(tensor, non_blocking=True)

"""Snapshots and online averages: one complete Hugging Face folder each, written during training.

The loop blocks only until the weights are copied to host memory and the previous write has ended,
so there is at most one copy.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.checkpoints.checkpoint import RESIDUAL_FILE, Origin
from llmtrain.checkpoints.gpt2_folder import Shape, save_tensors, save_weights, tensor_bytes
from llmtrain.checkpoints.shared_files import SharedFiles
from llmtrain.errors import WriteFailed
from llmtrain.runtime.distributed import World
from llmtrain.runtime.sharded import gather_on_rank_zero, to_local
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.integrity import write_integrity


class BackgroundWriter:
    """A thread that writes one folder at a time; all processes make the same calls."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pool = ThreadPoolExecutor(1, "writer")
        self._writing: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread; the previous write must have ended."""
        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Block until the last folder is durable, or raise what failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise the error of the last write if it has finished on all processes."""
        done = self._writing is None or self._writing.done()
        if self._world.sums([done])[0] == self._world.size:
            self.wait()

    def close(self) -> None:
        """Wait for the thread to end."""
        self._pool.shutdown()


class SnapshotWriter(BackgroundWriter):
    """Writes folders of weights on rank 0, one at a time."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        shape: Shape,
        shared: SharedFiles,
        failed: Callable[[WriteFailed], None],
    ) -> None:
        """Call `failed` on every process when a folder could not be written."""
        super().__init__(world)
        self._parameters, self._shape = dict(model.named_parameters()), shape
        self._shared, self._failed = shared, failed

    def wait(self) -> None:
        """Block until the last folder is durable, or could not be written."""
        try:
            self._world.on_rank_zero(super().wait)
        except WriteFailed as error:
            self._failed(error)

    def save(
        self,
        target: Path,
        parts: Mapping[str, Tensor],
        origin: Origin,
        residual: Mapping[str, Tensor] | None = None,
        provenance: object = None,
    ) -> None:
        """Start to write a folder of weights, replacing an existing one, after the previous write.

        `parts` are this process's parts of the float32 parameters; they may change after the
        return. `residual` is the rounding error of a running mean.
        """
        self.wait()
        weights, rounding = self._copy_whole(parts), self._copy_whole(residual or {})
        device = next(iter(parts.values())).device
        copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
            copied.record(torch.cuda.current_stream(device))

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            needed = tensor_bytes(weights) + tensor_bytes(rounding)
            with staged_folder(target, replace=True, needed=needed) as folder:
                save_weights(folder, weights, self._shape, origin, provenance)
                if rounding:
                    save_tensors(folder / RESIDUAL_FILE, rounding, self._shape)
                write_integrity(folder, self._shared.link_into(folder))

        if self._world.is_rank_zero:
            self.start(write)

    def _copy_whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the whole tensors in host memory; on rank 0 only."""
        local = {name: to_local(part.detach()) for name, part in parts.items()}
        gathered = gather_on_rank_zero(self._parameters, local)
        if not self._world.is_rank_zero:
            return {}
        # Tensors gathered from shards are copies already.
        return {n: t if isinstance(parts[n], DTensor) else _copy(t) for n, t in gathered.items()}


def _copy(tensor: Tensor) -> Tensor:
    """Copy to host memory; from CUDA asynchronously, into pinned memory."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)

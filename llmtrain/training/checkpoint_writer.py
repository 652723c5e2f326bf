"""Write training checkpoints: one at a time, by all processes together, during training.

A checkpoint gets its name only after every process has written its part. An error of one process
is raised on all. On a CPU alone, a background write gains nothing, so `save` blocks.
"""

from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from llmtrain.checkpoints.gpt2_folder import tensor_bytes
from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime.distributed import World
from llmtrain.runtime.sharded import to_local
from llmtrain.storage.commit import remove_folder, remove_leftovers, staged_folder
from llmtrain.storage.json_files import write_json
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training import checkpoint
from llmtrain.training.checkpoint import TrainingProgress
from llmtrain.training.snapshots import BackgroundWriter

T = TypeVar("T")
Tensors = dict[str, Tensor]


class CheckpointWriter(BackgroundWriter):
    """Saves training checkpoints; the next call on every process raises what failed."""

    def __init__(
        self, run: RunFolder, world: World, config: RunConfig, *, background: bool
    ) -> None:
        """In the background, the saved tensors must be copies."""
        super().__init__(world)
        self._run, self._config = run, config
        self.in_background = background

    def save(
        self,
        progress: TrainingProgress,
        updates: dict[str, int],
        tensors: Tensors,
        *,
        replace: bool,
    ) -> None:
        """Start to save the checkpoint of `progress.step` after the previous one is saved.

        Keep an existing checkpoint of this step, which is the same, unless `replace` is set.
        """
        self.wait()
        facts: dict[str, object] = {"format_version": checkpoint.FORMAT_VERSION}
        facts |= {"progress": asdict(progress), "average_updates": updates}
        target = self._run.state(progress.step)
        write = partial(self._commit, target, facts, tensors, replace)
        if self.in_background:
            self.start(write)
        else:
            write()

    def _commit(self, target: Path, facts: object, tensors: Tensors, replace: bool) -> None:
        """Create and rename the folder on rank 0; in between, every process writes its part."""
        outcome: Exception | None = None
        self._shared = self._world.size == 1
        if self._world.is_rank_zero:
            try:
                self._write_folder(target, facts, tensors, replace)
            except (UserError, RunFailed, OSError) as error:
                outcome = error
            if not self._shared:  # nothing to write: the other processes block on the folder
                self._broadcast(None)
        elif (folder := self._broadcast(None)) is not None:
            with suppress(CheckpointException):  # rank 0 raises it too, and broadcasts it
                self._write_part(folder, tensors)
        if (outcome := self._broadcast(outcome)) is not None:
            raise outcome

    def _write_folder(self, target: Path, facts: object, tensors: Tensors, replace: bool) -> None:
        remove_leftovers(target.parent)
        if replace or not target.exists():
            # `needed` is rank 0's part; the other processes need as much again.
            with staged_folder(target, replace=replace, needed=tensor_bytes(tensors)) as folder:
                if self._world.size == 1:
                    whole = {key: to_local(tensor) for key, tensor in tensors.items()}
                    save_file(whole, folder / checkpoint.TENSORS_FILE)
                else:
                    self._shared = self._broadcast(folder) is not None
                    self._write_all_parts(folder, tensors)
                write_json(folder / checkpoint.FACTS_FILE, facts)
        remove_old(self._run, self._config, newest=target)

    def _broadcast(self, value: T | None) -> T | None:
        """Return rank 0's value on every process."""
        if self._world.size == 1:
            return value
        values, group = [value], self._world.saving
        dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
        return values[0]

    def _write_part(self, folder: Path, tensors: Tensors) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=self._world.saving)

    def _write_all_parts(self, folder: Path, tensors: Tensors) -> None:
        """Write rank 0's part and check that the parts of all processes arrived."""
        try:
            self._write_part(folder, tensors)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        written = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for key, tensor in tensors.items():
            metadata = written.get(key)
            chunks = metadata.chunks if isinstance(metadata, TensorStorageMetadata) else []
            if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
                raise RunFailed(
                    f"{folder} lacks parts that other processes wrote",
                    hint="put the run folder on a disk that all machines share",
                )


def remove_old(run: RunFolder, config: RunConfig, newest: Path | None = None) -> None:
    """Delete the training checkpoints beyond `checkpoint.keep_states`, except `newest`."""
    folders, keep = step_folders(run.states), config.checkpoint.keep_states
    steps = list(folders)
    # A rewind needs regular checkpoints, which interruptions must not displace.
    every = config.checkpoint.state_every if config.may_rewind else 1
    kept = {*steps[-keep:], *checkpoint.regular_steps(steps, every)[-keep:]}
    for step, folder in folders.items():
        if step not in kept and folder != newest:
            remove_folder(folder)

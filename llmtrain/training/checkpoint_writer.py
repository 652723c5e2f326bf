"""Commits training states: one at a time, by all processes together, while training goes on.

Why apart from what a state holds: a state gets its name only when every process has written its part,
the write must not hold up a GPU, and an error of one process must reach all. On a CPU alone there is
nothing to hold up, so the state is written at once and not copied first.

    writer = StateWriter(run, world, keep=2, background=True); writer.save(progress, updates, tensors)
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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

from llmtrain.checkpoints.gpt2_folder import bytes_of
from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime.distributed import World
from llmtrain.runtime.sharded import to_local
from llmtrain.storage.commit import remove_folder, remove_leftovers, staged_folder
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import (
    FACTS_FILE,
    FORMAT_VERSION,
    TENSORS_FILE,
    TrainingProgress,
    regular,
)

T = TypeVar("T")


class StateWriter:
    """Saves states one after the other; what fails is raised by the next call, on every process."""

    def __init__(
        self, run: RunFolder, world: World, *, keep: int, every: int, background: bool
    ) -> None:
        """Nothing is written yet.

        Args:
            run: where to save.
            world: the processes, which make the same calls in the same order.
            keep: so many of the newest states stay, and of the `regular` ones of them.
            every: steps between two regular states.
            background: let training go on meanwhile; the tensors must be copies then.
        """
        self._run, self._world, self._keep, self._every = run, world, keep, every
        self.in_background = background
        self._pool = ThreadPoolExecutor(1, "state") if background else None
        self._saving: Future[None] | None = None

    def save(
        self,
        progress: TrainingProgress,
        updates: dict[str, int],
        tensors: dict[str, Tensor],
        *,
        replace: bool,
    ) -> None:
        """Begin to commit the state of `progress.step`, once the one before is committed.

        One that is there for this step is the same and stays, unless `replace` says otherwise.

        Args:
            progress: of the run.
            updates: that each online average has seen, by label.
            tensors: what `state.gather` gave.
            replace: whether one that is there gives way.
        """
        self.wait()
        facts = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(progress),
            "average_updates": updates,
        }
        commit = self._commit if self._world.size == 1 else self._commit_together
        work = partial(commit, self._run.state(progress.step), facts, tensors, replace)
        if self._pool is None:
            work()
        else:
            self._saving = self._pool.submit(work)

    def wait(self) -> None:
        """Return once the last state is committed.

        Raises:
            WriteFailed: it could not be.
            RunFailed: the run folder is not the same for all processes.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check(self) -> None:
        """Raise what `wait` would, if it would not have to wait."""
        done = self._saving is not None and self._saving.done()
        if self._world.sums([done])[0] == self._world.size:
            self.wait()

    def close(self) -> None:
        """Let what was begun come to its end."""
        if self._pool is not None:
            self._pool.shutdown()

    def _commit(
        self, target: Path, facts: dict[str, Any], tensors: dict[str, Tensor], replace: bool
    ) -> None:
        """By a process alone."""
        remove_leftovers(target.parent)
        if replace or not target.exists():
            with staged_folder(target, replace=replace, needed=bytes_of(tensors)) as folder:
                save_file(
                    {key: to_local(tensor) for key, tensor in tensors.items()},
                    folder / TENSORS_FILE,
                )
                (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        self._retire(target)

    def _commit_together(
        self, target: Path, facts: dict[str, Any], tensors: dict[str, Tensor], replace: bool
    ) -> None:
        """Rank 0 makes the folder and gives it its name; in between all write their parts into it."""
        if not self._world.is_rank_zero:
            folder = self._tell(None)
            if folder is not None:
                with suppress(CheckpointException):  # rank 0 meets it too, and tells
                    self._write_part(folder, tensors)
            if failed := self._tell(None):
                raise failed
            return
        told, outcome = False, None
        try:
            remove_leftovers(target.parent)
            if replace or not target.exists():
                # The others write as much again, each a part of it.
                with staged_folder(target, replace=replace, needed=bytes_of(tensors)) as folder:
                    told = self._tell(folder) is not None
                    self._write_all_parts(folder, tensors)
                    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
            self._retire(target)
        except (UserError, RunFailed, OSError) as error:
            outcome = error
        if not told:
            self._tell(None)
        self._tell(outcome)
        if outcome is not None:
            raise outcome

    def _tell(self, what: T | None) -> T | None:
        """What rank 0 says, on every process."""
        said = [what]
        dist.broadcast_object_list(
            said, src=0, group=self._world.saving, device=torch.device("cpu")
        )
        return said[0]

    def _write_part(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=self._world.saving)

    def _write_all_parts(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """See that what the processes wrote is a whole."""
        try:
            self._write_part(folder, tensors)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        for key, tensor in tensors.items():
            about = found.get(key)
            chunks = about.chunks if isinstance(about, TensorStorageMetadata) else []
            if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
                raise RunFailed(
                    f"{folder} does not hold what all processes wrote",
                    hint="the run folder must be on a disk that all machines share",
                )

    def _retire(self, target: Path) -> None:
        """Remove what need not be kept beside the state that was just saved."""
        folders = step_folders(self._run.states)
        steps = list(folders)
        kept = {*steps[-self._keep :], *regular(steps, self._every)[-self._keep :]}
        for step, folder in folders.items():
            if step not in kept and folder != target:
                remove_folder(folder)

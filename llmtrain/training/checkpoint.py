"""Training checkpoints: everything that a run needs to resume exactly.

Several processes write one checkpoint in the safetensors form of torch's distributed checkpoint, so
any number of processes can resume from it. It contains no RNG state: the data and the dropout of a
step are functions of (seed, step).
"""

import errno
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from llmtrain.averaging.online import OnlineAverage
from llmtrain.errors import UserError
from llmtrain.runtime.sharded import from_local, load_shards, to_local
from llmtrain.storage.commit import rename_durably
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.spikes import SpikeDetector

FORMAT_VERSION = 2
TENSORS_FILE = "tensors.safetensors"
"""Written by a single process; several processes write one file each, named by torch."""
FACTS_FILE = "state.json"


class OtherVersion(UserError):
    """An intact training checkpoint of another format version."""


@dataclass
class TrainingProgress:
    """State of a run apart from its tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wandb_id: str | None = None
    data: str = ""
    """SHA-256 of the data's manifest."""
    skipped: int = 0
    passed_batches: int = 0
    """Step `s` trains on batch `s + passed_batches`; each rewind adds the batches that it skips."""
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    micro_batch: int = 0
    """Sequences in one forward pass; 0: not yet chosen."""
    micro_batch_for: dict[str, Any] = field(default_factory=dict)
    """Settings and hardware that the micro-batch was chosen for."""

    @property
    def last_rewind(self) -> dict[str, Any] | None:
        """Record of the rewind to this step; None after a step of the new attempt."""
        last = self.rewinds[-1] if self.rewinds else {}
        return last if last.get("step") == self.step else None


@dataclass
class TrainingCheckpoint:
    """A training checkpoint whose tensors are still on disk."""

    folder: Path
    progress: TrainingProgress
    average_updates: dict[str, int]
    """Number of updates of each online average, by label."""


@dataclass(frozen=True)
class TrainingState:
    """The objects whose tensors are saved in a training checkpoint."""

    model: nn.Module
    optimizer: Optimizer
    averages: Sequence[OnlineAverage]
    spikes: SpikeDetector

    def _optimized_names(self) -> list[str]:
        """Return the parameter names in the order of the optimizer's state."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[each] for group in self.optimizer.param_groups for each in group["params"]]

    def collect(self, *, copy: bool) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint by name, in host memory, sharded like the model."""
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        tensors = _prefixed("model/", parameters)
        moments = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self._optimized_names()):
            for key, value in moments.get(index, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        for average in self.averages:
            tensors |= _prefixed(f"average/{average.config.label}/", average.state())
        tensors |= _prefixed("watch/", self.spikes.state())
        collected = {}
        for key, tensor in tensors.items():
            part = to_local(tensor.detach()).to("cpu", copy=copy).contiguous()
            parameter = parameters.get(_parameter_name(key))
            if parameter is not None and part.shape == to_local(parameter).shape:
                part = from_local(parameter, part)
            collected[key] = part
        return collected

    def restore(self, checkpoint: TrainingCheckpoint) -> None:
        """Load a checkpoint into these objects."""
        step = checkpoint.progress.step
        try:
            tensors = read_tensors(checkpoint.folder, dict(self.model.named_parameters()))
            self._load_weights(_with_prefix("model/", tensors))
            self._load_moments(_with_prefix("optimizer/", tensors))
            self.spikes.load(_with_prefix("watch/", tensors))
            for average in self.averages:
                label = average.config.label
                # A branch may add averages, which start here.
                if (updates := checkpoint.average_updates.get(label)) is not None:
                    average.load(_with_prefix(f"average/{label}/", tensors), updates)
                average.resume_at(step)
        except (RuntimeError, KeyError, ValueError) as error:
            problem = f"the training checkpoint of step {step:,} does not fit this config: {error}"
            raise UserError(problem, hint="resume with the run's own config.yaml") from error

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if other := dict(self.model.named_parameters()).keys() ^ weights.keys():
            raise KeyError(f"weights of {', '.join(sorted(other))}")
        load_shards(self.model, weights)

    def _load_moments(self, saved: Mapping[str, Tensor]) -> None:
        parameters, names = dict(self.model.named_parameters()), self._optimized_names()
        moments: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
        for key, value in saved.items():
            moment, _, name = key.rpartition("/")
            moments[names.index(name)][moment] = _shard_like(parameters[name], value)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def read_tensors(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, in host memory, sharded like the parameters.

    If one process cannot read a file, raise OSError on all.
    """
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for key, metadata in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(metadata, TensorStorageMetadata)
        parameter, dtype = parameters.get(_parameter_name(key)), metadata.properties.dtype
        if parameter is not None and metadata.size == parameter.shape:
            shard = torch.empty(to_local(parameter).shape, dtype=dtype)
            tensors[key] = from_local(parameter, shard)
        else:
            tensors[key] = torch.empty(metadata.size, dtype=dtype)
    try:
        # torch warns when a single process loads.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # a BaseException, which no caller expects
        raise next(iter(error.failures.values()))[0] from error
    return {key: to_local(tensor) for key, tensor in tensors.items()}


def _parameter_name(key: str) -> str:
    return key.rpartition("/")[2]


def _shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    if value.shape != to_local(parameter).shape:
        return value
    return from_local(parameter, value.to(parameter.device))


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def regular_steps(steps: Sequence[int], every: int) -> list[int]:
    """Return the steps that are saved even without interruptions; rewinds use only these."""
    return [step for step in steps if step % every == 0 or step == steps[0]]


def load_checkpoint(folder: Path) -> TrainingCheckpoint:
    """Check the hashes of a training checkpoint and read its progress."""
    if problems := integrity_problems(folder):
        problem = f"the training checkpoint {folder} is damaged: {'; '.join(problems)}"
        raise UserError(problem, hint="restore it from a copy, or resume from the one before it")
    facts = read_json(folder / FACTS_FILE)
    if (version := facts.get("format_version")) != FORMAT_VERSION:
        problem = f"{folder} has format version {version}, but this llmtrain reads {FORMAT_VERSION}"
        raise OtherVersion(problem, hint="use the version of llmtrain that wrote it")
    try:
        progress = TrainingProgress(**facts["progress"])
        return TrainingCheckpoint(folder, progress, facts["average_updates"])
    except (TypeError, KeyError) as error:
        problem = f"cannot read the training checkpoint {folder}: {error}"
        raise UserError(problem, hint="move it away") from error


def newest_checkpoint(
    run: RunFolder, warn: Callable[[str], None], among: Collection[int] | None = None
) -> TrainingCheckpoint | None:
    """Return the newest intact training checkpoint (of the steps `among`, if given), or None.

    Rename each damaged one to `step-…-damaged` and warn; raise a UserError if all are damaged.
    """
    folders = step_folders(run.states)
    if among is not None:
        folders = {step: folders[step] for step in sorted(folders.keys() & among)}
    for folder in reversed(folders.values()):
        try:
            return load_checkpoint(folder)
        except OtherVersion:
            raise
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise  # a bad sector is damage; missing permissions are not
            kept = set_aside(folder, "damaged")
            warn(f"{error}; kept as {kept.name}, resuming from the one before it")
    if folders or (among is None and any(run.states.glob("*-damaged*"))):
        problem = f"every training checkpoint of {run.path} is damaged"
        raise UserError(problem, hint="restore one from a copy, or choose another --run-dir")
    return None


def set_aside(folder: Path, reason: str) -> Path:
    """Rename `step-…` to `step-…-REASON` (or `-REASON-2`, …), which no reader counts as a step."""
    names = (f"{folder.name}-{reason}" + (f"-{n}" if n > 1 else "") for n in count(1))
    kept = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    rename_durably(folder, kept)
    return kept

"""The full training state: saved so that a run interrupted at any step goes on as if it had not been.

Why safetensors and JSON: nothing is ever unpickled, and a person can read what a state says. Several
processes write it together through torch's distributed checkpoint (its safetensors form), so that any
number of them, with whole weights or shards, can go on from it. The newest states are kept; an older
one goes only after its successor is durable. There is no RNG in it: the data and the dropout of a step
are functions of (seed, step).

    writer.save(progress, updates, gather(...)); saved = newest_state(run, warn=print)
"""

import errno
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from llmtrain.averaging.online import OnlineAverage
from llmtrain.errors import UserError
from llmtrain.runtime.sharded import from_local, load_shards, to_local
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.spikes import SpikeDetector

FORMAT_VERSION = 2
TENSORS_FILE = "tensors.safetensors"
"""Of one process; several write a file each, named by torch."""
FACTS_FILE = "state.json"


class OtherVersion(UserError):
    """A state that is whole, and written by another version of this program."""


@dataclass
class TrainingProgress:
    """What a run has done so far, apart from its weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Seconds of training, over all sessions."""
    wandb_id: str | None = None
    data: str = ""
    """Identity of the data: SHA-256 of its manifest."""
    skipped: int = 0
    """Steps whose update was left out, because of a spike or a number that was not finite."""
    passed_batches: int = 0
    """Step `s` trains on batch `s + passed_batches`: rewinds pass over the batches of a spike."""
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    """Each rewind as `metrics.jsonl` tells it, oldest first."""
    micro_batch: int = 0
    """Sequences in one forward pass; 0: not chosen yet."""
    micro_batch_for: dict[str, Any] = field(default_factory=dict)
    """What it was chosen for: where that is the same, a resumed run goes on with it."""


@dataclass
class TrainingCheckpoint:
    """What decides how training goes on: the tensors are read from its folder when they are needed."""

    folder: Path
    progress: TrainingProgress
    average_updates: dict[str, int]
    """Updates each online average has seen, by label."""


def gather(
    model: nn.Module,
    optimizer: Optimizer,
    averages: Sequence[OnlineAverage],
    watch: SpikeDetector,
    *,
    copy: bool = False,
) -> dict[str, Tensor]:
    """Every tensor that decides how training goes on, by a name that says what it is, in host memory.

    What is spread over processes is so here too. With `copy`, training may go on while they are saved.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in parameters.items()}
    moments = optimizer.state_dict()["state"]
    for index, name in enumerate(_optimized_names(model, optimizer)):
        tensors |= {
            f"optimizer/{key}/{name}": value for key, value in moments.get(index, {}).items()
        }
    for average in averages:
        tensors |= {
            f"average/{average.config.label}/{name}": t for name, t in average.state().items()
        }
    tensors |= {f"watch/{name}": tensor for name, tensor in watch.state().items()}
    gathered = {}
    for key, tensor in tensors.items():
        mine = to_local(tensor.detach()).to("cpu", copy=copy).contiguous()
        parameter = parameters.get(_parameter_name(key))
        fits = parameter is not None and mine.shape == to_local(parameter).shape
        gathered[key] = from_local(parameter, mine) if parameter is not None and fits else mine
    return gathered


def restore(
    state: TrainingCheckpoint,
    model: nn.Module,
    optimizer: Optimizer,
    averages: Sequence[OnlineAverage],
    watch: SpikeDetector,
) -> None:
    """Put everything that `gather` took back into its place, of whatever number of processes it was.

    Raises:
        UserError: the state is of another model.
    """
    parameters = dict(model.named_parameters())
    try:
        tensors = read_tensors(state.folder, parameters)
        weights = _under("model/", tensors)
        if weights.keys() != parameters.keys():
            raise KeyError(f"weights of {', '.join(sorted(weights.keys() ^ parameters.keys()))}")
        load_shards(model, weights)
        moments: dict[int, dict[str, Tensor]] = {}
        saved = _under("optimizer/", tensors)
        for index, name in enumerate(_optimized_names(model, optimizer)):
            keys = [key.removesuffix(f"/{name}") for key in saved if key.endswith(f"/{name}")]
            parameter = parameters[name]
            moments[index] = {key: _beside(parameter, saved[f"{key}/{name}"]) for key in keys}
        optimizer.load_state_dict(
            {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        watch.load(_under("watch/", tensors))
        for average in averages:
            label = average.config.label
            if label in state.average_updates:  # in a branch, others begin where it does
                average.load(_under(f"average/{label}/", tensors), state.average_updates[label])
            average.go_on_from(state.progress.step)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"the state of step {state.progress.step:,} does not fit this config: {error}",
            hint="resume with the config that the run was started with (its config.yaml)",
        ) from error


def read_tensors(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state by name, in host memory; of what is spread, this process's part.

    Args:
        folder: of the state.
        parameters: of the model, by name: what has the shape of one is spread as it is.

    Raises:
        OSError: a file cannot be read; on all processes where one cannot.
    """
    reader = HuggingFaceStorageReader(str(folder))
    spread: dict[str, Tensor] = {}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)
        parameter = parameters.get(_parameter_name(key))
        if parameter is not None and about.size == parameter.shape:
            part = torch.empty(to_local(parameter).shape, dtype=about.properties.dtype)
            spread[key] = from_local(parameter, part)
        else:
            spread[key] = torch.empty(about.size, dtype=about.properties.dtype)
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled", category=UserWarning
        )
        try:
            load(spread, storage_reader=reader, no_dist=alone)
        except CheckpointException as error:  # no Exception: nothing above would tell it
            raise next(iter(error.failures.values()))[0] from error
    return {key: to_local(tensor) for key, tensor in spread.items()}


def regular(steps: Sequence[int], every: int) -> list[int]:
    """Of the steps of states, those that a run has however often it was interrupted: a rewind goes to no other.

    They are the multiples of `every`, and the oldest: the run may have begun with it.
    """
    return [step for step in steps if step % every == 0 or step == steps[0]]


def load_state(folder: Path) -> TrainingCheckpoint:
    """A state, its hashes checked.

    Raises:
        UserError: a file is missing or damaged, or the format is of a newer version.
    """
    if problems := integrity_problems(folder):
        raise UserError(
            f"the state {folder} is damaged: {'; '.join(problems)}",
            hint="restore it from a copy; the run can go on from the state before it",
        )
    facts = read_json(folder / FACTS_FILE)
    if facts.get("format_version") != FORMAT_VERSION:
        raise OtherVersion(
            f"{folder} has format version {facts.get('format_version')}, this is version {FORMAT_VERSION}",
            hint="use the version of llmtrain that wrote it",
        )
    try:
        return TrainingCheckpoint(
            folder, TrainingProgress(**facts["progress"]), facts["average_updates"]
        )
    except (TypeError, KeyError) as error:
        raise UserError(
            f"the state {folder} cannot be read: {error}", hint="move it away"
        ) from error


def newest_state(
    run: RunFolder, warn: Callable[[str], None], among: Collection[int] | None = None
) -> TrainingCheckpoint | None:
    """The newest state that is whole (of the steps `among`, if given); None while the run has saved none.

    A damaged one is told, kept beside the others as `step-…-damaged`, and passed over.

    Raises:
        UserError: there are states and all are damaged, or one is of another version.
    """
    folders = {
        step: path
        for step, path in step_folders(run.states).items()
        if among is None or step in among
    }
    for folder in reversed(folders.values()):
        try:
            return load_state(folder)
        except OtherVersion:
            raise
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise  # a missing right is mended by whoever started this; a bad sector is damage
            aside = set_aside(folder, "damaged")
            warn(
                f"{error}; it is kept as {aside.name}, and the run goes on from the state before it"
            )
    if folders or (among is None and any(run.states.glob("*-damaged*"))):
        raise UserError(
            f"every state of {run.path} is damaged",
            hint="restore one from a copy, or train anew in another --run-dir",
        )
    return None


def set_aside(folder: Path, why: str) -> Path:
    """Rename a `step-…` folder to `step-…-WHY`, or, where there is one, to `step-…-WHY-2` and so on.

    Returns:
        What it is called now: nothing takes it for a step any more.
    """
    names = (f"{folder.name}-{why}" + (f"-{number}" if number > 1 else "") for number in count(1))
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def _parameter_name(key: str) -> str:
    """The last part of a name in a state: that of the parameter it belongs to, if it belongs to one."""
    return key.rpartition("/")[2]


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` as the optimizer keeps it: on the parameter's device and spread as it is, if it has its shape."""
    if value.shape != to_local(parameter).shape:
        return value
    return from_local(parameter, value.to(parameter.device))


def _optimized_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers its states."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

"""The full training state: saved so that a run interrupted at any step goes on as if it had not been.

Why safetensors and JSON: nothing is ever unpickled, and a person can read what a state says. The
newest states are kept; an older one goes only after its successor is durable. There is no RNG in it:
the data and the dropout of a step are functions of (seed, step).

    save_state(run, State(progress, gather(...), updates), keep=2); newest_state(run, warn=print)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.averaging.online import OnlineAverage
from llmtrain.checkpoint import bytes_of
from llmtrain.errors import UserError
from llmtrain.files import (
    RunFolder,
    integrity_problems,
    remove_folder,
    remove_leftovers,
    staged_folder,
    step_folders,
)
from llmtrain.training.stability import Watch
from llmtrain.weights_folder import read_json

FORMAT_VERSION = 1
_TENSORS = "tensors.safetensors"
_FACTS = "state.json"


@dataclass
class Progress:
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


@dataclass
class State:
    """Everything that decides how training goes on."""

    progress: Progress
    tensors: dict[str, Tensor]
    average_updates: dict[str, int]
    """Updates each online average has seen, by label."""


def gather(
    model: nn.Module, optimizer: Optimizer, averages: Sequence[OnlineAverage], watch: Watch
) -> dict[str, Tensor]:
    """Every tensor that decides how training goes on, by a name that says what it is."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    moments = optimizer.state_dict()["state"]
    for index, name in enumerate(_optimized_names(model, optimizer)):
        tensors |= {f"optimizer/{key}/{name}": value for key, value in moments.get(index, {}).items()}
    for average in averages:
        tensors |= {f"average/{average.config.label}/{name}": t for name, t in average.state().items()}
    tensors |= {f"watch/{name}": tensor for name, tensor in watch.state().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore(
    state: State,
    model: nn.Module,
    optimizer: Optimizer,
    averages: Sequence[OnlineAverage],
    watch: Watch,
) -> None:
    """Put everything that `gather` took back into its place.

    Raises:
        UserError: the state is of another model.
    """
    try:
        model.load_state_dict(_under("model/", state.tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        saved = _under("optimizer/", state.tensors)
        for index, name in enumerate(_optimized_names(model, optimizer)):
            keys = [key.removesuffix(f"/{name}") for key in saved if key.endswith(f"/{name}")]
            moments[index] = {key: saved[f"{key}/{name}"] for key in keys}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        watch.load(_under("watch/", state.tensors))
        for average in averages:
            label = average.config.label
            if label in state.average_updates:  # in a branch, others begin where it does
                average.load(_under(f"average/{label}/", state.tensors), state.average_updates[label])
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"the state of step {state.progress.step:,} does not fit this config: {error}",
            hint="resume with the config that the run was started with (its config.yaml)",
        ) from error


def save_state(run: RunFolder, state: State, *, keep: int, replace: bool = False) -> None:
    """Commit a state, then remove all but the newest `keep`.

    One that is there for this step is the same and stays, unless `replace` says otherwise.
    """
    remove_leftovers(run.states)
    target = run.state(state.progress.step)
    if replace or not target.exists():
        facts = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(state.progress),
            "average_updates": state.average_updates,
        }
        with staged_folder(target, replace=replace, needed=bytes_of(state.tensors)) as folder:
            save_file(state.tensors, folder / _TENSORS)
            (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    for folder in list(step_folders(run.states).values())[:-keep]:
        remove_folder(folder)


def load_state(folder: Path) -> State:
    """Read a state, its hashes checked.

    Raises:
        UserError: a file is missing or damaged, or the format is of a newer version.
    """
    if problems := integrity_problems(folder):
        raise UserError(
            f"the state {folder} is damaged: {'; '.join(problems)}",
            hint="restore it from a copy; the run can go on from the state before it",
        )
    facts = read_json(folder / _FACTS)
    if facts.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {facts.get('format_version')}, this is version {FORMAT_VERSION}",
            hint="use the version of llmtrain that wrote it",
        )
    try:
        return State(Progress(**facts["progress"]), load_file(folder / _TENSORS), facts["average_updates"])
    except (SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"the state {folder} cannot be read: {error}", hint="move it away") from error


def newest_state(run: RunFolder, warn: Callable[[str], None], latest: int | None = None) -> State | None:
    """The newest state that is whole (and not after step `latest`); None while the run has saved none.

    A damaged one is told, kept beside the others as `step-…-damaged`, and passed over.

    Raises:
        UserError: there are states and all are damaged.
    """
    folders = {
        step: path for step, path in step_folders(run.states).items() if latest is None or step <= latest
    }
    for folder in reversed(folders.values()):
        try:
            return load_state(folder)
        except UserError as error:
            aside = folder.with_name(f"{folder.name}-damaged")
            if aside.exists():
                remove_folder(aside)
            folder.rename(aside)
            warn(f"{error}; it is kept as {aside.name}, and the run goes on from the state before it")
    if folders or (latest is None and any(run.states.glob("*-damaged"))):
        raise UserError(
            f"every state of {run.path} is damaged",
            hint="restore one from a copy, or train anew in another --run-dir",
        )
    return None


def _optimized_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers its states."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

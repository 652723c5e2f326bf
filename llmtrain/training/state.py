"""The full training state: saved so that a run interrupted at any step goes on as if it had not been.

Why safetensors and JSON: nothing is ever unpickled, and a person can read what a state says. The
newest states are kept; an older one goes only after its successor is durable. There is no RNG in it:
the data and the dropout of a step are functions of (seed, step).

    save_state(run, State(progress, gather(...), updates), keep=2); load_state(newest_state(run))
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from llmtrain.averaging.online import OnlineAverage
from llmtrain.errors import UserError
from llmtrain.files import (
    RunFolder,
    integrity_problems,
    remove_folder,
    remove_leftovers,
    staged_folder,
    step_folders,
)

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


@dataclass
class State:
    """Everything that decides how training goes on."""

    progress: Progress
    tensors: dict[str, Tensor]
    average_updates: dict[str, int]
    """Updates each online average has seen, by label."""


def gather(model: nn.Module, optimizer: Optimizer, averages: Sequence[OnlineAverage]) -> dict[str, Tensor]:
    """Every tensor that decides how training goes on, by a name that says what it is."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    moments = optimizer.state_dict()["state"]
    for index, name in enumerate(_optimized_names(model, optimizer)):
        tensors |= {f"optimizer/{key}/{name}": value for key, value in moments.get(index, {}).items()}
    for average in averages:
        tensors |= {f"average/{average.config.label}/{name}": t for name, t in average.state().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore(state: State, model: nn.Module, optimizer: Optimizer, averages: Sequence[OnlineAverage]) -> None:
    """Put everything that `gather` took back into its place.

    Raises:
        UserError: the state is of another model, or lacks an average that the config asks for.
    """
    try:
        model.load_state_dict(_under("model/", state.tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        saved = _under("optimizer/", state.tensors)
        for index, name in enumerate(_optimized_names(model, optimizer)):
            keys = [key.removesuffix(f"/{name}") for key in saved if key.endswith(f"/{name}")]
            moments[index] = {key: saved[f"{key}/{name}"] for key in keys}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        for average in averages:
            label = average.config.label
            average.load(_under(f"average/{label}/", state.tensors), state.average_updates[label])
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"the state of step {state.progress.step:,} does not fit this config: {error}",
            hint="resume with the config that the run was started with (its config.yaml)",
        ) from error


def save_state(run: RunFolder, state: State, *, keep: int) -> None:
    """Commit a state, then remove all but the newest `keep`."""
    remove_leftovers(run.states)
    target = run.state(state.progress.step)
    if not target.exists():
        facts = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(state.progress),
            "average_updates": state.average_updates,
        }
        with staged_folder(target) as folder:
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
            hint="move that folder away: the run then resumes from the state before it",
        )
    facts = json.loads((folder / _FACTS).read_text())
    if facts["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {facts['format_version']}, this is version {FORMAT_VERSION}",
            hint="use the version of llmtrain that wrote it",
        )
    try:
        return State(Progress(**facts["progress"]), load_file(folder / _TENSORS), facts["average_updates"])
    except (SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"the state {folder} cannot be read: {error}", hint="move it away") from error


def newest_state(run: RunFolder) -> Path | None:
    """The folder of the newest committed state, or None."""
    return next(reversed(step_folders(run.states).values()), None)


def _optimized_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers its states."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

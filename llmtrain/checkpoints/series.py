"""Checkpoints of one training run by step: our runs, and folders on disk."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from llmtrain.checkpoints import windows
from llmtrain.checkpoints.checkpoint import Checkpoint, recorded_digests
from llmtrain.checkpoints.open import is_checkpoint, open_checkpoint
from llmtrain.checkpoints.step_names import StepName, parse_series
from llmtrain.config.warmup import warmup_steps
from llmtrain.errors import UserError
from llmtrain.storage.integrity import Digest
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_folders

_SHARD_SUFFIXES = (".safetensors", ".bin", ".tar")
"""Numbered files with these suffixes are shards of weights or data, not checkpoints."""

_FINAL_NAMES = ("final", "main")

Name = TypeVar("Name", str, Path)


class MissingCheckpoints(UserError):
    """A series lacks the requested checkpoints."""


@dataclass(frozen=True)
class Input:
    """A checkpoint that has not been opened."""

    step: int
    location: str
    open: Callable[[], Checkpoint] = field(compare=False, repr=False)
    """Find the files, or download them from the hub, and read their headers."""
    declared: Callable[[], Mapping[str, Digest]] = field(compare=False, repr=False, default=dict)
    """Return digests by file name as recorded by the writer; empty if not recorded."""


@dataclass(frozen=True)
class Series:
    """Checkpoints that can be averaged."""

    name: str
    averages: Path
    """Default parent folder of its averages."""
    inputs: Mapping[int, Input]
    """By step, ascending."""
    final: Input | None = None
    """Finished model, if stored next to the steps."""
    trusted: bool = False
    """Declared hashes come from our own commit and need not be recomputed."""
    repository: str | None = None

    @property
    def steps(self) -> list[int]:
        """Steps, ascending."""
        return list(self.inputs)

    def windows(
        self, *, every: int, size: int, at: int | str, disjoint: bool = False
    ) -> list[windows.Window]:
        """Return the windows for `at`: `last`, `all`, or the step at which one window ends.

        If none exists, the error lists the steps and the possible spacings or ends.
        """
        find = windows.disjoint_windows if disjoint else windows.sliding_windows
        complete = find(self.steps, every=every, size=size)
        chosen = complete[-1:] if at == "last" else [w for w in complete if at in ("all", w[-1])]
        if chosen:
            return chosen
        hint = f"use --window {max(len(self.steps), 1)} or less, or continue training"
        if complete:
            hint = f"windows end at {windows.describe_steps([each[-1] for each in complete])}"
        elif spacings := windows.possible_spacings(self.steps, size):
            hint = f"--every {windows.describe_spacings(spacings)} gives a window of {size}"
        end = "" if isinstance(at, str) else f" that ends at step {at:,}"
        raise MissingCheckpoints(
            f"{self.name} has no window of {size:,} checkpoints every {every:,} steps{end}; "
            f"it has {len(self.steps)}: {windows.describe_steps(self.steps)}",
            hint=hint,
        )


def run_series(run: RunFolder) -> Series:
    """Return the snapshots of a run after warm-up; earlier ones make averages worse than raw."""
    warmup = warmup_steps(run.config)
    snapshots = step_folders(run.snapshots)
    inputs = {step: local_input(step, path) for step, path in snapshots.items() if step > warmup}
    if not inputs:
        raise UserError(
            f"{run.path} contains no snapshot after its {warmup:,} warm-up steps; "
            f"it has {windows.describe_steps(list(snapshots))}",
            hint="continue training; checkpoint.snapshot_every sets the steps between snapshots",
        )
    return Series(str(run.path), run.averages, inputs, trusted=True)


def folder_series(folder: Path) -> Series:
    """Return the checkpoints in a folder: `step1000/`, `checkpoint-1000/`, `ckpt_1000.pt`, ….

    Their steps are in their names, see `step_names`. Step 0, the initial weights, is left out, but
    epoch 0 is not. Raise a UserError if the names count different things.
    """
    found = {
        path: path.stem if path.is_file() else path.name
        for path in sorted(folder.iterdir() if folder.is_dir() else [])
        if path.suffix not in _SHARD_SUFFIXES and is_checkpoint(path)
    }
    names = parse_series(found.values())
    steps = {
        path: names[name]
        for path, name in found.items()
        if name in names and (names[name].step or names[name].is_epoch)
    }
    paths = by_step(
        ((name.step, path) for path, name in steps.items()),
        hint="merge the files of several ranks into one per step, and move each other series to a "
        "separate folder",
    )
    _require_one_series(folder, {path: steps[path] for path in paths.values()})
    if not paths:
        raise UserError(
            f"{folder} contains no checkpoints with a step in their names",
            hint="such as step1000/ or checkpoint-1000/ with model.safetensors, or ckpt_1000.pt",
        )
    inputs = {step: local_input(step, path) for step, path in paths.items()}
    finals = [folder / name for name in _FINAL_NAMES if is_checkpoint(folder / name)]
    final = local_input(max(paths), finals[0]) if finals else None
    return Series(str(folder), Path("averages") / folder.resolve().name, inputs, final=final)


def _require_one_series(folder: Path, names: Mapping[Path, StepName]) -> None:
    examples = {name.series: path.name for path, name in names.items()}
    if len(examples) > 1:
        counts = Counter(name.series for name in names.values())
        parts = [f"{counts[each]} like {example}" for each, example in examples.items()]
        raise UserError(
            f"{folder} contains several series of checkpoints: {', '.join(parts[:8])}",
            hint="move each series to a separate folder",
        )


def by_step(found: Iterable[tuple[int, Name]], hint: str) -> dict[int, Name]:
    """Return the names or paths by step, ascending; raise if two share a step."""
    names: dict[int, Name] = {}
    for step, name in sorted(found):
        if step in names:
            raise UserError(f"{names[step]} and {name} both have step {step:,}", hint=hint)
        names[step] = name
    return names


def local_input(step: int, path: Path) -> Input:
    """Return the input for a folder or file of weights in any format."""
    opener, declared = partial(open_checkpoint, path, step=step), partial(recorded_digests, path)
    return Input(step, str(path), opener, declared)


def require_same_tensors(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise unless names, shapes and dtypes of all tensors equal those of the newest checkpoint.

    Also raise if the steps stored by the trainer contradict the order of the checkpoints.
    """
    _require_stored_order(checkpoints)
    newest = checkpoints[-1]
    expected = newest.tensors
    differences = [
        f"{name}: {tensors.get(name) or 'absent'} at step {checkpoint.step:,}, "
        f"{expected.get(name) or 'absent'} at step {newest.step:,}"
        for checkpoint in checkpoints[:-1]
        for tensors in [checkpoint.tensors]
        for name in sorted(expected.keys() | tensors.keys())
        if tensors.get(name) != expected.get(name)
    ]
    if differences:
        title = f"the checkpoints contain different tensors ({len(differences)} differences):"
        message = "\n  ".join([title, *differences[:8]])
        raise UserError(message, hint="average checkpoints of one model")


def _require_stored_order(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise if a checkpoint stores an earlier epoch or step than the one before it.

    Why only the order: trainers count from 0 or 1, and name files by epochs, tokens or samples.
    """
    stored = [(each, position) for each in checkpoints if (position := _stored_position(each))]
    for (one, first), (other, second) in itertools.pairwise(stored):
        if second < first:
            raise UserError(
                f"the names contradict the steps in the files: {one.location} stores "
                f"{_describe(first)}, {other.location} stores {_describe(second)}",
                hint="name them by the stored step, such as step1200.pt",
            )


def _stored_position(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return (epoch, step) from the weights file, `training.json` or `trainer_state.json`."""
    if checkpoint.position is not None:
        return checkpoint.position
    if origin := checkpoint.origin:
        return 0, origin.step
    state = checkpoint.folder / "trainer_state.json"  # Hugging Face's Trainer
    step = read_json(state).get("global_step") if state.is_file() else None
    return (0, step) if type(step) is int else None


def _describe(position: tuple[int, int]) -> str:
    epoch, step = position
    return f"epoch {epoch:,}, step {step:,}" if epoch else f"step {step:,}"

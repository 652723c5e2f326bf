"""The checkpoints of a run by step, known from their headers alone.

Why: whether a window can be averaged (all there, whole, same tensors) is decided from a few kilobytes
a checkpoint, before a single weight is read. Steps are numbers, never texts or file times.

    series = run_series(RunFolder(Path("runs/demo"))); series.steps
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmtrain.averaging.header import Header, StoredTensor, TensorSpec, read_header
from llmtrain.averaging.windows import (
    Window,
    describe_spacings,
    describe_steps,
    disjoint_windows,
    possible_spacings,
    sliding_windows,
)
from llmtrain.config import load_config
from llmtrain.errors import UserError
from llmtrain.files import INTEGRITY_FILE, RunFolder, read_integrity, step_folders
from llmtrain.weights_folder import WEIGHTS_FILE, Origin, load_origin

_DIFFERENCES_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step: the files that hold them and the header of each."""

    step: int
    path: Path
    """The folder, or the file where there is nothing but a file."""
    shards: Mapping[Path, Header]

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, in the order in which they are stored."""
        return {
            name: tensor.spec for header in self.shards.values() for name, tensor in header.tensors.items()
        }

    @cached_property
    def places(self) -> dict[str, tuple[Path, StoredTensor]]:
        """File and position of every tensor."""
        return {
            name: (path, tensor)
            for path, header in self.shards.items()
            for name, tensor in header.tensors.items()
        }

    @cached_property
    def origin(self) -> Origin | None:
        """What the folder says about where its weights come from."""
        return load_origin(self.path)

    def recorded_hashes(self) -> dict[str, str] | None:
        """SHA-256 of each weights file as recorded when the folder was committed; None: no record.

        Raises:
            UserError: the record and the files disagree about a size, or the record is damaged.
        """
        if not (self.path / INTEGRITY_FILE).exists():
            return None
        record = read_integrity(self.path)
        for path in self.shards:
            known, size = record.get(path.name, {}).get("bytes"), path.stat().st_size
            if known != size:
                raise UserError(
                    f"{path} has {size:,} bytes and was committed with {known}",
                    hint="the file is damaged: restore it, or average a window without this step",
                )
        return {path.name: str(record[path.name]["sha256"]) for path in self.shards}


@dataclass(frozen=True)
class Series:
    """Checkpoints of one training run that can be averaged, by step, ascending."""

    name: str
    """What a person calls it, for messages."""
    paths: Mapping[int, Path]

    @property
    def steps(self) -> list[int]:
        """What there is, ascending."""
        return list(self.paths)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step, its headers read.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = self.paths[step]
        weights = folder / WEIGHTS_FILE
        return Checkpoint(step, folder, {weights: read_header(weights)})

    def windows(self, *, every: int, size: int, at: int | str, disjoint: bool) -> list[Window]:
        """The windows that `at` asks for: `last`, `all`, or the one that ends at a step.

        Raises:
            UserError: there is none; says which steps there are and which spacings would do.
        """
        find = disjoint_windows if disjoint else sliding_windows
        complete = find(self.steps, every=every, size=size)
        if not complete:
            raise self._no_window(every, size)
        if at == "all":
            return complete
        if at == "last":
            return complete[-1:]
        chosen = [window for window in complete if window[-1] == at]
        if not chosen:
            ends = describe_steps([window[-1] for window in complete])
            raise UserError(
                f"no complete {'disjoint ' if disjoint else ''}window of {size} checkpoints every {every:,} "
                f"steps ends at step {at:,}; {self.name} has {describe_steps(self.steps)}",
                hint=f"windows end at {ends}",
            )
        return chosen

    def _no_window(self, every: int, size: int) -> UserError:
        spacings = possible_spacings(self.steps, size)
        message = (
            f"{self.name} has no {size} checkpoints every {every:,} steps; "
            f"it has {len(self.steps)}: {describe_steps(self.steps)}"
        )
        if spacings:
            return UserError(message, hint=f"--every {describe_spacings(spacings)} gives a window of {size}")
        return UserError(message, hint=f"--window {max(len(self.steps), 1)} or less, or train on")


def run_series(run: RunFolder) -> Series:
    """The snapshots of a run taken after warm-up.

    Averages that reach back into warm-up, or to the initial weights, are worse than the raw weights.

    Raises:
        UserError: no run, or no snapshot after warm-up.
    """
    warmup = load_config(run.config).schedule.warmup_steps
    everything = step_folders(run.snapshots)
    paths = {step: path for step, path in everything.items() if step > warmup}
    if not paths:
        raise UserError(
            f"{run.path} has no snapshot after its {warmup:,} warm-up steps; "
            f"it has {describe_steps(list(everything))}",
            hint="train on; checkpoint.snapshot_every says how often a snapshot is kept",
        )
    return Series(str(run.path), paths)


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Compare names, shapes and dtypes of all tensors of all checkpoints, from headers alone.

    Raises:
        UserError: they differ; lists the tensors and the steps.
    """
    reference = checkpoints[-1]
    differences = []
    for checkpoint in checkpoints[:-1]:
        for name in sorted(reference.tensors.keys() | checkpoint.tensors.keys()):
            mine, newest = checkpoint.tensors.get(name), reference.tensors.get(name)
            if mine != newest:
                differences.append(
                    f"{name}: {mine or 'absent'} at step {checkpoint.step:,}, "
                    f"{newest or 'absent'} at step {reference.step:,}"
                )
    if differences:
        shown = "\n  ".join(differences[:_DIFFERENCES_SHOWN])
        more = len(differences) - _DIFFERENCES_SHOWN
        raise UserError(
            f"the checkpoints do not hold the same tensors ({len(differences)} differences):\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else ""),
            hint="only checkpoints of one model can be averaged",
        )

"""The checkpoints of one training run, by step: of our own runs and of folders on disk.

Why: which window is wanted is decided on step numbers, before anything is opened. Steps are numbers,
read from names, never texts or file times.

    series = run_series(RunFolder(Path("runs/demo"))); series.steps
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llmtrain.checkpoints.checkpoint import TORCH_WEIGHTS_FILE, Checkpoint
from llmtrain.checkpoints.open import open_folder, open_safetensors
from llmtrain.checkpoints.weights_folder import WEIGHTS_FILE
from llmtrain.checkpoints.windows import (
    Window,
    describe_spacings,
    describe_steps,
    disjoint_windows,
    possible_spacings,
    sliding_windows,
)
from llmtrain.config.loading import load_config
from llmtrain.errors import UserError
from llmtrain.storage.integrity import INTEGRITY_FILE, read_integrity
from llmtrain.storage.run_folder import RunFolder, step_folders

_DIFFERENCES_SHOWN = 8
_STEP_IN_NAME = re.compile(r"(?:^|\D)(\d+)$")
_FINAL_NAMES = ("final", "main")


def _nothing_declared() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Input:
    """A checkpoint that has not been opened."""

    step: int
    location: str
    """Path, or repository@commit."""
    open: Callable[[], Checkpoint] = field(compare=False, repr=False)
    """Find its files (download them, for one on the hub) and read their headers."""
    declared: Callable[[], Mapping[str, str]] = field(
        compare=False, repr=False, default=_nothing_declared
    )
    """SHA-256 by file name as whoever wrote the files recorded it; empty where nobody did."""


@dataclass(frozen=True)
class Series:
    """Checkpoints that can be averaged."""

    name: str
    """What a person calls it, for messages."""
    averages: Path
    """Folder under which its averages go by default."""
    inputs: Mapping[int, Input]
    """By step, ascending."""
    final: Input | None = None
    """The finished model, where the series has one beside its steps."""
    trusted: bool = False
    """Its declared hashes are those of our own commit, and need not be computed again."""
    repository: str | None = None
    """On the hub."""

    @property
    def steps(self) -> list[int]:
        """What there is, ascending."""
        return list(self.inputs)

    def windows(
        self, *, every: int, size: int, at: int | str, disjoint: bool = False
    ) -> list[Window]:
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
            return UserError(
                message, hint=f"--every {describe_spacings(spacings)} gives a window of {size}"
            )
        return UserError(message, hint=f"--window {max(len(self.steps), 1)} or less, or train on")


def run_series(run: RunFolder) -> Series:
    """The snapshots of a run taken after warm-up.

    Averages that reach back into warm-up, or to the initial weights, are worse than the raw weights.

    Raises:
        UserError: no run, or no snapshot after warm-up.
    """
    warmup = load_config(run.config).schedule.warmup_steps
    everything = step_folders(run.snapshots)
    inputs = {step: own_input(step, path) for step, path in everything.items() if step > warmup}
    if not inputs:
        raise UserError(
            f"{run.path} has no snapshot after its {warmup:,} warm-up steps; "
            f"it has {describe_steps(list(everything))}",
            hint="train on; checkpoint.snapshot_every says how often a snapshot is kept",
        )
    return Series(str(run.path), run.averages, inputs, trusted=True)


def own_input(step: int, folder: Path) -> Input:
    """A folder that was committed with its hashes."""
    return Input(
        step, str(folder), partial(open_folder, folder, step=step), partial(recorded_hashes, folder)
    )


def recorded_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder as recorded when it was committed; empty without a record.

    Raises:
        UserError: the record and a file disagree about its size, or the record is damaged.
    """
    if not (folder / INTEGRITY_FILE).exists():
        return {}
    record = read_integrity(folder)
    for name, known in record.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if known["bytes"] != size:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(
                f"{path} {found} and was committed with {known['bytes']:,} bytes",
                hint="the file is damaged: restore it, or average a window without this step",
            )
    return {name: str(known["sha256"]) for name, known in record.items()}


def folder_series(folder: Path) -> Series:
    """Checkpoints in a folder: `step1000/`, `checkpoint-1000/` … or `ckpt_1000.pt` …

    The step is the number at the end of the name. Step 0 is left out.

    Raises:
        UserError: nothing of the kind in it, or two checkpoints of one step.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder",
            hint="name a run, a folder of checkpoints, or OWNER/NAME on the hub",
        )
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = _STEP_IN_NAME.search(path.stem if path.is_file() else path.name)
        if match is None or not is_checkpoint(path) or not int(match[1]):
            continue
        if int(match[1]) in found:
            raise UserError(
                f"{found[int(match[1])]} and {path} are both of step {int(match[1]):,}",
                hint="keep one of them in the folder",
            )
        found[int(match[1])] = path
    if not found:
        raise UserError(
            f"{folder} holds no checkpoints whose names end in their step",
            hint="such as step1000/ or checkpoint-1000/ with model.safetensors, or ckpt_1000.pt",
        )
    inputs = {step: path_input(step, found[step]) for step in sorted(found)}
    finals = [
        path_input(max(found), folder / name)
        for name in _FINAL_NAMES
        if is_checkpoint(folder / name)
    ]
    averages = Path("averages") / folder.resolve().name
    return Series(str(folder), averages, inputs, final=finals[0] if finals else None)


def path_input(step: int, path: Path) -> Input:
    """A folder of weights, a safetensors file, or a file of torch, of whatever origin."""
    if path.is_dir():
        return own_input(step, path)

    def open_file() -> Checkpoint:
        if path.suffix == ".safetensors":
            return open_safetensors(path.parent, {path: None}, step, str(path))
        from llmtrain.checkpoints.torch_files import (
            open_training_file,  # torch takes a second to import
        )

        return open_training_file(path, step=step)

    return Input(step, str(path), open_file)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder or a file of weights."""
    if path.is_dir():
        names = (WEIGHTS_FILE, TORCH_WEIGHTS_FILE)
        return any(
            (path / f"{name}{suffix}").exists() for name in names for suffix in ("", ".index.json")
        )
    return path.is_file() and path.suffix in (".pt", ".pth", ".ckpt")


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Compare names, shapes and dtypes of all tensors of all checkpoints, from headers alone.

    Raises:
        UserError: they differ; lists the tensors and the steps.
    """
    reference = checkpoints[-1]
    newest = reference.tensors
    differences = []
    for checkpoint in checkpoints[:-1]:
        tensors = checkpoint.tensors
        differences += [
            f"{name}: {tensors.get(name) or 'absent'} at step {checkpoint.step:,}, "
            f"{newest.get(name) or 'absent'} at step {reference.step:,}"
            for name in sorted(newest.keys() | tensors.keys())
            if tensors.get(name) != newest.get(name)
        ]
    if differences:
        shown = "\n  ".join(differences[:_DIFFERENCES_SHOWN])
        more = len(differences) - _DIFFERENCES_SHOWN
        raise UserError(
            f"the checkpoints do not hold the same tensors ({len(differences)} differences):\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else ""),
            hint="only checkpoints of one model can be averaged",
        )

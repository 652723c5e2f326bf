"""What lies in checkpoints: steps, tensors, parameters, dtypes, hashes, norms, distances, provenance.

Why: before averaging what somebody else trained, and after averaging anything, one wants to see that
the files are what they are said to be, without loading a model.

    for checkpoint in inspect_path(Path("runs/demo")): print(checkpoint.step, checkpoint.norm)
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.averaging import audit
from llmtrain.averaging.merge import Norms, merge
from llmtrain.averaging.provenance import hashes_of
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint, load_origin
from llmtrain.checkpoints.open import is_checkpoint
from llmtrain.checkpoints.resolve import resolve
from llmtrain.checkpoints.series import Input, folder_series, local_input, require_same_tensors
from llmtrain.errors import UserError
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_folders


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None
    """L2 norm; None for integers."""
    distance: float | None
    """L2 norm of the difference from the checkpoint before."""


@dataclass(frozen=True)
class Facts:
    """One checkpoint."""

    step: int
    path: str
    tensors: list[TensorFacts]
    parameters: int
    """Numbers in all tensors; a tied matrix is stored, and counted, once."""
    bytes: int
    dtypes: dict[str, int]
    """Tensors of each dtype."""
    sha256: str
    files: dict[str, str]
    """SHA-256 of each weights file."""
    hash_source: str
    """`recorded` or `computed`."""
    lr: float | None
    tokens: int | None
    """Trained on so far."""
    norm: float | None
    """Of all float tensors together; None where a number is not finite."""
    distance: float | None
    provenance: dict[str, Any] | None
    """Of an average: its method, weights and inputs."""
    problems: list[str]


def inspect_path(
    path: Path, *, verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Facts]:
    """Every checkpoint of a run, a folder of checkpoints, or the one that `path` is, by step.

    Args:
        path: what to look at.
        verify: compute hashes that were recorded as well.
        progress: called with pieces done and in all.

    Raises:
        UserError: nothing to look at, or a file that cannot be opened.
    """
    inputs = _inputs(path)
    opened = [source.open() for source in inputs]
    norms, problems = _norms(opened, progress)
    known = [hashes_of(s, c, compute=verify) for s, c in zip(inputs, opened, strict=True)]
    for line in _duplicates(inputs, [k.files for k in known]):
        problems[-1].append(line)
    return [
        Facts(
            step=checkpoint.step,
            path=checkpoint.location,
            tensors=_tensor_facts(checkpoint, norms[row], row),
            parameters=sum(spec.count for spec in checkpoint.tensors.values()),
            bytes=sum(spec.bytes for spec in checkpoint.tensors.values()),
            dtypes=dict(Counter(spec.dtype for spec in checkpoint.tensors.values())),
            sha256=hashes.sha256,
            files=dict(hashes.files),
            hash_source=hashes.source,
            lr=checkpoint.origin.lr if checkpoint.origin else None,
            tokens=checkpoint.origin.tokens if checkpoint.origin else None,
            norm=_total(norms[row], row, "norm"),
            distance=_total(norms[row], row, "distance"),
            provenance=_provenance(checkpoint),
            problems=problems[row],
        )
        for row, (checkpoint, hashes) in enumerate(zip(opened, known, strict=True))
    ]


def _inputs(path: Path) -> list[Input]:
    found = resolve(str(path))
    if isinstance(found, RunFolder):
        snapshots = step_folders(found.snapshots)
        if not snapshots:
            raise UserError(f"{path} has no snapshot yet", hint="continue training")
        return [local_input(step, folder) for step, folder in snapshots.items()]
    if is_checkpoint(path):
        return [local_input(_step_of(path), path)]
    return list(folder_series(path).inputs.values())


def _step_of(path: Path) -> int:
    """The step that one checkpoint says it is of, else the number its name ends in, else 0."""
    origin = load_origin(path) if path.is_dir() else None
    if origin is not None:
        return origin.step
    about = read_json(path / PROVENANCE_FILE) if (path / PROVENANCE_FILE).exists() else {}
    number = re.search(r"(\d+)$", path.stem)
    return int(about.get("step") or (number[1] if number else 0))


def _norms(
    opened: Sequence[Checkpoint], progress: Callable[[int, int], None] | None
) -> tuple[list[Norms | None], list[list[str]]]:
    """Norms of each checkpoint, and what is wrong with each."""
    problems: list[list[str]] = [[] for _ in opened]
    try:
        require_same_tensors(opened)
        norms = merge(opened, [], [], integers="last", progress=progress)
    except UserError as error:
        if len(opened) == 1:
            return [None], [[str(error)]]
        alone = [_norms([checkpoint], progress) for checkpoint in opened]
        found = [facts[1][0] for facts in alone]
        if not any(found):
            found[-1] = [str(error)]
        return [facts[0][0] for facts in alone], found
    for line in audit.outliers(opened, norms):
        step = next(row for row, c in enumerate(opened) if line.startswith(f"step {c.step:,} "))
        problems[step].append(line)
    return [norms] * len(opened), problems


def _row(norms: Norms, row: int) -> int:
    """The row of checkpoint `row`; norms of one checkpoint alone have a single one."""
    return row if len(norms.norm) > 1 else 0


def _total(norms: Norms | None, row: int, what: str) -> float | None:
    if norms is None or (what == "distance" and _row(norms, row) == 0):
        return None
    values = norms.norm if what == "norm" else norms.distance
    total = math.hypot(*values[_row(norms, row)])
    return total if math.isfinite(total) else None


def _tensor_facts(checkpoint: Checkpoint, norms: Norms | None, row: int) -> list[TensorFacts]:
    column = {name: i for i, name in enumerate(norms.names)} if norms is not None else {}
    facts = []
    for name, spec in checkpoint.tensors.items():
        norm = distance = None
        if norms is not None and name in column:
            place = _row(norms, row)
            norm = float(norms.norm[place, column[name]])
            distance = float(norms.distance[place, column[name]]) if place else None
        facts.append(TensorFacts(name, spec.dtype, spec.shape, norm, distance))
    return facts


def _duplicates(inputs: Sequence[Input], files: Sequence[Any]) -> list[str]:
    try:
        audit.refuse_duplicates({s.step: f for s, f in zip(inputs, files, strict=True)})
    except UserError as error:
        return [str(error)]
    return []


def _provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    path = checkpoint.folder / PROVENANCE_FILE
    return read_json(path) if path.exists() else None

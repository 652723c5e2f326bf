"""Facts about checkpoints for `llmtrain inspect`: tensors, hashes, norms, distances, provenance.

for checkpoint in inspect_path(Path("runs/demo")):
    print(checkpoint.step, checkpoint.norm)
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.averaging import audit
from llmtrain.averaging.merge import merge
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint, is_checkpoint, load_origin
from llmtrain.checkpoints.resolve import resolve
from llmtrain.checkpoints.series import Input, folder_series, local_input, require_same_tensors
from llmtrain.errors import UserError
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_folders

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None
    """L2 norm; None for integers."""
    distance: float | None
    """L2 norm of the difference from the previous checkpoint."""


@dataclass(frozen=True)
class Facts:
    """One checkpoint."""

    step: int
    path: str
    tensors: list[TensorFacts]
    parameters: int
    """Elements of all tensors; a tied matrix is stored, and counted, once."""
    bytes: int
    dtypes: dict[str, int]
    """Number of tensors by dtype."""
    sha256: str
    files: dict[str, str]
    """SHA-256 of each weights file."""
    hash_source: str
    """`recorded` or `computed`."""
    lr: float | None
    tokens: int | None
    """Tokens trained on so far."""
    norm: float | None
    """L2 norm of all float tensors; None if an element is not finite."""
    distance: float | None
    """L2 norm of the difference from the previous checkpoint."""
    provenance: dict[str, Any] | None
    """Method, weights and inputs of an average."""
    problems: list[str]


@dataclass(frozen=True)
class _Measured:
    """Norms and distances of one checkpoint by tensor, and its problems."""

    norm: Mapping[str, float]
    distance: Mapping[str, float]
    """Empty for the first checkpoint."""
    problems: list[str]


def inspect_path(
    path: Path, *, verify: bool = False, progress: Progress | None = None
) -> list[Facts]:
    """Return facts about every checkpoint of a run or folder, or about a single one, by step.

    Args:
        path: a run, a folder of checkpoints, or a checkpoint.
        verify: compute hashes even if they were recorded.
        progress: called with the chunks done and the total.

    Raises:
        UserError: there is no checkpoint, or a file cannot be opened.
    """
    inputs = _inputs(path)
    opened = [source.open() for source in inputs]
    measured = _measure(opened, progress)
    hashes = [audit.hashes_of(s, c, compute=verify) for s, c in zip(inputs, opened, strict=True)]
    try:
        by_step = {s.step: known.files for s, known in zip(inputs, hashes, strict=True)}
        audit.refuse_duplicates(by_step)
    except UserError as error:
        measured[-1].problems.append(str(error))
    return [_facts(*each) for each in zip(opened, hashes, measured, strict=True)]


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
    """Return the recorded step of a checkpoint, else the number at the end of its name, else 0."""
    origin = load_origin(path) if path.is_dir() else None
    if origin is not None:
        return origin.step
    provenance = path / PROVENANCE_FILE
    recorded = read_json(provenance).get("step") if provenance.exists() else None
    number = re.search(r"(\d+)$", path.stem)
    return int(recorded or (number[1] if number else 0))


def _measure(opened: Sequence[Checkpoint], progress: Progress | None) -> list[_Measured]:
    """Measure the checkpoints together; one by one if they differ or one is damaged."""
    try:
        require_same_tensors(opened)
        norms = merge(opened, [], [], integers="last", progress=progress).norms
    except UserError as error:
        if len(opened) == 1:
            return [_Measured({}, {}, [str(error)])]
        alone = [_measure([checkpoint], progress)[0] for checkpoint in opened]
        if not any(each.problems for each in alone):
            alone[-1].problems.append(str(error))
        return alone
    off = audit.outliers(opened, norms)

    def by_name(values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(norms.names, map(float, values), strict=True))

    return [
        _Measured(
            by_name(norms.norm[row]),
            by_name(norms.distance[row]) if row else {},
            [off[row]] if row in off else [],
        )
        for row in range(len(opened))
    ]


def _facts(checkpoint: Checkpoint, hashes: audit.InputHashes, measured: _Measured) -> Facts:
    origin, provenance = checkpoint.origin, checkpoint.folder / PROVENANCE_FILE
    specs = checkpoint.tensors
    return Facts(
        step=checkpoint.step,
        path=checkpoint.location,
        tensors=[
            TensorFacts(
                name, spec.dtype, spec.shape, measured.norm.get(name), measured.distance.get(name)
            )
            for name, spec in specs.items()
        ],
        parameters=sum(spec.count for spec in specs.values()),
        bytes=sum(spec.bytes for spec in specs.values()),
        dtypes=dict(Counter(spec.dtype for spec in specs.values())),
        sha256=hashes.sha256,
        files=dict(hashes.files),
        hash_source=hashes.source,
        lr=origin.lr if origin else None,
        tokens=origin.tokens if origin else None,
        norm=_total(measured.norm),
        distance=_total(measured.distance) if measured.distance else None,
        provenance=read_json(provenance) if provenance.exists() else None,
        problems=measured.problems,
    )


def _total(values: Mapping[str, float]) -> float | None:
    total = math.hypot(*values.values())
    return total if values and math.isfinite(total) else None

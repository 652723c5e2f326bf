"""Facts about checkpoints for `llmtrain inspect`: tensors, hashes, norms, distances, provenance."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.averaging import audit
from llmtrain.averaging.merge import merge
from llmtrain.averaging.trajectory import outliers
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint, load_origin
from llmtrain.checkpoints.gpt2_folder import added_biases
from llmtrain.checkpoints.open import is_checkpoint
from llmtrain.checkpoints.resolve import resolve
from llmtrain.checkpoints.series import Input, folder_series, local_input, require_same_tensors
from llmtrain.checkpoints.step_names import parse_step
from llmtrain.errors import UserError
from llmtrain.storage.integrity import DamagedFile
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RunFolder, step_folders

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint; integers have neither norm nor distance."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float | None
    distance: float | None


@dataclass(frozen=True)
class Facts:
    """One checkpoint.

    `norm` is the L2 norm of all float tensors and `distance` that of the difference from the
    previous checkpoint; None if an element is not finite.
    """

    step: int | None
    """None if neither a record nor the name contains it."""
    path: str
    tensors: list[TensorFacts]
    parameters: int
    """Number of weights, without `zero_biases`."""
    zero_biases: int
    """Number of zeros that Hugging Face's layout adds to a model without biases."""
    bytes: int
    dtypes: dict[str, int]
    """Number of tensors by dtype."""
    blake3: str | None
    """BLAKE3 of the weights; None if their record contains SHA-256."""
    sha256: str | None
    """SHA-256 of the weights; None if their record does not contain it."""
    files: dict[str, str]
    """Hash of each weights file."""
    hash_source: str
    """`computed`: every file was read, and agrees with its record if there is one."""
    lr: float | None
    tokens: int | None
    """Tokens trained on so far."""
    norm: float | None
    distance: float | None
    provenance: dict[str, Any] | None
    """Method, weights and inputs of an average."""
    problems: list[str]


Measured = tuple[dict[str, float], dict[str, float], list[str]]
"""Norms and distances by tensor (no distances for the first checkpoint), and problems."""


def inspect_path(path: Path, *, progress: Progress | None = None) -> list[Facts]:
    """Return facts about every checkpoint of a run or folder, or about a single one, by step.

    `progress` is called with the chunks done and the total. Raise UserError if there is no
    checkpoint, a file cannot be opened, or it differs from its record.
    """
    inputs = _inputs(path)
    opened = [source.open() for source in inputs]
    measured = _measure(opened, progress)
    digests = [audit.digests_of(checkpoint) for checkpoint in opened]
    try:
        by_step = {s.step: known.files for s, known in zip(inputs, digests, strict=True)}
        audit.refuse_duplicates(by_step)
    except UserError as error:
        measured[-1][2].append(str(error))
    return [_facts(*each) for each in zip(opened, digests, measured, strict=True)]


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
    """Return the recorded step of a checkpoint, else the step in its name, else 0."""
    provenance = path / PROVENANCE_FILE
    if origin := load_origin(path):
        return origin.step
    recorded = read_json(provenance).get("step") if provenance.exists() else None
    named = parse_step(path.stem if path.is_file() else path.name)
    return int(recorded or (named.step if named else 0))


def _measure(opened: Sequence[Checkpoint], progress: Progress | None) -> list[Measured]:
    """Measure the checkpoints together; one by one if they differ or one is damaged."""
    try:
        require_same_tensors(opened)
        norms = merge(opened, [], [], integers="last", progress=progress)
    except DamagedFile:
        raise
    except UserError as error:
        if len(opened) == 1:
            return [({}, {}, [str(error)])]
        alone = [_measure([checkpoint], progress)[0] for checkpoint in opened]
        if not any(problems for *_, problems in alone):
            alone[-1][2].append(str(error))
        return alone
    off = outliers(opened, norms)
    measured: list[Measured] = []
    for row in range(len(opened)):
        norm = dict(zip(norms.names, norms.norm[row].tolist(), strict=True))
        distance = dict(zip(norms.names, norms.distance[row].tolist(), strict=True)) if row else {}
        measured.append((norm, distance, [off[row]] if row in off else []))
    return measured


def _facts(checkpoint: Checkpoint, digests: audit.InputDigests, measured: Measured) -> Facts:
    origin, provenance = checkpoint.origin, checkpoint.folder / PROVENANCE_FILE
    norm, distance, problems = measured
    specs = checkpoint.tensors
    zeros = sum(specs[name].count for name in added_biases(checkpoint.folder, specs))
    return Facts(
        step=checkpoint.step or None,
        path=checkpoint.location,
        tensors=[
            TensorFacts(name, spec.dtype, spec.shape, norm.get(name), distance.get(name))
            for name, spec in specs.items()
        ],
        parameters=sum(spec.count for spec in specs.values()) - zeros,
        zero_biases=zeros,
        bytes=sum(spec.bytes for spec in specs.values()),
        dtypes=dict(Counter(spec.dtype for spec in specs.values())),
        blake3=digests.combined.as_json().get("blake3"),
        sha256=digests.combined.as_json().get("sha256"),
        files={name: digest.hex for name, digest in digests.files.items()},
        hash_source="computed",
        lr=origin.lr if origin else None,
        tokens=origin.tokens if origin else None,
        norm=_total(norm),
        distance=_total(distance),
        provenance=read_json(provenance) if provenance.exists() else None,
        problems=problems,
    )


def _total(values: Mapping[str, float]) -> float | None:
    total = math.hypot(*values.values())
    return total if values and math.isfinite(total) else None

"""Specifications: one average to make, its provenance, and its comparison with an existing folder.

The provenance identifies the inputs by digest, so a repeated command keeps finished averages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain import __version__
from llmtrain.averaging.audit import InputDigests
from llmtrain.averaging.merge import WeightedSum
from llmtrain.averaging.request import MergeOptions
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint
from llmtrain.checkpoints.series import Input
from llmtrain.errors import UserError
from llmtrain.storage.integrity import Algorithm, Digest, integrity_problems
from llmtrain.storage.json_files import read_json


@dataclass(frozen=True)
class AverageSpec:
    """One average to make."""

    method: str
    label: str
    inputs: tuple[Input, ...]
    """Oldest first; the average stands for the step of the last."""
    weights: tuple[float, ...]
    """One for each input."""
    target: Path
    """Folder to write."""
    options: dict[str, Any] = field(default_factory=dict)
    """Parameters of the method, for the provenance."""
    audited: bool = True
    """Check the inputs as checkpoints of one trajectory."""
    is_default: bool = False
    """The parent of the target contains averages of this label only."""

    @property
    def step(self) -> int:
        """Step that the average stands for."""
        return self.inputs[-1].step

    def as_json(self) -> dict[str, Any]:
        """Return the entry that `--json` prints."""
        return {
            "label": self.label,
            "step": self.step,
            "path": str(self.target),
            "inputs": [source.step for source in self.inputs],
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class Average:
    """One average on disk."""

    spec: AverageSpec
    cached: bool
    """It existed already, with the same inputs and weights."""


def unique_inputs(specs: Sequence[AverageSpec]) -> list[Input]:
    """Return every input of all specs once, by step."""
    return sorted({i for spec in specs for i in spec.inputs}, key=lambda i: (i.step, i.location))


def weighted_sums(specs: Sequence[AverageSpec], inputs: Sequence[Input]) -> list[WeightedSum]:
    """Return the sums of the specs for a merge of these inputs."""
    index = {source: i for i, source in enumerate(inputs)}
    return [WeightedSum(tuple(index[i] for i in spec.inputs), spec.weights) for spec in specs]


def provenance(
    spec: AverageSpec,
    checkpoints: Mapping[Input, Checkpoint],
    digests: Mapping[Input, InputDigests],
    options: MergeOptions,
) -> dict[str, Any]:
    """Return the content of `provenance.json`."""
    inputs = []
    for source, weight in zip(spec.inputs, spec.weights, strict=True):
        origin = checkpoints[source].origin
        entry = {
            "path": checkpoints[source].location,
            "step": source.step,
            "weight": weight,
            "lr": origin.lr if origin else None,
            "tokens": origin.tokens if origin else None,
            **digests[source].as_json(),
        }
        inputs.append(entry)
    return {
        "llmtrain": __version__,
        "method": spec.method,
        "label": spec.label,
        "step": spec.step,
        "options": spec.options,
        **_arithmetic(options),
        "inputs": inputs,
    }


def require_same(target: Path, document: Mapping[str, Any]) -> None:
    """Raise a UserError unless the existing folder is the average that `document` describes."""
    path = target / PROVENANCE_FILE
    existing = read_json(path) if path.exists() else {}
    try:
        same = _identity(existing) == _identity(document) and all(
            math.isclose(a["weight"], b["weight"], rel_tol=1e-9, abs_tol=1e-15)
            for a, b in zip(existing["inputs"], document["inputs"], strict=True)
        )
    except (TypeError, KeyError, AttributeError, OverflowError):  # not written by llmtrain
        same = False
    if same and (problems := integrity_problems(target, hashes=False)):
        raise UserError(f"{target} exists and is damaged: {problems[0]}", hint="delete it first")
    if not same:
        raise UserError(
            f"{target} exists and is not the average of these checkpoints with these weights",
            hint="write elsewhere with --out DIR" + (", or delete it" if existing else ""),
        )


def algorithm_for(specs: Sequence[AverageSpec]) -> Algorithm:
    """Return the algorithm for inputs without a record: that of the existing averages, if any."""
    for spec in specs:
        path = spec.target / PROVENANCE_FILE
        inputs = read_json(path).get("inputs") if path.exists() else None
        if isinstance(inputs, list) and any("sha256" in entry for entry in inputs):
            return "sha256"
    return "blake3"


def require_declared(spec: AverageSpec, options: MergeOptions) -> None:
    """Raise a UserError unless the existing folder has the inputs that are declared now."""
    inputs = [
        {"step": source.step, "weight": weight, **declared.as_json()}
        for source, weight in zip(spec.inputs, spec.weights, strict=True)
        if (declared := InputDigests.declared(source)).files
    ]
    require_same(spec.target, {**_arithmetic(options), "inputs": inputs})


def _arithmetic(options: MergeOptions) -> dict[str, Any]:
    return {
        "arithmetic": "float64 sums, rounded once",
        "dtype": options.dtype or "as the inputs",
        "max_shard_bytes": None,  # kept for averages of versions that could split shards
        "integers": options.integers,
    }


def _identity(document: Mapping[str, Any]) -> list[object]:
    """Return everything that determines the numbers of an average, except the weights."""
    inputs = [(i.get("step"), Digest.from_json(i)) for i in document.get("inputs") or []]
    options = [document.get(key) for key in ("arithmetic", "dtype", "max_shard_bytes")]
    return [*options, document.get("integers", "equal"), inputs]

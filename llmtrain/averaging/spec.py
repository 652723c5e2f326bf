"""Which average is to be made, how, and the result: the types that the phases of `average` share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.averaging.merge import Integers
from llmtrain.checkpoints.series import Input


@dataclass(frozen=True)
class AverageSpec:
    """One average to be made."""

    method: str
    label: str
    inputs: tuple[Input, ...]
    """Oldest first; the average stands for the step of the last."""
    weights: tuple[float, ...]
    """One for each input."""
    target: Path
    """The folder to be written."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's parameters, for the provenance."""
    decays: tuple[float, ...] | None = None
    """See `Mixture.decays`."""
    audited: bool = True
    """The inputs are checkpoints of a trajectory, and must look like one."""
    is_default: bool = False
    """The target lies in a folder of averages of its label alone."""

    @property
    def step(self) -> int:
        """The step the average stands for."""
        return self.inputs[-1].step


@dataclass(frozen=True)
class MergeOptions:
    """How averages are made, whichever they are."""

    dtype: str | None = None
    """Of the float tensors written (`F32` …); default: that of the inputs."""
    max_shard: int | None = None
    """Bytes in a shard; default: the newest input's shards."""
    integers: Integers = "equal"
    verify: bool = True
    """Hash the inputs even where hashes were recorded when they were committed, and compare."""
    strict: bool = False
    """An outlier is an error."""
    allow_duplicates: bool = False
    allow_known_bad: bool = False
    discard_inputs: bool = False
    """Delete each input once it is summed; for series on the hub."""


@dataclass(frozen=True)
class Average:
    """One average that lies on disk."""

    spec: AverageSpec
    kept: bool
    """It was there already, of the same inputs and weights."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "label": self.spec.label,
            "step": self.spec.step,
            "path": str(self.spec.target),
            "inputs": [source.step for source in self.spec.inputs],
            "weights": list(self.spec.weights),
        }

"""One checkpoint: which tensors it holds, in which files, and how their numbers are read.

Why: the merge should not know whether numbers come from one safetensors file, from many shards, or
from a file of torch. It asks a checkpoint for names and specs, and a reader for ranges of numbers.

    checkpoint = open_folder(Path("step1000"), step=1000)
    with checkpoint.reader() as reader: reader.read("lm_head.weight", 0, 10, buffer)

Shards are read from the names in the index, which are bare file names inside the folder: an index
is input, and must not be able to make us read anything else.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.checkpoints.header import TensorSpec
from llmtrain.checkpoints.numbers import StoredArray
from llmtrain.checkpoints.weights_folder import Origin, load_origin

TORCH_WEIGHTS_FILE = "pytorch_model.bin"
RESIDUAL_FILE = "model.residual.safetensors"
"""Beside float32 weights: what rounding took from them, so that their sum has some 48 bits."""


class Reader(Protocol):
    """Open files of one checkpoint."""

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """Numbers `start` to `stop` of a tensor, flat, in stored form; they may lie in `buffer`.

        Raises:
            UserError: the file ends before them.
        """
        ...

    def start_hashing(self) -> None:
        """From now on, hash what is read."""
        ...

    def hashes(self) -> dict[Path, str]:
        """SHA-256 of each file of which every byte was read since `start_hashing`, first to last."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step."""

    step: int
    location: str
    """Path, or repository@commit: for messages and the provenance."""
    folder: Path
    """Where the files beside the weights lie."""
    layout: Mapping[str, Mapping[str, TensorSpec]]
    """The tensors by the safetensors file that holds them, or would, in stored order."""
    files: tuple[Path, ...]
    """The weights files."""
    reader: Callable[[], AbstractContextManager[Reader]] = field(repr=False)
    residual: "Checkpoint | None" = None
    """Numbers to be added to these."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    disposable: bool = False
    """The folder was downloaded to be deleted once it is summed."""
    config: Mapping[str, Any] | None = None
    """The config.json where the folder has none, but the weights file says what it would be."""

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, in stored order."""
        return {name: spec for specs in self.layout.values() for name, spec in specs.items()}

    @property
    def origin(self) -> Origin | None:
        """What the folder says about where its weights come from."""
        return load_origin(self.folder)

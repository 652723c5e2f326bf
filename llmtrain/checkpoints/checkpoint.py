"""A checkpoint in any format: its tensors, its files, and a reader of elements."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llmtrain.checkpoints.tensors import StoredArray, TensorSpec
from llmtrain.errors import UserError
from llmtrain.storage import integrity
from llmtrain.storage.integrity import Algorithm, Digest
from llmtrain.storage.json_files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
TORCH_WEIGHTS_FILE = "pytorch_model.bin"
RESIDUAL_FILE = "model.residual.safetensors"
"""Rounding errors of float32 weights; the sum of both has about 48 bits of precision."""

CONFIG_FILE = "config.json"
TRAINING_FILE = "training.json"
PROVENANCE_FILE = "provenance.json"

COMPANION_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    TRAINING_FILE,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Patterns of the files that a model needs next to its weights; never code."""

WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class Origin:
    """Position in a training run, stored in `training.json`."""

    step: int
    tokens: int
    lr: float
    run: str


def load_origin(folder: Path) -> Origin | None:
    """Read `training.json`; return None if it is absent or was written by another program."""
    path = folder / TRAINING_FILE
    document = read_json(path) if path.exists() else {}
    types = {key: type(value) for key, value in document.items()}
    return Origin(**document) if types == Origin.__annotations__ else None


class Reader:
    """Open files of one checkpoint. A format without hashes overrides only `read`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """Return elements `start` to `stop` of the flattened tensor, possibly in `buffer`."""
        raise NotImplementedError  # each format has its own

    def start_hashing(self, algorithms: Mapping[str, Algorithm]) -> None:
        """Hash everything read from now on of the files named in `algorithms`."""

    def digests(self) -> dict[Path, Digest]:
        """Return the digest of each file read completely and in order since `start_hashing`."""
        return {}


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step."""

    step: int
    location: str
    """Path or repository@commit, for messages and the provenance."""
    folder: Path
    layout: Mapping[str, Mapping[str, TensorSpec]]
    """Tensors in stored order, by the safetensors file that contains, or would contain, them."""
    files: tuple[Path, ...]
    reader: Callable[[], Reader] = field(repr=False)
    """Open the files without checking them; see `verified_reader`."""
    residual: "Checkpoint | None" = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    disposable: bool = False
    """Downloaded to a temporary folder, to be deleted after use."""
    config: Mapping[str, Any] | None = None
    """Contents of `config.json`, if the weights file records them instead of the folder."""
    recorded: Mapping[str, Digest] = field(default_factory=dict)
    """Digests by file name from our own record or from the hub; empty if there are none."""
    notes: tuple[str, ...] = ()
    """Lines to report when the weights are used, such as entries of the file that are ignored."""
    position: tuple[int, int] | None = None
    """Epoch and step that the trainer stored in the weights file."""

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, in stored order."""
        return {name: spec for specs in self.layout.values() for name, spec in specs.items()}

    @property
    def origin(self) -> Origin | None:
        """Position in the training run, if the folder records it."""
        return load_origin(self.folder)


@contextmanager
def verified_reader(checkpoint: Checkpoint) -> Iterator[Reader]:
    """Open a checkpoint; the caller must read all tensors, in stored order if possible.

    Raise DamagedFile at the end if a file differs from its recorded digest. Files that were read
    in another order are hashed separately.
    """
    recorded = {path: checkpoint.recorded.get(path.name) for path in checkpoint.files}
    paths = {path: digest for path, digest in recorded.items() if digest is not None}
    with checkpoint.reader() as reader:
        reader.start_hashing({path.name: digest.algorithm for path, digest in paths.items()})
        yield reader
        found = reader.digests()
    for path, expected in paths.items():
        digest = found.get(path) or integrity.digest_of(path, expected.algorithm)
        integrity.require_recorded(path, digest, expected)


def recorded_digests(folder: Path) -> dict[str, Digest]:
    """Return the digests recorded when a folder was committed; check all but the weights.

    See `integrity.recorded_digests`; the weights are checked while they are read.
    """
    return integrity.recorded_digests(folder, unread=WEIGHTS_SUFFIXES)


def require_listed(files: Iterable[Path], recorded: Mapping[str, Digest]) -> None:
    """Raise DamagedFile if a committed folder has weights that are not in its record."""
    for path in files:
        if recorded and path.name not in recorded:
            problem = f"{path} is not in the {integrity.INTEGRITY_FILE} of its folder"
            raise integrity.DamagedFile(problem, hint="remove the file: it was added later")


def weights_files(folder: Path, name: str = WEIGHTS_FILE) -> Mapping[Path, set[str] | None]:
    """Return the weights file `name`, or the shards in its index with their tensors, by name.

    An index is untrusted input: it may only name files in its own folder.
    """
    index = folder / f"{name}.index.json"
    whole = (folder / name).exists() or not index.exists()
    files = {folder / name: None} if whole else _indexed_shards(index, Path(name).suffix)
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing", hint="restore the folder, or download it again")
    return files


def _indexed_shards(index: Path, suffix: str) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} lacks its weight_map", hint="restore the damaged index")
    shards: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if not re.fullmatch(rf"[^/\\\0]+\{suffix}", str(file)):
            raise UserError(
                f"{index} places {tensor!r} in {file!r}, which is not the name of a {suffix} file",
                hint="do not trust this folder: an index may only name files next to it",
            )
        shards.setdefault(index.parent / file, set()).add(tensor)
    return dict(sorted(shards.items()))


def reject_outside_link(path: Path) -> None:
    """Raise if `path` links to a file outside its folder and outside the hub cache's blobs."""
    real, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs"  # <repo>/snapshots/<commit>/file -> <repo>/blobs/<hash>
    in_cache = folder.parent.name == "snapshots" and real.parent == blobs
    if folder not in real.parents and not in_cache:
        hint = "do not trust this folder, or replace the link with the file"
        raise UserError(f"{path} is a link to a file outside its folder", hint=hint)


def check_shard(path: Path, found: set[str], indexed: set[str] | None) -> None:
    """Raise unless a shard contains exactly the tensors that its index places in it."""
    if indexed is not None and (different := sorted(found ^ indexed)):
        raise UserError(
            f"{path} is not the shard its index describes; see {', '.join(different[:4])}",
            hint="shards of different checkpoints were mixed, or a download is incomplete",
        )

"""Open the weights of a folder: safetensors or torch files, whole or in shards.

checkpoint = open_folder(Path("step1000"), step=1000)
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.checkpoints.checkpoint import (
    RESIDUAL_FILE,
    TORCH_WEIGHTS_FILE,
    Checkpoint,
)
from llmtrain.checkpoints.header import ITEM_BYTES, StoredTensor, TensorSpec, read_header
from llmtrain.checkpoints.numbers import STORED_DTYPES, StoredArray
from llmtrain.checkpoints.weights_folder import WEIGHTS_FILE
from llmtrain.errors import UserError
from llmtrain.storage.integrity import SequentialHash
from llmtrain.storage.json_files import read_json


def open_folder(folder: Path, *, step: int, location: str | None = None) -> Checkpoint:
    """The weights of a Hugging Face folder, known from headers: safetensors, or torch's format.

    Raises:
        UserError: no weights, a damaged header, or an index that does not fit its shards.
    """
    location = location or str(folder)
    for name in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            shards: Mapping[Path, set[str] | None] = {folder / name: None}
        elif index.exists():
            shards = _shards(index)
        else:
            continue
        if name == WEIGHTS_FILE:
            return open_safetensors(folder, shards, step, location)
        from llmtrain.checkpoints.torch_files import (
            open_torch_shards,  # torch takes a second to import
        )

        return open_torch_shards(folder, shards, step=step, location=location)
    raise UserError(
        f"{folder} holds no weights",
        hint=f"expected {WEIGHTS_FILE} or {TORCH_WEIGHTS_FILE}, or one of them in shards with its index",
    )


def with_residual(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the rounding residuals that lie beside it, if any do."""
    path = checkpoint.folder / RESIDUAL_FILE
    if not path.exists():
        return checkpoint
    residual = open_safetensors(
        checkpoint.folder, {path: None}, checkpoint.step, checkpoint.location
    )
    if residual.tensors != checkpoint.tensors:
        raise UserError(f"{path} does not fit the weights beside it", hint="restore the folder")
    return replace(checkpoint, residual=residual, files=(*checkpoint.files, path))


def _shards(index: Path) -> Mapping[Path, set[str] | None]:
    """The shards an index names and the tensors it promises in each.

    Raises:
        UserError: it is damaged, or names something that is not a file of this folder.
    """
    weight_map = read_json(index).get("weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map", hint="the index is damaged: restore it")
    promised: dict[Path, set[str]] = {}
    for name, filename in weight_map.items():
        bare = isinstance(filename, str) and filename == os.path.basename(filename)  # noqa: PTH119  (of a text that is no path yet)
        if not bare or not filename.endswith(suffix) or "\\" in filename or "\0" in filename:
            raise UserError(
                f"{index} places {name!r} in {filename!r}, which is not the name of a {suffix} file beside it",
                hint="do not trust this folder: an index may only name files of its own folder",
            )
        promised.setdefault(index.parent / filename, set()).add(name)
    for path in promised:
        refuse_links_out(path)
    return dict(sorted(promised.items()))


def refuse_links_out(path: Path) -> None:
    """Raise unless `path` lies in its folder, or in the blobs of the hub's cache that the folder is in."""
    real, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs"  # <repo>/snapshots/<commit>/file -> <repo>/blobs/<hash>
    inside = folder in real.parents or (folder.parent.name == "snapshots" and real.parent == blobs)
    if not inside:
        raise UserError(
            f"{path} is a link to a file outside its folder",
            hint="do not trust this folder, or replace the link by the file",
        )


def open_safetensors(
    folder: Path, shards: Mapping[Path, set[str] | None], step: int, location: str
) -> Checkpoint:
    """The tensors of safetensors files; of each file all, which must be those promised where any are."""
    layout: dict[str, dict[str, TensorSpec]] = {}
    places: dict[str, tuple[Path, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    for path, promised in shards.items():
        refuse_links_out(path)
        header = read_header(path)
        if promised is not None:
            require_promised(path, set(header.tensors), promised)
        layout[path.name] = {name: tensor.spec for name, tensor in header.tensors.items()}
        places |= {name: (path, tensor) for name, tensor in header.tensors.items()}
        metadata |= header.metadata
    return Checkpoint(
        step,
        location,
        folder,
        layout,
        tuple(shards),
        lambda: SafetensorsReader(places),
        metadata=metadata,
    )


def require_promised(path: Path, held: set[str], promised: set[str]) -> None:
    """Raise unless a shard holds exactly the tensors that the index places in it."""
    if held != promised:
        missing, extra = sorted(promised - held), sorted(held - promised)
        parts = [f"lacks {', '.join(missing[:4])}"] if missing else []
        parts += [f"also holds {', '.join(extra[:4])}"] if extra else []
        raise UserError(
            f"{path} is not the shard its index describes: it {' and '.join(parts)}",
            hint="shards of different checkpoints were mixed, or a download is incomplete",
        )


class SafetensorsReader:
    """Reads ranges of numbers by position.

    Not through a memory map: a map's pages count as memory of this process until the kernel takes
    them back, and a file that is cut short meanwhile would kill it.
    """

    def __init__(self, places: Mapping[str, tuple[Path, StoredTensor]]) -> None:
        self._places = places
        self._descriptors: dict[Path, int] = {}
        self._hashes: dict[Path, SequentialHash] = {}

    def __enter__(self) -> "SafetensorsReader":
        for path in {path for path, _ in self._places.values()}:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        """See `Reader.read`; the numbers lie in `buffer`."""
        path, tensor = self._places[name]
        width = ITEM_BYTES[tensor.dtype]
        target = buffer[: (stop - start) * width]
        got = 0
        while got < len(target):
            position = tensor.start + start * width + got
            count = os.preadv(self._descriptors[path], [target[got:].data], position)
            if count == 0:
                raise UserError(f"{path} was cut short while it was read", hint="restore the file")
            got += count
        if path in self._hashes:
            self._hashes[path].update(tensor.start + start * width, target.data)
        raw: StoredArray = target.view(STORED_DTYPES[tensor.dtype])
        return raw

    def start_hashing(self) -> None:
        """See `Reader.start_hashing`: of the header, which is read here, and the numbers that `read` gives."""
        starts: dict[Path, int] = {}
        for path, tensor in self._places.values():
            starts[path] = min(tensor.start, starts.get(path, tensor.start))
        for path, start in starts.items():
            self._hashes[path] = SequentialHash()
            self._hashes[path].update(0, os.pread(self._descriptors[path], start, 0))

    def hashes(self) -> dict[Path, str]:
        """See `Reader.hashes`."""
        sizes = {path: os.fstat(self._descriptors[path]).st_size for path in self._hashes}
        found = {path: passing.hexdigest(sizes[path]) for path, passing in self._hashes.items()}
        return {path: digest for path, digest in found.items() if digest is not None}

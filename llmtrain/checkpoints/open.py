"""Open a checkpoint in any supported format, chosen by the names of its files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llmtrain.checkpoints.checkpoint import (
    RESIDUAL_FILE,
    TORCH_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    recorded_digests,
    require_listed,
)
from llmtrain.checkpoints.safetensors_files import open_safetensors
from llmtrain.errors import UserError


class Format(NamedTuple):
    """One way to store a checkpoint: a folder with `file`, whole or in shards, or a single file."""

    file: str
    suffixes: tuple[str, ...]
    """Suffixes of single files."""
    opener: Callable[[Path, int, str], Checkpoint]
    """A function of path, step and location."""

    def matches(self, path: Path) -> bool:
        """Return whether `path` has this format, judging by names."""
        index = path / f"{self.file}.index.json"
        inside = (path / self.file).exists() or index.exists()
        return inside or (path.is_file() and path.suffix in self.suffixes)


def _open_torch(path: Path, step: int, location: str) -> Checkpoint:
    from llmtrain.checkpoints.torch_files import open_torch  # importing torch takes a second

    recorded = recorded_digests(path if path.is_dir() else path.parent)
    checkpoint = open_torch(path, step, location)
    if path.is_dir():
        require_listed(checkpoint.files, recorded)
    return replace(checkpoint, recorded=recorded)


_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
FORMATS = (
    Format(WEIGHTS_FILE, (".safetensors",), open_safetensors),
    Format(TORCH_WEIGHTS_FILE, _SUFFIXES, _open_torch),
)
"""Supported formats; the first match applies."""


def open_checkpoint(path: Path, *, step: int, location: str | None = None) -> Checkpoint:
    """Open a folder or file of weights and read its headers."""
    for candidate in FORMATS:
        if candidate.matches(path):
            return candidate.opener(path, step, location or str(path))
    hint = "expected model.safetensors or pytorch_model.bin, whole or in shards with an index"
    raise UserError(f"{path} contains no weights", hint=hint)


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a folder or file of weights, judging by names."""
    return any(candidate.matches(path) for candidate in FORMATS)


def open_with_residual(folder: Path, *, step: int) -> Checkpoint:
    """Open a folder of weights with its rounding residual, if there is one."""
    checkpoint, path = open_checkpoint(folder, step=step), folder / RESIDUAL_FILE
    if not path.exists():
        return checkpoint
    residual = open_checkpoint(path, step=step)
    if residual.tensors != checkpoint.tensors:
        raise UserError(f"{path} does not match the weights of its folder", hint="restore it")
    return replace(checkpoint, residual=residual)

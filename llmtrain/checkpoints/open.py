"""Open a checkpoint in any supported format."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from llmtrain.checkpoints.checkpoint import (
    RESIDUAL_FILE,
    TORCH_WEIGHTS_FILE,
    WEIGHTS_FILE,
    Checkpoint,
)
from llmtrain.checkpoints.safetensors_files import open_safetensors
from llmtrain.errors import UserError


class Format(NamedTuple):
    """One way to store a checkpoint: a folder with `file`, whole or in shards, or a single file."""

    file: str
    suffixes: tuple[str, ...]
    """Suffixes of single files."""
    opener: str
    """module:function of a function (path, step, location) -> Checkpoint."""

    def matches(self, path: Path) -> bool:
        """Return whether `path` has this format, judging by names."""
        if path.is_dir():
            return any((path / f"{self.file}{end}").exists() for end in ("", ".index.json"))
        return path.is_file() and path.suffix in self.suffixes


FORMATS = (
    Format(
        WEIGHTS_FILE,
        (".safetensors",),
        "llmtrain.checkpoints.safetensors_files:open_safetensors",
    ),
    Format(
        TORCH_WEIGHTS_FILE,
        (".pt", ".pth", ".ckpt", ".bin", ".tar"),
        "llmtrain.checkpoints.torch_files:open_torch",
    ),
)
"""Supported formats; the first match applies. Modules are imported when needed: torch is slow."""


def open_checkpoint(path: Path, *, step: int, location: str | None = None) -> Checkpoint:
    """Open a folder or file of weights and read its headers."""
    for candidate in FORMATS:
        if candidate.matches(path):
            opener: Callable[[Path, int, str], Checkpoint] = resolve_name(candidate.opener)
            return opener(path, step, location or str(path))
    raise UserError(
        f"{path} contains no weights",
        hint="expected model.safetensors or pytorch_model.bin, whole or in shards with an index",
    )


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a folder or file of weights, judging by names."""
    return any(candidate.matches(path) for candidate in FORMATS)


def with_residual(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the rounding residual of its folder, if there is one."""
    path = checkpoint.folder / RESIDUAL_FILE
    if not path.exists():
        return checkpoint
    residual = open_safetensors(path, checkpoint.step, checkpoint.location)
    if residual.tensors != checkpoint.tensors:
        raise UserError(f"{path} does not match the weights of its folder", hint="restore it")
    return replace(checkpoint, residual=residual, files=(*checkpoint.files, path))

"""Load a file of torch without running code: tensors, plain containers and inert records only.

`weights_only` is always on. Of the classes that torch does not accept by itself, two are accepted:
`argparse.Namespace`, which only holds attributes, and build-nanogpt's configuration.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from llmtrain.errors import UserError


class GPTConfig:
    """Inert replacement for the configuration class that build-nanogpt pickles."""


def load_torch(path: Path) -> Any:
    """Return the content of a file of torch, with the tensors mapped from the file."""
    try:
        _reject_archive(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        classes = {name: _inert_class(name) for name in names}
        if rejected := sorted(name for name, found in classes.items() if found is None):
            raise ValueError(f"it contains {', '.join(rejected[:3])}, not only plain data")
        inert: list[Any] = [(found, name) for name, found in classes.items()]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged or hostile files
        hint = "restore the file, or check its permissions"
        if not isinstance(error, OSError):
            hint = (
                "restore it; or, if you trust it, save only its weights: "
                "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
            )
        raise UserError(f"cannot read {path} as tensors: {_reason(error)}", hint=hint) from None


def _inert_class(name: str) -> type | None:
    if name == "argparse.Namespace":
        return argparse.Namespace
    return GPTConfig if name.rpartition(".")[2] == "GPTConfig" else None


def _reject_archive(path: Path) -> None:
    """Raise unless the file is an archive as torch writes it: complete and not compressed."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is damaged, or was written by torch 1.5 or earlier")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("it unpacks to more bytes than the file has")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, so its tensors cannot be mapped")


def _reason(error: Exception) -> str:
    """Return one line; torch puts its own reason at the end of a page of advice."""
    text = str(error) or type(error).__name__
    found = re.search(r"WeightsUnpickler error: (.*)", text)
    return found[1] if found else text.splitlines()[0]

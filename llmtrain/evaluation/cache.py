"""Cached results: one JSON file per measurement under a run's `evals/`.

Why by content: the file name contains a hash of everything the result depends on, such as the
weights, the data and the precision. Retrained weights are measured again; a moved folder is not.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmtrain.checkpoints.checkpoint import weights_files
from llmtrain.checkpoints.resolve import Target
from llmtrain.errors import UserError, WriteFailed
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.integrity import INTEGRITY_FILE, read_integrity, sha256_of
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import step_name

Result = TypeVar("Result")


def ignore(message: str) -> None:
    """Drop a warning."""


def cached(
    target: Target,
    kind: str,
    identity: str,
    form: type[Result],
    measure: Callable[[], Result],
    warn: Callable[[str], None],
) -> Result:
    """Return the stored result, or measure and store it. Weights outside a run are always measured.

    Args:
        target: the weights.
        kind: subfolder of `evals/`; empty for losses.
        identity: everything that the result depends on.
        form: dataclass of the result.
        measure: computes the result.
        warn: called if the result cannot be stored.

    Raises:
        UserError: the stored file is damaged.
    """
    if target.run is None:
        return measure()
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    step = "" if target.step is None else f"-{step_name(target.step)}"
    path = target.run.evals / kind / f"{target.label}{step}-{key}.json"
    if path.exists() and (stored := read_result(path, form)) is not None:
        return stored
    result: Any = measure()
    try:
        write_atomically(path, json.dumps(asdict(result), indent=2) + "\n")
    except (WriteFailed, OSError) as error:
        warn(f"result not cached: {error}")
    return result  # type: ignore[no-any-return]


def read_result(path: Path, form: type[Result]) -> Result | None:
    """Return a stored result, or None if another version with other fields wrote it.

    Raises:
        UserError: the file is damaged.
    """
    document = read_json(path)
    if document.keys() != form.__dataclass_fields__.keys():  # type: ignore[attr-defined]
        return None
    try:
        return TypeAdapter(form).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}",
            hint="delete the file; llmtrain eval will measure it again",
        ) from None


def weights_sha256(folder: Path) -> str:
    """Return the hash of the weights file; of several files, the hash of their sorted hashes.

    Hashes recorded at commit are reused as long as no weights file is newer than the record.

    Raises:
        UserError: the folder contains no weights.
    """
    torch_files = sorted(folder.glob("pytorch_model*.bin"))
    only_torch = torch_files and not any(folder.glob("*.safetensors"))
    paths = torch_files if only_torch else weights_files(folder)
    record = folder / INTEGRITY_FILE
    unchanged = record.exists() and all(
        path.stat().st_mtime_ns <= record.stat().st_mtime_ns for path in paths
    )
    known = read_integrity(folder) if unchanged else {}
    hashes = [str(known[p.name]["sha256"]) if p.name in known else sha256_of(p) for p in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

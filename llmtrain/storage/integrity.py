"""SHA-256 hashes, and the record of sizes and hashes in each committed folder."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from llmtrain.errors import UserError

INTEGRITY_FILE = "integrity.json"
"""Name, size and SHA-256 of each other file in a committed folder; written last."""


class SequentialHash:
    """SHA-256 of a file that is read or written sequentially; out-of-order data is ignored."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._position = 0

    def update(self, position: int, data: bytes | memoryview) -> None:
        """Add the bytes at `position` of the file."""
        if position == self._position:
            self._sha256.update(data)
            self._position += len(data)

    def hexdigest(self, size: int) -> str | None:
        """Return the hash if all `size` bytes of the file were added."""
        return self._sha256.hexdigest() if self._position == size else None


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blake3_of(path: Path) -> str:
    """Return the hexadecimal BLAKE3 of a file, read in chunks."""
    digest, buffer = blake3(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_integrity(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Record the size and SHA-256 of each file below `folder`; compute those not in `hashes`."""
    known, files = hashes or {}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != INTEGRITY_FILE:
            name = path.relative_to(folder).as_posix()
            sha256 = known.get(name) or sha256_of(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    (folder / INTEGRITY_FILE).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read_integrity(folder: Path) -> dict[str, dict[str, int | str]]:
    """Return the recorded size and SHA-256 of each file, or raise UserError."""
    path = folder / INTEGRITY_FILE
    try:
        files = json.loads(path.read_text())["files"]
        if any(name.startswith("/") or ".." in name.split("/") or "\0" in name for name in files):
            raise ValueError("a file name points outside the folder")
        return {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in files.items()
        }
    except FileNotFoundError:
        hint = "llmtrain did not write this folder, or the copy is incomplete"
        raise UserError(f"cannot verify {folder}: {INTEGRITY_FILE} is missing", hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(
            f"cannot read {path}: {e}", hint="the folder is damaged: restore it or delete it"
        ) from e


def integrity_problems(folder: Path, *, hashes: bool = True) -> list[str]:
    """Return the differences between a folder and its record; compare contents if `hashes`."""
    problems = []
    for name, expected in read_integrity(folder).items():
        path, size = folder / name, expected["bytes"]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}")
        elif hashes and sha256_of(path) != expected["sha256"]:
            problems.append(f"{path} does not have the recorded SHA-256")
    return problems

"""Size and SHA-256 of what lies in a committed folder, recorded when it was written and compared ever after.

Why a record of its own: a disk, a copy or a person may change a file that was whole, and nothing in its bytes
would say so.

    write_integrity(folder); ...; assert not integrity_problems(folder)
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from llmtrain.errors import UserError

INTEGRITY_FILE = "integrity.json"
"""Name, size and SHA-256 of every other file of a committed folder; written last, before the rename."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces so that memory does not grow with the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_integrity(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Record size (bytes) and SHA-256 (where not in `hashes`) of every file below `folder`."""
    known, files = hashes or {}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != INTEGRITY_FILE:
            name = path.relative_to(folder).as_posix()
            files[name] = {
                "bytes": path.stat().st_size,
                "sha256": known.get(name) or sha256_of(path),
            }
    (folder / INTEGRITY_FILE).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read_integrity(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of each file as recorded when the folder was committed.

    Raises:
        UserError: the record is missing or cannot be read.
    """
    path = folder / INTEGRITY_FILE
    try:
        files = json.loads(path.read_text())["files"]
        if any(
            Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name for name in files
        ):
            raise ValueError("it names a file outside its folder")
        return {
            name: {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])}
            for name, f in files.items()
        }
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so nothing in the folder can be checked",
            hint="the folder was not written by llmtrain, or was copied in part",
        ) from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path} cannot be read ({error})",
            hint="the folder is damaged: restore it or delete it",
        ) from error


def integrity_problems(folder: Path, *, hashes: bool = True) -> list[str]:
    """What differs between a committed folder and its record; empty when all is as written.

    Sizes are always compared, contents when `hashes` is true.
    """
    problems = []
    for name, expected in read_integrity(folder).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(
                f"{path} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
            )
        elif hashes and sha256_of(path) != expected["sha256"]:
            problems.append(f"{path} has another SHA-256 than when it was written")
    return problems

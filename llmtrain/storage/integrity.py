"""Digests of files, and the record of sizes and digests in each committed folder.

Records contain BLAKE3, which is several times as fast as SHA-256. Records of earlier versions
contain SHA-256, as does the hub.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from blake3 import blake3

from llmtrain.errors import UserError
from llmtrain.storage.json_files import require_regular_file

INTEGRITY_FILE = "integrity.json"
"""Name, size and digest of each other file in a committed folder; written last."""

Algorithm = Literal["blake3", "sha256"]

_TITLES: dict[Algorithm, str] = {"blake3": "BLAKE3", "sha256": "SHA-256"}
_BUFFER_BYTES = 1 << 20


class DamagedFile(UserError):
    """A file that differs from its record."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        default = "restore the file from a copy; llmtrain verify PATH lists all damaged files"
        super().__init__(message, hint=hint or default)


@dataclass(frozen=True)
class Digest:
    """Hash of a file's content. Digests of different algorithms are never equal."""

    algorithm: Algorithm
    hex: str

    def __str__(self) -> str:
        """Return the hexadecimal hash, with a prefix unless it is SHA-256."""
        return self.hex if self.algorithm == "sha256" else f"{self.algorithm}:{self.hex}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the digest whose string is `text`."""
        prefix, _, digest = text.rpartition(":")
        return cls("blake3" if prefix == "blake3" else "sha256", digest)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self | None:
        """Return the digest in a JSON object with the key `blake3` or `sha256`, if any."""
        known = (name for name in get_args(Algorithm) if isinstance(entry.get(name), str))
        name: Any = next(known, None)
        return None if name is None else cls(name, entry[name])

    def as_json(self) -> dict[str, str]:
        """Return the JSON object of `from_json`."""
        return {self.algorithm: self.hex}


class RunningDigest:
    """Digest of a file that is read or written sequentially; out-of-order data is ignored."""

    def __init__(self, algorithm: Algorithm = "blake3") -> None:
        self._algorithm = algorithm
        self._hash: Any = hashlib.sha256() if algorithm == "sha256" else blake3()
        self._position = 0

    def update(self, position: int, data: bytes | memoryview) -> None:
        """Add the bytes at `position` of the file."""
        if position == self._position:
            self._hash.update(data)
            self._position += len(data)

    def digest(self, size: int) -> Digest | None:
        """Return the digest if all `size` bytes of the file were added."""
        if self._position != size:
            return None
        return Digest(self._algorithm, self._hash.hexdigest())


class FileRecord(NamedTuple):
    """Size and digest of a file when its folder was committed."""

    bytes: int
    digest: Digest


def digest_of(path: Path, algorithm: Algorithm = "blake3") -> Digest:
    """Return the digest of a file, read in chunks."""
    running, buffer, position = RunningDigest(algorithm), memoryview(bytearray(_BUFFER_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            running.update(position, buffer[:count])
            position += count
    digest = running.digest(position)
    assert digest is not None, "the chunks were added in order"
    return digest


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return digest_of(path, "sha256").hex


def blake3_of(path: Path) -> str:
    """Return the hexadecimal BLAKE3 of a file."""
    return digest_of(path).hex


def combined_digest(digests: Mapping[str, Digest]) -> Digest:
    """Return the only digest, or that of the sorted lines `<hash>  <name>` of several files."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    algorithms = {digest.algorithm for digest in digests.values()}
    running = RunningDigest("sha256" if algorithms == {"sha256"} else "blake3")
    lines = "".join(f"{digest.hex}  {name}\n" for name, digest in sorted(digests.items())).encode()
    running.update(0, lines)
    digest = running.digest(len(lines))
    assert digest is not None, "all lines were added"
    return digest


def write_integrity(folder: Path, known: Mapping[str, Digest] | None = None) -> None:
    """Record the size and digest of each file below `folder`; compute those not in `known`."""
    found, files = known or {}, {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != INTEGRITY_FILE:
            name = path.relative_to(folder).as_posix()
            digest = found.get(name) or digest_of(path)
            files[name] = {"bytes": path.stat().st_size, **digest.as_json()}
    (folder / INTEGRITY_FILE).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read_integrity(folder: Path) -> dict[str, FileRecord]:
    """Return the record of each file, or raise UserError."""
    path = folder / INTEGRITY_FILE
    require_regular_file(path)
    try:
        files = json.loads(path.read_text())["files"]
        if any(name.startswith("/") or ".." in name.split("/") or "\0" in name for name in files):
            raise ValueError("a file name points outside the folder")
        return {name: _file_record(entry) for name, entry in files.items()}
    except FileNotFoundError:
        hint = "llmtrain did not write this folder, or the copy is incomplete"
        raise UserError(f"cannot verify {folder}: {INTEGRITY_FILE} is missing", hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(
            f"cannot read {path}: {e}", hint="the folder is damaged: restore it or delete it"
        ) from e


def _file_record(entry: Mapping[str, Any]) -> FileRecord:
    digest = Digest.from_json(entry)
    if digest is None:
        raise ValueError("a file has neither blake3 nor sha256")
    return FileRecord(int(entry["bytes"]), digest)


def integrity_problems(folder: Path, *, hashes: bool = True) -> list[str]:
    """Return the differences between a folder and its record; compare contents if `hashes`."""
    found = (
        _problem(folder / name, expected, hashes=hashes)
        for name, expected in read_integrity(folder).items()
    )
    return [*filter(None, found)]


def _problem(path: Path, expected: FileRecord, *, hashes: bool) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected.bytes:
        return f"{path} has {size:,} bytes instead of {expected.bytes:,}"
    if hashes and (found := digest_of(path, expected.digest.algorithm)) != expected.digest:
        return mismatch(path, found)
    return None


def mismatch(path: Path, found: Digest) -> str:
    """Return the error message for a file whose digest is not the recorded one."""
    return f"{path} does not have the recorded {_TITLES[found.algorithm]}"


def require_recorded(path: Path, found: Digest, recorded: Digest) -> None:
    """Raise DamagedFile unless the digest of a file is the recorded one."""
    if found != recorded:
        raise DamagedFile(mismatch(path, found))


def recorded_digests(folder: Path, unread: tuple[str, ...] = ()) -> dict[str, Digest]:
    """Return the recorded digests of a folder by file name; empty if nothing was recorded.

    Raise DamagedFile if a file is missing or has another size. Also compare the contents, except
    those of files with the suffixes `unread`, which the caller checks while reading them.
    """
    if not (folder / INTEGRITY_FILE).exists():
        return {}
    records = read_integrity(folder)
    for name, expected in records.items():
        if problem := _problem(folder / name, expected, hashes=not name.endswith(unread)):
            raise DamagedFile(problem)
    return {name: expected.digest for name, expected in records.items()}

"""JSON documents, and JSON Lines files such as a run's `metrics.jsonl`."""

import json
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.storage.safe_files import read_regular

_COUNTS = ("seconds", "tokens", "skipped", "memory")
_MEASUREMENTS = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")
"""Keys that may also be null: not finite or unknown."""
_SECTOR = 512
_HINT = "restore the file from a copy"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise UserError."""
    try:
        document = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}", hint=_HINT) from None
    if not isinstance(document, dict):
        raise UserError(f"{path} does not contain a JSON object", hint="restore the damaged file")
    return document


def require_regular_file(path: Path) -> None:
    """Raise UserError for a pipe or a device: reading it could block or never end."""
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: not a regular file", hint=_HINT)


def write_json(path: Path, document: object) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of an append-only file, except those that an interruption damaged.

    A kill truncates the last line. A power loss may leave zeros in place of lines or sectors that
    were not flushed; nothing after them was flushed either.
    """
    try:
        *lines, _ = _until_zeros(read_regular(path)).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}", hint="restore the file") from None
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line.decode())
            if not isinstance(value, dict):
                raise TypeError(f"found a {type(value).__name__}")
            objects.append(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not a JSON object ({error})",
                hint="the file is damaged: restore it or fix the line",
            ) from None
    return objects


def _until_zeros(content: bytes) -> bytes:
    """Return the content before the zeros that a power loss left, if any."""
    zeros = content.find(b"\0")
    is_lost = zeros >= 0 and (zeros % _SECTOR == 0 or content[zeros - 1 : zeros] == b"\n")
    return content[:zeros] if is_lost else content


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a `metrics.jsonl`; raise UserError if a value has the wrong type."""
    events = read_json_lines(path)
    for number, event in enumerate(events, start=1):
        for key, value in {"step": None, **event}.items():
            if not _is_valid(key, value):
                message = f"{path}, line {number}: invalid training event: {key} is {value!r:.40}"
                raise UserError(message, hint="the file is damaged: restore it or delete the line")
    return events


def _is_valid(key: str, value: object) -> bool:
    is_integer = type(value) is int and abs(value) < 2**63
    if key == "step":
        return is_integer and value >= 0  # type: ignore[operator]  # an integer
    if key in _MEASUREMENTS or key.startswith("val/"):
        return is_integer or value is None or type(value) is float
    return key not in _COUNTS or is_integer or type(value) is float

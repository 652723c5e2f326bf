"""JSON files that hold one object.

document = read_json(folder / "config.json")
"""

import json
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: missing, or not such a file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {error}", hint="is it a complete folder of weights?"
        ) from None
    if not isinstance(document, dict):
        raise UserError(
            f"{path} does not hold a JSON object", hint="the file is damaged: restore it"
        )
    return document


def write_json(path: Path, document: object) -> None:
    """Write JSON, indented, with a newline at the end."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

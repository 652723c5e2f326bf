"""The events of a run, read back from its `metrics.jsonl` and checked.

Why apart from the log that writes them: training, the report and a sweep all read that file, and a line
that was damaged or written by something else must end in a message for each of them.

    losses = [event["loss"] for event in read_events(run.metrics) if "loss" in event]
"""

import json
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError

_COUNTED = ("seconds", "tokens", "skipped", "memory")
_MEASURED = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")
"""What may be null, too: not finite, or not known."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the order of the file, each with its `step`; a last line torn by a kill is left out.

    Raises:
        UserError: a line is no JSON object, has no step, or has something else than a number where one belongs.
    """
    events = read_json_lines(path)
    for number, event in enumerate(events, start=1):
        step = event.get("step")
        if type(step) is not int or not 0 <= step < 2**63:
            raise _damaged(path, number, f"its step is {step!r:.40}")
        for key, value in event.items():
            measured = key in _MEASURED or key.startswith("val/")
            if (measured or key in _COUNTED) and not _is_number(value, may_be_null=measured):
                raise _damaged(path, number, f"its {key} is {value!r:.40}")
    return events


def _is_number(value: object, *, may_be_null: bool) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return type(value) is float or (may_be_null and value is None)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is appended to, in order; a last line torn by a kill is left out.

    Raises:
        UserError: a line before the last is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line.decode())
            if not isinstance(value, dict):
                raise TypeError(f"a {type(value).__name__}")
            objects.append(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not a JSON object ({error})",
                hint="the file is damaged: restore it or mend the line",
            ) from None
    return objects


def _damaged(path: Path, number: int, what: str) -> UserError:
    return UserError(
        f"{path}, line {number}: no event of a run: {what}",
        hint="the file is damaged: restore it or delete the line",
    )

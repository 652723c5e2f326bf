"""Results of one kind, one file each under a run's `evals/`, so that nothing is measured twice.

Why by content: the name holds a hash of all that a result depends on (the weights, the text or the task, how it
was measured), so what is found is what would be measured, and what has changed is measured anew.

    score = kept(target, "tasks", [weights, task], TypeAdapter(TaskResult), lambda: score_task(...), warn)
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from llmtrain.checkpoints.resolve import Target
from llmtrain.errors import UserError, WriteFailed
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.run_folder import step_name

Result = TypeVar("Result")


def cached(
    target: Target,
    kind: str,
    identity: Sequence[object],
    form: TypeAdapter[Result],
    measure: Callable[[], Result],
    warn: Callable[[str], None],
) -> Result:
    """What `measure` gives, or gave before; weights outside a run are always measured.

    Args:
        target: the weights.
        kind: name of the folder under `evals/`.
        identity: all that the result depends on.
        form: how it is read from JSON and written.
        measure: computes it.
        warn: see `keep`.

    Raises:
        UserError: the file is damaged.
    """
    if target.run is None:
        return measure()
    key = hashlib.sha256("\n".join(map(str, identity)).encode()).hexdigest()[:16]
    step = "" if target.step is None else f"-{step_name(target.step)}"
    path = target.run.evals / kind / f"{target.label}{step}-{key}.json"
    if path.exists():
        try:
            return form.validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise UserError(
                f"{path}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}",
                hint="delete the file: llmtrain eval measures it again",
            ) from None
    result = measure()
    store(path, form.dump_python(result), warn)
    return result


def store(path: Path, result: object, warn: Callable[[str], None]) -> None:
    """Write a result as JSON; where the disk refuses, `warn` is told, since whoever waited for it wants to see it."""
    try:
        write_atomically(path, json.dumps(result, indent=2) + "\n")
    except (WriteFailed, OSError) as error:
        warn(f"measured but not kept: {error}")

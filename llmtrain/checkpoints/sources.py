"""What `llmtrain average SOURCE` may be: a run, a folder of checkpoints, or a series on the hub.

Why: the same word means the same thing wherever a series is asked for, and what is none of the three
is told what it could have been.

    series = find_series(None)  # the newest run under runs/
"""

import re
from pathlib import Path

from llmtrain.checkpoints.series import Series, folder_series, run_series
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RunFolder, is_run, newest_run

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find_series(
    source: str | None, *, revision_pattern: str | None = None, discard: bool = False
) -> Series:
    """The series that `source` names; None: the newest run.

    Raises:
        UserError: there is no such thing, or it holds no checkpoints.
    """
    if source is None:
        return run_series(newest_run())
    path = Path(source)
    if path.exists():
        if revision_pattern is not None:
            raise UserError(
                f"{source} is a folder and has no revisions", hint="leave out --revision-pattern"
            )
        if discard:
            raise UserError(
                f"{source} was not downloaded", hint="--discard-inputs is for series on the hub"
            )
        return run_series(RunFolder(path)) if is_run(path) else folder_series(path)
    if _REPOSITORY.fullmatch(source) and not source.startswith(("runs/", ".")):
        from llmtrain.checkpoints.hub_series import hub_series  # takes a second to import

        return hub_series(source, revision_pattern=revision_pattern, discard=discard)
    raise UserError(
        f"there is no {source}",
        hint="name the folder of a run or of checkpoints, or OWNER/NAME on the hub",
    )

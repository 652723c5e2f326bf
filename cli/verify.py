"""`llmtrain verify`: compare every file on disk with its recorded hash."""

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonFlag, console, print_json


def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Data, weights, runs, or a folder that contains some."),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Hash every file of every committed folder below PATH and compare it with its record.

    Prints each folder with its files, bytes and problems. Exits with 1 if a file differs.
    """
    from dataclasses import asdict

    from llmtrain.data.verify import verify_below
    from llmtrain.errors import RunFailed

    checks = [check for path in paths for check in verify_below(path)]
    if as_json:
        print_json([{**asdict(check), "folder": str(check.folder)} for check in checks])
    else:
        for check in checks:
            status, style = ("damaged", "red") if check.problems else ("ok", None)
            size = f"{check.files:,} files, {check.bytes:,} bytes"
            console.print(f"{status}  {check.folder}: {size}", style=style)
            for problem in check.problems:
                console.print(f"  {problem}", style=style)
    if damaged := sum(bool(check.problems) for check in checks):
        raise RunFailed(
            f"{damaged} of {len(checks)} folder(s) differ from their records",
            hint="restore them from a copy, or delete them and create them again",
        )
    if not as_json:
        console.print(f"{len(checks):,} folder(s): all match their records")

"""The `llmtrain doctor` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .common import JsonFlag, SetOption, console, print_json

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Also check the disk and data of this run."),
    ] = None,
    settings: SetOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/<name>")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check Python, torch, device, memory, compile, tokenizer, disk, data and network.

    Writes and removes a file of 64 MiB. A note affects only some runs. Exits with 1 if there is a
    problem.
    """
    from dataclasses import asdict

    from llmtrain.config.loading import load_config
    from llmtrain.errors import RunFailed, UserError
    from llmtrain.planning.doctor import run_checks

    if settings and config is None:
        raise UserError("--set needs a config to override", hint="add --config FILE")
    checks = []
    for check in run_checks(load_config(config, settings or []) if config else None, run_dir):
        checks.append(check)
        if not as_json:
            console.print(Text(f"{check.state:<7} ", _COLOURS[check.state]), end="")
            console.print(f"{check.name:<10} {check.found}", soft_wrap=True)
            if check.hint:
                console.print(f"{'':<18} {check.hint}", soft_wrap=True)
    if as_json:
        print_json([asdict(check) for check in checks])
    if problems := [check.name for check in checks if check.state == "problem"]:
        names = ", ".join(problems)
        raise RunFailed(f"this machine is not ready: {names}", hint="follow the hints above")

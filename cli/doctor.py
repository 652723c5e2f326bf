"""`llmtrain doctor`: is this machine fit for a run?

llmtrain doctor --config configs/gpt2-small.yaml
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .common import console, print_json

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="Look at what this run needs, too: its disk space and its data.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override a key of the config; repeatable."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="runs/NAME, NAME from the config"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Try what a run needs: Python, torch, device, precision, compile, tokenizer, disk, data, network.

    Writes and removes a file of 64 MiB. A note is not needed for every run. Exit code 1 when there is a problem.
    """
    from dataclasses import asdict

    from llmtrain.config.loading import load_config
    from llmtrain.errors import RunFailed, UserError
    from llmtrain.planning.doctor import check_up

    if settings and config is None:
        raise UserError(
            "--set overrides a key of a config, and none is named", hint="--config FILE"
        )
    checks = []
    for check in check_up(load_config(config, settings or []) if config else None, run_dir):
        checks.append(check)
        if not as_json:
            colour = _COLOURS[check.state]
            console.print(
                f"[{colour}]{check.state:<7}[/] {check.name:<10} {escape(check.found)}",
                soft_wrap=True,
            )
            if check.hint:
                console.print(f"{'':<18} {escape(check.hint)}", soft_wrap=True)
    if as_json:
        print_json([asdict(check) for check in checks])
    if problems := [check.name for check in checks if check.state == "problem"]:
        raise RunFailed(
            f"not fit for this: {', '.join(problems)}", hint="the lines above say what to do"
        )

"""`llmtrain pretrain`: train a model from a configuration, or go on with a run.

llmtrain pretrain --config configs/demo.yaml --set optimizer.lr=6e-3
"""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from llmtrain.runtime import ranks

from .common import console, discard_stdout, parse_duration, print_outcome, warn


def _print_line(line: str) -> None:
    # Not through rich, which exits where the reader is gone; training then saves its state first.
    try:
        print(line, flush=True)
    except OSError as error:  # a terminal that was closed, a full disk under a redirection
        raise BrokenPipeError(error.errno, error.strerror) from error


def _warn(message: str) -> None:
    try:
        warn(message)
    except SystemExit as left:  # how rich says that nobody reads
        raise BrokenPipeError from left


def _without_nproc(words: list[str]) -> list[str]:
    """The command line of one process."""
    kept = []
    rest = iter(words)
    for word in rest:
        if word == "--nproc":
            next(rest)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


def pretrain(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file, such as configs/demo.yaml.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override a key of the config; repeatable."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Folder of the run.", show_default="runs/<name>"),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on with a run that is there; never: refuse it; PATH: begin a new run with this "
            "state (RUN/state/step-…).",
        ),
    ] = "auto",
    branch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Begin run NAME beside this one, from its state --from STEP.",
            show_default=False,
        ),
    ] = None,
    from_step: Annotated[
        int | None, typer.Option("--from", metavar="STEP", help="See --branch.", show_default=False)
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train with N processes on this machine, a GPU each (or a part of the CPU). Across machines: "
            "torchrun … -m llmtrain pretrain.",
            show_default="this one",
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration,
            metavar="TIME",
            help="Stop after this time with the state saved: 90m, 1h30m, 3600s.",
            show_default="no limit",
        ),
    ] = None,
) -> None:
    """Pre-train a GPT-2 model and save its snapshots.

    Prints a line every log.every steps: loss (nats per token), learning rate, gradient norm, tokens
    per second, utilisation of the device's peak (MFU) and time left. Ctrl-C, SIGTERM, SIGUSR1 and
    --max-time end the run at its next micro-batch with the state of its last step saved (exit codes 130,
    143, 138 and 124); the same command goes on. A second signal leaves at once. Any number of processes
    gives the same training, and each can go on from what another saved.
    """
    from llmtrain.config.loading import load_config
    from llmtrain.errors import UserError
    from llmtrain.storage.run_folder import RunFolder

    resolved = load_config(config, settings or [])
    folder = run_dir or Path("runs") / resolved.name
    start: Literal["auto", "never"] | Path = (
        "auto" if resume == "auto" else "never" if resume == "never" else Path(resume)
    )
    if (branch is None) != (from_step is None) or (branch and resume != "auto"):
        raise UserError(
            "--branch NAME and --from STEP go together, and without --resume",
            hint="--branch cooldown --from 8000 --set 'schedule={name: wsd, decay_steps: 2000}'",
        )
    if branch is not None and from_step is not None:
        start = RunFolder(folder).state(from_step)
        folder = folder.parent / branch
        resolved = load_config(config, [*(settings or []), f"name={json.dumps(branch)}"])
    if nproc is not None:
        if ranks.is_member():
            raise UserError(
                "--nproc starts processes, and this is one of several", hint="leave it out here"
            )
        from llmtrain.runtime.launcher import launch

        raise typer.Exit(launch(_without_nproc(sys.argv[1:]), nproc))

    from llmtrain.config.schedules import tokens_until
    from llmtrain.config.schema import flatten
    from llmtrain.runtime.device import device_name, resolve_device, resolve_precision
    from llmtrain.runtime.signals import Interrupted
    from llmtrain.training.run import pretrain as train

    device = resolve_device(resolved.train.device)
    table = Table("key", "value", title=f"{config}", title_justify="left")
    for key, value in flatten(resolved).items():
        table.add_row(key, "" if value is None else str(value))
    table.add_section()
    table.add_row("→ device", device_name(device))
    table.add_row("→ precision", resolve_precision(resolved.train.precision, device))
    table.add_row("→ tokens a step", f"{resolved.tokens_per_step:,}")
    table.add_row("→ tokens in all", f"{tokens_until(resolved.train.max_steps, resolved):,}")
    console.print(table)
    try:
        outcome = train(
            resolved, folder, resume=start, max_seconds=max_time, log=_print_line, warn=_warn
        )
    except Interrupted as interrupted:
        nobody_reads = interrupted.exit_code == 128 + signal.SIGPIPE
        reason = "nobody reads the log" if nobody_reads else str(interrupted)
        print_outcome(f"{reason}: state saved in {folder}; the same command goes on")
        if nobody_reads:
            discard_stdout()
        raise typer.Exit(interrupted.exit_code) from None
    if outcome.already_finished:
        message = f"{folder} has finished: it is at step {outcome.step:,}. A larger train.max_steps goes on."
    else:
        next_command = f"llmtrain average {shlex.quote(str(folder))} --every N"
        message = f"{folder}: step {outcome.step:,} reached. Next: {next_command}"
    console.print(message, markup=False)

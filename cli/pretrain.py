"""`llmtrain pretrain`: train a model from a configuration, or resume a run."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from llmtrain.errors import UserError, printable
from llmtrain.runtime import launcher

from .common import SetOption, console, discard_stdout, parse_duration, print_outcome, warn

if TYPE_CHECKING:
    from llmtrain.config.schema import RunConfig


def pretrain(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file, such as configs/demo.yaml.")
    ],
    settings: SetOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/<name>")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: resume an existing run; never: refuse it; PATH: start a new run from this "
            "training checkpoint (RUN/state/step-…).",
        ),
    ] = "auto",
    branch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Start run NAME next to this one from its training checkpoint at --from STEP.",
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
            help="Train with N processes on this machine, each with a GPU or a share of the CPU. "
            "Across machines: torchrun … -m llmtrain pretrain.",
            show_default="this process",
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration,
            metavar="TIME",
            help="Save a training checkpoint and stop after this time: 90m, 1h30m, 3600s.",
            show_default="no limit",
        ),
    ] = None,
) -> None:
    """Pre-train a GPT-2 model and save its snapshots.

    Prints a line every log.every steps: loss (nats per token), learning rate, gradient norm, tokens
    per second, utilization of the device's peak (MFU) and time left. Ctrl-C, SIGTERM, SIGUSR1 and
    --max-time stop the run within a micro-batch or after it and save a training checkpoint (exit
    codes 130, 143, 138 and 124); the same command resumes it. A second signal stops at once. Any
    number of processes trains the same model and can resume checkpoints of another number.
    """
    from llmtrain.config.loading import load_config
    from llmtrain.storage.run_folder import RunFolder

    resolved = load_config(config, settings or [])
    folder = run_dir or Path("runs") / resolved.name
    start: Literal["auto", "never"] | Path = (
        "auto" if resume == "auto" else "never" if resume == "never" else Path(resume)
    )
    if (branch is None) != (from_step is None) or (branch and resume != "auto"):
        raise UserError(
            "--branch NAME needs --from STEP, and neither works with --resume",
            hint="--branch cooldown --from 8000 --set 'schedule={name: wsd, decay_steps: 2000}'",
        )
    if branch is not None and from_step is not None:
        start = RunFolder(folder).state(from_step)
        folder = folder.parent / branch
        resolved = load_config(config, [*(settings or []), f"name={json.dumps(branch)}"])
    if nproc is not None and not launcher.is_worker():
        raise typer.Exit(launcher.launch(sys.argv[1:], nproc))
    if nproc is not None and launcher.LAUNCHER not in os.environ:
        problem = "--nproc cannot be used in a process that a launcher started"
        raise UserError(problem, hint="remove --nproc")

    from llmtrain.runtime.signals import Interrupted
    from llmtrain.training.run import pretrain as train

    _print_config(config, resolved)
    try:
        outcome = train(
            resolved, folder, resume=start, max_seconds=max_time, log=_print, warn=_warn
        )
    except Interrupted as interrupted:
        is_pipe_closed = interrupted.exit_code == 128 + signal.SIGPIPE
        reason = "output closed" if is_pipe_closed else str(interrupted)
        saved = f"training checkpoint saved in {folder}"
        print_outcome(f"{reason}: {saved}; run the same command to resume")
        if is_pipe_closed:
            discard_stdout()
        raise typer.Exit(interrupted.exit_code) from None
    next_step = f"Next: llmtrain average {shlex.quote(str(folder))} --every N"
    if outcome.already_finished:
        next_step = "Already finished: raise train.max_steps to continue"
    console.print(f"{folder}: step {outcome.step:,} reached. {next_step}")


def _print_config(path: Path, config: "RunConfig") -> None:
    """Print a table of the configuration and its resolved values on this machine."""
    from llmtrain.config.schedules import tokens_until
    from llmtrain.config.schema import flatten
    from llmtrain.runtime.device import device_name, resolve_device, resolve_precision

    device = resolve_device(config.train.device)
    table = Table("key", "value", title=str(path), title_justify="left")
    for key, value in flatten(config).items():
        table.add_row(key, "" if value is None else str(value))
    table.add_section()
    table.add_row("→ device", device_name(device))
    table.add_row("→ precision", resolve_precision(config.train.precision, device))
    table.add_row("→ tokens per step", f"{config.tokens_per_step:,}")
    table.add_row("→ tokens in total", f"{tokens_until(config.train.max_steps, config):,}")
    console.print(table)


def _print(line: str) -> None:
    # Not through rich, which exits when the pipe is closed; training saves a checkpoint first.
    try:
        print(printable(line), flush=True)
    except OSError as error:  # a closed terminal, or a full disk under a redirection
        raise BrokenPipeError(error.errno, error.strerror) from error


def _warn(message: str) -> None:
    try:
        warn(message)
    except SystemExit as closed:  # rich's reaction to a closed pipe
        raise BrokenPipeError from closed

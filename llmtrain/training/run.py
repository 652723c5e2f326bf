"""Which run it is: a new one, one to go on with, or one that must not be touched.

Why apart from the loop: a run folder is resumed only if its configuration agrees, and is never
overwritten. That rule should be readable in one place.

    outcome = pretrain(load_config(Path("configs/demo.yaml")), Path("runs/demo"))
"""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from llmtrain.config.loading import dump_config, load_config
from llmtrain.config.schema import RunConfig, flatten
from llmtrain.data.mixture import open_training_data
from llmtrain.data.shards import TokenData
from llmtrain.errors import UserError
from llmtrain.runtime.device import (
    environment,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
)
from llmtrain.runtime.distributed import init_distributed
from llmtrain.runtime.signals import Interrupt
from llmtrain.storage.commit import locked_folder, remove_leftovers, write_atomically
from llmtrain.storage.integrity import INTEGRITY_FILE
from llmtrain.storage.json_files import read_events, read_json
from llmtrain.storage.run_folder import RunFolder, is_run, require_run, step_folders
from llmtrain.training.checkpoint import TrainingCheckpoint, load_state, newest_state
from llmtrain.training.compile import compile_model
from llmtrain.training.initial import load_initial_weights, open_weights
from llmtrain.training.metrics import MetricsLog
from llmtrain.training.micro_batch import explain_oom, find_micro_batch
from llmtrain.training.trainer import Trainer

MAY_CHANGE = (
    "name",
    "train.max_steps",
    "train.micro_batch",
    "train.compile",
    "train.device",
    "train.parallel",
    "train.activation_checkpointing",
    "train.on_nonfinite",
    "spikes.action",
    "spikes.threshold",
    "spikes.rewind_steps",
    "spikes.max_rewinds",
    "data.path",
    "checkpoint.",
    "eval.",
    "log.",
)
"""Keys that may differ when a run is resumed: they do not change what was learned so far."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `pretrain` ended."""

    run: RunFolder
    step: int
    already_finished: bool
    """Nothing was left to do."""


def pretrain(
    config: RunConfig,
    folder: Path,
    *,
    resume: Literal["auto", "never"] | Path = "auto",
    max_seconds: float | None = None,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
) -> Outcome:
    """Train, or go on training, until `train.max_steps`.

    Args:
        config: the resolved configuration.
        folder: of the run; created when it does not exist.
        resume: "auto" goes on with a run that is there; "never" refuses it; the folder of a state
            begins a new run with it, for a cooldown or another learning rate.
        max_seconds: stop after this time with the state saved, as if a signal had come.
        say: prints one line of the log.
        warn: tells what the user should know.

    Raises:
        UserError: config, data and run folder do not go together.
        RunFailed: loss or gradients are not finite, or spike, and the configuration has no way on.
        Interrupted: a signal came or the time is over; the state is saved.
    """
    device = resolve_device(config.train.device)
    with init_distributed(device, spread=config.train.parallel in ("fsdp", "hsdp")) as (
        world,
        device,
    ):
        if not world.is_rank_zero:
            say = warn = _say_nothing
        world.on_rank_zero(lambda: _refuse_other_files(folder))
        data = world.local_rank_zero_first(lambda: open_training_data(config.data))
        _check_vocabulary(config, data)
        run = RunFolder(folder)
        interrupt = Interrupt(
            max_seconds, quiet=not world.is_rank_zero, agree=world.exit_code_agreement()
        )
        say, warn = partial(_tell, interrupt, say), partial(_tell, interrupt, warn)
        held = world.enter_on_rank_zero(_held(run.path))
        with held, interrupt, explain_oom(device), keep_freed_memory(device):
            start = world.on_rank_zero(lambda: _start(config, run, data, resume, warn))
            if start.finished and start.state is not None:
                return Outcome(run, start.state.progress.step, already_finished=True)
            trainer = Trainer(config, run, data, world, device, warn)
            _tell_about(trainer, warn)
            if start.state is not None:
                trainer.restore(start.state)
                how = "branched off" if start.branched else "resumed"
                say(f"{how} at step {start.state.progress.step:,}")
            elif config.init_from is not None:
                initial = world.local_rank_zero_first(partial(open_weights, config.init_from))
                load_initial_weights(initial, trainer.model, config)
                say(f"begins with the weights of {initial.location}")
            world.on_rank_zero(lambda: _write_down(trainer))
            find_micro_batch(trainer, say)
            trainer.forward = compile_model(trainer, warn)
            with _open_log(trainer, say) as log:
                trainer.train(log, interrupt)
            return Outcome(run, trainer.progress.step, already_finished=False)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder of a run for this process alone; one that was made for a run that never began goes again."""
    is_new = not folder.exists()
    with locked_folder(folder):
        try:
            yield
        finally:
            if is_new and folder.exists() and _holds_no_more_than_a_beginning(folder):
                shutil.rmtree(folder)


def _write_down(trainer: Trainer) -> None:
    """What is trained, and on what."""
    write_atomically(trainer.run.config, dump_config(trainer.config))
    facts = environment(trainer.device) | {
        "processes": trainer.world.size,
        "precision": resolve_precision(trainer.config.train.precision, trainer.device),
    }
    write_atomically(trainer.run.environment, json.dumps(facts, indent=2) + "\n")


def _say_nothing(line: str) -> None:
    """Of the processes of a run, only the first speaks."""


def _tell(interrupt: Interrupt, tell: Callable[[str], None], line: str) -> None:
    """Where nobody reads any more, that is a reason to leave, as good as a signal."""
    try:
        tell(line)
    except BrokenPipeError:
        interrupt.received = signal.SIGPIPE


@dataclass(frozen=True)
class _Start:
    """Where a run begins."""

    state: TrainingCheckpoint | None
    """To go on from, if any."""
    branched: bool
    """It is the state of another run."""
    finished: bool
    """Nothing is left to do."""


def _start(
    config: RunConfig,
    run: RunFolder,
    data: TokenData,
    resume: Literal["auto", "never"] | Path,
    warn: Callable[[str], None],
) -> _Start:
    if isinstance(resume, Path) and not is_run(run.path):
        return _Start(_branch(config, run, data, resume), branched=True, finished=False)
    state = _existing_state(config, run, data, resume, warn)
    finished = state is not None and _is_finished(config, run, data, state.progress.step)
    return _Start(state, branched=False, finished=finished)


def _tell_about(trainer: Trainer, warn: Callable[[str], None]) -> None:
    data, config = trainer.data, trainer.config
    if data.tokenizer_assumed:
        warn(f"{config.data.path} does not say its tokenizer: GPT-2's is assumed")
    if len(data.reader("val")) < 2:
        warn("the val split is empty: no validation loss will be measured")
    if config.log.sample_tokens and trainer.parallel in ("fsdp", "hsdp"):
        warn("log.sample_tokens: no text is sampled from a model in shards")


def _open_log(trainer: Trainer, say: Callable[[str], None]) -> MetricsLog:
    """The log of this process: of the first one, as the others have nothing to tell."""
    progress = trainer.progress
    return MetricsLog(
        trainer.run.metrics if trainer.world.is_rank_zero else None,
        trainer.config,
        resumed_step=progress.step,
        wandb_id=progress.wandb_id,
        say=say,
        warn=trainer.warn,
    )


def _is_finished(config: RunConfig, run: RunFolder, data: TokenData, step: int) -> bool:
    """Whether nothing is left to do: an interruption at the last step may have left its evaluation undone."""
    if step != config.train.max_steps:
        return step > config.train.max_steps
    saved = [run.snapshot(step), *(run.average(average.label, step) for average in config.averages)]
    evaluated = any(
        "val/loss" in event and event["step"] == step for event in read_events(run.metrics)
    )
    return all(path.exists() for path in saved) and (evaluated or len(data.reader("val")) < 2)


def _check_vocabulary(config: RunConfig, data: TokenData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size:,} is smaller than the vocabulary of the data, "
            f"{data.vocab_size:,} ({data.tokenizer})",
            hint=f"--set model.vocab_size={-(-data.vocab_size // 64) * 64}",
        )


def _branch(config: RunConfig, run: RunFolder, data: TokenData, folder: Path) -> TrainingCheckpoint:
    """The state of another run with which a new one begins; which it was goes to `parent.json`.

    What the averages hold is taken over where both runs have them; others begin here.

    Raises:
        UserError: no state, a damaged one, or one of another model.
    """
    if not (folder / INTEGRITY_FILE).is_file():
        states = step_folders(folder.parent) or step_folders(RunFolder(folder).states)
        there = ", ".join(map(str, states.values())) or "none"
        raise UserError(f"{folder} is not the folder of a state", hint=f"states there: {there}")
    state = load_state(folder)
    parent = require_run(folder.resolve().parents[1])
    before, now = flatten(load_config(parent.config)), flatten(config)
    differing = {
        key: [before.get(key), now.get(key)]
        for key in now | before
        if before.get(key) != now.get(key)
    }
    if other := [key for key in differing if key.startswith(("model.", "data.block_size"))]:
        raise UserError(
            f"{folder} is of another model: {', '.join(other)} differ",
            hint="a branch keeps its model",
        )
    if "muon" in differing.get("optimizer.name", ()):
        message = f"{folder} has other moments: Muon keeps one of a matrix, and AdamW two"
        raise UserError(
            message, hint="a branch keeps its optimizer; init_from: SNAPSHOT takes weights alone"
        )
    state.progress.wandb_id, state.progress.data = None, data.sha256
    about = {
        "run": str(parent.path),
        "state": folder.name,
        "step": state.progress.step,
        "changed": differing,
    }
    write_atomically(run.parent, json.dumps(about, indent=2) + "\n")
    return state


def _existing_state(
    config: RunConfig,
    run: RunFolder,
    data: TokenData,
    resume: Literal["auto", "never"] | Path,
    warn: Callable[[str], None],
) -> TrainingCheckpoint | None:
    """The state to go on from, or None for a new run.

    Raises:
        UserError: the run must not be resumed, or is another run.
    """
    if not is_run(run.path):
        run.parent.unlink(missing_ok=True)  # of a branch that was killed before it had a config
        return None
    for parent in (run.path, run.snapshots, run.states, run.evals, *run.averages.glob("[!.]*")):
        remove_leftovers(parent)
    if resume == "never":
        raise UserError(
            f"{run.path} holds a run already and --resume is never",
            hint="choose another --run-dir, or --resume auto to go on with it",
        )
    if isinstance(resume, Path) and not _began_with(run, resume.resolve()):
        raise UserError(
            f"{run.path} holds a run already, and it did not begin with {resume}",
            hint="choose another name for the branch",
        )
    _refuse_other_config(config, run, warn)
    state = newest_state(run, warn)
    if state is None:
        began_with = _parent_state(run)
        state = None if began_with is None else _branch(config, run, data, began_with)
        _refuse_lost_states(run, 0 if state is None else state.progress.step, warn)
        return state
    if state.progress.data != data.sha256:
        raise UserError(
            f"{run.path} was trained on other data than {config.data.path} holds now",
            hint="point data.path at the data it was trained on, or choose another --run-dir",
        )
    return state


def _refuse_other_files(folder: Path) -> None:
    """Raise a UserError where something else than a run, or the beginning of one, lies."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", hint="choose another --run-dir")
    if folder.is_dir() and not is_run(folder) and not _holds_no_more_than_a_beginning(folder):
        raise UserError(
            f"{folder} holds other files and is no run", hint="choose another --run-dir"
        )


def _holds_no_more_than_a_beginning(folder: Path) -> bool:
    begun = re.compile(r"\.lock|parent\.json|\.tmp-\d+-(parent\.json|config\.yaml)")
    return all(begun.fullmatch(path.name) for path in folder.iterdir())


def _refuse_lost_states(run: RunFolder, first: int, warn: Callable[[str], None]) -> None:
    """A run without a state begins again at step `first` only if it cannot have had one."""
    steps = [event["step"] for event in read_events(run.metrics)]
    if steps and max(steps) > first + load_config(run.config).checkpoint.state_every:
        raise UserError(
            f"{run.path} was trained to step {max(steps):,} and its states are gone",
            hint="restore its state folder, or train anew in another --run-dir",
        )
    if steps:
        warn(f"{run.path} was stopped before its first state: it begins again at step {first:,}")


def _parent_state(run: RunFolder) -> Path | None:
    """The state that a run began with, if it is a branch."""
    if not run.parent.exists():
        return None
    about = read_json(run.parent)
    parent, state = about.get("run"), about.get("state")
    if not (isinstance(parent, str) and isinstance(state, str)):
        raise UserError(
            f"{run.parent} does not say which state the run began with", hint="restore the file"
        )
    return RunFolder(Path(parent)).states / state


def _began_with(run: RunFolder, state: Path) -> bool:
    recorded = _parent_state(run)
    if recorded is None or recorded == state:
        return recorded == state
    # On another machine, or under another name of the disk, the same state of the same run.
    return not recorded.parents[1].exists() and recorded.parts[-3:] == state.parts[-3:]


def _refuse_other_config(config: RunConfig, run: RunFolder, warn: Callable[[str], None]) -> None:
    before, now = flatten(load_config(run.config)), flatten(config)
    keys = [key for key in now | before if before.get(key) != now.get(key)]
    if changed := [key for key in keys if not key.startswith(MAY_CHANGE)]:
        listed = "; ".join(
            f"{key}: {before.get(key)} there, {now.get(key)} here" for key in changed
        )
        raise UserError(
            f"{run.path} was trained with another config ({listed})",
            hint="choose another --run-dir (or name:), or go back to that config",
        )
    follows_max_steps = getattr(config.schedule, "horizon", 0) is None
    if "train.max_steps" in keys and follows_max_steps:
        warn(
            f"the {config.schedule.name} schedule ends at train.max_steps, which was "
            f"{before['train.max_steps']:,} and is {config.train.max_steps:,}: the learning rate jumps here; "
            "schedule.horizon keeps it where it was"
        )

"""`pretrain`: train a run, or resume it, from its configuration."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmtrain.config.loading import dump_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.sampler import n_windows, small_split
from llmtrain.data.shard_check import ShardCheck
from llmtrain.data.token_data import TokenData, open_training_data
from llmtrain.errors import UserError
from llmtrain.runtime.device import environment, keep_freed_memory, resolve_device
from llmtrain.runtime.distributed import init_distributed
from llmtrain.runtime.signals import Interrupt
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.locks import is_held, locked_folder
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.checkpoint_writer import remove_old
from llmtrain.training.initial import load_initial_weights, open_weights
from llmtrain.training.metrics import MetricsLog
from llmtrain.training.micro_batch import explain_oom, find_micro_batch
from llmtrain.training.resume import Resume, check_folder, find_start, has_only_started, is_finished
from llmtrain.training.trainer import Trainer
from llmtrain.training.worker import Log, Worker, compile_model, make_worker


@dataclass(frozen=True)
class Outcome:
    """How a call of `pretrain` ended."""

    run: RunFolder
    step: int
    already_finished: bool


def pretrain(
    config: RunConfig,
    folder: Path,
    *,
    resume: Resume = "auto",
    max_seconds: float | None = None,
    log: Log = print,
    warn: Log = print,
) -> Outcome:
    """Train to `train.max_steps`, from step 0 or from where the run stopped.

    `resume`: "auto" resumes an existing run; "never" refuses it; the folder of a training
    checkpoint starts a new run from it, for a cooldown or another learning rate. After a signal or
    `max_seconds`, raise Interrupted once a training checkpoint is saved.
    """
    device = resolve_device(config.train.device)
    spread = config.train.parallel in ("fsdp", "hsdp")
    with init_distributed(device, spread=spread) as (world, device):
        if not world.is_rank_zero:
            log = warn = lambda line: None
        world.on_rank_zero(lambda: check_folder(folder))
        data = world.local_rank_zero_first(lambda: open_training_data(config.data))
        _check_vocabulary(config, data)
        run, agree = RunFolder(folder), world.exit_code_agreement()
        interrupt = Interrupt(max_seconds, quiet=not world.is_rank_zero, agree=agree)
        log, warn = partial(_print, interrupt, log), partial(_print, interrupt, warn)
        lock = world.enter_on_rank_zero(_lock(run.path))
        with lock, interrupt, explain_oom(), keep_freed_memory(device), ExitStack() as stack:
            start = world.on_rank_zero(lambda: find_start(config, run, data, resume, warn))
            branched = start is not None and start.folder.parent != run.states
            if start is not None and not branched:
                step = start.progress.step
                if world.on_rank_zero(lambda: is_finished(config, run, data, step)):
                    world.on_rank_zero(lambda: remove_old(run, config))  # after a kill at the end
                    return Outcome(run, step, already_finished=True)
            # One process of each machine hashes its shards, during the preparations and training.
            files = data.all_files if world.local_rank == 0 else ()
            shard_check = stack.enter_context(ShardCheck(files))
            worker = make_worker(config, world, device, warn)
            trainer = Trainer(worker, run, data)
            _warn_about_settings(worker, data)
            if start is not None:
                trainer.restore(start)
                how = "branched off" if branched else "resumed"
                log(f"{how} at step {trainer.progress.step:,}")
            elif config.init_from is not None:
                initial = world.local_rank_zero_first(partial(open_weights, config.init_from))
                for note in initial.notes:
                    warn(note)
                load_initial_weights(initial, worker.model, config)
                log(f"starting from the weights of {initial.location}")
            world.on_rank_zero(lambda: _write_config(worker, run))
            find_micro_batch(worker, trainer.progress, log)
            worker.forward = compile_model(worker, trainer.progress.micro_batch)
            path, progress = run.metrics if world.is_rank_zero else None, trainer.progress
            with MetricsLog(path, config, progress, log=log, warn=warn) as metrics:
                trainer.train(metrics, interrupt, shard_check)
            return Outcome(run, trainer.progress.step, already_finished=False)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock the run's folder; remove it if this process created it and the run never started."""
    is_new = not folder.exists()
    with locked_folder(folder):
        try:
            yield
        finally:
            if is_new and is_held(folder) and has_only_started(folder):
                shutil.rmtree(folder)


def _print(interrupt: Interrupt, write: Log, line: str) -> None:
    """Print a line; treat a closed output pipe like a stop signal."""
    try:
        write(line)
    except BrokenPipeError:
        interrupt.received = signal.SIGPIPE


def _check_vocabulary(config: RunConfig, data: TokenData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size:,} is smaller than the vocabulary of the "
            f"data, {data.vocab_size:,} ({data.tokenizer})",
            hint=f"--set model.vocab_size={-(-data.vocab_size // 64) * 64}",
        )


def _warn_about_settings(worker: Worker, data: TokenData) -> None:
    config = worker.config
    if data.tokenizer_assumed:
        worker.warn(f"{config.data.path} does not name a tokenizer: assuming GPT-2's")
    if (tokens := data.tokens("val")) < 2:
        worker.warn("the val split is empty: skipping evaluations")
    windows = n_windows(min(tokens, config.eval.tokens or tokens), config.data.block_size)
    if small := small_split(windows, "window"):
        worker.warn(f"{config.data.path}, val split: {small}")
    if config.log.sample_tokens and worker.is_sharded:
        worker.warn("log.sample_tokens is ignored: a sharded model generates no samples")


def _write_config(worker: Worker, run: RunFolder) -> None:
    """Write the run's config and the hardware and software it runs on."""
    write_atomically(run.config, dump_config(worker.config))
    facts = environment(worker.device)
    facts |= {"processes": worker.world.size, "precision": worker.precision}
    write_atomically(run.environment, json.dumps(facts, indent=2) + "\n")

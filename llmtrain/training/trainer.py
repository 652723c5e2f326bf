"""The training loop, and only the loop: what one step does, and what is due after it.

Why a class: a step, an evaluation and a save all act on the same model, optimizer and averages, and
a resumed run must find every one of them as it was. Which run it is, and whether it may be resumed,
is decided in `run.py`.

    trainer = Trainer(config, run, data, world, device, warn); choose(trainer, say)  # the micro-batch
    trainer.train(log, interrupt)
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.averaging.online import OnlineAverage, build_average, swapped_in
from llmtrain.checkpoints.gpt2_folder import Origin, Shape
from llmtrain.config.schedules import block_size, learning_rate, reset_factor
from llmtrain.config.schema import RunConfig
from llmtrain.data.batches import Batches
from llmtrain.data.shards import TokenData
from llmtrain.errors import RunFailed
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.device import (
    Precision,
    autocast,
    peak_flops,
    peak_memory,
    resolve_compile,
    resolve_precision,
    to_device,
)
from llmtrain.runtime.distributed import World
from llmtrain.runtime.signals import Interrupt, Interrupted
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import TrainingCheckpoint, TrainingProgress, gather, restore
from llmtrain.training.checkpoint_writer import StateWriter
from llmtrain.training.compile import allocate_grads
from llmtrain.training.metrics import MetricsLog
from llmtrain.training.micro_batch import retry_on_oom
from llmtrain.training.optimizers.optim import build_optimizer, gradient_norm, update
from llmtrain.training.parallel import build_model, grad_sync, resolve_parallel, without_backward
from llmtrain.training.rewind import state_before, take_back
from llmtrain.training.sample import sample
from llmtrain.training.snapshots import SnapshotWriter
from llmtrain.training.spikes import SpikeDetector, SpikeEvent


class Trainer:
    """Everything that changes while a model is trained."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        data: TokenData,
        world: World,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        """Build the model and what trains it, at step 0.

        Args:
            config: the resolved configuration.
            run: where to save.
            data: the token shards.
            world: the processes that train it together.
            device: where this one trains.
            warn: tells what the user should know.

        Raises:
            UserError: a step does not divide over the processes, or the device cannot do what is asked of it.
        """
        self.warn = warn
        self.config, self.run, self.data = config, run, data
        self.world, self.device = world, device
        precision = resolve_precision(config.train.precision, device)
        self.parallel = resolve_parallel(config, world, device, precision)
        self.to_compile, reason = resolve_compile(config.train.compile, device)
        if reason is not None:
            warn(reason)
        self.model = build_model(config, self.parallel, world, device, precision)
        self.forward: nn.Module = self.model
        self.is_compiled = self.replays = False
        """Compiled; and its forward and backward passes are replayed as CUDA graphs. Set by `compiled`."""
        self.cast: Precision = precision if self.parallel in (None, "ddp") else "float32"
        """For autocast: FSDP casts by itself."""
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.averages = [
            build_average(each, self.model, warmup_steps=config.schedule.warmup_steps)
            for each in config.averages
        ]
        self.watch = SpikeDetector(config, device)
        self.batches = Batches(config, data, world)
        self.val_tokens = data.reader("val")
        self.token_bytes = load_tokenizer(data.tokenizer).token_bytes()
        shape = Shape(config.model, config.data.block_size, data.eot)
        self.snapshot_writer = SnapshotWriter(self.model, world, shape)
        self.progress = TrainingProgress(data=data.sha256)
        self.state_writer = StateWriter(
            run,
            world,
            keep=config.checkpoint.keep_states,
            every=config.checkpoint.state_every if config.may_rewind else 1,
            background=world.size > 1 or device.type != "cpu",
        )
        self._peak = (peak_flops(device, precision) or 0.0) * world.size
        self._evaluated: set[int] = set()
        self._stepping = 0.0
        """Seconds in steps since the last line of the log, which stood at:"""
        self._logged = (0, 0)
        """Its step and tokens."""

    # --- one step ------------------------------------------------------------------------------

    def step(self, interrupt: Interrupt) -> tuple[Tensor, Tensor]:
        """One optimizer step on the batch that belongs to it; one that the watch holds back changes no weight.

        Returns:
            The loss (mean over all micro-batches of all processes) and the gradient norm before
            clipping, shape ().

        Raises:
            Interrupted: a signal came; nothing of the step has happened.
        """
        step, progress = self.progress.step + 1, self.progress
        loss = retry_on_oom(self, lambda: self._accumulate_gradients(step, interrupt))
        norm = gradient_norm(self.optimizer)
        if self.world.size > 1:  # one number for all: they must decide alike
            loss, norm = self.world.mean(torch.stack([loss, norm])).unbind()
        progress.step = step
        progress.tokens += self.config.batch_size * block_size(step, self.config.data)
        hold = self.watch.judge(step, loss, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        update(self.optimizer, step, norm, clip=self.config.optimizer.grad_clip, hold=hold)
        for average in self.averages:
            if average.due(step):
                average.update(step)
        return loss, norm

    def _accumulate_gradients(self, step: int, interrupt: Interrupt) -> Tensor:
        """Gradients of the whole batch of step `step`, and the mean loss of this process's part, shape ()."""
        config, micro = self.config, self.progress.micro_batch
        _seed_dropout(config.seed, step - 1, self.world.rank)
        parts = self.batches.of(step, step - 1 + self.progress.passed_batches, micro)
        n_micro = config.batch_size // self.world.size // micro
        if self.replays:
            allocate_grads(self.model)
        loss = torch.zeros((), device=self.device)
        for index, part in enumerate(parts):
            interrupt.check()
            windows = to_device(part, self.device)
            with grad_sync(self.forward, index == n_micro - 1):
                with autocast(self.device, self.cast):
                    micro_loss = self.forward(windows[:, :-1], windows[:, 1:]) / n_micro
                micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def learning_rate(self) -> float:
        """Of the last step taken (0 before the first)."""
        config, step = self.config, self.progress.step
        if step == 0:
            return 0.0
        rate = learning_rate(step, config.schedule, config.optimizer.lr, config.train.max_steps)
        return (
            rate
            if config.optimizer.spam is None
            else rate * reset_factor(step, config.optimizer.spam)
        )

    # --- the loop ------------------------------------------------------------------------------

    def train(self, log: MetricsLog, interrupt: Interrupt) -> None:
        """Train to `max_steps`; on a signal save the state and leave."""
        self._evaluated = self.world.on_rank_zero(lambda: log.evaluated_steps)
        started, earlier = time.perf_counter(), self.progress.seconds
        try:
            self._begin(log, interrupt)
            while self.progress.step < self.config.train.max_steps:
                step_started = time.perf_counter()
                loss, norm = self.step(interrupt)
                self._stepping += time.perf_counter() - step_started
                self.progress.seconds = earlier + time.perf_counter() - started
                if self._settle(log):
                    if self._due(self.config.log.every):
                        self._log(log, loss, norm)
                    self._after_step(log, interrupt, fresh=True)
            self.snapshot_writer.finish(log, self.warn, self.progress.step)
            self.state_writer.wait()
        except Interrupted:
            if self._settle(log, now=True):
                self.save_state(log)
            self.state_writer.wait()
            raise
        finally:
            self.batches.close()
            self.snapshot_writer.close()
            self.state_writer.close()

    def _begin(self, log: MetricsLog, interrupt: Interrupt) -> None:
        """Do what an interruption left undone, and save the state that a branch, or a rewind, begins with."""
        rewinds = self.progress.rewinds
        if rewinds and rewinds[-1]["step"] == self.progress.step:
            self._finish_rewind(log)
        begins = self.world.on_rank_zero(lambda: not step_folders(self.run.states))
        if begins and (self.config.may_rewind or self.progress.step > 0):
            self.save_state(log)
        self._logged = (self.progress.step, self.progress.tokens)
        self._after_step(log, interrupt, fresh=False)

    def _log(self, log: MetricsLog, loss: Tensor, norm: Tensor) -> None:
        self.state_writer.check()
        with self.snapshot_writer.telling(log, self.warn, self.progress.step):
            self.snapshot_writer.check()
        step, tokens = self._logged
        stepping = self.world.sums([self._stepping])[0] / self.world.size
        rate = (self.progress.tokens - tokens) / stepping
        flops = self.model.flops_per_token(block_size(self.progress.step, self.config.data))
        self._stepping, self._logged = 0.0, (self.progress.step, self.progress.tokens)
        event = {
            "step": self.progress.step,
            "loss": loss.item(),
            "lr": self.learning_rate(),
            "grad_norm": norm.item(),
            "tokens": self.progress.tokens,
            "tokens_per_second": rate,
            "mfu": flops * rate / self._peak if self._peak else None,
            "seconds": self.progress.seconds,
            "skipped": self.progress.skipped,
            "memory": peak_memory(self.device),
        }
        remaining = self.config.train.max_steps - self.progress.step
        log.training(event, eta=remaining * stepping / (self.progress.step - step))

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step % every == 0 or step == self.config.train.max_steps)

    def _after_step(self, log: MetricsLog, interrupt: Interrupt, *, fresh: bool) -> None:
        """Evaluate and save what is due at this step.

        When a run was interrupted between a step and its evaluation or snapshot, this is called
        again after the resume with `fresh` false, and does only what is missing.
        """
        config, step = self.config, self.progress.step
        if (
            self._due(config.eval.every)
            and step not in self._evaluated
            and len(self.val_tokens) > 1
        ):
            log.evaluation(self.evaluate(interrupt))
            self._evaluated.add(step)
        warm = step > config.schedule.warmup_steps
        if warm and self._due(config.checkpoint.snapshot_every):
            self.snapshot_writer.finish(log, self.warn, step)
            self._save_weights(log, fresh=fresh)
        if fresh and self._due(config.checkpoint.state_every):
            self.save_state(log)

    def _save_weights(self, log: MetricsLog, *, fresh: bool) -> None:
        """The snapshot of this step, and the averages whose turn it is."""
        if fresh or not self._exists(self.run.snapshot(self.progress.step)):
            self.save_snapshot()
        for average in self.averages:
            target = self.run.average(average.config.label, self.progress.step)
            due = average.ready and self._due(self.config.save_every(average.config))
            if due and (fresh or not self._exists(target)):
                self.snapshot_writer.finish(log, self.warn, self.progress.step)
                self.save_average(average)

    def _exists(self, path: Path) -> bool:
        return self.world.on_rank_zero(path.exists)

    # --- what the watch saw --------------------------------------------------------------------

    def _settle(self, log: MetricsLog, *, now: bool = False) -> bool:
        """Learn what the watch saw where the host reads numbers anyway; False when the run went back.

        Raises:
            RunFailed: the policy is to stop, or a rewind is not possible.
        """
        config = self.config
        reading = (config.log.every, config.eval.every, config.checkpoint.snapshot_every)
        due = any(map(self._due, (*reading, config.checkpoint.state_every)))
        if not (now or due or self.device.type == "cpu"):
            return True
        for incident in self.watch.drain():
            log.incident(incident)
            if incident.action == "rewind":
                self._rewind(incident, log)
                return False
            if incident.action == "stop":
                raise RunFailed(
                    f"step {incident.step:,} was not taken: its loss is {incident.loss:g}, its gradient norm "
                    f"{incident.grad_norm:g}",
                    hint="--set train.on_nonfinite=skip passes over such steps, rewind goes back; or go on from a "
                    "saved state at a lower rate: --branch NAME --from STEP --set optimizer.lr=RATE",
                )
            self.progress.skipped += incident.action == "skip"
        return True

    def _rewind(self, incident: SpikeEvent, log: MetricsLog) -> None:
        """Go back to a state before the incident, and from there on past the batches in between."""
        self.state_writer.wait()
        self.restore(
            self.world.on_rank_zero(
                lambda: state_before(self.run, incident, self.progress, self.config, self.warn)
            )
        )
        self.save_state(log, replace=True)
        self.state_writer.wait()  # from here on, a resume knows of it
        self._finish_rewind(log)
        self._stepping, self._logged = 0.0, (self.progress.step, self.progress.tokens)

    def _finish_rewind(self, log: MetricsLog) -> None:
        record = self.progress.rewinds[-1]
        # After it is told, what lies past this step belongs to the new stretch.
        self.world.on_rank_zero(
            lambda: None if log.tells(record) else take_back(self.run, self.progress.step)
        )
        log.rewind(record)
        self._evaluated = self.world.on_rank_zero(lambda: log.evaluated_steps)

    # --- evaluate and save ---------------------------------------------------------------------

    def evaluate(self, interrupt: Interrupt) -> dict[str, Any]:
        """Validation loss of the weights and of each online average, as one event."""
        raw = self._validation_loss(interrupt)
        event: dict[str, Any] = {
            "step": self.progress.step,
            "val/tokens": raw.tokens,
            "val/loss": raw.loss,
        }
        for average in filter(lambda each: each.ready, self.averages):
            with swapped_in(self.model, average.weights()):
                event[f"val/loss/{average.config.label}"] = self._validation_loss(interrupt).loss
        if (
            self.config.log.sample_tokens
            and self.world.is_rank_zero
            and self.parallel in (None, "ddp")
        ):
            event["sample"] = sample(self.model, self.data, self.config.log.sample_tokens)
        return event

    def _validation_loss(self, interrupt: Interrupt) -> LossResult:
        with without_backward(self.model):
            return evaluate(
                self.model,
                self.val_tokens,
                self.token_bytes,
                block_size=self.config.data.block_size,
                batch=self.config.eval.batch,
                device=self.device,
                precision=self.cast,
                world=self.world,
                limit=self.config.eval.tokens,
                on_progress=lambda done, total: interrupt.check(),
            )

    def origin(self) -> Origin:
        """Where in the run the present weights are."""
        return Origin(
            self.progress.step, self.progress.tokens, self.learning_rate(), self.config.name
        )

    def save_snapshot(self) -> None:
        """Begin to commit the weights as a Hugging Face folder."""
        weights = dict(self.model.named_parameters())
        self.snapshot_writer.save(self.run.snapshot(self.progress.step), weights, self.origin())

    def save_average(self, average: OnlineAverage) -> None:
        """Begin to commit an online average as a Hugging Face folder with its provenance."""
        step = self.progress.step
        self.snapshot_writer.save(
            self.run.average(average.config.label, step),
            average.weights(),
            self.origin(),
            residual=average.residual(),
            provenance=average.provenance(step),
        )

    def save_state(self, log: MetricsLog, *, replace: bool = False) -> None:
        """Begin to commit everything that decides how training goes on, once earlier snapshots are durable."""
        self.snapshot_writer.finish(log, self.warn, self.progress.step)
        self.world.on_rank_zero(log.flush)
        self.progress.wandb_id = log.wandb_id
        in_background = self.state_writer.in_background
        tensors = gather(self.model, self.optimizer, self.averages, self.watch, copy=in_background)
        updates = {average.config.label: average.updates for average in self.averages}
        self.state_writer.save(self.progress, updates, tensors, replace=replace)

    def restore(self, state: TrainingCheckpoint) -> None:
        """Go on from a saved state."""
        restore(state, self.model, self.optimizer, self.averages, self.watch)
        self.progress = state.progress


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the draws of a step a function of (seed, step, rank), as its data is: a state holds no RNG."""
    mixed = np.random.SeedSequence([seed, step] + [rank] * (rank > 0)).generate_state(1, np.uint32)
    torch.manual_seed(int(mixed[0]))

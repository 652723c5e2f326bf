"""The training loop: one step, and what is due after it.

forward, backward → `spikes.check` → `optimizer.update` → `average.update` → `metrics.training`
"""

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llmtrain.averaging.online import build_average, swapped_in
from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape
from llmtrain.checkpoints.shared_files import SharedFiles
from llmtrain.config.schedules import block_size, learning_rate
from llmtrain.data.dataloader import DataLoader
from llmtrain.data.shard_check import ShardCheck
from llmtrain.data.token_data import TokenData
from llmtrain.errors import RunFailed, WriteFailed
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.planning.sizes import Architecture
from llmtrain.runtime.contention import ContentionDetector, threads_spin
from llmtrain.runtime.device import peak_flops, peak_memory, to_device
from llmtrain.runtime.signals import Interrupt, Interrupted
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import TrainingCheckpoint, TrainingProgress, TrainingState
from llmtrain.training.checkpoint_writer import CheckpointWriter
from llmtrain.training.metrics import MetricsLog
from llmtrain.training.micro_batch import retry_on_oom
from llmtrain.training.resume import checkpoint_before, set_aside_after
from llmtrain.training.snapshots import SnapshotWriter
from llmtrain.training.spikes import LOWER_RATE_HINT, SpikeDetector, SpikeEvent
from llmtrain.training.time_left import TimeLeft
from llmtrain.training.worker import Worker, allocate_grads, grad_sync

_POLL_SECONDS = 0.1
SAMPLE_PROMPT = 32  # tokens from the beginning of the val split before a sample


class Trainer:
    """A training run: the model, and everything that changes with it."""

    metrics: MetricsLog
    shard_check: ShardCheck
    """Both set by `train`."""

    def __init__(self, worker: Worker, run: RunFolder, data: TokenData) -> None:
        self.worker, self.run, self.data = worker, run, data
        self.config, self.world, self.model = worker.config, worker.world, worker.model
        config, world, model = self.config, self.world, self.model
        build = partial(build_average, model=model, warmup_steps=config.schedule.warmup_steps)
        self.averages = [build(average) for average in config.averages]
        self.spikes = SpikeDetector(config, worker.device)
        self._state = TrainingState(model, worker.optimizer, self.averages, self.spikes)
        self.dataloader = DataLoader(config, data, world)
        self.val_tokens = data.reader("val")
        self.token_bytes = load_tokenizer(data.tokenizer).token_bytes()
        shape = Shape(config.model, config.data.block_size, data.eot)
        shared = SharedFiles(run.tokenizer, shape, data.tokenizer)
        self.snapshot_writer = SnapshotWriter(model, world, shape, shared, self._log_not_saved)
        self.progress = TrainingProgress(data=data.sha256)
        background = world.size > 1 or worker.device.type != "cpu"
        self.checkpoint_writer = CheckpointWriter(run, world, config, background=background)
        self._peak = (peak_flops(worker.device, worker.precision) or 0.0) * world.size
        self._intact = False
        self._contention = ContentionDetector(torch.get_num_threads(), spinning=threads_spin())
        self._time_left = TimeLeft()
        self._restart_timing()

    def step(self, interrupt: Interrupt) -> tuple[Tensor, Tensor]:
        """Train on the next batch; return the mean loss and the gradient norm before clipping.

        If a signal interrupts it, nothing has changed.
        """
        worker, progress, step = self.worker, self.progress, self.progress.step + 1
        loss = retry_on_oom(worker, progress, lambda: self._accumulate_gradients(step, interrupt))
        norm = worker.optimizer.gradient_norm()
        if self.world.size > 1:  # the ranks must decide from the same numbers
            loss, norm = self.world.mean(torch.stack([loss, norm])).unbind()
        progress.step = step
        progress.tokens += self.config.batch_size * block_size(step, self.config.data)
        skip = self.spikes.check(step, loss, norm)
        for group in worker.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        worker.optimizer.update(step, norm, clip=self.config.optimizer.grad_clip, skip=skip)
        for average in self.averages:
            if average.due(step):
                average.update(step)
        return loss, norm

    def _accumulate_gradients(self, step: int, interrupt: Interrupt) -> Tensor:
        """Compute the gradients of a batch; return the mean loss of this process."""
        worker, micro = self.worker, self.progress.micro_batch
        _seed_dropout(self.config.seed, step - 1, self.world.rank)
        parts = self.dataloader.micro_batches(step, step - 1 + self.progress.passed_batches, micro)
        n_micro = worker.sequences // micro
        if worker.uses_cuda_graphs:
            allocate_grads(self.model)
        loss = torch.zeros((), device=worker.device)
        # A micro-batch of minutes is abandoned at once; several processes finish it together.
        alone = worker.device.type == "cpu" and self.world.size == 1
        for index, part in enumerate(parts):
            interrupt.check()
            windows = to_device(part, worker.device)
            stops = interrupt.raising() if alone else nullcontext()
            with stops, grad_sync(worker.forward, index == n_micro - 1):
                loss += worker.backward(worker.forward, windows, n_micro)
        return loss

    def learning_rate(self) -> float:
        """Return the learning rate of the last step; 0 before the first."""
        config, step = self.config, self.progress.step
        if step == 0:
            return 0.0
        rate = learning_rate(step, config.schedule, config.optimizer.lr, config.train.max_steps)
        return rate * self.worker.optimizer.lr_factor(step)

    def train(self, metrics: MetricsLog, interrupt: Interrupt, shard_check: ShardCheck) -> None:
        """Train to `max_steps`; after a signal, save a training checkpoint and raise."""
        self.metrics, self.shard_check = metrics, shard_check
        started, earlier = time.perf_counter(), self.progress.seconds
        try:
            self._begin(interrupt)
            while self.progress.step < self.config.train.max_steps:
                step_started = time.perf_counter()
                loss, norm = self.step(interrupt)
                self._add_time(time.perf_counter() - step_started)
                self.progress.seconds = earlier + time.perf_counter() - started
                if self._handle_spikes():
                    if self._due(self.config.log.every):
                        self._log(loss, norm)
                    paused = time.perf_counter()
                    self._after_step(interrupt, fresh=True)
                    self._paused += time.perf_counter() - paused
            self.snapshot_writer.wait()
            self.checkpoint_writer.wait()
        except Interrupted:
            # Save without waiting for the shard check: a resume waits for it.
            if self._handle_spikes(now=True):
                self.save_checkpoint()
            self.checkpoint_writer.wait()
            raise
        finally:
            self.dataloader.close()
            self.snapshot_writer.close()
            self.checkpoint_writer.close()

    def _begin(self, interrupt: Interrupt) -> None:
        """Finish what an interruption left undone, and save the start of a branch or rewind."""
        if self.progress.step > 0:
            self._wait_for_shard_check(interrupt)
        if self.progress.last_rewind is not None:
            self._finish_rewind()
        is_first = self.world.on_rank_zero(lambda: not step_folders(self.run.states))
        if is_first and (self.config.may_rewind or self.progress.step > 0):
            self.save_checkpoint()
        self._restart_timing()
        self._after_step(interrupt, fresh=False)

    def _after_step(self, interrupt: Interrupt, *, fresh: bool) -> None:
        """Run the evaluations and saves due at this step; after a resume, only the missing ones."""
        config, step = self.config, self.progress.step
        saving = config.checkpoint
        if any(map(self._due, (config.eval.every, saving.snapshot_every, saving.state_every))):
            self._wait_for_shard_check(interrupt)
        to_evaluate = self._due(config.eval.every) and len(self.val_tokens) > 1
        evaluated = self.metrics.evaluated_steps
        if to_evaluate and not self.world.on_rank_zero(lambda: step in evaluated):
            self.metrics.evaluation(self.evaluate(interrupt))
        if step > config.schedule.warmup_steps and self._due(config.checkpoint.snapshot_every):
            self._save_weights(fresh=fresh)
        if fresh and self._due(config.checkpoint.state_every):
            self.save_checkpoint()

    def _wait_for_shard_check(self, interrupt: Interrupt) -> None:
        """Wait until all shards are intact, so that no weights from changed data are committed."""
        while not self._shards_are_intact():
            interrupt.check()
            time.sleep(_POLL_SECONDS)

    def _shards_are_intact(self) -> bool:
        """Return whether every machine has compared all shards; raise its UserError everywhere."""
        if not self._intact:
            running = self.world.sums([self.shard_check.is_running])[0]
            self.world.local_rank_zero_first(self.shard_check.raise_problem)
            self._intact = not running
        return self._intact

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step % every == 0 or step == self.config.train.max_steps)

    def _restart_timing(self) -> None:
        """Measure the speed from this step on."""
        self._stepping, self._logged = 0.0, (self.progress.step, self.progress.tokens)
        self._paused, self._started = 0.0, time.perf_counter()

    def _add_time(self, seconds: float) -> None:
        """Add the time of a step; on a CPU, warn once if other processes slow it down."""
        self._stepping += seconds
        if self.worker.device.type == "cpu":
            tokens = self.config.batch_size * block_size(self.progress.step, self.config.data)
            if warning := self._contention.check(tokens, seconds):
                self.worker.warn(warning)

    def _log(self, loss: Tensor, norm: Tensor) -> None:
        self.checkpoint_writer.check()
        self.snapshot_writer.check()
        self._shards_are_intact()
        progress, (step, tokens) = self.progress, self._logged
        stepping = self.world.sums([self._stepping])[0] / self.world.size
        rate = (progress.tokens - tokens) / stepping
        elapsed = time.perf_counter() - self._started
        self._time_left.add(progress.step - step, elapsed, self._paused)
        architecture = Architecture(self.config.model, self.config.data.block_size)
        flops = architecture.flops_per_token(block_size(progress.step, self.config.data))
        self._restart_timing()
        event = {
            "step": progress.step,
            "loss": loss.item(),
            "lr": self.learning_rate(),
            "grad_norm": norm.item(),
            "tokens": progress.tokens,
            "tokens_per_second": rate,
            "mfu": flops * rate / self._peak if self._peak else None,
            "seconds": progress.seconds,
            "skipped": progress.skipped,
            "memory": peak_memory(self.worker.device),
        }
        remaining = self.config.train.max_steps - progress.step
        self.metrics.training(event, eta=self._time_left.predict(remaining))

    def _handle_spikes(self, *, now: bool = False) -> bool:
        """Log and handle spikes when the host reads numbers; return False after a rewind."""
        config = self.config
        reading = (config.log.every, config.eval.every, config.checkpoint.snapshot_every)
        due = any(map(self._due, (*reading, config.checkpoint.state_every)))
        if not (now or due or self.worker.device.type == "cpu"):
            return True
        for event in self.spikes.drain():
            self.metrics.spike(event)
            if event.action == "rewind":
                self._rewind(event)
                return False
            if event.action == "stop":
                raise RunFailed(
                    f"stopped at step {event.step:,}, update skipped: loss {event.loss:g}, "
                    f"gradient norm {event.grad_norm:g}",
                    hint=f"--set train.on_nonfinite=skip (or rewind), or {LOWER_RATE_HINT}",
                )
            self.progress.skipped += event.action == "skip"
        return True

    def _rewind(self, event: SpikeEvent) -> None:
        """Restore a checkpoint before the event, and skip the batches from there to the event."""
        self.checkpoint_writer.wait()
        arguments = (self.run, event, self.progress, self.config, self.worker.warn)
        self.restore(self.world.on_rank_zero(lambda: checkpoint_before(*arguments)))
        self.save_checkpoint(replace=True)
        self.checkpoint_writer.wait()  # from here on, a resume finishes the rewind
        self._finish_rewind()
        self._restart_timing()

    def _finish_rewind(self) -> None:
        record, step = self.progress.rewinds[-1], self.progress.step
        # Once the rewind is logged, later snapshots belong to the new attempt.
        self.world.on_rank_zero(
            lambda: None if self.metrics.contains(record) else set_aside_after(self.run, step)
        )
        self.metrics.rewind(record)

    def evaluate(self, interrupt: Interrupt) -> dict[str, Any]:
        """Return an event with the validation loss of the weights and of each online average."""
        raw = self._validation_loss(interrupt)
        event: dict[str, Any] = {"step": self.progress.step}
        event |= {"val/tokens": raw.tokens, "val/loss": raw.loss}
        for average in filter(lambda each: each.ready, self.averages):
            with swapped_in(self.model, average.weights()):
                event[f"val/loss/{average.config.label}"] = self._validation_loss(interrupt).loss
        if self.config.log.sample_tokens and self.world.is_rank_zero and not self.worker.is_sharded:
            event["sample"] = sample(self.model, self.data, self.config.log.sample_tokens)
        return event

    def _validation_loss(self, interrupt: Interrupt) -> LossResult:
        try:
            return evaluate(
                self.model,
                self.val_tokens,
                self.token_bytes,
                block_size=self.config.data.block_size,
                batch=self.config.eval.batch,
                device=self.worker.device,
                precision=self.worker.autocast_precision,
                world=self.world,
                limit=self.config.eval.tokens,
                on_progress=lambda done, total: interrupt.check(),
            )
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()  # free the gathered weights, which no backward pass does here

    def _save_weights(self, *, fresh: bool) -> None:
        """Save the snapshot of this step and the averages that are due."""
        step = self.progress.step
        if fresh or not self.world.on_rank_zero(self.run.snapshot(step).exists):
            self.save_snapshot()
        for average in self.averages:
            target = self.run.average(average.config.label, step)
            due = average.ready and self._due(self.config.save_every(average.config))
            if due and (fresh or not self.world.on_rank_zero(target.exists)):
                weights, origin = average.weights(), self._origin()
                residual, provenance = average.residual(), average.provenance(step)
                self.snapshot_writer.save(target, weights, origin, residual, provenance)

    def save_snapshot(self) -> None:
        """Start to write the weights as a Hugging Face folder."""
        weights = dict(self.model.named_parameters())
        self.snapshot_writer.save(self.run.snapshot(self.progress.step), weights, self._origin())

    def _origin(self) -> Origin:
        progress = self.progress
        return Origin(progress.step, progress.tokens, self.learning_rate(), self.config.name)

    def _log_not_saved(self, error: WriteFailed) -> None:
        """Log weights that could not be written, at the current step, and continue without them."""
        self.metrics.write({"step": self.progress.step, "not_saved": str(error)}, "incident")
        self.worker.warn(f"{error}. Training continues; averages that need it will fail")

    def save_checkpoint(self, *, replace: bool = False) -> None:
        """Start to save a training checkpoint once earlier snapshots are durable."""
        self.snapshot_writer.wait()
        self.world.on_rank_zero(self.metrics.flush)
        self.progress.wandb_id = self.metrics.wandb_id
        tensors = self._state.collect(copy=self.checkpoint_writer.in_background)
        updates = {average.config.label: average.updates for average in self.averages}
        self.checkpoint_writer.save(self.progress, updates, tensors, replace=replace)

    def restore(self, checkpoint: TrainingCheckpoint) -> None:
        """Continue from a training checkpoint."""
        self._state.restore(checkpoint)
        self.progress = checkpoint.progress


@torch.no_grad()
def sample(model: GPT, data: TokenData, tokens: int) -> str:
    """Return the beginning of the val split, `→`, and `tokens` tokens generated greedily."""
    tokenizer, reader = load_tokenizer(data.tokenizer), data.reader("val")
    prompt = reader.read(0, min(SAMPLE_PROMPT, len(reader), model.block_size))
    ids = torch.tensor([prompt.tolist()], device=model.transformer.wte.weight.device)
    training = model.training
    model.eval()
    for _ in range(tokens):
        logits_V = model.logits(ids[:, -model.block_size :])[0, -1, : tokenizer.vocab_size]
        ids = torch.cat([ids, logits_V.argmax().view(1, 1)], dim=1)
    model.train(training)
    text = ids[0].tolist()
    return f"{tokenizer.decode(text[: len(prompt)])} → {tokenizer.decode(text[len(prompt) :])}"


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed a step as a function of (seed, step, rank), so checkpoints need no RNG state."""
    mixed = np.random.SeedSequence([seed, step] + [rank] * (rank > 0)).generate_state(1, np.uint32)
    torch.manual_seed(int(mixed[0]))

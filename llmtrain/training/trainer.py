"""The training loop, and only the loop: what one step does, and what is due after it.

Why a class: a step, an evaluation and a save all act on the same model, optimizer and averages, and
a resumed run must find every one of them as it was. Which run it is, and whether it may be resumed,
is decided in `run.py`.

    trainer = Trainer(config, run, data, device, precision, warn); trainer.train(log, interrupt)
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtrain.averaging.checkpoints import RESIDUAL_FILE
from llmtrain.averaging.online import OnlineAverage, build_average, swapped_in
from llmtrain.checkpoint import Origin, Shape, bytes_of, save_tensors, save_weights
from llmtrain.config import RunConfig
from llmtrain.config_averages import PowerEmaConfig, RunningMeanConfig
from llmtrain.data.sampler import Sampler, batch
from llmtrain.data.shards import TokenData
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import RunFailed, WriteFailed
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.files import RunFolder, staged_folder
from llmtrain.hardware import Precision, autocast, peak_flops
from llmtrain.interrupt import Interrupt, Interrupted
from llmtrain.model import GPT
from llmtrain.training.metrics import MetricsLog
from llmtrain.training.optim import Spam, build_optimizer
from llmtrain.training.rewind import state_before, take_back
from llmtrain.training.schedules import block_size, learning_rate, reset_factor
from llmtrain.training.stability import Incident, Watch
from llmtrain.training.state import Progress, State, gather, restore, save_state


class Trainer:
    """Everything that changes while a model is trained."""

    def __init__(
        self,
        config: RunConfig,
        run: RunFolder,
        data: TokenData,
        device: torch.device,
        precision: Precision,
        warn: Callable[[str], None],
    ) -> None:
        """Build the model and what trains it, at step 0.

        Args:
            config: the resolved configuration.
            run: where to save.
            data: the token shards.
            device: where to train.
            precision: of matrix products.
            warn: tells what the user should know.
        """
        self.warn = warn
        self.config, self.run, self.data = config, run, data
        self.device, self.precision = device, precision
        self.model = GPT(config.model, config.data.block_size, config.seed).to(device)
        self.forward: nn.Module = self.model
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.averages = [
            build_average(each, self.model, warmup_steps=config.schedule.warmup_steps)
            for each in config.averages
        ]
        self.watch = Watch(config, device)
        self.train_tokens = data.reader("train")
        self.val_tokens = data.reader("val")
        self.token_bytes = load_tokenizer(data.tokenizer).token_bytes()
        self.sampler = Sampler(len(self.train_tokens), config.data.block_size, config.batch_size, config.seed)
        self.shape = Shape(config.model, config.data.block_size, data.eot)
        self.progress = Progress(data=data.sha256)
        self._peak = peak_flops(device, precision)
        self._evaluated: set[int] = set()
        self._stepping = 0.0
        """Seconds in steps since the last line of the log, which stood at:"""
        self._logged = (0, 0)
        """Its step and tokens."""

    # --- one step ------------------------------------------------------------------------------

    def step(self, interrupt: Interrupt) -> tuple[Tensor, Tensor]:
        """One optimizer step on the batch that belongs to it; one that the watch holds back changes no weight.

        Returns:
            The loss (mean over all micro-batches) and the gradient norm before clipping, shape ().

        Raises:
            Interrupted: a signal came; nothing of the step has happened.
        """
        step, progress = self.progress.step + 1, self.progress
        loss = self._accumulate_gradients(step, interrupt)
        norm = self._clip_gradients(step)
        progress.step = step
        progress.tokens += self.config.batch_size * block_size(step, self.config.data)
        hold = self.watch.judge(step, loss, norm)
        # What fused AdamW itself looks at, on the device: where it is 1, nothing is changed.
        self.optimizer.found_inf = hold.float()  # type: ignore[attr-defined]  # optional in torch
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            if average.due(step):
                average.update(step)
        return loss, norm

    def _accumulate_gradients(self, step: int, interrupt: Interrupt) -> Tensor:
        """Gradients of the whole batch of step `step`, and its mean loss, shape ()."""
        config, micro = self.config, self.config.train.micro_batch
        _seed_dropout(config.seed, step - 1)
        rows = self.sampler.rows(step - 1 + self.progress.passed_batches)
        length = block_size(step, config.data)
        n_micro = len(rows) // micro
        loss = torch.zeros((), device=self.device)
        for index in range(n_micro):
            interrupt.check()
            some = rows[index * micro : (index + 1) * micro]
            windows = torch.from_numpy(batch(self.train_tokens, some, length))
            windows = windows.to(self.device)
            with autocast(self.device, self.precision):
                micro_loss = self.forward(windows[:, :-1], windows[:, 1:]) / n_micro
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def _clip_gradients(self, step: int) -> Tensor:
        """Clip by the global norm, after SPAM's clipping by element; the norm before both, shape ()."""
        clip = self.config.optimizer.grad_clip or math.inf
        parameters = list(self.model.parameters())
        if not isinstance(self.optimizer, Spam):
            return torch.nn.utils.clip_grad_norm_(parameters, clip)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.optimizer.tame(step)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        return norm

    def learning_rate(self) -> float:
        """Of the last step taken (0 before the first)."""
        config, step = self.config, self.progress.step
        if step == 0:
            return 0.0
        rate = learning_rate(step, config.schedule, config.optimizer.lr, config.train.max_steps)
        return rate if config.optimizer.spam is None else rate * reset_factor(step, config.optimizer.spam)

    # --- the loop ------------------------------------------------------------------------------

    def train(self, log: MetricsLog, interrupt: Interrupt) -> None:
        """Train to `max_steps`; on a signal, or when nobody reads the log, save the state and leave."""
        self._evaluated = log.evaluated_steps
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
        except (Interrupted, BrokenPipeError):
            if self._settle(log, now=True):
                self.save_state(log)
            raise

    def _begin(self, log: MetricsLog, interrupt: Interrupt) -> None:
        """Do what an interruption left undone, and save what a rewind in the first steps goes back to."""
        rewinds = self.progress.rewinds
        if rewinds and rewinds[-1]["step"] == self.progress.step:
            self._finish_rewind(log)
        if self.config.rewinds and self.progress.step == 0:
            self.save_state(log)
        self._logged = (self.progress.step, self.progress.tokens)
        self._after_step(log, interrupt, fresh=False)

    def _log(self, log: MetricsLog, loss: Tensor, norm: Tensor) -> None:
        step, tokens = self._logged
        seconds_a_step = self._stepping / (self.progress.step - step)
        rate = (self.progress.tokens - tokens) / self._stepping
        self._stepping, self._logged = 0.0, (self.progress.step, self.progress.tokens)
        event = {
            "step": self.progress.step,
            "loss": loss.item(),
            "lr": self.learning_rate(),
            "grad_norm": norm.item(),
            "tokens": self.progress.tokens,
            "tokens_per_second": rate,
            "mfu": self._flops_per_token() * rate / self._peak if self._peak else None,
            "seconds": self.progress.seconds,
            "skipped": self.progress.skipped,
        }
        remaining = self.config.train.max_steps - self.progress.step
        log.training(event, eta=remaining * seconds_a_step)

    def _flops_per_token(self) -> int:
        return self.model.flops_per_token(block_size(self.progress.step, self.config.data))

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step > 0 and (step % every == 0 or step == self.config.train.max_steps)

    def _after_step(self, log: MetricsLog, interrupt: Interrupt, *, fresh: bool) -> None:
        """Evaluate and save what is due at this step.

        When a run was interrupted between a step and its evaluation or snapshot, this is called
        again after the resume with `fresh` false, and does only what is missing.
        """
        config, step = self.config, self.progress.step
        if self._due(config.eval.every) and step not in self._evaluated and len(self.val_tokens) > 1:
            log.evaluation(self.evaluate(interrupt))
            self._evaluated.add(step)
        warm = step > config.schedule.warmup_steps
        if warm and self._due(config.checkpoint.snapshot_every):
            try:
                self._save_weights(fresh=fresh)
            except WriteFailed as error:
                log.not_saved(step, error)
                self.warn(f"{error}. Training goes on without it: an average that needs it will say so")
        if fresh and self._due(config.checkpoint.state_every):
            self.save_state(log)

    def _save_weights(self, *, fresh: bool) -> None:
        """The snapshot of this step, and the averages whose turn it is."""
        step = self.progress.step
        if fresh or not self.run.snapshot(step).exists():
            self.save_snapshot()
        for average in self.averages:
            saved = self.run.average(average.config.label, step).exists()
            if average.ready and self._due(self._save_every(average)) and (fresh or not saved):
                self.save_average(average)

    def _save_every(self, average: OnlineAverage) -> int:
        snapshot, state = self.config.checkpoint.snapshot_every, self.config.checkpoint.state_every
        if average.config.save_every is not None:
            return average.config.save_every
        if isinstance(average.config, RunningMeanConfig | PowerEmaConfig):
            return snapshot  # others are made from these, at the steps of snapshots
        return math.ceil(state / snapshot) * snapshot

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

    def _rewind(self, incident: Incident, log: MetricsLog) -> None:
        """Go back to a state before the incident, and from there on past the batches in between."""
        self.restore(state_before(self.run, incident, self.progress, self.config, self.warn))
        self.save_state(log, replace=True)  # from here on, a resume knows of it
        self._finish_rewind(log)
        self._stepping, self._logged = 0.0, (self.progress.step, self.progress.tokens)

    def _finish_rewind(self, log: MetricsLog) -> None:
        take_back(self.run, self.progress.step)
        log.rewind(self.progress.rewinds[-1])
        self._evaluated = log.evaluated_steps

    # --- evaluate and save ---------------------------------------------------------------------

    def evaluate(self, interrupt: Interrupt) -> dict[str, Any]:
        """Validation loss of the weights and of each online average, as one event."""
        raw = self._validation_loss(interrupt)
        event = {"step": self.progress.step, "val/tokens": raw.tokens, "val/loss": raw.loss}
        for average in filter(lambda each: each.ready, self.averages):
            with swapped_in(self.model, average.weights()):
                event[f"val/loss/{average.config.label}"] = self._validation_loss(interrupt).loss
        return event

    def _validation_loss(self, interrupt: Interrupt) -> LossResult:
        return evaluate(
            self.model,
            self.val_tokens,
            self.token_bytes,
            block_size=self.config.data.block_size,
            batch=self.config.eval.batch,
            device=self.device,
            precision=self.precision,
            limit=self.config.eval.tokens,
            on_progress=lambda done, total: interrupt.check(),
        )

    def origin(self) -> Origin:
        """Where in the run the present weights are."""
        return Origin(self.progress.step, self.progress.tokens, self.learning_rate(), self.config.name)

    def save_snapshot(self) -> None:
        """Commit the weights as a Hugging Face folder."""
        weights, target = self.model.state_dict(), self.run.snapshot(self.progress.step)
        with staged_folder(target, replace=True, needed=bytes_of(weights)) as folder:
            save_weights(folder, weights, self.shape, self.origin())

    def save_average(self, average: OnlineAverage) -> None:
        """Commit an online average as a Hugging Face folder with its provenance."""
        step, weights, residual = self.progress.step, average.weights(), average.residual()
        target = self.run.average(average.config.label, step)
        with staged_folder(
            target, replace=True, needed=bytes_of(weights) + bytes_of(residual or {})
        ) as folder:
            save_weights(folder, weights, self.shape, self.origin(), average.provenance(step))
            if residual is not None:
                save_tensors(folder / RESIDUAL_FILE, residual, self.shape)

    def save_state(self, log: MetricsLog, *, replace: bool = False) -> None:
        """Commit everything that decides how training goes on."""
        log.flush()
        self.progress.wandb_id = log.wandb_id
        tensors = gather(self.model, self.optimizer, self.averages, self.watch)
        updates = {average.config.label: average.updates for average in self.averages}
        state = State(self.progress, tensors, updates)
        save_state(self.run, state, keep=self.config.checkpoint.keep_states, replace=replace)

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        restore(state, self.model, self.optimizer, self.averages, self.watch)
        self.progress = state.progress


def _seed_dropout(seed: int, step: int) -> None:
    """Make the draws of a step a function of (seed, step), as its data is: a state holds no RNG."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)
    torch.manual_seed(int(mixed[0]))

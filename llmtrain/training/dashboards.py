"""Weights & Biases and TensorBoard: both get the events of `metrics.jsonl` and never stop training.

A dashboard that fails is reported once and then disabled.
"""

from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from llmtrain.config.schema import RunConfig, flatten
from llmtrain.errors import UserError, mask_credentials
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.checkpoint import TrainingProgress

Event = Mapping[str, float | int | str | None]
Warn = Callable[[str], None]


class Dashboards:
    """The dashboards that the configuration selects, in the run's folder."""

    def __init__(
        self, run: RunFolder, config: RunConfig, start: TrainingProgress, warn: Warn
    ) -> None:
        self._run, self._warn = run, warn
        self._boards: list[_Wandb | _TensorBoard] = []
        self.wandb_id = start.wandb_id
        """Id of the W&B run, also while W&B is disabled."""
        if config.log.tensorboard:
            self._boards.append(_TensorBoard(run.path / "tensorboard", start.step))
        if config.log.wandb.mode != "disabled":
            try:
                self._boards.append(board := _Wandb(run.path, config, start.wandb_id, warn))
                self.wandb_id = board.id
            except Exception as error:  # W&B raises any type of error
                warn(f"cannot start W&B: {_first_line(error)}; training continues without it")

    def log(self, event: Event, group: str) -> None:
        """Log an event; names without a `/` get the prefix `group/`."""
        step = int(event["step"] or 0)
        named = {
            key if "/" in key else f"{group}/{key}": value
            for key, value in event.items()
            if key != "step" and value is not None
        }
        numbers = {key: float(value) for key, value in named.items() if not isinstance(value, str)}
        texts = {key: value for key, value in named.items() if isinstance(value, str)}
        self._each(lambda board: board.log(step, numbers, texts))

    def rewind(self, step: int) -> None:
        """Remove the points after `step` from TensorBoard; W&B shows both attempts."""
        self._each(lambda board: board.rewind(step))

    def close(self, *, finished: bool) -> None:
        """Close the dashboards; add the report of a finished run."""
        if finished and self._boards:
            from llmtrain.evaluation.report.page import write_report

            try:
                page = write_report([self._run], self._run.report).page
                self._each(lambda board: board.add_report(page))
            except Exception as error:  # the training itself has succeeded
                self._warn(f"cannot write the report: {_first_line(error)}")
        self._each(lambda board: board.close(finished=finished))

    def _each(self, action: Callable[["_Wandb | _TensorBoard"], None]) -> None:
        for board in list(self._boards):
            try:
                action(board)
            except Exception as error:  # libraries raise any type of error
                self._boards.remove(board)
                self._warn(f"{board.name} failed ({error}); training continues without it")


class _Wandb:
    """A W&B run, new or resumed; offline, without a prompt, if W&B cannot be reached."""

    name = "W&B"

    def __init__(self, folder: Path, config: RunConfig, run_id: str | None, warn: Warn) -> None:
        import wandb  # takes a third of a second

        self._wandb, mode = wandb, config.log.wandb.mode
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise wandb.errors.UsageError("no account is configured; run wandb login")
            self._run = self._start(folder, config, run_id, mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            warn(f"cannot reach W&B: {_first_line(error)}; recording offline for `wandb sync`")
            self._run = self._start(folder, config, run_id, "offline")
        # W&B's own step must increase: after a resume or rewind it would drop repeated steps.
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id

    def _start(self, folder: Path, config: RunConfig, run_id: str | None, mode: Any) -> Any:
        return self._wandb.init(
            project=config.log.wandb.project,
            name=folder.resolve().name,
            mode=mode,
            dir=str(folder),
            id=run_id,
            resume="allow" if run_id is not None else None,
            config={key: _masked(value) for key, value in flatten(config).items()},
            settings=self._wandb.Settings(silent=True),
        )

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        html = self._wandb.Html
        pages = {key: html(_preformat(text), inject=False) for key, text in texts.items()}
        self._run.log({"step": step, **numbers, **pages})

    def rewind(self, step: int) -> None:
        """Do nothing: W&B keeps both attempts."""

    def add_report(self, page: Path) -> None:
        artifact = self._wandb.Artifact(f"report-{self.id}", type="report")
        artifact.add_file(str(page))
        self._run.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"log.tensorboard is true, but TensorBoard is not installed: {error}",
                hint="pip install 'llmtrain[tensorboard]', or --set log.tensorboard=false",
            ) from None
        self._open = partial(SummaryWriter, str(folder))
        self._writer = self._open(purge_step=resumed_step + 1)

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        for key, text in texts.items():
            self._writer.add_text(key, _preformat(text), step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def add_report(self, page: Path) -> None:
        from matplotlib.image import imread

        figure = page.with_name("loss.png")
        if figure.exists():  # missing if nothing was evaluated
            self._writer.add_image("report/loss", imread(figure)[..., :3], dataformats="HWC")

    def close(self, *, finished: bool) -> None:
        self._writer.close()


def _masked(value: object) -> object:
    return mask_credentials(value) if isinstance(value, str) else value


def _preformat(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

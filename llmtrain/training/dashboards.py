"""Weights & Biases and TensorBoard: told what `metrics.jsonl` is told, and never a reason to stop training.

Why so careful: a run of a week must not wait for an answer at a prompt, nor end because a service that
draws its curves has gone away. What fails is said once, and training goes on without it.

    boards = Dashboards(run, config, resumed_step=0, wandb_id=None, warn=print); boards.log(event, "train")
"""

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from llmtrain.config.schema import RunConfig, flatten
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RunFolder

Event = Mapping[str, float | int | str | None]


class Dashboards:
    """Those that the configuration asks for."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        *,
        resumed_step: int,
        wandb_id: str | None,
        warn: Callable[[str], None],
    ) -> None:
        """Open them.

        Args:
            run: whose they are; TensorBoard's files and W&B's go into its folder.
            config: which there are, and what W&B is told.
            resumed_step: what TensorBoard was told after this step is taken back; 0 for a new run.
            wandb_id: the id of the W&B run to go on with.
            warn: tells of a dashboard that fails.

        Raises:
            UserError: TensorBoard is asked for and not installed.
        """
        self._run, self._warn = run, warn
        self._boards: list[_Wandb | _TensorBoard] = []
        self.wandb_id: str | None = wandb_id
        """Id of the W&B run, kept in the training state, also while there is none to tell."""
        if config.log.tensorboard:
            self._boards.append(_TensorBoard(run.path / "tensorboard", resumed_step))
        started = _start_wandb(run.path, config, wandb_id, warn)
        if started is not None:
            self._boards.append(_Wandb(started))
            self.wandb_id = started.id

    def log(self, event: Event, group: str) -> None:
        """Tell an event; its numbers without a `/` in their names are told under `group/`."""
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
        """Training goes on from `step`: TensorBoard takes back what it was told after it; W&B shows both."""
        self._each(lambda board: board.rewind(step) if isinstance(board, _TensorBoard) else None)

    def close(self, *, finished: bool) -> None:
        """Close them; of a run that has `finished` W&B keeps the report, TensorBoard its figure of the losses."""
        if finished and self._boards and (page := self._report()) is not None:
            self._each(lambda board: board.keep(page))
        self._each(lambda board: board.close(finished=finished))

    def _report(self) -> Path | None:
        from llmtrain.evaluation.report.page import write_report

        try:
            return write_report([self._run], self._run.report).page
        except Exception as error:  # a run that was trained to its end has not failed
            names = " and ".join(board.name for board in self._boards)
            self._warn(f"{names} gets no report: {_first_line(error)}")
            return None

    def _each(self, tell: Callable[["_Wandb | _TensorBoard"], None]) -> None:
        for board in list(self._boards):
            try:
                tell(board)
            except Exception as error:  # of any library's kind: whatever it is, training goes on
                self._boards.remove(board)
                self._warn(
                    f"{board.name} fails ({error}): training goes on, and tells it nothing more"
                )


class _Wandb:
    name = "W&B"

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        import wandb

        pages = {
            key: wandb.Html(f"<pre>{escape(text)}</pre>", inject=False)
            for key, text in texts.items()
        }
        self._run.log({"step": step, **numbers, **pages})

    def keep(self, page: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        artifact.add_file(str(page))
        self._run.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._folder = folder
        self._open(resumed_step)

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"log.tensorboard is true and TensorBoard is not installed ({error})",
                hint="pip install 'llmtrain[tensorboard]', or --set log.tensorboard=false",
            ) from None
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        for key, text in texts.items():
            self._writer.add_text(key, f"<pre>{escape(text)}</pre>", step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def keep(self, page: Path) -> None:
        from matplotlib.image import imread

        figure = page.with_name("loss.png")
        if figure.exists():  # there is none where nothing was validated
            self._writer.add_image("report/loss", imread(figure)[..., :3], dataformats="HWC")

    def close(self, *, finished: bool) -> None:
        self._writer.close()


def _start_wandb(
    folder: Path, config: RunConfig, run_id: str | None, warn: Callable[[str], None]
) -> Any:
    """A W&B run, or None when the config wants none or there cannot be one."""
    if config.log.wandb.mode == "disabled":
        return None
    try:
        return _wandb_run(folder, config, run_id, warn)
    except (
        Exception
    ) as error:  # of its server process, its settings, its files: training begins all the same
        warn(f"W&B cannot be started ({_first_line(error)}): training goes on without it")
        return None


def _wandb_run(
    folder: Path, config: RunConfig, run_id: str | None, warn: Callable[[str], None]
) -> Any:
    """A new W&B run, or that of `run_id` again; offline where it must. The import alone takes a third of a second."""
    import wandb

    def start(mode: str) -> Any:
        run = wandb.init(
            project=config.log.wandb.project,
            name=config.name,
            mode=mode,  # type: ignore[arg-type]  # one of W&B's, by the config's type
            dir=str(folder),
            id=run_id,
            resume="allow" if run_id is not None else None,
            config=flatten(config),
            settings=wandb.Settings(silent=True),
        )
        # Its own count of steps must rise: after a rewind, or a resume, it would drop what is told again.
        run.define_metric("*", step_metric="step")
        return run

    if config.log.wandb.mode == "offline":
        return start("offline")
    try:
        if not wandb.login(prompt=False):
            raise wandb.errors.UsageError("no account is known here: wandb login")
        return start("online")
    except wandb.Error as error:
        warn(
            f"W&B cannot be reached ({_first_line(error)}): the run is kept offline, and `wandb sync` sends it later"
        )
        return start("offline")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""One dict an event, fanned out to the terminal, `metrics.jsonl` and dashboards.

Why one dict: the number on the screen, in the file and in the dashboard is the same number. The
file has no gap and no line twice after a resume: what lies past the resumed step is cut off.

    log = MetricsLog(run.metrics, config, resumed_step=0, say=print); log.training(event)
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from llmtrain.config.schema import RunConfig
from llmtrain.errors import WriteFailed
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.dashboards import Dashboards, Event
from llmtrain.training.spikes import SpikeEvent

HEADER = f"{'step':>9}  {'loss':>8}  {'lr':>9}  {'grad norm':>9}  {'tokens/s':>9}  {'MFU':>6}  {'ETA':>8}"


def format_duration(seconds: float) -> str:
    """`1:02:03`, `2:03` or `2d 01:02`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_training(event: Event, eta: float) -> str:
    """One line under `HEADER`; `eta` in seconds."""
    mfu = f"{event['mfu']:.1%}" if event["mfu"] is not None else "n/a"
    return (
        f"{event['step']:>9,}  {event['loss']:>8.4f}  {event['lr']:>9.3e}  {event['grad_norm']:>9.3f}  "
        f"{event['tokens_per_second']:>9,.0f}  {mfu:>6}  {format_duration(eta):>8}"
    )


def format_evaluation(event: Event) -> str:
    """`     1,000  validation 3.2100  ema-0.9 3.1900`."""
    losses = {
        k.removeprefix("val/loss").lstrip("/"): v
        for k, v in event.items()
        if k.startswith("val/loss")
    }
    cells = [f"{label or 'validation'} {loss:.4f}" for label, loss in losses.items()]
    return f"{event['step']:>9,}  " + "  ".join(cells)


class MetricsLog:
    """Writes events; use as a context manager so that dashboards are closed however the run ends."""

    def __init__(
        self,
        path: Path | None,
        config: RunConfig,
        *,
        resumed_step: int,
        wandb_id: str | None,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Open the log of a run.

        Args:
            path: the run's `metrics.jsonl`; None: tell nobody, for a process that is not the first.
            config: which dashboards there are, and what they are told.
            resumed_step: events after this step are removed; 0 for a new run.
            wandb_id: the id of the W&B run to go on with.
            say: prints one line.
            warn: tells of a dashboard that fails.
        """
        self.evaluated_steps: set[int] = set()
        """Steps whose evaluation stands in the file already."""
        self._lines = 0
        self._path = path
        self._boards: Dashboards | None = None
        if path is None:
            self._say: Callable[[str], None] = lambda line: None
            return
        self._say = say
        kept = [event for event in read_events(path) if event["step"] <= resumed_step]
        self.evaluated_steps = {int(event["step"]) for event in kept if "val/loss" in event}
        write_atomically(path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = path.open("a", encoding="utf-8")
        self._boards = Dashboards(
            RunFolder(path.parent), config, resumed_step=resumed_step, wandb_id=wandb_id, warn=warn
        )

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run, kept in the training state."""
        return self._boards.wandb_id if self._boards is not None else None

    def training(self, event: Event, eta: float) -> None:
        """Log one step; `eta` in seconds is for the terminal only."""
        self._write(
            event, "train"
        )  # first: where nobody reads what is said, the state of this step is saved
        if self._lines % 25 == 0:
            self._say(HEADER)
        self._lines += 1
        self._say(format_training(event, eta))

    def evaluation(self, event: Event) -> None:
        """Log the losses of one evaluation."""
        self._write(event, "val")
        self._say(format_evaluation(event))

    def incident(self, incident: SpikeEvent) -> None:
        """Log a spike or a number that is not finite."""
        self._write(incident.event(), "incident")
        self._say(str(incident))

    def not_saved(self, step: int, error: WriteFailed) -> None:
        """Log that a snapshot or an average, which the error names, found no place on the disk."""
        self._write({"step": step, "not_saved": str(error)}, "incident")

    def tells(self, record: Event) -> bool:
        """Whether the file holds this event already."""
        return self._path is not None and record in read_events(self._path)

    def rewind(self, record: Event) -> None:
        """Log that the run went back; the events that it takes back go to another file, and to no average.

        Nothing happens where the file tells it already: a resumed run calls this again.
        """
        if self._path is None or self._boards is None:
            return
        step = int(record["step"] or 0)
        if self.tells(record):
            return
        events = read_events(self._path)
        taken_back = [event for event in events if event["step"] > step]
        with RunFolder(self._path.parent).rewound_metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(event) + "\n" for event in taken_back)
        self._file.close()
        kept = [*(event for event in events if event["step"] <= step), record]
        write_atomically(self._path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self.evaluated_steps = {each for each in self.evaluated_steps if each <= step}
        self._boards.rewind(step)
        self._say(f"{step:>9,}  back from step {record['rewound_from']:,}, past the batches since")

    def flush(self) -> None:
        """Make durable what was written; called before a state that refers to it is committed."""
        if self._path is None:
            return
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def _write(self, event: Event, group: str) -> None:
        """To the file, and to the dashboards under the name of `group`."""
        if self._path is None or self._boards is None:
            return
        # JSON has no word for a number that is not finite.
        event = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in event.items()
        }
        with disk_errors(self._path):
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
        self._boards.log(event, group)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError) if kind else disk_errors(self._path):
                self._file.close()  # after a failed write it fails again, and must not hide what was said of that
        if self._boards is not None:
            self._boards.close(finished=kind is None)

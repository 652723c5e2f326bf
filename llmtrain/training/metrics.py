"""Events of a run, written to the terminal, `metrics.jsonl` and dashboards.

After a resume or a rewind, the file contains every step once: later events are removed.
"""

import contextlib
import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from llmtrain.config.schema import RunConfig
from llmtrain.storage.commit import write_atomically, writing
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.file_systems import fsync
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RunFolder
from llmtrain.storage.safe_files import open_own
from llmtrain.training.checkpoint import TrainingProgress
from llmtrain.training.dashboards import Dashboards, Event
from llmtrain.training.spikes import SpikeEvent
from llmtrain.training.worker import Log

HEADER = "     step      loss         lr  grad norm   tokens/s     MFU       ETA"


def format_training(event: Event, eta: float) -> str:
    """Return a line for the columns of `HEADER`; `eta` is in seconds."""
    mfu = f"{event['mfu']:.1%}" if event["mfu"] is not None else "n/a"
    return (
        f"{event['step']:>9,}  {event['loss']:>8.4f}  {event['lr']:>9.3e}  "
        f"{event['grad_norm']:>9.3f}  {event['tokens_per_second']:>9,.0f}  {mfu:>6}  "
        f"{_format_eta(eta):>8}"
    )


def _format_eta(seconds: float) -> str:
    return "> 999 d" if seconds >= 999 * 86_400 else str(timedelta(seconds=round(seconds)))


def format_evaluation(event: Event) -> str:
    """Return `     1,000  validation 3.2100  ema-0.9 3.1900`."""
    losses = {k.removeprefix("val/loss"): v for k, v in event.items() if k.startswith("val/loss")}
    cells = [f"{label.lstrip('/') or 'validation'} {loss:.4f}" for label, loss in losses.items()]
    return f"{event['step']:>9,}  " + "  ".join(cells)


def _append(path: Path) -> IO[str]:
    descriptor = open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return os.fdopen(descriptor, "a", encoding="utf-8")


class MetricsLog:
    """Writes events; a context manager that closes the dashboards however the run ends."""

    def __init__(
        self, path: Path | None, config: RunConfig, start: TrainingProgress, *, log: Log, warn: Log
    ) -> None:
        """Open `metrics.jsonl` and remove the events after `start`; without a path, do nothing.

        The events of an interrupted rewind stay until `rewind` is called again.
        """
        self.evaluated_steps: set[int] = set()
        self._lines, self._path, self._log = 0, path, log
        if path is None:
            return
        events, rewind = read_events(path), start.last_rewind
        if rewind is None or rewind in events:  # otherwise `rewind` moves the later events
            events = [each for each in events if each["step"] <= start.step]
        self._rewrite(path, events)
        self._boards = Dashboards(RunFolder(path.parent), config, start, warn)

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run, saved in training checkpoints."""
        return self._boards.wandb_id if self._path is not None else None

    def training(self, event: Event, eta: float) -> None:
        """Log a training step; `eta`, in seconds, appears on the terminal only."""
        # Write first: if the output pipe is closed, the checkpoint of this step is saved.
        self.write(event, "train")
        if self._lines % 25 == 0:
            self._log(HEADER)
        self._lines += 1
        self._log(format_training(event, eta))

    def evaluation(self, event: Event) -> None:
        """Log the losses of an evaluation."""
        self.write(event, "val")
        self.evaluated_steps.add(int(event["step"] or 0))
        self._log(format_evaluation(event))

    def spike(self, event: SpikeEvent) -> None:
        """Log a spike or a non-finite number."""
        self.write(event.event(), "incident")
        self._log(str(event))

    def contains(self, event: Event) -> bool:
        """On rank 0, return whether the file contains this event."""
        assert self._path is not None
        return event in read_events(self._path)

    def rewind(self, record: Event) -> None:
        """Log a rewind once, and move the events after its step to `metrics-rewound.jsonl`.

        Each moved event contains the record, so an interrupted move can be repeated.
        """
        if self._path is None or self.contains(record):
            return
        step, events = int(record["step"] or 0), read_events(self._path)
        later = [each | {"rewind": dict(record)} for each in events if each["step"] > step]
        target = RunFolder(self._path.parent).rewound_metrics
        earlier = read_events(target)
        if not any(each.get("rewind") == record for each in earlier):
            write_atomically(target, _to_lines([*earlier, *later]))
        self._file.close()
        kept = [each for each in events if each["step"] <= step]
        self._rewrite(self._path, [*kept, dict(record)])
        self._boards.rewind(step)
        start = record["rewound_from"]
        self._log(f"{step:>9,}  rewound from step {start:,}, skipping its batches")

    def flush(self) -> None:
        """On rank 0, make the file durable; a training checkpoint depends on it."""
        assert self._path is not None
        with writing(self._path):
            self._file.flush()
            fsync(self._file.fileno(), self._path)

    def _rewrite(self, path: Path, events: list[dict[str, Any]]) -> None:
        write_atomically(path, _to_lines(events))
        self._file = _append(path)
        self.evaluated_steps = {int(e["step"]) for e in events if "val/loss" in e}

    def write(self, event: Event, group: str) -> None:
        """Write an event to the file and the dashboards; these prefix names with `group/`."""
        if self._path is None:
            return
        # JSON has no non-finite numbers.
        invalid = [k for k, v in event.items() if isinstance(v, float) and not math.isfinite(v)]
        finite = {**event, **dict.fromkeys(invalid)}
        with disk_errors(self._path):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        self._boards.log(finite, group)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._path is not None:
            # After a failed write, closing fails again and must not hide the first error.
            with contextlib.suppress(OSError) if kind else disk_errors(self._path):
                self._file.close()
            self._boards.close(finished=kind is None)


def _to_lines(events: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)

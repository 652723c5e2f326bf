"""Names of the files and folders in a run.

run = newest_run(); run.snapshot(1000)
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError

RAW = "raw"
"""Label of the weights that no average has touched."""

_STEP_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """`step-00001000`: sorts as text in the order of the numbers up to 99,999,999."""
    return f"step-{step:08d}"


def step_folders(parent: Path) -> dict[int, Path]:
    """The committed `step-…` folders of `parent`, by step, ascending."""
    if not parent.is_dir():
        return {}
    matches = (
        (_STEP_NAME.fullmatch(path.name), path) for path in parent.iterdir() if path.is_dir()
    )
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


@dataclass(frozen=True)
class RunFolder:
    """Where everything of one run lies. Only names: nothing is created by asking."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration: what makes a folder a run."""
        return self.path / "config.yaml"

    @property
    def parent(self) -> Path:
        """Where a run that branched off another one says from which state."""
        return self.path / "parent.json"

    @property
    def metrics(self) -> Path:
        """One JSON object an event."""
        return self.path / "metrics.jsonl"

    @property
    def rewound_metrics(self) -> Path:
        """The events that rewinds took back."""
        return self.path / "metrics-rewound.jsonl"

    @property
    def environment(self) -> Path:
        """On what it was trained last: versions and device."""
        return self.path / "environment.json"

    @property
    def snapshots(self) -> Path:
        """Weights by step."""
        return self.path / "snapshots"

    @property
    def states(self) -> Path:
        """Training states by step."""
        return self.path / "state"

    @property
    def averages(self) -> Path:
        """Averages by label, then by step."""
        return self.path / "averages"

    @property
    def evals(self) -> Path:
        """Results of evaluations."""
        return self.path / "evals"

    @property
    def report(self) -> Path:
        """Tables and plots."""
        return self.path / "report"

    def snapshot(self, step: int) -> Path:
        """The weights of one step."""
        return self.snapshots / step_name(step)

    def state(self, step: int) -> Path:
        """The training state of one step."""
        return self.states / step_name(step)

    def average(self, label: str, step: int) -> Path:
        """One average."""
        return self.averages / label / step_name(step)


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run (it has the resolved configuration)."""
    return (path / "config.yaml").is_file()


def require_run(path: Path) -> RunFolder:
    """The run in `path`.

    Raises:
        UserError: `path` is not the folder of a run.
    """
    if not is_run(path):
        raise UserError(
            f"{path} is not a run: it has no config.yaml",
            hint="a run is what llmtrain pretrain wrote under runs/",
        )
    return RunFolder(path)


def newest_run(parent: Path = Path("runs")) -> RunFolder:
    """The run under `parent` that was trained last (its metrics were written last).

    Raises:
        UserError: there is none.
    """
    runs = [path for path in parent.iterdir() if is_run(path)] if parent.is_dir() else []
    if not runs:
        raise UserError(
            f"there is no run under {parent}/",
            hint="train one (llmtrain pretrain --config FILE) or name its folder",
        )

    def trained(path: Path) -> float:
        metrics = path / "metrics.jsonl"
        return (metrics if metrics.exists() else path / "config.yaml").stat().st_mtime

    return RunFolder(max(runs, key=trained))

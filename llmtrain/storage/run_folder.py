"""Paths of the files and folders in a run."""

import os
import re
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.storage.safe_files import reject_links

RAW = "raw"
"""Label of weights that are not averaged."""

_STEP_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Return `step-00001000`; names up to 99,999,999 sort by step."""
    return f"step-{step:08d}"


def step_folders(parent: Path) -> dict[int, Path]:
    """Return the committed `step-…` folders in `parent` by step, ascending."""
    if not parent.is_dir():
        return {}
    folders = filter(Path.is_dir, parent.iterdir())
    matches = ((_STEP_NAME.fullmatch(path.name), path) for path in folders)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


class RunFolder:
    """Paths in one run; nothing is created."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        """Resolved configuration; a folder with this file is a run."""
        self.parent = path / "parent.json"
        """Training checkpoint from which a branched run started."""
        self.metrics = path / "metrics.jsonl"
        """Training and evaluation events, one JSON object per line."""
        self.rewound_metrics = path / "metrics-rewound.jsonl"
        self.environment = path / "environment.json"
        self.snapshots = path / "snapshots"
        self.states = path / "state"
        """Training checkpoints by step."""
        self.averages = path / "averages"
        self.tokenizer = path / "tokenizer"
        """Tokenizer files, which the weights folders share."""
        self.evals = path / "evals"
        self.report = path / "report"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def reject_links(self) -> None:
        """Raise UserError if a folder of the run that commands write to is a symbolic link."""
        folders = [self.snapshots, self.states, self.averages, self.evals, self.report]
        folders += [self.tokenizer, self.path / "tensorboard", self.path / "wandb"]
        folders += self.averages.glob("[!.]*")
        for folder in folders:
            reject_links(self.path, folder)

    def check_output(self, path: Path) -> None:
        """Raise UserError if the run was moved, or if a link in it leads to `path`."""
        require_run(self.path)
        reject_links(self.path, path)

    def snapshot(self, step: int) -> Path:
        """Return the folder of the weights at `step`."""
        return self.snapshots / step_name(step)

    def state(self, step: int) -> Path:
        """Return the folder of the training checkpoint at `step`."""
        return self.states / step_name(step)

    def average(self, label: str, step: int) -> Path:
        """Return the folder of one average."""
        return self.averages / label / step_name(step)


def is_run(path: Path) -> bool:
    """Return whether `path` contains the configuration of a run."""
    return RunFolder(path).config.is_file()


def require_run(path: Path) -> RunFolder:
    """Return the run in `path`, or raise UserError."""
    if not is_run(path):
        hint = "name a folder that llmtrain pretrain wrote, such as runs/NAME"
        raise UserError(f"{path} is not a run: config.yaml is missing", hint=hint)
    return RunFolder(path)


def newest_run(parent: Path = Path("runs")) -> RunFolder:
    """Return the run in `parent` whose metrics changed last, or raise UserError."""
    runs = [RunFolder(path) for path in parent.iterdir() if is_run(path)] if parent.is_dir() else []
    if not runs:
        hint = "train one (llmtrain pretrain --config FILE) or name its folder"
        raise UserError(f"no run in {parent}/", hint=hint)
    changed = [run.metrics if run.metrics.exists() else run.config for run in runs]
    return RunFolder(max(changed, key=os.path.getmtime).parent)

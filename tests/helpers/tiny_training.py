"""Runs of a tiny model, and comparisons of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmtrain.training.run as module
from llmtrain.config.schema import RunConfig
from llmtrain.storage.json_files import read_json_lines
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.run import pretrain

Build = Callable[..., RunConfig]

EVERY_AVERAGE = [
    {"kind": "ema", "decay": 0.9, "save_every": 4},
    {"kind": "ema", "decay": 0.5, "every": 2, "start": 3, "offload": True},
    {"kind": "swa", "start": 6, "every": 2},
    {"kind": "lawa", "every": 2, "window": 3},
    {"kind": "running-mean"},
    {"kind": "power-ema", "sigma_rel": 0.05},
    {"kind": "power-ema", "sigma_rel": 0.1},
]


def quiet(config: RunConfig, folder: Path, **options: Any) -> RunFolder:
    return pretrain(config, folder, log=lambda line: None, **options).run


def final_state(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(list(step_folders(run.states).values())[-1] / "tensors.safetensors")


def events(run: RunFolder, path: Path | None = None) -> list[dict[str, Any]]:
    """Return the events in `path`, by default metrics.jsonl, without times."""
    timed = {"seconds", "tokens_per_second", "memory"}
    lines = read_json_lines(path or run.metrics)
    return [{k: v for k, v in e.items() if k not in timed} for e in lines]


def assert_same_run(one: RunFolder, two: RunFolder) -> None:
    """Check bitwise equality of checkpoints, snapshots, averages, and of events except times."""
    a, b = final_state(one), final_state(two)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()] == []
    assert events(one) == events(two)
    for parent in ("snapshots", "averages"):
        for path in (one.path / parent).rglob("*.safetensors"):
            assert path.read_bytes() == (two.path / path.relative_to(one.path)).read_bytes()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, check: int) -> None:
    """Simulate a SIGTERM at the n-th check (from 0) of the loop."""

    class Later(module.Interrupt):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            if self.checks == check + 1:
                self.received = 15
            super().check()

    monkeypatch.setattr(module, "Interrupt", Later)

"""Weights that are written while training goes on: as they were, and never later than a state after them."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Build, assert_same_run, quiet

from llmtrain.checkpoint import Origin, Shape, load_weights
from llmtrain.config import ModelConfig
from llmtrain.files import RunFolder, step_folders
from llmtrain.model import GPT
from llmtrain.training import snapshots, state_writer
from llmtrain.training.distributed import World
from llmtrain.training.snapshots import SnapshotWriter

staged_folder = snapshots.staged_folder


@contextlib.contextmanager
def slowly(target: Path, **options: Any) -> Iterator[Path]:
    """A disk on which a snapshot takes longer than several steps."""
    time.sleep(0.2)
    with staged_folder(target, **options) as folder:
        yield folder


def test_what_is_written_is_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "staged_folder", slowly)
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=97)
    model = GPT(shape, 16, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    writer = SnapshotWriter(model, World(), Shape(shape, 16, 96))
    writer.save(tmp_path / "step-00000001", dict(model.named_parameters()), Origin(1, 1, 1e-3, "r"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not (tmp_path / "step-00000001").exists()
    writer.wait()
    written = load_weights(tmp_path / "step-00000001")
    assert all(torch.equal(written[name], value) for name, value in before.items())
    writer.close()


def test_no_state_stands_without_the_snapshots_before_it(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(checkpoint={"snapshot_every": 1, "state_every": 4})
    plain = quiet(config, tmp_path / "plain")
    run = RunFolder(tmp_path / "run")
    held = {}

    @contextlib.contextmanager
    def watched(target: Path, **options: Any) -> Iterator[Path]:
        held[target.name] = max(step_folders(run.snapshots), default=0)
        with staged_folder(target, **options) as folder:
            yield folder

    monkeypatch.setattr(snapshots, "staged_folder", slowly)
    monkeypatch.setattr(state_writer, "staged_folder", watched)
    quiet(config, run.path)
    assert held == {f"step-{step:08d}": step for step in (4, 8, 12)}
    assert_same_run(plain, run)

"""Snapshots are written during training, unchanged and before the next checkpoint."""

import contextlib
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import wandb
from tiny_training import Build, assert_same_run, events, quiet

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape, load_weights
from llmtrain.checkpoints.shared_files import SharedFiles
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import WriteFailed
from llmtrain.model.gpt import GPT
from llmtrain.runtime.distributed import World
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training import checkpoint_writer as state_writer
from llmtrain.training import snapshots
from llmtrain.training.snapshots import SnapshotWriter

staged_folder = snapshots.staged_folder


@contextlib.contextmanager
def slowly(target: Path, **options: Any) -> Iterator[Path]:
    """Simulate a disk on which a snapshot takes longer than several steps."""
    time.sleep(0.2)
    with staged_folder(target, **options) as folder:
        yield folder


def test_a_snapshot_has_the_weights_at_the_time_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "staged_folder", slowly)
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=97)
    model = GPT(shape, 16, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model_shape = Shape(shape, 16, 96)
    shared = SharedFiles(tmp_path / "tokenizer", model_shape, "byte")
    writer = SnapshotWriter(model, World(), model_shape, shared, failed=pytest.fail)
    writer.save(tmp_path / "step-00000001", dict(model.named_parameters()), Origin(1, 1, 1e-3, "r"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not (tmp_path / "step-00000001").exists()
    writer.wait()
    written = load_weights(tmp_path / "step-00000001")
    assert all(torch.equal(written[name], value) for name, value in before.items())
    writer.close()


@pytest.mark.slow
def test_a_checkpoint_waits_for_earlier_snapshots(
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


@pytest.mark.slow
def test_a_failed_write_is_logged_with_the_next_line(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of steps, and in W&B."""

    def full(target: Path, **options: Any) -> NoReturn:
        raise WriteFailed(f"cannot write {target}: disk full", hint="make room")

    check = SnapshotWriter.check

    def check_later(writer: SnapshotWriter) -> None:
        futures.wait([writer._writing] if writer._writing else [])
        check(writer)

    monkeypatch.setattr(snapshots, "staged_folder", full)
    monkeypatch.setattr(SnapshotWriter, "check", check_later)
    log = {"every": 1, "wandb": {"mode": "offline"}}
    warnings = list[str]()
    run = quiet(
        tiny(log=log, averages=[], checkpoint={"snapshot_every": 5, "state_every": 100}),
        tmp_path / "run",
        warn=warnings.append,
    )
    steps = [event["step"] for event in events(run)]
    assert steps == sorted(steps)
    missing = [(event["step"], event["not_saved"]) for event in events(run) if "not_saved" in event]
    assert [(step, Path(text.split(":")[0]).name) for step, text in missing] == [
        (6, "step-00000005"),
        (11, "step-00000010"),
        (12, "step-00000012"),
    ]
    assert len(warnings) == 3
    wandb.teardown()  # flush the finished run
    (written,) = (run.path / "wandb").glob("offline-run-*/run-*.wandb")
    assert written.read_bytes().count(b"incident/not_saved") >= 3

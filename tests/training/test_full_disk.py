"""A full disk during training, simulated by a limit on file sizes of the installed command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import unmeasured
from tiny_training import Build, events

from llmtrain.config.loading import dump_config
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.run_folder import RunFolder, step_folders

pytestmark = pytest.mark.slow


def train(config: Path, folder: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `llmtrain pretrain` with files of at most `limit` bytes."""
    command = [str(Path(sys.executable).parent / "llmtrain"), "pretrain", "--config", str(config)]
    start = "import os, resource, sys; "
    if limit is not None:
        start += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    start += "os.execv(sys.argv[1], sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", start, *command, "--run-dir", str(folder)],
        capture_output=True, text=True, timeout=120, check=False, cwd=folder.parent,
        env=unmeasured(),
    )  # fmt: skip


def config_file(tiny: Build, folder: Path, **overrides: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(tiny(**overrides)))
    return path


def not_saved(run: RunFolder) -> list[int]:
    """Return the steps of snapshots logged as not saved."""
    missing = [e["not_saved"] for e in events(run) if "not_saved" in e]
    found = [re.search(r"snapshots/step-(\d+)", text) for text in missing]
    return [int(match[1]) for match in found if match]


def test_training_continues_without_a_snapshot(tiny: Build, tmp_path: Path) -> None:
    """No room for weights (42 kB) at any step; no checkpoint is due before the last step."""
    config = config_file(tiny, tmp_path, checkpoint={"snapshot_every": 4, "state_every": 100})
    done = train(config, tmp_path / "run", limit=30_000)
    assert "Traceback" not in done.stderr
    run = RunFolder(tmp_path / "run")
    assert not_saved(run) == [4, 8, 12]
    steps = [e["step"] for e in events(run)]
    assert steps == sorted(steps)
    assert "bytes needed" in done.stderr
    assert "Training continues" in done.stderr
    assert (
        "averages/ema-0.9/step-00000012" in done.stderr
    )  # tried although the snapshot before it failed
    assert [e["step"] for e in events(run) if "lr" in e] == [3, 6, 9, 12]
    # The checkpoint of the last step is essential, but does not fit either.
    assert done.returncode == 1
    assert step_folders(run.snapshots) == {}
    assert not [path for path in run.path.rglob(".tmp-*") if path.is_dir()]
    assert train(config, run.path).returncode == 0


def test_the_last_good_checkpoint_stays(tiny: Build, tmp_path: Path) -> None:
    config = config_file(tiny, tmp_path)
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    assert train(config, whole.path).returncode == 0
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text(config.read_text().replace("max_steps: 12", "max_steps: 8"))
    assert train(shorter, run.path).returncode == 0
    failed = train(config, run.path, limit=60_000)  # a snapshot fits, a checkpoint does not
    assert failed.returncode == 1
    assert "cannot write" in failed.stderr
    assert "step-00000012" in failed.stderr
    assert "bytes needed" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(step_folders(run.states)) == [4, 8]
    assert all(integrity_problems(folder) == [] for folder in step_folders(run.states).values())
    assert train(config, run.path).returncode == 0
    for name in (
        "snapshots/step-00000012/model.safetensors",
        "averages/ema-0.9/step-00000012/model.safetensors",
    ):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert json.loads((run.state(12) / "state.json").read_text())["progress"]["step"] == 12


def test_a_log_that_does_not_fit_is_named(tiny: Build, tmp_path: Path) -> None:
    config = config_file(
        tiny, tmp_path, log={"every": 1}, checkpoint={"snapshot_every": 4, "state_every": 99}
    )
    failed = train(config, tmp_path / "run", limit=1500)
    assert failed.returncode == 1
    assert "metrics.jsonl: File too large (" in failed.stderr
    assert "Traceback" not in failed.stderr

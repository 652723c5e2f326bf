"""A run written by an earlier version stays readable and resumable.

`tests/files/earlier_run/` contains 20 steps of a tiny model by commit 538ec85, with snapshots, a
training checkpoint, averages and evaluations. `step-30.safetensors` contains the weights that the
same commit reached at step 30.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from in_process import Outcome, invoke
from places import REPOSITORY
from safetensors.torch import load_file

EARLIER = REPOSITORY / "tests" / "files" / "earlier_run"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "work"))


def succeed(workplace: Path, *arguments: str) -> Outcome:
    outcome = invoke(*arguments, cwd=workplace)
    assert outcome.code == 0, outcome.stderr
    return outcome


def test_resuming_reaches_the_weights_of_the_earlier_version(workplace: Path) -> None:
    """Not bitwise: float32 sums depend on the threads and vector instructions of the processor."""
    run = "runs/old"
    command = ["pretrain", "--config", f"{run}/config.yaml", "--run-dir", run]
    outcome = succeed(workplace, *command, "--set", "train.max_steps=30")
    assert "resumed at step 20" in outcome.stdout
    expected = load_file(workplace / "step-30.safetensors")
    weights = load_file(workplace / run / "snapshots" / "step-00000030" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_existing_average_is_recognized(workplace: Path) -> None:
    folder = workplace / "runs/old/averages/lawa-3x5/step-00000020"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    succeed(workplace, "average", "runs/old", "--every", "5", "--window", "3")
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert after == before
    assert [path.name for path in folder.parent.glob("step-*")] == [folder.name]


def test_eval_reads_the_stored_results(workplace: Path) -> None:
    """The seconds of a new evaluation would differ."""
    rows = json.loads(succeed(workplace, "eval", "runs/old", "--json").stdout)
    stored = [json.loads(path.read_text()) for path in (workplace / "runs/old/evals").iterdir()]
    seconds = {each["weights"]: each["seconds"] for each in stored}
    assert sorted(row["label"] for row in rows) == ["ema-0.9", "lawa-3x5", "raw"]
    assert {row["weights"]: row["seconds"] for row in rows} == seconds


def test_verify_passes(workplace: Path) -> None:
    succeed(workplace, "verify", "runs/old")

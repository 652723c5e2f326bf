"""`llmtrain average` as a process: JSON, exit codes, and no torch where numpy does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

CONFIG = """
data: {path: none, block_size: 8}
schedule: {name: constant, warmup_steps: 0}
train: {max_steps: 40, batch_sequences: 16}
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo"
    for step in (10, 20, 30, 40):
        folder = run / "snapshots" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (run / "config.yaml").write_text(CONFIG)
    return tmp_path


def llmtrain(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmtrain", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_json_is_the_documented_list_and_nothing_else(runs: Path) -> None:
    done = llmtrain(runs, "average", "--every", "10", "--window", "3", "--json")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    assert entry == {
        "label": "lawa-3x10",
        "step": 40,
        "path": "runs/demo/averages/lawa-3x10/step-00000040",
        "inputs": [20, 30, 40],
        "weights": [1 / 3] * 3,
    }
    assert (runs / entry["path"] / "model.safetensors").exists()


def test_a_table_and_the_path_without_json(runs: Path) -> None:
    done = llmtrain(runs, "average", "runs/demo", "--every", "10", "--window", "2", "--at", "all")
    assert done.returncode == 0, done.stderr
    for step in (20, 30, 40):
        assert f"runs/demo/averages/lawa-2x10/step-{step:08d}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--every", "15", "--window", "2"], "--every 10"),
        ([], "--every is required"),
        (["--every", "10", "--window", "9"], "10 to 40 every 10"),
        (["--every", "10", "--window", "2", "--at", "35"], "ends at step 35"),
        (["--every", "10", "--at", "soon"], "--at 'soon'"),
        (["--every", "10", "--window", "2", "--label", "../x"], "--label"),
        (["nowhere", "--every", "10"], "nowhere"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_with_a_hint(
    runs: Path, arguments: list[str], said: str
) -> None:
    done = llmtrain(runs, "average", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_torch_is_not_imported(runs: Path) -> None:
    code = (
        "import sys\nfrom llmtrain.cli.main import main\n"
        "sys.argv = ['llmtrain', 'average', '--every', '10', '--window', '2']\n"
        "try: main()\nfinally: sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

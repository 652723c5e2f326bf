"""`llmtrain average`: JSON, exit codes, renamed options, and no import of torch."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from llmtrain.cli.main import main

CONFIG = """
data: {path: none, block_size: 8}
schedule: {name: constant, warmup_steps: 0}
train: {max_steps: 40, batch_sequences: 16}
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "runs" / "demo"
    for step in (10, 20, 30, 40):
        folder = run / "snapshots" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (run / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def average(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["llmtrain", "average", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return Result(int(end.value.code or 0), *capsys.readouterr())

    return run


def test_json_is_the_documented_list(average: Command, runs: Path) -> None:
    done = average("--every", "10", "--window", "3", "--json")
    assert done.code == 0, done.err
    (entry,) = json.loads(done.out)
    assert entry == {
        "label": "lawa-3x10",
        "step": 40,
        "path": "runs/demo/averages/lawa-3x10/step-00000040",
        "inputs": [20, 30, 40],
        "weights": [1 / 3] * 3,
    }
    assert (runs / entry["path"] / "model.safetensors").exists()


def test_prints_a_table_with_the_folders(average: Command) -> None:
    done = average("runs/demo", "--every", "10", "--window", "2", "--at", "all")
    assert done.code == 0, done.err
    for step in (20, 30, 40):
        assert f"runs/demo/averages/lawa-2x10/step-{step:08d}" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "15", "--window", "2"], "--every 10"),
        ([], "--every is required"),
        (["--every", "10", "--window", "9"], "10 to 40 every 10"),
        (["--every", "10", "--window", "2", "--at", "35"], "ends at step 35"),
        (["--every", "10", "--at", "soon"], "--at 'soon'"),
        (["--every", "10", "--window", "2", "--label", "../x"], "--label"),
        (["nowhere", "--every", "10"], "nowhere"),
        (["--every", "10", "--method", "median"], "--method 'median' is unknown"),
        (["--every", "10", "--method", "ema", "--decay", "much"], "--decay 'much'"),
        (["--every", "10", "--checks", "none"], "--checks"),
    ],
)
def test_invalid_command_line_is_exit_code_2_with_a_hint(
    average: Command, arguments: list[str], message: str
) -> None:
    done = average(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "hint:" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--method", "ema", "--half-life", "20"], ["--method", "ema", "--decay", "half-life=20"]),
        (["--strict"], ["--checks", "strict"]),
        (["--no-verify", "--allow-duplicates"], ["--checks", "no-verify, allow-duplicates"]),
        (["--allow-known-bad"], ["--checks", "allow-known-bad"]),
        (["--integers", "last"], ["--checks", "allow-integers"]),
        (["--label", "mine"], ["--out", "runs/demo/averages/mine/step-00000040"]),
    ],
)
def test_renamed_options_still_work(
    average: Command, runs: Path, old: list[str], new: list[str]
) -> None:
    made = []
    for options in (old, new):
        done = average("--every", "10", "--window", "2", "--json", *options)
        assert done.code == 0, done.err
        made.append(json.loads(done.out)[0]["weights"])
        assert ("was renamed: use" in done.err) == (options is old)
    assert made[0] == made[1]
    assert len([*(runs / "runs" / "demo" / "averages").rglob("model.safetensors")]) == 1


def test_help_lists_at_most_20_options(average: Command) -> None:
    listed = set(re.findall(r"│ (--[\w-]+)", average("--help").out))
    assert {"--every", "--decay", "--checks"} <= listed
    assert len(listed - {"--help"}) <= 20


def test_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom llmtrain.cli.main import main\n"
        "sys.argv = ['llmtrain', 'average', '--every', '10', '--window', '2']\n"
        "try: main()\nfinally: sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "twice",
    [
        ("--at", "20", "--to", "10"),
        ("--method", "ema", "--decay", "0.5", "--half-life", "10"),
    ],
)
def test_an_option_and_its_earlier_name_exclude_each_other(
    average: Command, twice: tuple[str, ...]
) -> None:
    done = average("--every", "10", *twice)
    assert done.code == 2
    assert "is given twice" in done.err

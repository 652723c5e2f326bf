"""Files of a run replaced by pipes, folders, sockets and devices: no command blocks."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from limited import invoke_limited


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)
    os.chdir(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": bind_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}
FILES = [
    "runs/run/config.yaml",
    "runs/run/metrics.jsonl",
    "runs/run/metrics-rewound.jsonl",
    "runs/run/environment.json",
    "runs/run/snapshots/step-00000008/model.safetensors",
    "runs/run/snapshots/step-00000008/config.json",
    "runs/run/snapshots/step-00000008/training.json",
    "runs/run/snapshots/step-00000008/integrity.json",
    "runs/run/averages/ema-0.9/step-00000008/provenance.json",
    "runs/run/averages/ema-0.9/step-00000008/model.safetensors",
    "runs/run/averages/ema-0.9/step-00000008/integrity.json",
    "runs/run/evals/*.json",
    "runs/run/state/step-00000008/*.json",
    "runs/run/state/step-00000008/*.safetensors",
    "data/manifest.json",
    "data/val-00000.bin",
    "data/train-00000.bin",
    "runs/run/averages/ema-0.9",
]
ALL_KINDS = "metrics.jsonl"
CASES = [
    (file, kind) for file in FILES for kind in KINDS if kind == "pipe" or file.endswith(ALL_KINDS)
]
COMMANDS = [
    ["runs"],
    ["report", "runs/run"],
    ["inspect", "runs/run", "--verify"],
    ["verify", "runs/run", "data"],
    ["eval", "runs/run"],
    ["average", "runs/run", "--every", "2", "--window", "2"],
    ["generate", "runs/run", "--max-tokens", "2", "--tokenizer", "byte"],
    ["export", "runs/run", "--to", "exported", "--tokenizer", "byte"],
    [
        "pretrain",
        "-c",
        "config.yaml",
        "--run-dir",
        "runs/run",
        "--set",
        "train.max_steps=10",
    ],
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "kind"), CASES)
def test_no_command_blocks(workplace: Path, file: str, kind: str) -> None:
    (path, *_) = sorted(workplace.glob(file)) or [workplace / file]
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    KINDS[kind](path)
    for command, outcome in zip(
        COMMANDS, invoke_limited(COMMANDS, cwd=workplace, seconds=60), strict=True
    ):
        assert "this is a bug" not in outcome.stderr, (command, outcome)
        assert outcome.code in (0, 1, 2)

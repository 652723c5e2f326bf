"""Small commands whose results can be repeated, and the comparison with an undisturbed run."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llmtrain.storage.json_files import read_json_lines

CONFIG = """
name: run
data: {path: data/text, block_size: 32}
model: {n_layer: 2, n_head: 2, n_embd: 32, vocab_size: 264, dropout: 0.1}
optimizer: {lr: 3e-3}
schedule: {name: constant, warmup_steps: 5}
train: {max_steps: STEPS, batch_sequences: 8, micro_batch: 4, precision: float32, compile: false,
        device: cpu}
checkpoint: {snapshot_every: 5, state_every: 10, keep_states: 6}
averages: [{kind: ema, decay: 0.9, save_every: 20}, {kind: running-mean}]
spikes: {action: rewind, window: 8, threshold: 8, rewind_steps: 3, max_rewinds: 100}
eval: {every: 20, batch: 64, tokens: 4000}
log: {every: 5}
"""

TRAIN = ["pretrain", "--config", "run.yaml"]
COMMANDS = {
    "prepare": [
        *["prepare", "text", "--out", "data/text", "--tokenizer", "byte"],
        *["--val-fraction", "0.02"],
    ],
    "pretrain": TRAIN,
    "branch": [*TRAIN, "--branch", "branch", "--from", "50", "--set", "train.max_steps=70"],
    "average": ["average", "runs/run", "--every", "5", "--at", "all", "--window", "3"],
    "eval": ["eval", "runs/run"],
}
RESULTS = {
    "prepare": "data",
    "pretrain": "runs/run",
    "branch": "runs/branch",
    "average": "runs/run/averages/lawa-3x5",
    "eval": "runs/run/evals",
}
"""The folder that each command writes."""

TIMES = {"seconds", "tokens_per_second", "memory", "mfu"}
"""Values that differ between two equal runs."""


def lay_out(folder: Path, *, steps: int, documents: int, words: int) -> None:
    """Write the config and the documents; 0.6% of the data is noise, on which the loss spikes."""
    (folder / "text").mkdir(parents=True)
    (folder / "run.yaml").write_text(CONFIG.replace("STEPS", str(steps)))
    chance = random.Random(1)
    for number in range(documents):
        text = " ".join(chance.choices(("loss", "step", "the", "rate", "mean"), k=words))
        (folder / "text" / f"{number:03}.txt").write_text(text)
    for number in range(3):  # each character has three bytes, each word about five
        noise = chance.choices(range(0x4E00, 0x9FFF), k=documents * words // 900)
        (folder / "text" / f"noise-{number}.txt").write_text("".join(map(chr, noise)))


def start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """Start a command in `folder` without its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "llmtrain", *command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def environment() -> dict[str, str]:
    """Return variables that make the results independent of the number of cores."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def run(command: list[str], folder: Path) -> None:
    """Run a command in `folder`; raise SystemExit if it fails."""
    if code := start(command, folder).wait():
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}")


def require_rewind(folder: Path) -> None:
    """Raise SystemExit unless the undisturbed run contains a rewind to test."""
    events = read_json_lines(folder / RESULTS["pretrain"] / "metrics.jsonl")
    if not any("rewound_from" in event for event in events):
        raise SystemExit("the undisturbed run has no rewind: adapt `spikes` in CONFIG")


def contents(folder: Path) -> dict[str, str]:
    """Return by path the JSON of a file without times, or its hash: equal for equal results."""
    return {
        path.relative_to(folder).as_posix(): _content(path).replace(str(folder.resolve()), ".")
        for path in sorted(folder.rglob("*"))
        # The integrity record covers files that contain times.
        if path.is_file() and path.name not in {".lock", "integrity.json"}
    }


def differences(one: Mapping[str, str], two: Mapping[str, str]) -> list[str]:
    """Return the files that exist on one side only, or differ."""
    return [
        f"{name}: {'differs' if name in one and name in two else 'only in one'}"
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    ]


def _content(path: Path) -> str:
    if path.suffix == ".jsonl":
        return json.dumps([_timeless(json.loads(line)) for line in path.read_text().splitlines()])
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text())))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value

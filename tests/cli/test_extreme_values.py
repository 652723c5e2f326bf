"""Extreme values of the options: each ends with a result, or one line and a hint."""

from collections.abc import Sequence

import pytest
from in_process import invoke
from tiny_runs import MakeRun

DIGITS = "9" * 5_000
"""More digits than Python converts to an integer."""
LONG = "9" * 400
"""An integer above the largest float."""
COUNTS = [DIGITS, LONG, str(2**63), str(2**63 - 1), str(-(2**63)), str(2**31), "0", "-1", "", "²"]
NUMBERS = ["1e300", "inf", "-inf", "nan", "0", "-0.0", "1e-320", "abc", "", "-1", DIGITS]

AVERAGE = ("average", "runs/tiny")
LAWA = (*AVERAGE, "--every", "2", "--window", "2")
EMA = (*AVERAGE, "--method", "ema", "--every", "2")
SWEEP = (*AVERAGE, "--at", "4", "--sweep")
GENERATE = ("generate", "runs/tiny", "--max-tokens", "2", "--tokenizer", "byte")
PREPARE = ("prepare", "t.txt", "--tokenizer", "byte", "--out", "new", "--val-fraction", "0")
PLAN = ("plan", "-c", "runs/tiny/config.yaml")
PRETRAIN = ("pretrain", "-c", "runs/tiny/config.yaml", "--run-dir", "new")

OPTIONS: list[tuple[Sequence[str], str, Sequence[str]]] = [
    ((*AVERAGE, "--window", "2"), "--every=", COUNTS),
    ((*AVERAGE, "--every", "2"), "--window=", [*COUNTS, "1000000000"]),
    ((*AVERAGE, "--every", "2", "--disjoint"), "--window=", COUNTS),
    ((*EMA, "--decay", "0.9"), "--window=", COUNTS),
    ((*AVERAGE, "--method", "ema", "--decay", "0.9"), "--every=", COUNTS),
    ((*AVERAGE, "--method", "ema", "--decay", "half-life=9"), "--every=", COUNTS),
    (LAWA, "--at=", [*COUNTS, "abc"]),
    (LAWA, "--blend=", NUMBERS),
    ((*AVERAGE, "--method", "swa", "--every", "2"), "--from=", COUNTS),
    ((*AVERAGE, "--method", "dense", "--at", "8"), "--from=", COUNTS),
    (EMA, "--decay=", NUMBERS),
    (EMA, "--decay=half-life=", NUMBERS),
    (EMA, "--half-life=", NUMBERS),
    ((*AVERAGE, "--method", "posthoc-ema"), "--sigma-rel=", NUMBERS),
    (SWEEP, "every=2 window=", COUNTS),
    (SWEEP, "window=9 every=", COUNTS),
    (SWEEP, "window=9 every=2 blend=", NUMBERS),
    (SWEEP, "method=ema window=9 every=2 decay=", NUMBERS),
    (SWEEP, "method=ema window=9 every=2 half-life=", NUMBERS),
    (SWEEP, "method=posthoc-ema sigma-rel=", NUMBERS),
    (("eval", "runs/tiny"), "--tokens=", COUNTS),
    (("eval", "runs/tiny"), "--batch=", COUNTS),
    (
        ("eval", "runs/tiny", "--text", "t.txt"),
        "--stride=",
        [each for each in COUNTS if each > "1"],
    ),
    (("eval", "runs/tiny", "--tasks", "x"), "--batch-size=", [DIGITS, "0", "-1", "", "²"]),
    (GENERATE, "--max-tokens=", [DIGITS, "0", "-1", str(-(2**63))]),
    (GENERATE, "--num=", [DIGITS, "0", "-1"]),
    (GENERATE, "--temperature=", NUMBERS),
    (GENERATE, "--top-k=", COUNTS),
    (GENERATE, "--top-p=", NUMBERS),
    (GENERATE, "--seed=", COUNTS),
    (PREPARE, "--val-fraction=", NUMBERS),
    (PREPARE, "--seed=", COUNTS),
    (PREPARE, "--shard-tokens=", [*COUNTS, "nan", "inf", "1e400", "1e99999999999"]),
    (PREPARE, "--workers=", COUNTS),
    (PREPARE, "--limit-documents=", [*COUNTS, "1e400"]),
    (PLAN, "--devices=", COUNTS),
    (PLAN, "--mfu=", NUMBERS),
    (PLAN, "--tokens-per-second=", NUMBERS),
    (PLAN, "--interconnect-gbps=", NUMBERS),
    ((*PRETRAIN, "--branch", "b"), "--from=", COUNTS),
    (PRETRAIN, "--nproc=", [DIGITS, "0", "-1", ""]),
    (PRETRAIN, "--max-time=", ["", DIGITS, "-1", "inf", "nan"]),
    (("config", "runs/tiny"), "--set=train.max_steps=", COUNTS),
    (("config", "runs/tiny"), "--set=seed=", COUNTS),
    (("config", "runs/tiny"), "--set=optimizer.lr=", NUMBERS),
    (PLAN, "--set=train.max_steps=", COUNTS),
    (PLAN, "--set=checkpoint.snapshot_every=", COUNTS),
    (PLAN, "--set=model.n_layer=", COUNTS),
    (PLAN, "--set=model.vocab_size=", COUNTS),
    (PLAN, "--set=data.block_size=", COUNTS),
]


@pytest.mark.parametrize(
    ("command", "option", "values"), OPTIONS, ids=[f"{c[0]} {o}" for c, o, _ in OPTIONS]
)
def test_extreme_values(
    make_run: MakeRun, command: Sequence[str], option: str, values: Sequence[str]
) -> None:
    place = make_run([2, 4, 6, 8]).path.parents[1]
    (place / "t.txt").write_text("some text " * 20)
    for number, value in enumerate(values):
        arguments = [f"{part}{number}" if part == "new" else part for part in command]
        if command is SWEEP:
            arguments.append(option + value)
        else:
            arguments.append(f"{option}{value}")
        outcome = invoke(*arguments, cwd=place)
        shown = (value[:30], outcome)
        errors = [line for line in outcome.stderr.splitlines() if "error: " in line]
        assert "this is a bug" not in outcome.stderr, shown
        assert "Warning" not in outcome.stderr, shown
        assert "Traceback" not in outcome.stderr, shown
        assert outcome.code in (0, 2), shown
        assert len(errors) == (outcome.code == 2), shown
        assert all(len(line) < 1100 for line in outcome.stderr.splitlines()), shown


@pytest.mark.parametrize(
    "command",
    [
        (*LAWA, "--out"),
        ("export", "runs/tiny", "--to"),
        ("report", "runs/tiny", "--out"),
        ("pretrain", "-c", "runs/tiny/config.yaml", "--run-dir"),
    ],
    ids=lambda command: command[0],
)
def test_urls_are_not_taken_for_local_folders(make_run: MakeRun, command: Sequence[str]) -> None:
    place = make_run([2, 4]).path.parents[1]
    before = set(place.iterdir())
    outcome = invoke(*command, "memory://x/y", cwd=place)
    assert (outcome.code, "is a URL" in outcome.stderr) == (2, True)
    assert set(place.iterdir()) == before

"""`scripts/bench`: memory of a process tree, ratios, tables of 80 columns, sides that fail."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks import (
    attention,
    commands,
    everything,
    head,
    measure,
    piece,
    prepare,
    profile,
    shapes,
)
from benchmarks.measure import Figures, Row
from torch import Tensor
from typer.testing import CliRunner

HOLD = "held = bytearray(100_000_000); print(flush=True); input()"
TWO = f"""
import subprocess, sys, time
ends = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
started = [subprocess.Popen([sys.executable, "-c", {HOLD!r}], **ends) for _ in "12"]
for each in started:
    each.stdout.readline()
time.sleep(1)  # both processes hold their memory
for each in started:
    each.communicate("go")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
def test_memory_of_a_process_tree_is_the_sum(tmp_path: Path) -> None:
    together = commands.run([sys.executable, "-c", TWO], tmp_path, tree=True)
    assert 200 < together["MB"] < 260
    assert together["s"] > 1
    assert (
        commands.run([sys.executable, "-c", TWO], tmp_path)["MB"] < 130
    )  # the largest process alone


def test_a_failed_command_reports_its_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no reason"):
        commands.run([sys.executable, "-c", "raise SystemExit('no reason')"], tmp_path, tree=True)


def test_ratios_compare_the_same_round() -> None:
    taken: dict[str, list[Figures]] = {
        "ours": [{"s": 1.0}, {"s": 10.0}, {"s": 3.0}],
        "theirs": [{"s": 2.0}, {"s": 20.0}, {"s": 3.0}],
    }
    ours, theirs = measure.rows("work", taken, "theirs", {("ours", "s"): "≤ 2"})
    assert (ours.median, ours.ratio, ours.target, ours.against) == (3.0, 0.5, "≤ 2", "theirs")
    assert theirs.ratio is None


def test_tables_fit_80_columns_and_list_unmeasured_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    long = Row(
        "prepare webmix-train, 43,497 documents",
        "tiktoken alone",
        "tokens/s",
        4_077_123.0,
        3.1e6,
        5.2e6,
        5,
        3.6,
    )
    measure.publish(
        [long, measure.not_measured("train", "llmtrain", "no GPU")], tmp_path / "rows.json"
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "4,077,123 3,100,000 to 5,200,000" in " ".join(printed.split())
    assert "not measured: train, llmtrain: no GPU" in printed
    assert [row["side"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [
        "tiktoken alone",
        "llmtrain",
    ]


def test_a_failed_benchmark_is_listed_with_its_reason() -> None:
    def fails() -> list[Row]:
        raise RuntimeError("no room\n")

    (row,) = everything._tried("average", fails)
    assert (row.what, row.median, row.note) == ("average", None, "no room")


@pytest.mark.slow
def test_all_sides_of_prepare_count_the_same_tokens(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"Document {i}."}) + "\n" for i in range(40)))
    sides = [
        prepare._llmtrain(source, tmp_path / "tokens"),
        prepare._plain(source, tmp_path / "plain"),
        prepare._tiktoken(source)(),
    ]
    assert {round(figures["tokens/s"] * figures["s"]) for figures in sides} == {40 * 4}


@pytest.mark.slow
def test_a_profile_lists_the_longest_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Shape(1, 2, 32, 32, 2))
    step, *operations = profile.measure("tiny", rounds=2, settings=["train.compile=false"])
    assert step.side == "step"
    assert step.median
    assert operations[0].ratio
    assert 0 < operations[0].ratio < 1
    assert {"aten::mm", "all others"} <= {row.side for row in operations}
    assert all(row.median is not None and row.median >= 0 for row in operations)


@pytest.mark.slow
def test_a_failed_side_is_listed_and_the_others_are_measured() -> None:
    sides = {"fails": measure.Worker(int, "x"), "works": measure.Worker(partial, dict, {"s": 2.0})}
    works, fails = piece.compare("work", sides, rounds=2, against="fails")
    assert (works.side, works.median, works.rounds, works.ratio) == ("works", 2.0, 2, None)
    assert fails.median is None and fails.note.startswith("ValueError: invalid literal")


@pytest.mark.slow
def test_a_wrong_head_has_a_large_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*given: Tensor) -> Tensor:
        return head.LOSSES[head.OURS](*given) / 2

    monkeypatch.setitem(head.LOSSES, "half", half)
    right, wrong = (head.one_loss(name, 16, 600, 97, "float32")() for name in (head.OURS, "half"))
    assert max(right["error"], right["gradient error"]) < 1e-5
    assert wrong["error"] == pytest.approx(0.5) == wrong["gradient error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bench", "options", "sides"),
    [
        (attention, ["attention", "--length", "20", "--width", "64"], {"materialized", "fused"}),
        (head, ["head", "--width", "16", "--vocabulary", "97"], {head.OURS, head.PLAIN}),
    ],
)
def test_a_part_of_the_model_is_measured_and_accurate(
    bench: ModuleType,
    options: list[str],
    sides: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        bench, "PRECISIONS", ("float32",)
    )  # few processes: each takes seconds to start
    monkeypatch.setattr(
        head, "LOSSES", {name: head.LOSSES[name] for name in (head.OURS, head.PLAIN)}
    )
    app, path = (
        runpy.run_path(str(Path(measure.__file__).parents[1] / "bench"))["app"],
        tmp_path / "rows.json",
    )
    result = CliRunner().invoke(
        app, [*options, "--tokens", "40", "--rounds", "1", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert {row["side"] for row in rows if row["figure"] == "ms" and row["median"] > 0} == sides
    assert max(row["median"] for row in rows if "error" in row["figure"]) < 1e-5

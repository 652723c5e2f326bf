"""Validation losses are compared only on the same tokens, data and precision."""

import csv
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

from in_process import invoke

from llmtrain.evaluation.curves import loss_curves, measured_curves, newest_results
from llmtrain.evaluation.report.charts import Chart, Drawing, Line, draw, run_charts
from llmtrain.evaluation.report.page import write_report
from llmtrain.evaluation.report.records import differing_windows, read_records, savings
from llmtrain.evaluation.report.run_list import list_runs
from llmtrain.evaluation.results import EvalResult
from llmtrain.storage.run_folder import RunFolder

CONFIG = "name: x\ndata: {path: x, block_size: 16}\ntrain: {batch_sequences: 16}\n"


def write_run(
    path: Path, tokens: int = 99, losses: tuple[float, ...] = (3.0, 2.5, 2.0)
) -> RunFolder:
    """Write a run that trained and evaluated at steps 10, 20, …, on `tokens` tokens."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    (path / "environment.json").write_text('{"precision": "float32"}')
    lines = []
    for index, loss in enumerate(losses, 1):
        train = {"step": 10 * index, "loss": loss, "lr": 0.1, "tokens": 160, "seconds": 1.0}
        lines += [train, {"step": 10 * index, "val/tokens": tokens, "val/loss": loss}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(path)


def write_result(
    run: RunFolder,
    label: str,
    loss: float,
    tokens: int,
    *,
    step: int = 30,
    precision: str = "float32",
    data: str = "d",
) -> None:
    result = EvalResult(
        label=label, step=step, path="x", run=run.path.name, loss=loss, perplexity=None,
        bits_per_byte=None, tokens=tokens, bytes=0, seconds=1.0, delta=None, split="val",
        block_size=16, precision=precision, data=data, weights="0" * 64,
    )  # fmt: skip
    run.evals.mkdir(exist_ok=True)
    name = f"{label}-{step}-{tokens}-{precision}-{data}.json"
    (run.evals / name).write_text(json.dumps(asdict(result)))


def test_eval_on_few_tokens_does_not_hide_the_curve_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_result(run, "raw", 0.5, 9)
    write_result(run, "lawa", 0.4, 9)
    assert loss_curves(run) == {"raw": [(10, 3.0), (20, 2.5), (30, 2.0)]}
    (record,) = read_records([run])
    assert {each.tokens: curves for each, curves in record.others.items()} == {
        9: {"raw": [(30, 0.5)], "lawa": [(30, 0.4)]}
    }
    assert [(row.loss, row.val_tokens) for row in savings(record)] == [(2.0, 99)]
    written = write_report([run], tmp_path / "report")
    assert "2 losses on other tokens, which the charts omit" in written.page.read_text()
    with (tmp_path / "report" / "losses.csv").open() as file:
        counts = [row["val_tokens"] for row in csv.DictReader(file)]
    assert counts == ["99", "99", "99", "9", "9"]
    assert [(row.label, row.tokens) for row in newest_results(run)] == [("raw", 9), ("lawa", 9)]


def test_many_results_on_fewer_tokens_do_not_hide_the_curve_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for number in range(20):
        write_result(run, f"lawa-{number}", 0.4, 90)
    assert list(loss_curves(run)) == ["raw"]
    for number in range(4):
        write_result(run, f"lawa-{number}", 0.4, 100)  # more losses, on more tokens
    assert len(loss_curves(run)) == 4


def test_eval_on_the_tokens_of_training_extends_its_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_result(run, "lawa", 1.5, 99)
    assert loss_curves(run)["lawa"] == [(30, 1.5)]
    assert len(measured_curves(run)) == 1
    write_result(run, "ema", 1.0, 99, precision="bfloat16")
    write_result(run, "other", 1.0, 99, data="e")
    assert list(loss_curves(run)) == ["raw", "lawa"]
    assert len(measured_curves(run)) == 3


def test_runs_show_the_token_count_and_never_the_lowest_of_different_tokens(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "runs" / "one")
    write_result(run, "raw", 0.5, 9)
    (entry,) = list_runs(tmp_path / "runs")
    assert entry.raw is not None and entry.raw.loss == 2.0
    assert entry.windows is not None and entry.windows.tokens == 99
    shown = invoke("runs", cwd=tmp_path)
    assert " 99 " in shown.stdout and shown.stderr == ""
    write_run(tmp_path / "runs" / "two", tokens=1_234)
    shown = invoke("runs", cwd=tmp_path)
    assert "1,234" in shown.stdout
    assert "the losses are not comparable: the runs were measured on different" in shown.stderr


def test_a_report_of_several_runs_ranks_only_losses_on_the_same_tokens(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", tokens=9, losses=(1.0, 0.5))]
    records = read_records(runs)
    assert differing_windows(records) == ["tokens"]
    assert [row.run for row in write_report(runs, tmp_path / "out").savings] == ["a", "b"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The losses of these runs are not comparable." in page
    assert 'class="best"' not in page and "lowest validation loss" not in page
    labels = [line.label for line in run_charts(records)[0].lines]
    assert labels == ["a: raw (99 tokens)", "b: raw (9 tokens)"]
    shown = invoke("report", runs[0].path, runs[1].path, cwd=tmp_path)
    assert "not comparable: different tokens" in shown.stderr
    for run, loss in zip(runs, (2.0, 3.0), strict=True):  # now on the same tokens
        for step in (10, 20, 30):
            write_result(run, "raw", loss, 500, step=step)
    records = read_records(runs)
    assert differing_windows(records) == []
    assert [record.windows and record.windows.tokens for record in records] == [500, 500]
    assert run_charts(records)[0].title == "Validation loss on 500 tokens, by steps"


def marked(drawing: Drawing) -> list[list[str]]:
    """Return the values of the points of the last line that have a marker."""
    marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawing.svg)
    return [
        values
        for x, y, *values in drawing.points[-1]["points"]
        if any(math.dist((x, y), (float(a), float(b))) < 0.2 for a, b in marks)
    ]


def test_single_points_have_a_marker() -> None:
    alone = Line("raw", [50], [1.5])
    gaps = Line("raw", [0, 10, 20, 30, 40, 50], [1.0, None, 2.0, None, 2.5, 3.0])
    whole = Line("a", [0, 100], [1.0, 2.0])
    shown = [draw(Chart("x", "x", "step", "loss", [whole, line])) for line in (alone, gaps, whole)]
    assert marked(shown[0]) == [["50", "1.5"]]
    assert ["20", "2"] in marked(shown[1]) and ["40", "2.5"] not in marked(shown[1])


def test_a_long_legend_leaves_the_plot_its_size() -> None:
    def height(count: int) -> float:
        lines = [Line(f"line {i} {'x' * 24}", [0, 100], [1.0, i], colour=i) for i in range(count)]
        _, top, _, bottom = draw(Chart("x", "x", "step", "loss", lines)).frame
        return bottom - top

    assert height(9) > 0.95 * height(2)

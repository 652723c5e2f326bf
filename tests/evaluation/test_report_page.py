"""The HTML report: its numbers match the files, and a browser renders it without errors."""

import csv
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.report.charts import COLOURS, Chart, Line, draw, run_charts
from llmtrain.evaluation.report.page import write_report
from llmtrain.evaluation.report.records import gains, read_records, savings
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.run import pretrain

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[RunFolder]:
    """Return two runs of one model with different learning rates."""
    place = tmp_path_factory.mktemp("runs")
    quiet = {"log": lambda line: None, "warn": lambda line: None}
    log = {"every": 3, "sample_tokens": 4, "wandb": {"project": "</script><script>alert(1)"}}
    rates = {"slow": 1e-3, "fast<b>&": 1e-2}
    return [
        pretrain(tiny(optimizer={"lr": rate}, log=log), place / name, **quiet).run
        for name, rate in rates.items()
    ]


def write_run(folder: Path, losses: dict[str, dict[int, float]]) -> RunFolder:
    """Write a run with these validation losses, 10 tokens and half an hour per step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\ndata: {path: x}\ntrain: {batch_sequences: 16}\n")
    events = [
        {"step": step, "loss": 1.0, "lr": 0.1, "tokens": 10 * step, "seconds": 1800.0 * step}
        for step in (1, 2, 100)
    ]
    for step in sorted({step for curve in losses.values() for step in curve}):
        keys = {"raw": "val/loss"} | {
            label: f"val/loss/{label}" for label in losses if label != "raw"
        }
        found = {keys[label]: curve[step] for label, curve in losses.items() if step in curve}
        events.append({"step": step, "val/tokens": 99} | found)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return RunFolder(folder)


def test_savings_count_from_the_first_step_that_reaches_the_best_raw_loss(tmp_path: Path) -> None:
    raw = {10: 3.0, 20: 2.5, 30: 2.0, 40: 2.1}
    (record,) = read_records(
        [
            write_run(
                tmp_path / "run",
                {"raw": raw, "a": {10: 2.9, 20: 2.0, 40: 1.5}, "b": {20: 2.6}, "c": {40: 1.9}},
            )
        ]
    )
    rows = {row.label: row for row in savings(record)}
    assert list(rows) == ["a", "c", "raw", "b"]
    a = rows["a"]
    assert (a.step, a.loss, a.gain, a.reached, a.raw_step, a.steps_saved) == (
        40,
        1.5,
        0.5,
        20,
        30,
        10,
    )
    assert (a.tokens_saved, a.hours_saved) == (pytest.approx(100), pytest.approx(5))
    assert (rows["c"].reached, rows["c"].steps_saved) == (40, -10)
    assert (rows["b"].reached, rows["b"].tokens_saved, rows["raw"].reached) == (None, None, None)
    assert gains(record)["a"] == [(10, pytest.approx(0.1)), (20, 0.5), (40, pytest.approx(0.6))]


def test_points_match_the_positions_in_the_svg() -> None:
    line = Line("a & b $x$", [0, 50, 100], [1.0, None, 3.0], colour=2, marker=1)
    drawing = draw(Chart("x", "<x>", "step", "loss", [line, Line("b", [0, 100], [math.nan, 2.0])]))
    left, top, right, bottom = drawing.frame
    first, second = drawing.points
    assert (first["label"], first["colour"]) == ("a & b $x$", COLOURS[2])
    ((x0, y0, *texts), (x1, y1, *_)) = first["points"]
    assert texts == ["0", "1"]
    assert left == pytest.approx(x0, abs=0.2)
    assert left < x1 < right and top < y1 < y0 < bottom
    assert [point[2] for point in second["points"]] == ["100"]
    markers = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawing.svg)
    for x, y in ((x0, y0), (x1, y1)):
        assert any(math.dist((x, y), (float(a), float(b))) < 0.2 for a, b in markers)
    assert "a &amp; b $x$" in drawing.svg and "&lt;x&gt;" in drawing.svg


def test_known_standard_errors_are_drawn() -> None:
    line = Line("a", [0, 50, 100], [1.0, 2.0, 3.0])
    plain, barred = (
        draw(Chart("x", "x", "step", "loss", [line, replace(line, label="b", spread=spread)]))
        for spread in ((), (0.5, math.nan, 0.25))
    )
    assert "LineCollection" not in plain.svg
    (bars,) = re.findall(r'id="LineCollection_1">(.*?)</g>', barred.svg, re.DOTALL)
    lengths = [
        float(a) - float(b) for a, b in re.findall(r"M [\d.]+ ([\d.]+) \nL [\d.]+ ([\d.]+)", bars)
    ]
    assert len(lengths) == 2
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=1e-3)


@pytest.mark.slow
def test_the_page_is_self_contained_and_escaped(runs: list[RunFolder], tmp_path: Path) -> None:
    written = write_report(runs, tmp_path)
    page = written.page.read_text()
    assert not re.findall(r'(?:src|href|action)="(?!#|data:)[^"]*"|@import|url\((?!#)', page)
    assert "color-scheme: only light" in page  # dark mode would hide black curves
    assert "fast<b>" not in page and "fast&lt;b&gt;&amp;" in page
    assert page.count("</script>") == 2 and "alert(1)" in page

    class Ids(HTMLParser):
        found: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for key, value in attributes if key == "id"]

    Ids().feed(page)
    assert len(Ids.found) == len(set(Ids.found))
    assert write_report(runs, tmp_path / "again").page.read_bytes() == written.page.read_bytes()


def test_figures_and_tables_match_the_measurements(runs: list[RunFolder], tmp_path: Path) -> None:
    written = write_report(runs[:1], tmp_path)
    curves = written.records[0].curves
    with (tmp_path / "losses.csv").open() as file:
        rows = [
            (row["weights"], int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)
        ]
    assert rows == [(label, step, loss) for label, curve in curves.items() for step, loss in curve]
    with (tmp_path / "training.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [3, 6, 9, 12]
    assert written.plot.read_bytes().startswith(b"\x89PNG")
    for name in ("loss-tokens", "loss-hours", "gain", "learning-rate", "throughput", "memory"):
        assert (tmp_path / f"{name}.svg").is_file()
    assert not (tmp_path / "skipped.svg").exists()  # no step was skipped
    page = written.page.read_text()
    for shown in (
        "ema-0.9",
        f"{min(loss for _, loss in curves['raw']):.4f}",
        "→",
        "optimizer.lr",
        "torch",
    ):
        assert shown in page


def test_a_run_without_a_logged_key_gets_no_line(runs: list[RunFolder]) -> None:
    one, other = read_records(runs)
    silent = [
        {key: value for key, value in event.items() if key != "memory"} for event in other.training
    ]
    drawn = run_charts([one, replace(other, training=silent)])
    assert all(line.x for chart in drawn for line in chart.lines)
    assert {chart.name: len(chart.lines) for chart in drawn}["memory"] == 1


def test_a_run_without_losses_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not contain validation losses"):
        write_report([write_run(tmp_path / "run", {})], tmp_path / "out")
    assert not (tmp_path / "out").exists()


PROBE = """
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument, figure = inside.querySelector(".chart.steps");
  for (const each of inside.querySelectorAll(".chart"))
    each.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
  const {dataset: {ready}, scrollWidth: wide} = inside.documentElement;
  const tip = figure.querySelector(".tip").textContent;
  const found = {ready, wide, figure: figure.clientWidth, tip};
  const output = document.createElement("pre");
  output.textContent = JSON.stringify(found);
  document.body.append(output);
};
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_renders_the_page(runs: list[RunFolder], tmp_path: Path, width: int) -> None:
    written = write_report(runs, tmp_path)
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<body><iframe src="report.html" style="width: {width}px; border: 0"></iframe>{PROBE}'
    )
    done = subprocess.run(
        [CHROMIUM or "", "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu",
         "--allow-file-access-from-files",
         "--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1400,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    shown = re.search(r"<pre>(\{.*\})</pre>", done.stdout)
    assert shown is not None, done.stdout[-500:]
    found = json.loads(shown[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert found["ready"] == "yes"
    assert found["wide"] == width  # no horizontal overflow
    assert 340 < found["figure"] < 640
    last = written.records[0].curves["raw"][-1][1]
    assert "step 12" in found["tip"]
    assert f"slow: raw{last:.4f}" in found["tip"]


def test_a_logarithmic_axis_spaces_equal_ratios_equally() -> None:
    drawn = draw(
        Chart(
            "rates",
            "Rates",
            "rate",
            "loss",
            [Line("a", [1e-3, 1e-2, 1e-1], [1.0, 2.0, 3.0])],
            log_x=True,
        )
    )
    first, second, third = (point[0] for point in drawn.points[0]["points"])
    assert second - first == pytest.approx(third - second, abs=0.2) and second > first

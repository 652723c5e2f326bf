"""The list of runs: what state each is in, how far it is, how good and how large."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.report.run_list import list_runs
from llmtrain.storage.commit import is_locked, locked_folder
from llmtrain.training.run import pretrain


def test_the_runs_of_a_folder(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    llmtrain: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    place = tmp_path / "runs"
    done = pretrain(tiny(), place / "done", log=lambda line: None).run
    half = place / "half"
    half.mkdir()
    (half / "config.yaml").write_text(
        done.config.read_text().replace("max_steps: 12", "max_steps: 1200")
    )
    (half / "metrics.jsonl").write_text(done.metrics.read_text())
    for other in ("broken", "busy"):
        (place / other).mkdir()
        (place / other / "config.yaml").write_text(done.config.read_text())
    (place / "broken" / "metrics.jsonl").write_text("[]\n")
    (place / "no run").mkdir()

    with locked_folder(place / "busy"):
        assert is_locked(place / "busy")
        shown = llmtrain("runs", cwd=tmp_path)
        entries = {entry.name: entry for entry in list_runs(place)}
    assert not is_locked(place / "busy")
    assert {name: entry.state for name, entry in entries.items()} == {
        "done": "finished", "half": "interrupted", "broken": "damaged", "busy": "running",
    }  # fmt: skip
    losses = [e for e in map(json.loads, done.metrics.read_text().splitlines()) if "val/loss" in e]
    for name, steps in (("done", 12), ("half", 1200)):
        entry = entries[name]
        assert (entry.step, entry.max_steps) == (12, steps)
        assert entry.raw is not None and entry.average is not None
        assert entry.raw.loss == min(e["val/loss"] for e in losses)
        assert (entry.average.label, entry.average.loss) == (
            "ema-0.9",
            min(e["val/loss/ema-0.9"] for e in losses),
        )
    assert entries["done"].bytes == sum(
        p.stat().st_size for p in done.path.rglob("*") if p.is_file()
    )

    assert shown.returncode == 0
    assert "1,200" in shown.stdout and "running" in shown.stdout
    assert "broken/metrics.jsonl, line 1" in shown.stderr
    described = json.loads(llmtrain("runs", "--json", cwd=tmp_path).stdout)
    assert {each["name"]: each["state"] for each in described} == {
        "done": "finished", "half": "interrupted", "broken": "damaged", "busy": "interrupted",
    }  # fmt: skip
    assert all(each["age"] > 0 for each in described)


def test_where_no_run_is(
    tmp_path: Path, llmtrain: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        list_runs(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    shown = llmtrain("runs", cwd=tmp_path)
    assert (shown.returncode, shown.stdout) == (0, "")
    assert "contains no runs" in shown.stderr

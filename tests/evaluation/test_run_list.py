"""The list of runs: state, progress, best losses and size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import invoke

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.report.run_list import list_runs
from llmtrain.storage.locks import is_locked, locked_folder
from llmtrain.training.run import pretrain


def test_runs_are_listed_with_state_losses_and_size(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
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
        shown = invoke("runs", cwd=tmp_path)
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

    assert shown.code == 0
    assert "1,200" in shown.stdout and "running" in shown.stdout
    assert "broken/metrics.jsonl, line 1" in shown.stderr
    described = json.loads(invoke("runs", "--json", cwd=tmp_path).stdout)
    assert {each["name"]: each["state"] for each in described} == {
        "done": "finished", "half": "interrupted", "broken": "damaged", "busy": "interrupted",
    }  # fmt: skip
    assert all(each["age"] > 0 for each in described)


def test_a_folder_without_runs(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        list_runs(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    shown = invoke("runs", cwd=tmp_path)
    assert (shown.code, shown.stdout) == (0, "")
    assert "contains no runs" in shown.stderr

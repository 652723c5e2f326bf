"""The sweep: its losses match written averages, its savings are counted correctly."""

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.averaging.sweep import Candidate, SweepResult, parse_sweep, summary, sweep, write_csv
from llmtrain.checkpoints.resolve import Target
from llmtrain.checkpoints.series import run_series
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.run import pretrain

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(
        averages=[], train__max_steps=14, checkpoint={"snapshot_every": 1, "state_every": 14}
    )
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    return pretrain(config, folder, log=lambda line: None).run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained, tmp_path / "runs" / "tiny"))


def test_parses_every_combination_once() -> None:
    requests = parse_sweep("window=3,5 every=200,400 method=lawa,ema decay=0.5,0.9")
    assert AverageRequest(method="lawa", window=3, every=200) in requests
    assert AverageRequest(method="ema", window=5, every=400, decay=0.9) in requests
    assert len(requests) == 4 + 8
    assert parse_sweep("every=2 from=4 method=swa") == [
        AverageRequest(method="swa", every=2, start=4)
    ]


@pytest.mark.parametrize(
    "text",
    ["window", "windows=3", "window=three", "window=3,", "window=3 window=5", "window=3 decay=0.9"],
)
def test_rejects_invalid_sweep(text: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        parse_sweep(text)


def test_unknown_key_lists_the_keys() -> None:
    with pytest.raises(UserError, match="'windows=3' is not a known key") as caught:
        parse_sweep("windows=3")
    assert caught.value.hint is not None and "half-life" in caught.value.hint


def test_losses_match_the_written_averages(run: RunFolder) -> None:
    result = sweep(run, parse_sweep("method=lawa,linear window=2,3 every=2,3"), at="all")
    assert len(result.candidates) == 8
    assert sorted(result.raw.losses) == list(range(3, 15))
    series = run_series(run)
    for candidate in (result.best, result.candidates[-1]):
        assert candidate.request is not None
        (written,) = average(series, make_specs(series, candidate.request))
        (row,) = measure_losses(
            [Target("x", 14, written.spec.target, run)], EvalOptions(), lambda *progress: None
        )
        assert row.loss == pytest.approx(candidate.losses[14], rel=1e-6)
    (raw,) = measure_losses(
        [Target("raw", 9, run.snapshot(9), run)], EvalOptions(), lambda *progress: None
    )
    assert raw.loss == pytest.approx(result.raw.losses[9], rel=1e-6)
    assert result.best.losses[14] == min(c.losses[14] for c in result.candidates)


def test_compares_a_single_step(run: RunFolder) -> None:
    requests = parse_sweep("window=2,3 every=2,5")
    everywhere = {c.label: c.losses for c in sweep(run, requests, at="all").candidates}
    for at, step in ((9, 9), ("last", 14)):
        alone = sweep(run, requests, at=at)
        assert list(alone.raw.losses) == [step]
        assert {c.label: c.losses for c in alone.candidates} == {
            label: {step: losses[step]} for label, losses in everywhere.items() if step in losses
        }
    assert sweep(run, requests, at=6).skipped[-1] == "lawa-3x5 has no window that ends there"
    with pytest.raises(UserError, match="no candidate has a window that ends at step 2"):
        sweep(run, requests, at=2)


@pytest.mark.slow
def test_sweeps_widths_of_posthoc_emas(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    kept = [{"kind": "power-ema", "sigma_rel": width} for width in (0.05, 0.1)]
    config = tiny(
        averages=kept, train__max_steps=14, checkpoint={"snapshot_every": 1, "state_every": 14}
    )
    run = pretrain(config, tmp_path / "tiny", log=lambda line: None).run
    result = sweep(
        run, parse_sweep("method=lawa,posthoc-ema sigma-rel=0.07,0.15 window=2 every=2"), at="last"
    )
    assert len(result.candidates) == 3
    for candidate in result.candidates:
        assert candidate.request is not None
        (written,) = average(run_series(run), make_specs(run_series(run), candidate.request))
        (row,) = measure_losses(
            [Target("x", 14, written.spec.target, run)], EvalOptions(), lambda *progress: None
        )
        assert row.loss == pytest.approx(candidate.losses[14], rel=1e-6)


def test_writes_nothing(run: RunFolder) -> None:
    before = sorted(run.path.rglob("*"))
    sweep(run, parse_sweep("window=2 every=2"))
    assert sorted(run.path.rglob("*")) == before


@pytest.mark.slow
def test_group_size_does_not_change_the_losses(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(run, parse_sweep("window=2,4 every=1,2"))
    monkeypatch.setattr("llmtrain.averaging.sweep.MEMORY", 1)
    single = sweep(run, parse_sweep("window=2,4 every=1,2"))
    assert {c.label: c.losses for c in whole.candidates} == {
        c.label: c.losses for c in single.candidates
    }


def test_skips_candidates_without_a_window(run: RunFolder) -> None:
    result = sweep(run, parse_sweep("window=2,50 every=2"))
    assert [candidate.label for candidate in result.candidates] == ["lawa-2x2"]
    assert "no window of 50 checkpoints" in result.skipped[0]
    with pytest.raises(UserError, match="no candidate has a window"):
        sweep(run, parse_sweep("window=50 every=2"))


def test_savings_start_at_the_first_step_with_the_final_raw_loss(
    run: RunFolder, tmp_path: Path
) -> None:
    raw = Candidate("raw", None, {6: 3.0, 10: 2.5, 14: 2.0})
    good = Candidate("good", None, {6: 2.4, 10: 1.9, 14: 1.8})
    poor = Candidate("poor", None, {10: 2.6, 14: 2.1})
    result = SweepResult(raw, [good, poor], [], 100)
    first, second = summary(result, run)
    assert (first.reached, first.steps_saved, first.tokens_saved) == (10, 4, 4 * 8 * 16)
    assert first.best
    assert first.delta == pytest.approx(-0.2)
    assert first.hours_saved is not None
    assert first.hours_saved > 0
    assert (second.reached, second.steps_saved, second.hours_saved) == (None, None, None)
    write_csv(result, tmp_path / "sweep.csv")
    rows = list(csv.reader((tmp_path / "sweep.csv").open()))
    assert rows == [
        ["step", "raw", "good", "poor"],
        ["6", "3.0", "2.4", ""],
        ["10", "2.5", "1.9", "2.6"],
        ["14", "2.0", "1.8", "2.1"],
    ]


@pytest.mark.slow
def test_command_writes_the_best(run: RunFolder, llmtrain: Command) -> None:
    done = llmtrain(
        "average",
        run.path,
        "--sweep",
        "window=2,3 every=2,3",
        "--write-best",
        "--json",
        cwd=run.path.parent,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (best,) = [row for row in document["candidates"] if row["best"]]
    (written,) = document["written"]
    assert written["label"] == best["label"]
    assert best["losses"]["14"] == best["loss"]
    assert best["delta"] == best["loss"] - document["raw"]["losses"]["14"]
    assert (Path(written["path"]) / "model.safetensors").exists()
    assert (run.report / "sweep.png").read_bytes().startswith(b"\x89PNG")
    again = llmtrain(
        "average", run.path, "--sweep", "window=2", "--every", "2", cwd=run.path.parent
    )
    assert again.returncode == 2
    assert "--sweep takes" in again.stderr


@pytest.mark.parametrize("text", ["window=0 every=2", "window=3 every=0", "window=-2 every=2"])
def test_rejects_invalid_values(run: RunFolder, text: str) -> None:
    with pytest.raises(UserError, match="is not between 1 and"):
        sweep(run, parse_sweep(text))


def test_rejects_duplicate_snapshots(run: RunFolder) -> None:
    shutil.rmtree(run.snapshot(9))
    shutil.copytree(run.snapshot(8), run.snapshot(9))
    with pytest.raises(UserError, match="same content"):
        sweep(run, parse_sweep("window=3 every=1"))


def test_savings_end_at_the_first_step_with_the_final_raw_loss(run: RunFolder) -> None:
    raw = {1: 3.0, 2: 2.0, 3: 1.9, 4: 2.5}
    result = SweepResult(
        Candidate("raw", None, raw), [Candidate("a", None, {1: 2.4, 4: 2.0})], [], 10
    )
    (row,) = summary(result, run)
    assert (row.reached, row.steps_saved) == (1, 2 - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [["--dtype", "float16"], ["--checks", "strict"], ["--show-weights"], ["--no-verify"]]
)
def test_rejects_options_that_a_sweep_ignores(
    run: RunFolder, llmtrain: Command, option: list[str]
) -> None:
    result = llmtrain(
        "average", run.path, "--sweep", "window=3 every=1", *option, cwd=run.path.parent
    )
    assert result.returncode == 2
    alone = llmtrain("average", run.path, "--every", "1", "--write-best", cwd=run.path.parent)
    assert alone.returncode == 2

"""Targets of a run, cached losses, and the curves of the report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import invoke

from llmtrain.checkpoints.resolve import Target, find_targets
from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.curves import loss_curves, newest_results
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions
from llmtrain.evaluation.report.page import write_report
from llmtrain.evaluation.results import EvalResult, stored_results
from llmtrain.evaluation.text import measure_text
from llmtrain.storage.integrity import write_integrity
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.run import pretrain


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return pretrain(tiny(), tmp_path_factory.mktemp("trained") / "run", log=lambda line: None).run


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """Return a fresh copy of a trained run."""
    return RunFolder(shutil.copytree(trained.path, tmp_path / "run"))


def measure_all(
    targets: list[Target], settings: EvalOptions | None = None
) -> tuple[list[EvalResult], set[str]]:
    """Return the results, and the paths that were computed rather than cached."""
    computed: set[str] = set()
    rows = measure_losses(
        targets,
        settings or EvalOptions(),
        lambda target, *progress: computed.add(str(target.path)),
    )
    return rows, computed


def test_a_run_resolves_to_its_averages_and_matching_snapshots(run: RunFolder) -> None:
    found = [(t.label, t.step) for t in find_targets(run.path, every_snapshot=False)]
    assert found == [
        ("raw", 4),
        ("ema-0.9", 4),
        ("raw", 8),
        ("ema-0.9", 8),
        ("raw", 12),
        ("ema-0.9", 12),
    ]
    assert len(find_targets(run.path, every_snapshot=True)) == 5 + 3


def test_a_run_without_averages_resolves_to_its_newest_snapshot(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = pretrain(tiny(averages=[]), tmp_path / "run", log=lambda line: None).run
    assert [t.step for t in find_targets(run.path, every_snapshot=False)] == [12]


def test_an_average_is_compared_with_its_raw_weights(run: RunFolder) -> None:
    found = [t.label for t in find_targets(run.average("ema-0.9", 8), every_snapshot=False)]
    assert found == ["raw", "ema-0.9"]
    assert [t.label for t in find_targets(run.snapshot(8), every_snapshot=False)] == ["raw"]


def test_invalid_targets_raise(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="neither a run nor a folder of weights"):
        find_targets(tmp_path, every_snapshot=False)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="no snapshot yet"):
        find_targets(tmp_path, every_snapshot=False)
    with pytest.raises(RunFailed, match="cannot reach the hub") as caught:
        find_targets("runz/demo", every_snapshot=False)
    assert "the folder runz/demo does not exist" in caught.value.hint


def test_losses_match_training_and_are_cached(run: RunFolder) -> None:
    targets = find_targets(run.path, every_snapshot=False)
    rows, computed = measure_all(targets)
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    last = next(e for e in logged if e["step"] == 12 and "val/loss" in e)
    by_label = {row.label: row for row in rows if row.step == 12}
    assert by_label["raw"].loss == pytest.approx(last["val/loss"], rel=1e-6)
    assert by_label["ema-0.9"].loss == pytest.approx(last["val/loss/ema-0.9"], rel=1e-6)
    assert by_label["raw"].delta == 0.0
    assert by_label["ema-0.9"].delta == by_label["ema-0.9"].loss - by_label["raw"].loss
    assert len(computed) == len(targets)
    again, computed_again = measure_all(targets)
    assert again == rows
    assert computed_again == set()


def test_results_of_a_renamed_run_have_its_new_name(run: RunFolder) -> None:
    measure_all(find_targets(run.path, every_snapshot=False))
    renamed = RunFolder(run.path.rename(run.path.with_name("renamed")))
    rows, computed = measure_all(find_targets(renamed.path, every_snapshot=False))
    assert computed == set()
    for row in (*rows, *stored_results(renamed)):
        assert row.run == "renamed"
        assert Path(row.path).is_relative_to(renamed.path)


def test_other_tokens_or_another_split_are_measured_again(run: RunFolder) -> None:
    targets = find_targets(run.snapshot(12), every_snapshot=False)
    losses = {
        measure_all(targets, s)[0][0].loss
        for s in (EvalOptions(), EvalOptions(tokens=50), EvalOptions(split="train"))
    }
    assert len(losses) == 3
    assert len(stored_results(run)) == 3


def test_a_missing_data_folder_raises(run: RunFolder, tmp_path: Path) -> None:
    targets = find_targets(run.snapshot(12), every_snapshot=False)
    with pytest.raises(UserError, match="nowhere contains no prepared data"):
        measure_all(targets, EvalOptions(data=tmp_path / "nowhere"))


def test_deltas_compare_results_of_one_precision(run: RunFolder) -> None:
    targets = find_targets(run.average("ema-0.9", 12), every_snapshot=False)
    for precision in ("float32", "bfloat16"):
        measure_all(targets, EvalOptions(precision=precision))
    raw = {row.precision: row.loss for row in stored_results(run) if row.label == "raw"}
    deltas = {row.precision: row.delta for row in stored_results(run) if row.label == "ema-0.9"}
    losses = {row.precision: row.loss for row in stored_results(run) if row.label == "ema-0.9"}
    assert len(raw) == 2
    assert deltas == {precision: losses[precision] - raw[precision] for precision in raw}


def test_a_folder_outside_a_run_needs_data(
    run: RunFolder, data_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    run.snapshot(12).rename(moved)
    targets = find_targets(moved, every_snapshot=False)
    with pytest.raises(UserError, match="does not belong to a run"):
        measure_all(targets)
    (row,), _ = measure_all(targets, EvalOptions(data=data_folder))
    assert (row.label, row.step, row.delta) == ("elsewhere", 12, None)


def test_different_token_counts_cause_a_warning(
    tiny: Callable[..., RunConfig], data_folder: Path, tmp_path: Path
) -> None:
    run = pretrain(tiny(eval__tokens=50), tmp_path / "run", log=lambda line: None).run
    run.snapshot(10).rename(tmp_path / "elsewhere")
    targets = [
        target
        for path in (run.snapshot(12), tmp_path / "elsewhere")
        for target in find_targets(path, every_snapshot=False)
    ]
    warned: list[str] = []
    rows = measure_losses(
        targets, EvalOptions(data=data_folder), lambda *progress: None, warn=warned.append
    )
    assert rows[0].tokens == 49
    assert rows[1].tokens > 49
    assert "--tokens N" in warned[0]
    measure_losses(
        targets,
        EvalOptions(data=data_folder, tokens=50),
        lambda *progress: None,
        warn=warned.append,
    )
    assert sum("to compare" in warning for warning in warned) == 1


def test_nan_weights_raise(run: RunFolder) -> None:
    from safetensors.torch import load_file, save_file

    path = run.snapshot(12) / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.weight"][:] = float("nan")
    save_file(tensors, path)
    write_integrity(path.parent)
    with pytest.raises(RunFailed, match="is nan"):
        measure_all(find_targets(run.snapshot(12), every_snapshot=False))


def test_the_report_contains_each_label_and_a_plot(run: RunFolder, tmp_path: Path) -> None:
    assert newest_results(run) == []
    measure_all(find_targets(run.path, every_snapshot=False))
    assert [(row.label, row.step) for row in newest_results(run)] == [("raw", 12), ("ema-0.9", 12)]
    curves = loss_curves(run)
    assert list(curves) == ["raw", "ema-0.9"]
    assert [step for step, _ in curves["raw"]] == [4, 6, 8, 12]
    assert write_report([run], tmp_path / "report").plot.read_bytes().startswith(b"\x89PNG")


def test_changed_weights_are_measured_again(run: RunFolder) -> None:
    before, _ = measure_all(find_targets(run.snapshot(12), every_snapshot=False))
    path = run.snapshot(12) / "model.safetensors"
    path.write_bytes((run.snapshot(4) / "model.safetensors").read_bytes())
    write_integrity(path.parent)
    after, computed = measure_all(find_targets(run.snapshot(12), every_snapshot=False))
    assert computed
    assert after[0].loss != before[0].loss
    assert [row.loss for row in stored_results(run)] == [after[0].loss]


def test_a_result_that_cannot_be_cached_is_returned_with_a_warning(
    run: RunFolder, text_file: Path
) -> None:
    shutil.rmtree(run.evals, ignore_errors=True)
    run.evals.write_text("a file instead of the folder")
    targets, warned = find_targets(run.path, every_snapshot=False)[-1:], list[str]()
    (row,) = measure_losses(targets, EvalOptions(), lambda *done: None, warn=warned.append)
    (text,) = measure_text(
        targets, text_file, EvalOptions(), lambda *done: None, warn=warned.append
    )
    assert row.loss > 0 < text.loss
    assert len(warned) == 2 and all(line.startswith("result not cached: ") for line in warned)


def test_a_result_with_other_fields_is_measured_again(run: RunFolder) -> None:
    measure_all(find_targets(run.snapshot(12), every_snapshot=False))
    (path,) = run.evals.iterdir()
    document = json.loads(path.read_text())
    del document["run"]
    path.write_text(json.dumps(document))
    assert stored_results(run) == []
    _, computed = measure_all(find_targets(run.snapshot(12), every_snapshot=False))
    assert computed


def test_curves_compare_equal_windows_only(run: RunFolder) -> None:
    measure_all(find_targets(run.path, every_snapshot=False), EvalOptions(tokens=50))
    # Training measured steps 6 and 12 on more tokens.
    assert [step for step, _ in loss_curves(run)["raw"]] == [6, 12]
    measure_all(find_targets(run.path, every_snapshot=False))
    assert newest_results(run)[0].tokens > newest_results(run)[-1].tokens == 49
    assert [step for step, _ in loss_curves(run)["raw"]] == [4, 6, 8, 12]


def test_a_small_split_is_reported_with_its_standard_error(run: RunFolder, tmp_path: Path) -> None:
    """Four tokens are one window, which has no standard error."""
    few = invoke("eval", run.path, "--tokens", "4", "--json", cwd=tmp_path)
    assert "val split: 1 window(s) are too few for a reliable loss" in few.stderr
    assert few.stderr.count("too few") == 1
    assert {row["stderr"] for row in json.loads(few.stdout)} == {None}
    more = invoke("eval", run.path, "--json", cwd=tmp_path)
    assert "too few" not in more.stderr
    assert all(0 < row["stderr"] < 1 for row in json.loads(more.stdout))
    table = invoke("eval", run.path, cwd=tmp_path).stdout
    assert f"{json.loads(more.stdout)[0]['stderr']:.4f}" in table and "±" in table


def test_results_without_a_standard_error_are_shown(run: RunFolder, tmp_path: Path) -> None:
    """Earlier versions did not store a standard error."""
    first = json.loads(invoke("eval", run.path, "--json", cwd=tmp_path).stdout)
    for path in run.evals.iterdir():
        document = json.loads(path.read_text())
        del document["stderr"]
        path.write_text(json.dumps(document))
    again = json.loads(invoke("eval", run.path, "--json", cwd=tmp_path).stdout)
    assert [row | {"stderr": None} for row in first] == again
    assert "n/a" in invoke("eval", run.path, cwd=tmp_path).stdout
    assert len(stored_results(run)) == len(first)

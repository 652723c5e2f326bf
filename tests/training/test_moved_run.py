"""A run folder that is moved, deleted or replaced while a command writes to it."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_training import Build, quiet

import llmtrain.averaging.average as averaging
import llmtrain.evaluation.loss as evaluation
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.resolve import find_targets
from llmtrain.checkpoints.series import run_series
from llmtrain.config.loading import dump_config
from llmtrain.errors import RunFailed
from llmtrain.evaluation.options import EvalOptions
from llmtrain.storage.run_folder import RunFolder, step_folders


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True], ids=["moved", "moved-and-replaced"])
def test_training_stops_when_its_folder_is_moved(
    tiny: Build, tmp_path: Path, replaced: bool
) -> None:
    config = tiny(name="run", train__max_steps=100_000)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    process = subprocess.Popen(
        [Path(sys.executable).parent / "llmtrain", "pretrain", "--config", "run.yaml"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run, moved = RunFolder(tmp_path / "runs" / "run"), RunFolder(tmp_path / "runs" / "moved")
    while not step_folders(run.states):
        assert process.poll() is None
        time.sleep(0.05)
    run.path.rename(moved.path)
    if replaced:
        run.path.mkdir()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "was moved or deleted while this command was writing to it" in errors
    assert "Traceback" not in errors
    assert list(run.path.iterdir()) == [] if replaced else not run.path.exists()
    last = max(step_folders(moved.states))
    config = tiny(name="run", train__max_steps=last + 4)
    quiet(config, moved.path)
    steps = [json.loads(line)["step"] for line in moved.metrics.read_text().splitlines()]
    assert max(steps) == last + 4


@pytest.fixture
def run(tiny: Build, tmp_path: Path) -> RunFolder:
    return quiet(tiny(), tmp_path / "runs" / "run")


def moving(run: RunFolder, call: Callable[..., object]) -> Callable[..., object]:
    """Return `call`, which moves the run when it is called."""

    def move_and_call(*arguments: object, **options: object) -> object:
        run.path.rename(run.path.with_name("moved"))
        return call(*arguments, **options)

    return move_and_call


def test_results_of_a_moved_run_are_not_stored(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = evaluation.evaluate

    def move_after(*arguments: object, **options: object) -> object:
        result = measure(*arguments, **options)  # type: ignore[arg-type]  # passed through
        run.path.rename(run.path.with_name("moved"))
        return result

    monkeypatch.setattr(evaluation, "evaluate", move_after)
    warnings: list[str] = []
    targets = find_targets(run.path, every_snapshot=False)[:1]
    evaluation.measure_losses(targets, EvalOptions(), lambda *_: None, warn=warnings.append)
    (warning,) = warnings
    assert warning.startswith("result not cached: ") and "is not a run" in warning
    assert not run.path.exists()


@pytest.mark.parametrize("moment", ["require_room", "merge"])
def test_an_average_of_a_moved_run_fails(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    request = AverageRequest(every=2, window=2)
    series = run_series(run)
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match="moved or deleted"):
        patch.setattr(averaging, moment, moving(run, getattr(averaging, moment)))
        averaging.average(series, make_specs(series, request))
    assert not run.path.exists()
    series = run_series(RunFolder(run.path.with_name("moved")))
    (written,) = averaging.average(series, make_specs(series, request))
    assert not written.cached


def test_a_deleted_run_is_not_created_again(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmtrain.training.run as module

    prepare = module.find_micro_batch

    def delete_and_prepare(*arguments: object) -> None:
        shutil.rmtree(tmp_path / "run")
        prepare(*arguments)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(module, "find_micro_batch", delete_and_prepare)
    with pytest.raises(RunFailed, match="moved or deleted"):
        quiet(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()

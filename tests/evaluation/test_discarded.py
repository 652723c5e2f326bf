"""Averages whose inputs a rewind has discarded are not compared with the new attempt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import invoke

from llmtrain.config.schema import RunConfig
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.checkpoint import set_aside
from llmtrain.training.run import pretrain

LABEL = "lawa-3x2"


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average of the snapshots of steps 8, 10 and 12."""
    place = tmp_path_factory.mktemp("trained")
    pretrain(tiny(averages=[]), place / "runs" / "run", log=lambda line: None)
    assert invoke("average", "runs/run", "--every", "2", "--window", "3", cwd=place).code == 0
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "place")


def rewrite(run: RunFolder, step: int) -> None:
    """Set a snapshot aside and write another one, as a rewind does."""
    set_aside(run.snapshot(step), "rewound")
    with staged_folder(run.snapshot(step)) as folder:
        for path in run.snapshot(4).iterdir():
            if path.name != "integrity.json":
                shutil.copy(path, folder)


def rows(place: Path) -> dict[str, dict[str, object]]:
    outcome = invoke("eval", "runs/run", "--json", cwd=place)
    assert outcome.code == 0, outcome
    return {row["label"]: row for row in json.loads(outcome.stdout)}


def test_an_average_of_the_present_snapshots_is_compared(place: Path) -> None:
    row = rows(place)[LABEL]
    assert row["delta"] is not None
    assert row["discarded"] is False


def test_a_deleted_input_is_not_a_discarded_one(place: Path) -> None:
    shutil.rmtree(RunFolder(place / "runs/run").snapshot(8))
    assert rows(place)[LABEL]["discarded"] is False


def test_a_moved_run_keeps_its_averages(place: Path) -> None:
    (place / "runs/run").rename(place / "runs/other")
    outcome = invoke("eval", "runs/other", "--json", cwd=place)
    assert [row["discarded"] for row in json.loads(outcome.stdout)] == [False, False]


def test_a_copy_is_compared_with_its_own_snapshots(place: Path) -> None:
    """The provenance of a copy contains the paths of the original run, which are ignored."""
    shutil.copytree(place / "runs/run", place / "runs/copy")
    rewrite(RunFolder(place / "runs/run"), 10)
    outcome = invoke("eval", "runs/copy", "--json", cwd=place)
    assert [row["discarded"] for row in json.loads(outcome.stdout)] == [False, False]


@pytest.mark.parametrize("step", [8, 12])
@pytest.mark.parametrize("again", [False, True])
def test_eval_and_report_leave_out_discarded_averages(place: Path, step: int, again: bool) -> None:
    run = RunFolder(place / "runs/run")
    assert rows(place)[LABEL]["delta"] is not None  # now cached
    if again:
        rewrite(run, step)
    else:
        set_aside(run.snapshot(step), "rewound")
    found = rows(place)
    assert (found[LABEL]["delta"], found[LABEL]["discarded"]) == (None, True)
    outcome = invoke("eval", "runs/run", cwd=place)
    warnings = [line for line in outcome.stderr.splitlines() if "discarded" in line]
    assert len(warnings) == 1
    assert f"averages/{LABEL}/step-00000012" in warnings[0]
    assert f"{LABEL} (discarded inputs)" in outcome.stdout
    report = invoke("report", "runs/run", cwd=place)
    assert f"run: left out averages of snapshots that a rewind discarded: {LABEL}" in report.stderr
    page = (run.report / "report.html").read_text()
    assert f"{LABEL} at step 12." in page
    losses = (run.report / "losses.csv").read_text()
    assert f"run,{LABEL}," not in losses
    assert "run,raw," in losses


def test_texts_and_tasks_are_not_compared_either(place: Path, text_file: Path) -> None:
    rewrite(RunFolder(place / "runs/run"), 10)
    outcome = invoke("eval", "runs/run", "--text", text_file, cwd=place)
    (line, *_) = [line for line in outcome.stdout.splitlines() if "discarded inputs" in line]
    assert line.split()[-1] == "n/a"

"""Names of runs, paths and repositories, and the series and weights behind them."""

from pathlib import Path

import pytest
from tiny_runs import MakeRun, model_at, write_checkpoint

from llmtrain.checkpoints.resolve import Repository, find_series, find_targets, resolve
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_resolve_distinguishes_runs_paths_and_repositories(
    tmp_path: Path, make_run: MakeRun
) -> None:
    make_run([10])
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for run in (resolve("runs/tiny"), resolve(None)):
        assert isinstance(run, RunFolder) and run.path == Path("runs/tiny")
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("owner/other") == Repository("owner/other", None)
    assert resolve("owner/other@refs/pr/1") == Repository("owner/other", "refs/pr/1")


@pytest.mark.parametrize("word", ["nowhere", "runs/nowhere", "./a/b", "/a/b", "a/b/c", "a/b@"])
def test_unknown_name_is_an_error(word: str) -> None:
    with pytest.raises(UserError, match=rf"key: {word} does not exist"):
        resolve(word, key="key")


def test_find_series_of_a_run(make_run: MakeRun) -> None:
    made = make_run([10, 20, 30])
    assert find_series(str(made.path)).steps == [10, 20, 30]
    assert find_series(None).name == "runs/tiny"


@pytest.mark.parametrize("word", ["nowhere", "no/such/thing", "empty"])
def test_find_series_without_checkpoints_is_an_error(tmp_path: Path, word: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=word):
        find_series(word)


def test_find_series_rejects_hub_options_for_folders(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "s" / "step10", model_at(10))
    with pytest.raises(UserError, match="is not on the hub"):
        find_series("s", revision_pattern="step{N}")
    with pytest.raises(UserError, match="is not on the hub"):
        find_series("s", discard=True)


def test_find_series_rejects_a_single_revision() -> None:
    with pytest.raises(UserError, match="owner/name@main is one revision"):
        find_series("owner/name@main")


def test_find_targets_rejects_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor a folder of weights"):
        find_targets(tmp_path)

"""Shards that changed after their preparation, and the list of intact shards."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke, refused
from tiny_training import Build

from llmtrain.config.loading import dump_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.shard_check import require_intact
from llmtrain.data.shards import HEADER_BYTES, TokenFile
from llmtrain.data.token_data import open_data
from llmtrain.errors import UserError
from llmtrain.storage import cache
from llmtrain.storage.integrity import Algorithm, Digest, digest_of
from llmtrain.storage.run_folder import RunFolder

CHANGED = "the data has changed since it was prepared: "


@pytest.fixture
def data(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files hashed so far, with an empty cache and a clock by which all files are old."""
    paths: list[Path] = []

    def record(path: Path, algorithm: Algorithm = "blake3") -> Digest:
        paths.append(path)
        return digest_of(path, algorithm)

    later = time.time_ns() + 10 * 10**9
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "time_ns", lambda: later)
    monkeypatch.setattr(cache, "digest_of", record)
    return paths


def change(folder: Path, split: str = "train") -> None:
    """Change the first token of a shard, but neither its size nor its modification time."""
    path = folder / f"{split}-00000.bin"
    info = path.stat()
    content = path.read_bytes()
    first = HEADER_BYTES
    path.write_bytes(content[:first] + bytes([content[first] ^ 1]) + content[first + 1 :])
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def files(folder: Path) -> list[TokenFile]:
    data = open_data(folder)
    return [*data.files["train"], *data.files["val"]]


def test_a_shard_is_hashed_once_and_again_after_a_change(data: Path, hashed: list[Path]) -> None:
    file = files(data)[0]
    require_intact([file, file])
    require_intact([file])
    assert hashed == [file.path]
    change(data)
    for _ in range(2):
        with pytest.raises(UserError, match=r"train-00000\.bin does not have the recorded BLAKE3"):
            require_intact([file])
    assert hashed == [file.path] * 2
    shutil.rmtree(data)
    with pytest.raises(UserError, match=r"cannot read .*train-00000\.bin: No such file"):
        require_intact([file])


def write_config(folder: Path, config: RunConfig) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_on_changed_data_commits_no_weights(
    tiny: Build, data: Path, tmp_path: Path, hashed: list[Path], split: str
) -> None:
    change(data, split)
    config = write_config(tmp_path, tiny(data__path=str(data)))
    arguments: list[Any] = ["pretrain", "--config", config, "--run-dir", "run"]
    outcome = invoke(*arguments, cwd=tmp_path)
    assert outcome.code == 2
    assert f"error: {CHANGED}{data}/{split}-00000.bin" in outcome.stderr
    run = RunFolder(tmp_path / "run")
    assert not list(run.path.glob("s*/step-*")) and not list(run.path.glob("averages/*/*"))


def test_resuming_with_changed_data_is_refused(
    tiny: Build, data: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    config = write_config(tmp_path, tiny(data__path=str(data)))
    command: list[Any] = ["pretrain", "--config", config, "--run-dir", "run"]
    assert invoke(*command, cwd=tmp_path).code == 0
    run = RunFolder(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "state").rglob("*.*")}
    metrics = run.metrics.read_bytes()
    change(data)
    outcome = invoke(*command, "--set", "train.max_steps=16", cwd=tmp_path)
    assert outcome.code == 2
    assert f"error: {CHANGED}{data}/train-00000.bin" in outcome.stderr
    assert {path: path.read_bytes() for path in run.states.rglob("*.*")} == before
    assert run.metrics.read_bytes() == metrics


def test_evaluating_changed_data_stores_no_result(
    tiny: Build, data: Path, tmp_path: Path, hashed: list[Path]
) -> None:
    config = write_config(tmp_path, tiny(data__path=str(data)))
    assert invoke("pretrain", "--config", config, "--run-dir", "run", cwd=tmp_path).code == 0
    change(data, "val")
    refused("eval", "run", cwd=tmp_path, expected=f"{CHANGED}{data}/val-00000.bin")
    assert not list((tmp_path / "run").glob("evals/*"))
    sweep = ("average", "run", "--sweep", "window=2 every=2")
    refused(*sweep, cwd=tmp_path, expected=f"{CHANGED}{data}/val-00000.bin")
    # The training split is intact.
    assert invoke("eval", "run", "--split", "train", cwd=tmp_path).code == 0


@pytest.mark.slow
def test_all_processes_stop_and_one_error_is_printed(
    tiny: Build, data: Path, tmp_path: Path, hashed: list[Path], llmtrain: Callable[..., Any]
) -> None:
    change(data)
    config = write_config(tmp_path, tiny(data__path=str(data)))
    result = llmtrain(
        *("pretrain", "--config", config, "--run-dir", "run", "--nproc", "2"), cwd=tmp_path
    )
    assert result.returncode == 2
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {CHANGED}") and hint.startswith("hint: ")

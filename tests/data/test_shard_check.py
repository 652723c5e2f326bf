"""Shards that changed after their preparation, and the list of intact shards."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke, refused
from tiny_training import Build

from llmtrain.config.loading import dump_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.manifest import ShardRecord
from llmtrain.data.shard_check import require_intact
from llmtrain.data.shards import HEADER_BYTES, TokenFile
from llmtrain.data.token_data import open_data
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RunFolder

CHANGED = "the data has changed since it was prepared: "


@pytest.fixture
def data(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "intact-shards"


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


class Counting(ShardRecord):
    """A record that counts how often its shard is hashed."""

    hashed: list[Path]

    def hash_problem(self, path: Path) -> str | None:
        self.hashed.append(path)
        return super().hash_problem(path)


def counted(folder: Path) -> tuple[TokenFile, list[Path]]:
    """Return the training shard and the list of the times it was hashed."""
    file = files(folder)[0]
    assert file.record is not None
    record = Counting(**file.record.model_dump(), hashed=[])
    return TokenFile(file.path, file.tokens, file.offset, record), record.hashed


def test_a_shard_is_hashed_once_and_again_after_a_change(data: Path, cache: Path) -> None:
    file, hashed = counted(data)
    require_intact([file, file])
    require_intact([file])
    assert hashed == [file.path]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    change(data)
    for times in (2, 3):
        with pytest.raises(UserError, match=r"train-00000\.bin does not have the recorded BLAKE3"):
            require_intact([file])
        assert len(hashed) == times
    shutil.rmtree(data)
    with pytest.raises(UserError, match=r"cannot read .*train-00000\.bin: No such file"):
        require_intact([file])


def damaged(path: Path) -> None:
    path.write_bytes(b"\xff\n")


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def writable_by_others(path: Path) -> None:
    path.parent.chmod(0o777)


def without_a_folder(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("not a folder")


@pytest.mark.parametrize(
    "spoil", [damaged, replaced_by_a_folder, writable_by_others, without_a_folder]
)
def test_an_unusable_cache_means_hashing_again(
    data: Path, cache: Path, spoil: Callable[[Path], None]
) -> None:
    file, hashed = counted(data)
    require_intact([file])
    (entry,) = cache.iterdir()
    spoil(entry)
    require_intact([file])
    assert len(hashed) == 2


def test_the_cache_respects_xdg_cache_home(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    require_intact(files(data))
    assert len(list((tmp_path / "xdg" / "llmtrain" / "intact-shards").iterdir())) == 2


def write_config(folder: Path, config: RunConfig) -> Path:
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_on_changed_data_commits_no_weights(
    tiny: Build, data: Path, tmp_path: Path, cache: Path, split: str
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
    tiny: Build, data: Path, tmp_path: Path, cache: Path
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
    tiny: Build, data: Path, tmp_path: Path, cache: Path
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
    tiny: Build, data: Path, tmp_path: Path, cache: Path, llmtrain: Callable[..., Any]
) -> None:
    change(data)
    config = write_config(tmp_path, tiny(data__path=str(data)))
    result = llmtrain(
        *("pretrain", "--config", config, "--run-dir", "run", "--nproc", "2"), cwd=tmp_path
    )
    assert result.returncode == 2
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {CHANGED}") and hint.startswith("hint: ")

"""File systems without locks, permissions or flushes, and new folders."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import Build

from llmtrain.config.loading import dump_config
from llmtrain.errors import StorageWarning
from llmtrain.storage import file_systems
from llmtrain.storage.commit import remove_folder, staged_folder, write_atomically
from llmtrain.storage.file_systems import make_folders, unless_unsupported
from llmtrain.storage.locks import locked_folder

PROGRAM = Path(__file__).parents[1] / "helpers" / "limited_file_system.py"


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files and folders that are flushed, in order."""
    names: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        names.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


def test_new_parents_are_flushed(tmp_path: Path, flushed: list[str]) -> None:
    make_folders(tmp_path / "a" / "b" / "c")
    assert flushed == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_folders(tmp_path / "a" / "b" / "c")
    assert len(flushed) == 3


def test_each_writer_flushes_its_new_parents(tmp_path: Path, flushed: list[str]) -> None:
    write_atomically(tmp_path / "file" / "deep" / "f", "x")
    with locked_folder(tmp_path / "lock" / "deep"):
        pass
    with staged_folder(tmp_path / "folder" / "deep" / "t") as folder:
        (folder / "a").touch()
    for name in ("file", "lock", "folder"):
        assert {str(tmp_path), str(tmp_path / name)} <= set(flushed)
    flushed.clear()
    remove_folder(tmp_path / "folder" / "deep" / "t")
    assert str(tmp_path / "folder" / "deep") in flushed


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_other_errors_are_raised(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError), unless_unsupported("file locks", tmp_path / "f"):
        raise OSError(number, os.strerror(number))


def test_one_warning_for_each_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(file_systems, "_WARNED", set())
    for name in "ab":
        with unless_unsupported("file locks", tmp_path / name):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    (warning,) = recwarn.list
    assert warning.category is StorageWarning
    assert "does not support file locks: nothing prevents two commands" in str(warning.message)


@pytest.mark.slow
def test_commands_work_on_a_limited_file_system(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words of text. " * 500)
    config = tiny(data__path="data", train__max_steps=8)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    for command in (
        "prepare text.txt --out data --tokenizer byte --val-fraction 0",
        "pretrain --config run.yaml",
        "pretrain --config run.yaml --set train.max_steps=12",
        "average runs/tiny --every 2 --window 2",
        "export runs/tiny --to exported",
    ):
        done = subprocess.run(
            [sys.executable, PROGRAM, "flock,fsync,chmod,fallocate", *command.split()],
            cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if "does not support" in line]
        assert all(line.startswith("warning: the file system of ") for line in lines)
        assert len(lines) == len(set(lines)) >= 2, done.stderr
    assert not list(tmp_path.rglob(".tmp-*"))

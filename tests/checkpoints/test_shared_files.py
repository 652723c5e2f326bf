"""Tokenizer files are stored once per run and linked into each weights folder."""

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from tiny_runs import SHAPE

from llmtrain.checkpoints.shared_files import SharedFiles
from llmtrain.storage.file_systems import link_or_copy
from llmtrain.storage.integrity import integrity_problems

NAMES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "generation_config.json"),
}


def linked(shared: SharedFiles, folder: Path) -> dict[str, int]:
    """Link the files into a new folder; return the inode of each."""
    folder.mkdir()
    shared.link_into(folder)
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_all_folders_of_a_run_share_one_copy(tmp_path: Path) -> None:
    shared = SharedFiles(tmp_path / "tokenizer", SHAPE, "byte")
    one, two = (linked(shared, tmp_path / name) for name in "ab")
    again = linked(SharedFiles(tmp_path / "tokenizer", SHAPE, "byte"), tmp_path / "c")
    assert one == two == again
    assert one.keys() == NAMES
    shutil.rmtree(tmp_path / "a")
    assert integrity_problems(tmp_path / "tokenizer") == []


@pytest.mark.parametrize("damage", ["changed", "unrecorded"])
def test_damaged_files_are_written_again_under_new_names(tmp_path: Path, damage: str) -> None:
    """Folders that were linked earlier keep their files."""
    one = linked(SharedFiles(tmp_path / "tokenizer", SHAPE, "byte"), tmp_path / "a")
    if damage == "changed":
        with (tmp_path / "tokenizer/vocab.json").open("r+b") as file:
            file.write(b"!")
    else:
        (tmp_path / "tokenizer/integrity.json").unlink()
    two = linked(SharedFiles(tmp_path / "tokenizer", SHAPE, "byte"), tmp_path / "b")
    assert one.items().isdisjoint(two.items())
    assert (tmp_path / "b/vocab.json").read_text().startswith("{")
    assert integrity_problems(tmp_path / "tokenizer") == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK])
def test_a_file_system_without_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unsupported(source: Path, target: Path) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", unsupported)
    one = linked(SharedFiles(tmp_path / "tokenizer", SHAPE, "byte"), tmp_path / "a")
    assert one.keys() == NAMES
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "a").iterdir())


def test_other_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "none", tmp_path / "target")

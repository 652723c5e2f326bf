"""Links, FIFOs and hard links where a command writes: nothing outside changes."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.commit import (
    remove_folder,
    remove_leftovers,
    staged_folder,
    temporary_folder,
    write_atomically,
)
from llmtrain.storage.json_files import read_json, read_json_lines
from llmtrain.storage.locks import is_locked, locked_folder
from llmtrain.storage.run_folder import RunFolder
from llmtrain.storage.safe_files import reject_links

Plant = Callable[[Path], None]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder with a file, outside of `place`."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture(params=["link", "dangling link", "hard link", "FIFO", "folder"])
def plant(request: pytest.FixtureRequest, victim: Path) -> Plant:
    """Create something other than a regular file at a path."""
    return {
        "link": lambda path: path.symlink_to(victim / "file"),
        "dangling link": lambda path: path.symlink_to(victim / "new"),
        "hard link": lambda path: path.hardlink_to(victim / "file"),
        "FIFO": os.mkfifo,
        "folder": Path.mkdir,
    }[request.param]


def is_untouched(victim: Path) -> bool:
    return {p.name: p.read_text() for p in victim.iterdir()} == {"file": "precious"}


def refusal(path: Path) -> contextlib.AbstractContextManager[object]:
    """Expect an error unless `path` is a regular file: one with several names is replaced."""
    if path.is_file() and not path.is_symlink():
        return contextlib.nullcontext()
    return pytest.raises(UserError, match=r"cannot write .*it is a link, has several")


def test_lock_files_are_regular_files(place: Path, victim: Path, plant: Plant) -> None:
    plant(place / ".lock")
    with refusal(place / ".lock"), locked_folder(place):
        assert (place / ".lock").stat().st_nlink == 1
    assert not is_locked(place)
    assert is_untouched(victim)


def test_a_copy_with_hard_links_does_not_block_a_folder(place: Path) -> None:
    """`cp -al run backup` gives the lock file of the run a second name."""
    copy = place.with_name("copy")
    with locked_folder(place):
        shutil.copytree(place, copy, copy_function=os.link)
        assert is_locked(place)
        with pytest.raises(UserError, match="in use"), locked_folder(place):
            pass
    with locked_folder(place), locked_folder(copy):
        assert is_locked(place)
        assert not (place / ".lock").samefile(copy / ".lock")


def test_marker_of_a_resumable_folder_is_a_regular_file(
    place: Path, victim: Path, plant: Plant
) -> None:
    (place / ".tmp-t").mkdir()
    plant(place / ".tmp-t" / ".resumable")
    with refusal(place / ".tmp-t" / ".resumable"), temporary_folder(place / "t"):
        pass
    assert is_untouched(victim)


def test_a_linked_build_folder_is_not_used(place: Path, victim: Path) -> None:
    (victim / ".resumable").touch()
    (place / ".tmp-t").symlink_to(victim)
    with (
        pytest.raises(UserError, match="it is a link, or"),
        temporary_folder(place / "t"),
    ):
        pass
    (victim / ".resumable").unlink()
    assert is_untouched(victim)


def test_a_folder_without_our_marker_is_not_used(place: Path) -> None:
    (place / ".tmp-t").mkdir()
    (place / ".tmp-t" / "mine").write_text("mine")
    with pytest.raises(UserError, match="no llmtrain") as caught, temporary_folder(place / "t"):
        pass
    assert f"touch {place / '.tmp-t' / '.resumable'}" in caught.value.hint
    assert [path.name for path in (place / ".tmp-t").iterdir()] == ["mine"]


def test_an_empty_folder_is_used(place: Path) -> None:
    """A kill between creating the folder and its marker must not block the next command."""
    (place / ".tmp-t").mkdir()
    with temporary_folder(place / "t") as build:
        assert [path.name for path in build.iterdir()] == [".resumable"]
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", [".tmp-x", ".tmp-t", ".tmp-5-t", ".tmp-deleted-t", ".tmp-t.lock"])
def test_planted_temporary_names_do_not_block(
    place: Path, victim: Path, plant: Plant, name: str
) -> None:
    plant(place / name)
    remove_leftovers(place)
    with staged_folder(place / "t") as folder:
        (folder / "a").write_text("a")
    write_atomically(place / "f", "f")
    remove_folder(place / "t")
    remove_leftovers(place)
    assert is_untouched(victim)


def test_clean_up_deletes_links_but_not_their_targets(place: Path, victim: Path) -> None:
    build = place / ".tmp-5-t"
    build.mkdir()
    (build / ".building").touch()
    for name in ("new", "deleted", "x"):
        (build / name).symlink_to(victim)
    remove_leftovers(place)
    assert list(place.iterdir()) == []
    assert is_untouched(victim)


def test_clean_up_keeps_folders_without_our_marker(place: Path) -> None:
    for name in (".tmp-5-t", ".tmp-mine"):
        (place / name).mkdir()
        (place / name / "mine").touch()
    remove_leftovers(place)
    assert sorted(path.name for path in place.iterdir()) == [".tmp-5-t", ".tmp-mine"]


def test_removing_or_replacing_a_linked_folder_keeps_its_target(place: Path, victim: Path) -> None:
    (place / "step-00000001").symlink_to(victim)
    remove_folder(place / "step-00000001")
    assert list(place.iterdir()) == []
    (place / "step-00000001").symlink_to(victim)
    with staged_folder(place / "step-00000001", replace=True) as folder:
        (folder / "a").touch()
    assert not (place / "step-00000001").is_symlink()
    assert is_untouched(victim)


@pytest.mark.parametrize(
    "where", ["snapshots", "state", "averages", "averages/ema", "evals", "tokenizer"]
)
def test_links_inside_a_run_are_rejected(place: Path, victim: Path, where: str) -> None:
    path = place / where
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(victim)
    with pytest.raises(UserError, match=f"cannot write to .*{where}: it is a symbolic link inside"):
        RunFolder(place).reject_links()


def test_a_commit_changes_the_permissions_of_its_own_files_only(place: Path, victim: Path) -> None:
    (victim / "file").chmod(0o600)
    with staged_folder(place / "t") as folder:
        (folder / "shared").hardlink_to(victim / "file")
        (folder / "own").touch(mode=0o600)
    assert (victim / "file").stat().st_mode & 0o777 == 0o600
    assert (place / "t" / "own").stat().st_mode & 0o044


def test_links_to_a_run_and_above_it_are_accepted(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    (place / "snapshots").mkdir()
    RunFolder(tmp_path / "link").reject_links()
    reject_links(tmp_path / "link", tmp_path / "link" / "snapshots" / "step-00000001")
    write_atomically(tmp_path / "link" / "f", "x")
    assert (place / "f").read_text() == "x"


def test_reading_a_fifo_fails_at_once(place: Path) -> None:
    os.mkfifo(place / "f")
    started = time.monotonic()
    for read in (read_json, read_json_lines):
        with pytest.raises(UserError, match="not a regular file"):
            read(place / "f")
    assert time.monotonic() - started < 5


def test_a_folder_that_was_moved_is_not_written(place: Path, tmp_path: Path) -> None:
    with locked_folder(place):
        write_atomically(place / "f", "x")
        place.rename(tmp_path / "moved")
        with pytest.raises(RunFailed, match=r"place was moved or deleted while this command"):
            write_atomically(place / "g" / "h", "x")
        with pytest.raises(RunFailed, match="moved or deleted"), staged_folder(place / "t"):
            pass
        assert not place.exists()
        place.mkdir()  # a new folder with the same name
        with pytest.raises(RunFailed, match="moved or deleted"):
            write_atomically(place / "g", "x")
        assert list(place.iterdir()) == []


def test_a_folder_that_is_moved_during_a_write(place: Path, tmp_path: Path) -> None:
    with (
        locked_folder(place),
        pytest.raises(RunFailed, match="place was moved or deleted"),
        staged_folder(place / "t") as folder,
    ):
        place.rename(tmp_path / "moved")
        (folder / "a").touch()
    assert not place.exists()
    remove_leftovers(tmp_path / "moved")
    assert [path.name for path in (tmp_path / "moved").iterdir()] == [".lock"]

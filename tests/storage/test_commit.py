"""Atomic commits, integrity records, locks, JSON Lines and the paths in a run."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from llmtrain.errors import UserError
from llmtrain.storage.commit import (
    remove_folder,
    remove_leftovers,
    staged_folder,
    write_atomically,
)
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.json_files import read_json_lines
from llmtrain.storage.locks import locked_folder
from llmtrain.storage.run_folder import RunFolder, newest_run, require_run, step_folders


def write_folder(target: Path, content: str = "x") -> None:
    with staged_folder(target) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text(content)


def test_committed_folder_matches_its_record(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step-00000001"
    write_folder(target)
    assert sorted(p.name for p in target.iterdir()) == ["a.txt", "integrity.json", "sub"]
    assert integrity_problems(target) == []
    assert not list(target.parent.glob(".tmp-*"))


def test_error_removes_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no"), staged_folder(tmp_path / "t") as folder:
        (folder / "a").write_text("x")
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "t"
    write_folder(target, "old")
    with pytest.raises(FileExistsError):
        write_folder(target, "new")
    with staged_folder(target, replace=True) as folder:
        (folder / "a.txt").write_text("new")
    assert (target / "a.txt").read_text() == "new"
    assert not (target / "sub").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_killed_commit_is_ignored_and_cleaned_up(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from llmtrain.storage.commit import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as f:\n"
        "    (f/'a').write_text('x'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "step-00000002"
    assert subprocess.run([sys.executable, "-c", code, target], check=False).returncode == -9
    assert step_folders(tmp_path) == {}
    assert all(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "a.txt").write_text("y"), "does not have the recorded BLAKE3"),
        (lambda f: (f / "a.txt").write_text("longer"), "has 6 bytes instead of 1"),
        (lambda f: (f / "sub" / "b.txt").unlink(), "is missing"),
    ],
)
def test_integrity_problems_finds_damage(tmp_path: Path, damage: object, expected: str) -> None:
    write_folder(tmp_path / "t")
    damage(tmp_path / "t")  # type: ignore[operator]  # pytest's parameters are objects
    (problem,) = integrity_problems(tmp_path / "t")
    assert expected in problem


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"a": 1}}', "\x00"])
def test_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    write_folder(tmp_path / "t")
    (tmp_path / "t" / "integrity.json").write_text(content)
    with pytest.raises(UserError, match="integrity"):
        integrity_problems(tmp_path / "t")
    (tmp_path / "t" / "integrity.json").unlink()
    with pytest.raises(UserError, match="missing"):
        integrity_problems(tmp_path / "t")


def test_write_atomically_creates_and_replaces(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "f", "one")
    write_atomically(tmp_path / "deep" / "f", b"two")
    assert (tmp_path / "deep" / "f").read_bytes() == b"two"
    assert len(list((tmp_path / "deep").iterdir())) == 1


STOPPED = """
import os, sys
from pathlib import Path
from llmtrain.storage import commit

def stop(path, target):
    print("written", flush=True)
    sys.stdin.readline()
    os.rename(path, target)

Path.replace = stop
commit.write_atomically(Path(sys.argv[1]), "whole")
"""


def test_clean_up_deletes_only_files_of_killed_processes(
    tmp_path: Path,
) -> None:
    """Both processes stop between the write and the rename."""
    command = [sys.executable, "-c", STOPPED]
    dead, living = (
        subprocess.Popen(
            [*command, tmp_path / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in ("dead", "living")
    )
    for process in (dead, living):
        assert process.stdout is not None and process.stdout.readline() == "written\n"
    dead.kill()
    dead.wait()
    assert len(list(tmp_path.glob(".tmp-*"))) == 2
    write_atomically(tmp_path / "other", "one")
    remove_leftovers(tmp_path)
    assert [path.name.split("-")[-1] for path in tmp_path.glob(".tmp-*")] == ["living"]
    living.communicate("go")
    assert living.returncode == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "living": "whole",
        "other": "one",
    }


def test_an_empty_build_folder_is_deleted(tmp_path: Path) -> None:
    """A kill before the marker is created, or after it is removed, leaves an empty folder."""
    for name in (".tmp-12-step", ".tmp-13-step"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-13-step" / "file").write_text("of another program")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-13-step"}


def test_similar_names_of_other_programs_are_kept(tmp_path: Path) -> None:
    """A config may be in a folder with unrelated files."""
    for name in (".tmp-2024-notes", ".tmp-cache.lock"):
        (tmp_path / name).write_text("mine")
    write_folder(tmp_path / ".tmp-cache")
    before = set(tmp_path.rglob("*"))
    write_atomically(tmp_path / "new.yaml", "one")
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "new.yaml"}


def test_clean_up_deletes_the_file_that_it_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the lock is taken, the writer renames the file and starts the next one."""
    staging, lock = tmp_path / ".tmp-5-f", fcntl.flock
    staging.write_text("first")

    def later(file: IO[bytes], operation: int) -> None:
        if not (tmp_path / "f").exists():
            staging.replace(tmp_path / "f")
            staging.write_text("second")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", later)
    remove_leftovers(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "f": "first",
        ".tmp-5-f": "second",
    }


def test_write_atomically_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for content in ("one", "two"):
        write_atomically(tmp_path / "f", content)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["two"]


AGAIN = """
import sys
from pathlib import Path
from llmtrain.storage.commit import write_atomically

for number in range(100):
    write_atomically(Path(sys.argv[1]), str(number))
"""


def test_processes_write_to_one_folder_concurrently(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AGAIN]
    writers = [
        subprocess.Popen([*command, tmp_path / name], stderr=subprocess.PIPE, text=True)
        for name in "aaab"
    ]
    assert [writer.communicate()[1] for writer in writers] == [""] * 4
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "99", "b": "99"}


def test_remove_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "step-00000003")
    remove_folder(tmp_path / "step-00000003")
    assert list(tmp_path.iterdir()) == []


def test_lock_is_exclusive_and_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from llmtrain.storage.locks import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"pid {holder.pid}"), locked_folder(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with locked_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_truncated_last_json_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{broken\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_json_lines(path)


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b'{"step": 1}\n' + bytes(12) + b'{"step": 3}\n', 1),  # the second line is lost
        (b'{"step": 1}\n' * 50 + bytes(600), 50),
        ((b'{"step": 1}\n' * 50)[:512] + bytes(512), 42),  # a sector within a line
        (bytes(30), 0),
        (b'{"step":\0 1}\n{"step": 2}\n', None),  # a flipped bit
    ],
)
def test_zeros_of_a_power_loss_end_a_log(tmp_path: Path, content: bytes, count: int | None) -> None:
    (tmp_path / "m.jsonl").write_bytes(content)
    if count is None:
        with pytest.raises(UserError, match="line 1"):
            read_json_lines(tmp_path / "m.jsonl")
    else:
        assert len(read_json_lines(tmp_path / "m.jsonl")) == count


def test_step_folders_and_newest_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        newest_run(tmp_path / "runs")
    for age, name in enumerate(("b", "a", "c")):
        run = RunFolder(tmp_path / "runs" / name)
        write_atomically(run.config, "")
        write_atomically(run.metrics, "")
        os.utime(run.metrics, (1000 - age, 1000 - age))
    (tmp_path / "runs" / "no-run").mkdir()
    assert newest_run(tmp_path / "runs").path.name == "b"
    with pytest.raises(UserError, match="not a run"):
        require_run(tmp_path / "runs" / "no-run")
    for name in (
        "step-00000010",
        "step-100000000",
        "step-00000002",
        "step-3",
        ".tmp-step-00000004",
    ):
        (tmp_path / "steps" / name).mkdir(parents=True)
    assert list(step_folders(tmp_path / "steps")) == [2, 10, 100_000_000]


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier-version"])
def test_killed_replacement_restores_the_old_folder(tmp_path: Path, earlier: bool) -> None:
    """Simulate a kill between the two renames of a replacement."""
    write_folder(tmp_path / "t", "old")
    if earlier:
        (tmp_path / "t").rename(tmp_path / ".tmp-replaced-t")
        write_folder(tmp_path / ".tmp-t", "new")
        (tmp_path / ".tmp-t.lock").touch()
    else:
        write_folder(tmp_path / ".tmp-5-t" / "new", "new")
        (tmp_path / ".tmp-5-t" / ".building").touch()
        (tmp_path / "t").rename(tmp_path / ".tmp-5-t" / "old")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t" / "a.txt").read_text() == "old"


def test_second_process_cannot_build_the_same_folder(tmp_path: Path) -> None:
    with (
        staged_folder(tmp_path / "t"),
        pytest.raises(UserError, match="in use by another"),
        staged_folder(tmp_path / "t"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match="cannot create the directory"),
        staged_folder(tmp_path / "file" / "t"),
    ):
        pass

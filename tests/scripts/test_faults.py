"""`scripts/power_loss`: the model of a disk, traces of real calls, and a loss that it finds."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import trace
from faults.disk import Disk, Mode, Name, Sync

SCRIPTS = Path(__file__).parents[2] / "scripts"
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

COMMIT = """
import os
os.mkdir("new")
with open("new/.tmp-file", "wb") as file:
    file.write(b"content")
    file.flush()
    {sync_file}
os.rename("new/.tmp-file", "new/file")
os.link("new/file", "new/link")
{sync_folder}
{sync_parent}
"""


def traced(folder: Path, monkeypatch: pytest.MonkeyPatch, **steps: str) -> Disk:
    """Return the disk after a commit with these flushes, run by Python instead of llmtrain."""
    folder.mkdir()
    (folder / "old").write_bytes(b"before")
    flush = "os.fsync(os.open({}, os.O_RDONLY))"
    sources = {
        "sync_file": "os.fsync(file.fileno())",
        "sync_folder": flush.format("'new'"),
        "sync_parent": flush.format("'.'"),
    }
    script = folder.with_name("commit.py")
    script.write_text(COMMIT.format(**sources | steps))
    monkeypatch.setattr(trace, "PROGRAM", [sys.executable, str(script)])
    return trace.record([], folder)


def left(disk: Disk, mode: Mode) -> dict[str, bytes]:
    return dict(disk.after_loss(len(disk.operations), mode, random.Random(0)))


@needs_strace
def test_a_flushed_commit_survives_every_kind_of_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = traced(tmp_path / "folder", monkeypatch)
    expected = {"old": b"before", "new/": b"", "new/file": b"content", "new/link": b"content"}
    modes: tuple[Mode, ...] = ("durable", "names", "random")
    assert all(left(disk, mode) == expected for mode in modes)
    real = {
        path.relative_to(tmp_path / "folder").as_posix(): path.read_bytes()
        for path in (tmp_path / "folder").rglob("*")
        if path.is_file()
    }
    assert {path: data for path, data in expected.items() if path[-1] != "/"} == real


@needs_strace
@pytest.mark.parametrize(
    ("missing", "durable", "names"),
    [
        ("sync_file", b"", b""),
        ("sync_folder", None, b"content"),
        ("sync_parent", None, b"content"),
    ],
)
def test_each_missing_flush_loses_something(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    durable: bytes | None,
    names: bytes,
) -> None:
    disk = traced(tmp_path / "folder", monkeypatch, **{missing: "pass"})
    assert left(disk, "durable").get("new/file") == durable
    assert left(disk, "names").get("new/file") == names


def test_a_promise_is_a_folder_that_was_renamed_and_flushed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    folder = disk.create(".tmp-step", is_folder=True)
    disk.add(Name(((disk.root, ".tmp-step", None), (disk.root, "step", folder))))
    assert disk.promised(2) == set()
    disk.add(Sync(disk.root, 2))
    assert disk.promised(3) == {"step/"}
    disk.add(Name(((disk.root, "step", None),)))
    assert disk.promised(4) == set()


@needs_strace
@pytest.mark.slow
def test_power_losses_lose_nothing() -> None:
    command = [sys.executable, SCRIPTS / "power_loss", "--losses", "12", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\w+) +(\d+) +0$", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["prepare", "pretrain", "branch", "average", "eval"]

"""`llmtrain average`, killed at any system call and repeated, gives the same bytes."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import MakeRun

from llmtrain.averaging import average as module
from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.series import run_series
from llmtrain.data.verify import verify_below
from llmtrain.errors import UserError
from llmtrain.storage.commit import staged_folder
from llmtrain.storage.run_folder import RunFolder

# Two averages per merge; SIGKILL before the n-th creation, rename or removal of a file or folder.
KILLED = """
import os, sys
from llmtrain.averaging import average
from llmtrain.cli.main import main
average.MAX_GROUP = 2
left = int(sys.argv.pop(1))
def count(event, arguments):
    global left
    flags = arguments[2] if event == "open" else 0
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(count)
main()
"""
COMMANDS = {
    "default": ["average", "runs/tiny", "--every", "10", "--window", "2", "--at", "all"],
    "out": [
        "average",
        "runs/tiny",
        "--every",
        "10",
        "--window",
        "2",
        "--at",
        "all",
        "--out",
        "means",
    ],
    "single": ["average", "runs/tiny", "--every", "10", "--window", "3", "--out", "mean"],
}


def command(folder: Path, which: str, kill_at: int = 0) -> int:
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(kill_at), *COMMANDS[which]],
        cwd=folder,
        capture_output=True,
        check=False,
    ).returncode


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def identities(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return inode and time of every file of every complete average."""
    complete = (
        path
        for path in folder.rglob("integrity.json")
        if not any(part.startswith(".tmp-") for part in path.parts)
    )
    every = (file for path in complete for file in path.parent.iterdir())
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in every}


@pytest.mark.slow
@pytest.mark.parametrize("which", COMMANDS)
def test_resumes_after_a_kill_at_any_call(make_run: MakeRun, tmp_path: Path, which: str) -> None:
    make_run([10, 20, 30, 40])
    reference = shutil.copytree(tmp_path / "runs", tmp_path / "reference" / "runs").parent
    assert command(reference, which) == 0
    expected = contents(reference)
    kills = kept = 0
    for kill_at in range(1, 400, 1 if which == "single" else 3):
        folder = shutil.copytree(tmp_path / "runs", tmp_path / str(kill_at) / "runs").parent
        if command(folder, which, kill_at) == 0:
            break  # after the last call
        kills += 1
        assert not [check for check in verify_below(folder) if check.problems]
        before = identities(folder)
        kept += len(before) > len(identities(tmp_path / "runs"))
        assert command(folder, which) == 0
        assert contents(folder) == expected
        assert before.items() <= identities(folder).items()
    assert kills > 8
    assert kept or which == "single"


def every_window(run: RunFolder) -> list[bool]:
    series = run_series(run)
    request = AverageRequest(every=10, window=2, at="all")
    return [one.cached for one in average(series, make_specs(series, request))]


def test_reads_only_inputs_of_missing_averages(make_run: MakeRun) -> None:
    run = make_run([10, 20, 30, 40, 50])
    every_window(run)
    shutil.rmtree(run.average("lawa-2x10", 30))
    for step, message in ((50, None), (30, "recorded BLAKE3")):
        path = run.snapshot(step) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            assert every_window(run) == [True, False, True, True]
            shutil.rmtree(run.average("lawa-2x10", 30))


def test_group_size_does_not_change_the_bytes(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([10, 20, 30, 40, 50])
    every_window(run)
    together = contents(run.averages)
    shutil.rmtree(run.averages)
    monkeypatch.setattr(module, "MAX_GROUP_BYTES", 1)
    every_window(run)
    assert contents(run.averages) == together


@pytest.mark.slow
def test_next_command_removes_leftovers_of_a_killed_one(make_run: MakeRun, tmp_path: Path) -> None:
    make_run([10, 20, 30, 40])
    assert command(tmp_path, "single", 8) == -9
    (killed,) = tmp_path.glob(".tmp-*-mean")
    (tmp_path / ".tmp-mine").write_text("not llmtrain's")
    with staged_folder(tmp_path / "living") as living:
        assert command(tmp_path, "out") == 0
        assert not killed.exists() and living.exists()
    assert command(tmp_path, "single") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs",
        "mean",
        "means",
        "living",
        ".tmp-mine",
    }

"""Full, limited and read-only disks, and missing permissions: messages, and what is kept."""

import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from in_process import unmeasured
from preparations import ARGUMENTS, COMMAND, OPTIONS, contents, identity, prepare

from llmtrain.errors import RunFailed

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_a_file_size_limit_is_reported_and_shards_are_kept(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, expected = undisturbed
    command = [COMMAND, "prepare", source, "--out", "out", *ARGUMENTS]
    shard_bytes = sorted(path.stat().st_size for path in expected.glob("train-*.bin"))
    limit = shard_bytes[-1] - 2  # all but the largest shard fit
    result = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=unmeasured(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert re.fullmatch(r"error: cannot write out: File too large \([\d,]+ bytes free\)", error)
    assert "ulimit -f" in result.stderr and "the same command resumes" in result.stderr
    assert "Traceback" not in result.stderr
    before = identity(tmp_path / ".tmp-out" / "shards")
    assert before
    assert not list((tmp_path / ".tmp-out" / "shards").glob(".tmp-*"))
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert contents(tmp_path / "out") == contents(expected)
    assert before.items() <= identity(tmp_path / "out").items()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small file system is not possible")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_shards_are_kept(
    undisturbed: tuple[Path, Path], small_disk: Path, llmtrain: Command
) -> None:
    source, expected = undisturbed
    result = llmtrain("prepare", source, "--out", small_disk / "out", *ARGUMENTS, cwd=small_disk)
    assert result.returncode == 1
    assert "No space left on device (" in result.stderr and "bytes free)" in result.stderr
    assert "hint: free space" in result.stderr
    before = identity(small_disk / ".tmp-out" / "shards")
    assert before
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    result = llmtrain("prepare", source, "--out", small_disk / "out", *ARGUMENTS, cwd=small_disk)
    assert result.returncode == 0, result.stderr
    assert contents(small_disk / "out") == contents(expected)
    assert before.items() <= identity(small_disk / "out").items()


@pytest.mark.slow
def test_a_read_only_disk_is_reported(
    undisturbed: tuple[Path, Path], small_disk: Path, llmtrain: Command
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = llmtrain(
        "prepare", undisturbed[0], "--out", small_disk / "out", *ARGUMENTS, cwd=small_disk
    )
    assert result.returncode == 1
    assert f"error: cannot write {small_disk}/out: Read-only file system" in result.stderr
    assert "hint: make that folder writable, or write elsewhere" in result.stderr


NOBODY = 65534


@pytest.fixture
def unprivileged() -> Iterator[tuple[Path, Command]]:
    """A folder, and a function that runs the command there without root's permissions."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        user = {} if os.geteuid() else {"user": NOBODY, "group": NOBODY}

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            environment = os.environ | {"HOME": name, "HF_HOME": name}
            return subprocess.run(
                [COMMAND, *arguments], cwd=name, env=environment, **user,
                capture_output=True, text=True, check=False,
            )  # fmt: skip

        try:
            reachable = run("--version").returncode == 0
        except PermissionError:
            reachable = False
        if not reachable:
            pytest.skip("other users cannot run the installed command")
        yield Path(name), run


def test_missing_permissions_are_reported(unprivileged: tuple[Path, Command]) -> None:
    folder, llmtrain = unprivileged
    (folder / "a.txt").write_text("text")
    (folder / "secret.txt").write_text("text")
    (folder / "secret.txt").chmod(0o000)
    (folder / "closed").mkdir(mode=0o555)
    unwritable = llmtrain("prepare", "a.txt", "--out", "closed/out", "--val-fraction", "0")
    assert unwritable.returncode == 1
    assert "cannot write" in unwritable.stderr and "Permission denied" in unwritable.stderr
    assert "hint: make that folder writable, or write elsewhere" in unwritable.stderr
    unreadable = llmtrain("prepare", "secret.txt", "--val-fraction", "0")
    assert unreadable.returncode == 2
    assert "cannot read secret.txt: Permission denied" in unreadable.stderr
    assert "cannot write" not in unreadable.stderr


def test_a_source_that_shrinks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.data import prepare as module
    from llmtrain.errors import UserError

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    real = module.validation_documents

    def shrink(*arguments: object) -> object:
        path.write_text('{"text": "one"}\n')
        return real(*arguments)

    monkeypatch.setattr(module, "validation_documents", shrink)
    with pytest.raises(
        UserError, match=r"a\.jsonl contains fewer documents than when it was first read"
    ):
        prepare(str(path), tmp_path / "out", tokenizer="byte", val_fraction=0)


def test_a_file_as_parent_folder_is_reported(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFailed, match="cannot write"):
        prepare(str(undisturbed[0]), tmp_path / "file" / "out", **OPTIONS)

"""Disks that are full, limited or not to be written to: what is said, and that nothing is half-written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtrain.disk import require_room, writing
from llmtrain.errors import RunFailed
from llmtrain.files import staged_folder, write_atomically

CAN_MOUNT = (
    sys.platform == "linux"
    and subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False).returncode
    == 0
)
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="may not mount a file system")


def on_a_disk(tmp_path: Path, options: str, code: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a new folder `disk` that is a mounted tmpfs of its own."""
    (tmp_path / "disk").mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} tmpfs disk && exec "$0" -c "$1"'
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script, sys.executable, code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


STAGE = """
import torch
from pathlib import Path
from safetensors.torch import save_file
from llmtrain.files import staged_folder, write_atomically
"""
KEEP = """
write_atomically(Path("disk/old"), "kept")
"""
WRITE = """
try:
    with staged_folder(Path("disk/new"), needed=4_000_000) as folder:
        save_file({"a": torch.ones(1_000_000)}, folder / "model.safetensors")
except BaseException as error:
    print(type(error).__name__, error)
print([path.name for path in Path("disk").iterdir()])
"""


@needs_mount
def test_a_full_disk_leaves_what_is_there_and_says_what_was_needed(tmp_path: Path) -> None:
    said, there = on_a_disk(tmp_path, "size=1m", STAGE + KEEP + WRITE).stdout.splitlines()
    assert said.startswith(
        "RunFailed cannot write disk/new: No space left on device (4,000,000 bytes needed, 1,0"
    )
    assert there == "['old']"


@needs_mount
def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    said, there = on_a_disk(tmp_path, "ro", STAGE + WRITE).stdout.splitlines()
    assert said.startswith("RunFailed cannot write disk/new: Read-only file system (4,000,000 bytes needed")
    assert there == "[]"


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            RunFailed, match=r"cannot write .*/f: File too large \(20,000 bytes needed"
        ) as caught:
            write_atomically(tmp_path / "f", "x" * 20_000)
        with pytest.raises(RunFailed, match="File too large"), staged_folder(tmp_path / "t") as folder:
            save_file({"a": torch.ones(10_000)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there", 1)
    with pytest.raises(RunFailed, match="1,000,000,000,000,000 bytes needed, "):
        require_room(tmp_path / "not" / "there", 10**15)
    assert not list(tmp_path.iterdir())


def test_only_refusals_of_the_target_are_told(tmp_path: Path) -> None:
    """A file elsewhere that may not be read is not a disk that cannot be written to."""
    for filename, kind in (("inputs/model", PermissionError), (".tmp-t/model", RunFailed)):
        with pytest.raises(kind), writing(tmp_path / "t"):
            raise PermissionError(13, os.strerror(13), str(tmp_path / filename))

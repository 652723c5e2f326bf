"""Disks that are full, limited or not to be written to: what is said, and that nothing is half-written."""

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed
from llmtrain.storage.commit import staged_folder, write_atomically
from llmtrain.storage.disk import disk_errors, require_room
from llmtrain.training.run import pretrain

CAN_MOUNT = (
    sys.platform == "linux"
    and subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False
    ).returncode
    == 0
)
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="may not mount a file system")


def on_a_disk(cwd: Path, options: str, *script: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell script with Python and `llmtrain` on its PATH, where `disk` is a mounted tmpfs of its own."""
    (cwd / "disk").mkdir(exist_ok=True)
    lines = (f"mount -t tmpfs -o {options} tmpfs disk", *script)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["unshare", "-m", "bash", "-ec", "\n".join(lines)],
        cwd=cwd,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


STAGE = """
import torch
from pathlib import Path
from safetensors.torch import save_file
from llmtrain.storage.commit import staged_folder, write_atomically
from llmtrain.training.run import pretrain
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
    said, there = on_a_disk(tmp_path, "size=1m", python(STAGE + KEEP + WRITE)).stdout.splitlines()
    assert said.startswith(
        "WriteFailed cannot write disk/new: No space left on device (4,000,000 bytes needed, 1,0"
    )
    assert there == "['old']"


@needs_mount
def test_a_disk_that_is_read_only(tmp_path: Path) -> None:
    said, there = on_a_disk(tmp_path, "ro", python(STAGE + WRITE)).stdout.splitlines()
    assert said.startswith(
        "WriteFailed cannot write disk/new: Read-only file system (4,000,000 bytes needed"
    )
    assert there == "[]"


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            RunFailed, match=r"cannot write .*/f: File too large \(20,000 bytes needed"
        ) as caught:
            write_atomically(tmp_path / "f", "x" * 20_000)
        with (
            pytest.raises(RunFailed, match="File too large"),
            staged_folder(tmp_path / "t") as folder,
        ):
            save_file({"a": torch.ones(10_000)}, folder / "model.safetensors")
        with (
            pytest.raises(RunFailed, match="File too large"),
            staged_folder(tmp_path / "t") as folder,
            (folder / "ckpt.pt").open("wb") as file,
        ):
            torch.save({"a": torch.ones(10_000)}, file)
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
        with pytest.raises(kind), disk_errors(tmp_path / "t"):
            raise PermissionError(13, os.strerror(13), str(tmp_path / filename))


@needs_mount
def test_average_and_eval_on_a_full_disk(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    pretrain(tiny(train__max_steps=8), tmp_path / "run", log=print)
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*"))
    result = on_a_disk(
        tmp_path,
        f"size={size // 4096 * 4096 + 400_000}",
        "cp -r run disk/run",
        "head -c 100M /dev/zero > disk/rest || true",
        "find disk -type f | sort | xargs sha256sum > before",
        "! llmtrain average disk/run --every 2 --window 2",
        "llmtrain eval disk/run",
        "find disk -type f | sort | xargs sha256sum | cmp - before",
        "rm disk/rest",
        "llmtrain average disk/run --every 2 --window 2 && llmtrain eval disk/run && llmtrain verify disk/run",
    )
    assert result.returncode == 0, result.stderr
    average, *others = [
        line for line in result.stderr.splitlines() if line.startswith(("error", "warning"))
    ]
    no_room = r"No space left on device \([\d,]+ bytes needed, 0 bytes free"
    assert re.match(rf"error: cannot write disk/run/averages/.* {no_room}", average)
    assert others  # one of each result, which is shown all the same
    for line in others:
        assert re.match(
            rf"warning: result not cached: cannot write disk/run/evals/.* {no_room}", line
        )
    assert result.stdout.count("ema-0.9") >= 2

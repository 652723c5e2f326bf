"""Full, limited and read-only disks: the message, and no incomplete files."""

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
    """Run a shell script with `disk` mounted as a tmpfs, and `llmtrain` on its PATH."""
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


IMPORTS = """
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from llmtrain.storage.commit import staged_folder, write_atomically
"""
KEEP = """
write_atomically(Path("disk/old"), "kept")
"""
WRITE = """
try:
    with staged_folder(Path("disk/new"), needed=4_000_000) as folder:
        save_file({"a": np.ones(1_000_000, np.float32)}, folder / "model.safetensors")
except BaseException as error:
    print(type(error).__name__, error)
print([path.name for path in Path("disk").iterdir()])
"""


@needs_mount
def test_full_disk_keeps_files_and_reports_the_needed_bytes(tmp_path: Path) -> None:
    message, files = on_a_disk(
        tmp_path, "size=1m", python(IMPORTS + KEEP + WRITE)
    ).stdout.splitlines()
    assert message.startswith(
        "WriteFailed cannot write disk/new: No space left on device (4,000,000 bytes needed, 1,0"
    )
    assert files == "['old']"


@needs_mount
def test_read_only_disk(tmp_path: Path) -> None:
    message, files = on_a_disk(tmp_path, "ro", python(IMPORTS + WRITE)).stdout.splitlines()
    assert message.startswith(
        "WriteFailed cannot write disk/new: Read-only file system (4,000,000 bytes needed"
    )
    assert files == "[]"


def test_file_size_limit(tmp_path: Path) -> None:
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


def test_require_room_writes_nothing(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there", 1)
    with pytest.raises(RunFailed, match="1,000,000,000,000,000 bytes needed, "):
        require_room(tmp_path / "not" / "there", 10**15)
    assert not list(tmp_path.iterdir())


def test_permission_error_of_another_file_passes_through(tmp_path: Path) -> None:
    for filename, kind in (("inputs/model", PermissionError), (".tmp-t/model", RunFailed)):
        with pytest.raises(kind), disk_errors(tmp_path / "t"):
            raise PermissionError(13, os.strerror(13), str(tmp_path / filename))


@pytest.mark.slow
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
        "llmtrain average disk/run --every 2 --window 2",
        "llmtrain eval disk/run",
        "llmtrain verify disk/run",
    )
    assert result.returncode == 0, result.stderr
    average, *others = [
        line for line in result.stderr.splitlines() if line.startswith(("error", "warning"))
    ]
    no_room = r"No space left on device \([\d,]+ bytes needed, 0 bytes free"
    assert re.match(rf"error: cannot write disk/run/averages/.* {no_room}", average)
    assert others  # one warning per result
    for line in others:
        assert re.match(
            rf"warning: result not cached: cannot write disk/run/evals/.* {no_room}", line
        )
    assert result.stdout.count("ema-0.9") >= 2

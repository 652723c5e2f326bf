"""Device, precision and compile settings; tests that need CUDA are marked `gpu`."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.errors import UserError
from llmtrain.runtime import device
from llmtrain.runtime.device import (
    autocast,
    available_memory,
    peak_flops,
    resolve_compile,
    resolve_device,
    resolve_precision,
)

CPU = torch.device("cpu")


def test_resolve_device() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UserError, match="is not a device"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="this machine has"):
        resolve_device("cuda:99")


def test_resolve_precision_and_autocast() -> None:
    assert resolve_precision("float32", CPU) == "float32"
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
    assert resolve_precision("auto", CPU) in {"float32", "bfloat16"}
    ones = torch.ones(2, 2)
    with autocast(CPU, "bfloat16"):
        assert (ones @ ones).dtype == torch.bfloat16
    with autocast(CPU, "float32"):
        assert (ones @ ones).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc/meminfo")
def test_available_memory_decreases_by_an_allocation() -> None:
    less = [0.0]
    while max(less) <= 200e6:  # other processes allocate and free
        assert len(less) <= 50
        before = available_memory(CPU)
        assert 0 < before < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        taken = torch.ones(100_000_000)
        less.append(before - available_memory(CPU))
        del taken


@pytest.mark.parametrize(
    ("controller", "limit", "statistics"),
    [
        ("", "memory.max", "anon 300\nfile 900\n"),
        ("memory", "memory.limit_in_bytes", "rss 200\ntotal_rss 300\n"),
    ],
)
def test_the_limit_of_a_cgroup_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: str, limit: str, statistics: str
) -> None:
    if not device._cgroups(controller):
        pytest.skip("this machine has the other version of cgroups")
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / "memory.stat").write_text(statistics)
    roots = [
        (c, tmp_path if c == controller else tmp_path / "none", *f) for c, _, *f in device._CGROUPS
    ]
    monkeypatch.setattr(device, "_CGROUPS", roots)
    assert available_memory(CPU) == 700
    if limit == "memory.max":
        (tmp_path / limit).write_text("max\n")
        assert available_memory(CPU) > 1000


def test_peak_flops_is_none_if_unpublished() -> None:
    assert peak_flops(CPU, "bfloat16") is None


def test_compile_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_compile("auto", CPU) == (False, None)
    assert resolve_compile(False, CPU) == (False, None)
    with pytest.raises(UserError, match=r"cuda-graphs: cpu does not support it"):
        resolve_compile("cuda-graphs", CPU)
    monkeypatch.setenv("PATH", "")
    wanted, warning = resolve_compile(True, CPU)
    assert not wanted
    assert warning is not None
    assert "C++ compiler" in warning


@pytest.mark.gpu
def test_cuda_resolves_to_bfloat16_and_compile() -> None:
    device = resolve_device("cuda")
    assert resolve_precision("auto", device) == "bfloat16"
    assert resolve_compile("auto", device) == (True, None)
    assert resolve_compile("cuda-graphs", device) == (True, None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_only_within_the_block() -> None:
    """Measure the growth of resident memory (MB) after a tensor of 200 MB is freed."""
    code = """
import torch
from llmtrain.runtime.device import keep_freed_memory
def resident():
    lines = open("/proc/self/status").readlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1000
def allocate_and_free():
    block = torch.ones(50_000_000)
    assert resident() > start + 190
    del block
    return resident() - start
start = resident()
print(allocate_and_free())
with keep_freed_memory(torch.device("cpu")):
    print(allocate_and_free())
print(resident() - start)
print(allocate_and_free())
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, within, after, later = map(int, run.stdout.split())
    assert within > 190
    assert max(before, after, later) < 50

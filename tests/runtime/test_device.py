"""What is made of a wish for a device, a precision or a compiler; the GPU's part is marked `gpu`."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.errors import UserError
from llmtrain.runtime.device import (
    autocast,
    available_memory,
    peak_flops,
    resolve_compile,
    resolve_device,
    resolve_precision,
)

CPU = torch.device("cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UserError, match="is not a device"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="this machine has"):
        resolve_device("cuda:99")


def test_precision_and_what_autocast_makes_of_it() -> None:
    assert resolve_precision("float32", CPU) == "float32"
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
    assert resolve_precision("auto", CPU) in {"float32", "bfloat16"}
    ones = torch.ones(2, 2)
    with autocast(CPU, "bfloat16"):
        assert (ones @ ones).dtype == torch.bfloat16
    with autocast(CPU, "float32"):
        assert (ones @ ones).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells what is available")
def test_available_memory_is_less_by_what_is_taken() -> None:
    less = [0.0]
    while max(less) <= 200e6:  # other processes of the machine take and give back meanwhile
        assert len(less) <= 50
        before = available_memory(CPU)
        assert 0 < before < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        taken = torch.ones(100_000_000)
        less.append(before - available_memory(CPU))
        del taken


def test_no_peak_is_guessed() -> None:
    assert peak_flops(CPU, "bfloat16") is None


def test_compile_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_cuda_device_multiplies_bfloat16() -> None:
    device = resolve_device("cuda")
    assert resolve_precision("auto", device) == "bfloat16"
    assert resolve_compile("auto", device) == (True, None)
    assert resolve_compile("cuda-graphs", device) == (True, None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep memory")
def test_what_is_freed_is_kept_within_the_block_and_given_back_after_it() -> None:
    """MB that a process holds more than at its start, whenever it has made and freed a tensor of 200."""
    code = """
import torch
from llmtrain.runtime.device import keep_freed_memory
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1000
def used_and_freed():
    block = torch.ones(50_000_000)
    assert held() > start + 190
    del block
    return held() - start
start = held()
print(used_and_freed())
with keep_freed_memory(torch.device("cpu")):
    print(used_and_freed())
print(held() - start)
print(used_and_freed())
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, within, after, later = map(int, run.stdout.split())
    assert within > 190
    assert max(before, after, later) < 50

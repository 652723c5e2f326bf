"""Device, precision and compile settings, available memory, and published peak performance."""

import ctypes
import math
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llmtrain import __version__
from llmtrain.errors import UserError
from llmtrain.runtime.hardware import DATASHEETS
from llmtrain.runtime.hardware import Precision as Precision

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h."""
_LARGE_BLOCK = 32 << 20
"""Largest mmap threshold (bytes) that glibc would choose itself."""
_CGROUPS = (
    ("", Path("/sys/fs/cgroup"), "memory.max", "anon"),
    ("memory", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "total_rss"),
)
"""Controller, root, file of the limit, and used bytes in `memory.stat`, of versions 2 and 1."""


def resolve_device(name: str) -> torch.device:
    """Return the device for `train.device` or `--device`; auto: CUDA, else MPS, else CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "set train.device or --device to auto, cpu, cuda, cuda:N or mps"
        raise UserError(f"{name!r} is not a device", hint=hint) from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        message = f"device {name!r}: this machine has {count} of type {device.type}"
        raise UserError(message, hint="use auto (train.device, --device)")
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision of matrix products; auto: bfloat16 if the hardware supports it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    if name == "bfloat16":
        if device.type != "cpu" and not native:
            message = f"train.precision bfloat16: {device_name(device)} does not support it"
            raise UserError(message, hint="use precision: auto or float32")
        return "bfloat16"
    return "bfloat16" if name == "auto" and native else "float32"


def resolve_compile(setting: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Return whether to call torch.compile, and a warning if it is requested but not available."""
    if setting == "cuda-graphs" and device.type != "cuda":
        message = f"train.compile cuda-graphs: {device_name(device)} does not support it"
        raise UserError(message, hint="use compile: auto, true or false")
    requested = device.type == "cuda" if setting == "auto" else bool(setting)
    if requested and device.type == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        return False, "train.compile needs a C++ compiler on CPU, none found: training uncompiled"
    if requested and device.type == "mps":
        return False, "train.compile is not supported on MPS: training uncompiled"
    return requested, None


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context for bfloat16, or an empty context."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16)


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; on CUDA asynchronously, from pinned memory."""
    on_host = torch.from_numpy(array)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """On a CPU with glibc, reuse freed memory within the block; return it to the kernel at the end.

    Why: by default glibc returns large blocks at once, and clearing new pages then costs a tenth of
    a step or more. The setting belongs to the process: the first block to end resets it for all.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, maximum = ctypes.CDLL(None), 2**31 - 1
    # An old glibc refuses the first setting; the second one alone would slow it down.
    if libc.mallopt(_MMAP_THRESHOLD, maximum):
        libc.mallopt(_TRIM_THRESHOLD, maximum)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGE_BLOCK)
        libc.malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of tensors on a GPU, or the peak resident bytes of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peaks := _proc("self/status", "VmHWM"):  # getrusage includes the parent before exec
        return int(peaks[0].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def available_memory(device: torch.device) -> float:
    """Return the available bytes of a GPU, or of the host and its cgroups; infinite if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    limits = [math.inf]
    limits += [int(value.split()[0]) * 1024 for value in _proc("meminfo", "MemAvailable")]
    return min([*limits, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Yield the bytes that each cgroup of this process, of version 1 or 2, leaves for new data."""
    for controller, root, maximum, used in _CGROUPS:
        for group in _cgroups(controller):
            limit, usage = root / group / maximum, root / group / "memory.stat"
            if limit.exists() and (content := limit.read_text().strip()) != "max":
                statistics = dict(line.split() for line in usage.read_text().splitlines())
                yield int(content) - int(statistics[used])


def _cgroups(controller: str) -> list[Path]:
    """Return the cgroup of this process and its parents, relative to the controller's root."""
    path = Path("/proc/self/cgroup")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.split(":", 2) for line in lines)
    own = [Path(group.lstrip("/")) for _, names, group in named if controller in names.split(",")]
    return [group for each in own for group in (each, *each.parents)]


def _proc(file: str, key: str) -> list[str]:
    """Return the values of the `key: value` lines in a file of /proc; none on other systems."""
    path = Path("/proc") / file
    pairs = (line.partition(":") for line in path.read_text().splitlines()) if path.exists() else ()
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU, or the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def environment(device: torch.device) -> dict[str, str | int]:
    """Return the versions and the hardware that a run records."""
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda and device.type == "cuda" else {}
    return {
        "llmtrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **cuda,
        "platform": platform.platform(),
        "processor": next(iter(_proc("cpuinfo", "model name")), platform.processor()),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the published dense peak in FLOP/s; None if unknown for this device and precision."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = device_name(device)
    return next((sheet.flops for key, sheet in DATASHEETS.items() if key in name), None)

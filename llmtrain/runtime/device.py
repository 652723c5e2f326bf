"""What the device can do: which one, in which precision, compiled or not, and its published peak.

Why: a setting that the device cannot honour is an error or a warning, never a silent change; and a
utilisation is only shown against a peak that somebody published, never against a guess.

    device = resolve_device("auto"); precision = resolve_precision("auto", device)
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmtrain import __version__
from llmtrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Datasheet:
    """What NVIDIA's data sheet says of a device."""

    flops: float
    """FLOP/s of dense bfloat16 matrix products (without sparsity)."""
    memory: float | None
    """Bytes, the sheet's GB being 1e9 of them; None where a name is sold with several sizes."""
    link: float | None = None
    """Bytes/s of NVLink to the other devices of a machine, in each direction, where it joins them all."""


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt, by malloc.h."""
_LARGE_BLOCK = 32 << 20
"""Bytes from which on glibc gives a block back at once, however often it was needed before."""

_PUBLISHED = {
    "H200": Datasheet(989e12, 141e9, 450e9),
    "H100 PCIe": Datasheet(756e12, 80e9),
    "H100 NVL": Datasheet(835e12, 94e9),
    "H100": Datasheet(989e12, 80e9, 450e9),
    "A100 40GB": Datasheet(312e12, 40e9),
    "A100 80GB": Datasheet(312e12, 80e9),
    "A100": Datasheet(312e12, None),
    "L40S": Datasheet(362e12, 48e9),
    "L4": Datasheet(121e12, 24e9),
    "A10G": Datasheet(70e12, 24e9),
}


def datasheet(name: str) -> Datasheet:
    """The data sheet of a device by its short name, such as `h100` or `a100-80gb`.

    Raises:
        UserError: none is known here.
    """
    known = {key.lower().replace(" ", "-"): sheet for key, sheet in _PUBLISHED.items()}
    if name.lower() not in known:
        raise UserError(
            f"nothing is known of a device {name!r}",
            hint=f"{', '.join(known)}; or cpu, or other, with --tokens-per-second",
        )
    return known[name.lower()]


def resolve_device(name: str) -> torch.device:
    """The device that a config's `train.device`, or an option `--device`, means; auto: CUDA, else MPS, else CPU.

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"{name!r} is no device",
            hint="train.device and --device take auto, cpu, cuda, cuda:N or mps",
        ) from None
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= present:
        raise UserError(
            f"device {name!r}: this machine has {present} of type {device.type}",
            hint="auto takes what there is (train.device, --device)",
        )
    return device


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """On a CPU, let the process keep what is freed within the block, for its next steps or batches.

    glibc gives large blocks, and what lies free at the end of its heap, back at once; that the kernel clears
    new pages for the next step costs a tenth of it and more. At the end all that is free is given back. That is a
    setting of the process: of blocks within each other, or in several threads, the first to end ends it for all.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, most = ctypes.CDLL(None), 2**31 - 1
    if libc.mallopt(
        _MMAP_THRESHOLD, most
    ):  # older ones refuse, and then the other alone would do harm
        libc.mallopt(_TRIM_THRESHOLD, most)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGE_BLOCK)
        libc.malloc_trim(0)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision of matrix products; auto: bfloat16 where the hardware multiplies it natively.

    Raises:
        UserError: bfloat16 was asked for where the device has none.
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    if name == "bfloat16":
        if device.type != "cpu" and not native:
            raise UserError(
                f"train.precision bfloat16: {device_name(device)} cannot multiply it",
                hint="precision: auto, or float32",
            )
        return "bfloat16"
    return "bfloat16" if name == "auto" and native else "float32"


def resolve_compile(setting: bool | str, device: torch.device) -> tuple[bool, str | None]:
    """Whether to call torch.compile, and, where it was asked for and cannot be had, a warning why not.

    Raises:
        UserError: CUDA graphs were asked for where there is no CUDA.
    """
    if setting == "cuda-graphs" and device.type != "cuda":
        raise UserError(
            f"train.compile cuda-graphs: {device_name(device)} has none",
            hint="compile: auto, true or false",
        )
    wanted = device.type == "cuda" if setting == "auto" else bool(setting)
    if (
        wanted
        and device.type == "cpu"
        and shutil.which("c++") is None
        and shutil.which("g++") is None
    ):
        return (
            False,
            "train.compile needs a C++ compiler on a CPU and none was found: training uncompiled",
        )
    if wanted and device.type == "mps":
        return False, "train.compile is not supported on MPS: training uncompiled"
    return wanted, None


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """bfloat16 matrix products over float32 weights, or nothing."""
    import torch

    if precision == "float32":
        return nullcontext()
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16)


def to_device(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """The array there; a GPU fetches it while the host goes on, which it can from pinned memory alone."""
    import torch

    on_host = torch.from_numpy(array)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU at a time; elsewhere the most that this process had in memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # what getrusage says there counts the process that started this one, before it did
        return next(
            int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> float:
    """Bytes that may still be taken: of a GPU, or of the host within its control group; infinite if unknown."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    bounds = [math.inf]
    if (about := Path("/proc/meminfo")).exists():
        lines = about.read_text().splitlines()
        bounds += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for group in _control_groups():
        limit, used = group / "memory.max", group / "memory.stat"
        if limit.exists() and limit.read_text().strip() != "max":
            taken = dict(line.split() for line in used.read_text().splitlines())
            bounds.append(int(limit.read_text()) - int(taken["anon"]))
    return min(bounds)


def _control_groups() -> list[Path]:
    """The folders of the group of this process (version 2), and of those it is in."""
    own, root = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
    lines = own.read_text().splitlines() if own.exists() else []
    name = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    return [root / str(group).lstrip("/") for group in (Path(name), *Path(name).parents)]


def environment(device: torch.device) -> dict[str, str | int]:
    """On what it is that something runs: versions and device, the same for every call on one machine."""
    import torch

    cuda = {"cuda": torch.version.cuda} if torch.version.cuda and device.type == "cuda" else {}
    return {
        "llmtrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **cuda,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Datasheet dense peak in FLOP/s, or None where none is known for the device and the precision."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = device_name(device)
    return next((sheet.flops for key, sheet in _PUBLISHED.items() if key in name), None)

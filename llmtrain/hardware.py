"""What the device can do: which one, in which precision, compiled or not, and its published peak.

Why: a setting that the device cannot honour is an error or a warning, never a silent change; and a
utilisation is only shown against a peak that somebody published, never against a guess.

    device = resolve_device("auto"); precision = resolve_precision("auto", device)
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

from llmtrain.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]

_DENSE_BF16_PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}
"""FLOP/s of dense bfloat16 matrix products, from NVIDIA's data sheets (without sparsity)."""


def resolve_device(name: str) -> torch.device:
    """The device a config's `train.device` means; auto: CUDA, else MPS, else CPU.

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
            f"train.device {name!r} is no device", hint="auto, cpu, cuda, cuda:N or mps"
        ) from None
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= present:
        raise UserError(
            f"train.device {name!r}: this machine has {present} devices of type {device.type}",
            hint="device: auto takes what there is",
        )
    return device


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
    """Whether to call torch.compile, and, where it was asked for and cannot be had, a warning why not."""
    wanted = device.type == "cuda" if setting == "auto" else bool(setting)
    if wanted and device.type == "cpu" and shutil.which("c++") is None and shutil.which("g++") is None:
        return False, "train.compile needs a C++ compiler on a CPU and none was found: training uncompiled"
    if wanted and device.type == "mps":
        return False, "train.compile is not supported on MPS: training uncompiled"
    return wanted, None


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """bfloat16 matrix products over float32 weights, or nothing."""
    import torch

    if precision == "float32":
        return nullcontext()
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16)


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Published dense peak in FLOP/s, or None where none is known for the device and the precision."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = device_name(device)
    return next((peak for key, peak in _DENSE_BF16_PEAK.items() if key in name), None)

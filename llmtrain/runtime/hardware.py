"""Published figures of devices, and the cores of this machine, without importing torch."""

import os
from dataclasses import dataclass
from typing import Literal

from llmtrain.errors import UserError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Datasheet:
    """Published figures of an NVIDIA device."""

    flops: float
    """Dense bfloat16 FLOP/s, without sparsity."""
    memory: float | None
    """Bytes (1 GB = 1e9); None if the name is sold with several sizes."""
    link: float | None = None
    """NVLink bytes/s in each direction, if it connects all devices of a machine."""


DATASHEETS = {
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
    """Return the datasheet for a short name such as `h100` or `a100-80gb`, or raise UserError."""
    sheets = {key.lower().replace(" ", "-"): sheet for key, sheet in DATASHEETS.items()}
    if name.lower() not in sheets:
        hint = f"{', '.join(sheets)}; or cpu, or other, with --tokens-per-second"
        raise UserError(f"unknown device {name!r}", hint=hint)
    return sheets[name.lower()]


def available_cores() -> int:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

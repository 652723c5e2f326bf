"""Options that describe the hardware of an estimate. Imports nothing heavy, for `--help`."""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from llmtrain.errors import UserError

Parallel = Literal["ddp", "fsdp"]

_LIMITS = {
    "devices": (10**6, "between 1 and 1,000,000"),
    "mfu": (1, "between 0.000001 and 1"),
    "tokens_per_second": (sys.float_info.max, "a number of at least 0.000001"),
    "interconnect_gbps": (sys.float_info.max, "a number of at least 0.000001"),
}
"""Largest value of a field, and a description of its values."""


@dataclass(frozen=True)
class HardwareOptions:
    """Hardware of an estimate."""

    devices: Annotated[int, Doc("Number of devices.")] = 1
    device: Annotated[
        str,
        Doc(
            "h200, h100, h100-pcie, h100-nvl, a100-80gb, a100-40gb, a100, l40s, l4, a10g, cpu, or "
            "other for an unlisted device."
        ),
    ] = "h100"
    parallel: Annotated[
        Parallel | None, Doc("ddp: replicated on each device. fsdp: sharded over the devices.")
    ] = None
    mfu: Annotated[
        float | None,
        Doc("Assumed utilization (MFU): share of the dense peak that training reaches."),
    ] = None
    tokens_per_second: Annotated[
        float | None, Doc("Measured speed of all devices together, instead of --mfu.")
    ] = None
    interconnect_gbps: Annotated[
        float | None, Doc("GB/s (gigabytes) of one device in each direction.")
    ] = None

    def check(self) -> None:
        """Raise UserError unless the values are in range and compatible."""
        for name, (limit, valid) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not 1e-6 <= value <= limit:
                option = f"--{name.replace('_', '-')}"
                hint = f"see llmtrain plan --help for {option}"
                raise UserError(f"{option} {value!s:.20} is not {valid}", hint=hint)
        if self.tokens_per_second is not None and self.mfu is not None:
            raise UserError(
                "--tokens-per-second is a measured speed, and --mfu an assumed one",
                hint="pass only one of them",
            )

"""Dtype and shape of a stored tensor, and conversion of its numbers to float64 and back.

Why not numpy's casts alone: numpy lacks bfloat16. Converting float64 to bfloat16 through float32
rounds twice, which gives a wrong result about once in 65,000 numbers. `round_to` rounds once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

StoredArray = NDArray[Any]
"""Flat numbers as stored, in the dtype of `STORED_DTYPES`; bfloat16 as its 16 bits."""

Float64s = NDArray[np.float64]

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
"""Supported safetensors dtypes, and the numpy dtype to read and write each."""

ITEM_BYTES = {name: dtype.itemsize for name, dtype in STORED_DTYPES.items()}

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)
    """Position of the first byte in a safetensors file."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.count * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def to_float64(raw: StoredArray, dtype: str, out: Float64s) -> None:
    """Convert stored floats exactly and write them to `out`, which has the same length."""
    if dtype == "BF16":
        out[...] = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        out[...] = raw


def exact_floats(raw: StoredArray, dtype: str, out: NDArray[np.uint8]) -> StoredArray:
    """Return stored floats as float32 or float64, whichever is exact, possibly in `out`."""
    if dtype in ("F32", "F64"):
        return raw
    floats = out.view(np.float32)[: len(raw)]
    if dtype == "BF16":
        np.left_shift(raw, 16, out=floats.view(np.uint32), dtype=np.uint32)
    else:
        floats[...] = raw
    return floats


def round_to(values: Float64s, dtype: str) -> StoredArray:
    """Round to nearest even, once, and return the stored form; overflow gives infinity."""
    with np.errstate(over="ignore"):
        return _to_bfloat16(values) if dtype == "BF16" else values.astype(STORED_DTYPES[dtype])


def overflows(raw: StoredArray, dtype: str) -> bool:
    """Return whether stored floats contain an infinity or NaN."""
    if dtype == "BF16":
        return bool(np.any((raw & 0x7F80) == 0x7F80))
    return not np.isfinite(raw).all()


def _to_bfloat16(values: Float64s) -> NDArray[np.uint16]:
    """Round to float32 with round-to-odd, which makes the second rounding exact.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums".
    """
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    back = nearest.astype(np.float64)
    bits -= (np.abs(back) > np.abs(values)).astype(np.uint32)  # toward zero
    bits |= (back != values).astype(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)

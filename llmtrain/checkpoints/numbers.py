"""Stored numbers to float64 and back, rounded once: float32, float16, float64 and bfloat16.

Why: numpy has no bfloat16, and rounding float64 to it by way of float32 rounds twice, which is wrong
in one case out of some 65,000. Here each conversion is the correctly rounded one (to nearest, ties to even).

    widen(raw, "BF16", out); raw = narrow(values, "BF16")

Raw numbers are flat numpy arrays of the dtype in `STORED_DTYPES`; bfloat16 is its 16 bits.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

StoredArray = NDArray[Any]
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
"""The numpy dtype in which each safetensors dtype is read and written."""


def to_float64(raw: StoredArray, dtype: str, out: Float64s) -> None:
    """Write the stored floats `raw` into `out` (same length), exactly."""
    if dtype == "BF16":
        out[...] = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        out[...] = raw


def round_to(values: Float64s, dtype: str) -> StoredArray:
    """The stored form of float64 `values`, each rounded once; too large ones become infinite."""
    with np.errstate(over="ignore"):
        return _to_bfloat16(values) if dtype == "BF16" else values.astype(STORED_DTYPES[dtype])


def overflows(raw: StoredArray, dtype: str) -> bool:
    """Whether stored floats hold an infinity or NaN."""
    if dtype == "BF16":
        return bool(np.any((raw & 0x7F80) == 0x7F80))
    return not np.isfinite(raw).all()


def _to_bfloat16(values: Float64s) -> NDArray[np.uint16]:
    """Round to nearest even by way of float32 rounded to odd, which makes the second rounding exact.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd".
    """
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    back = nearest.astype(np.float64)
    bits -= (np.abs(back) > np.abs(values)).astype(np.uint32)  # toward zero
    bits |= (back != values).astype(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)

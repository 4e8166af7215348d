"""Rounding of float64 values straight to the output types and to e4m3, and the spacing of those types.

A cast through float32 rounds twice and is wrong for values just beside a tie of the narrow type, and
``ml_dtypes`` converts float64 to bfloat16 that way. So the rounding is done here, in float64, where scaling
by a power of two is exact and ``rint`` breaks ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sm12x.ops.validate import out_dtype_name

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    """A binary floating-point type: `fraction_bits` stored bits, normal exponents from `min_exponent` to
    `max_exponent` (of values 1.f * 2**exponent), subnormals, infinities."""

    name: str
    fraction_bits: int
    min_exponent: int
    max_exponent: int
    numpy_dtype: np.dtype[Any]


FORMATS = {
    "bfloat16": Format("bfloat16", 7, -126, 127, np.dtype(ml_dtypes.bfloat16)),
    "float16": Format("float16", 10, -14, 15, np.dtype(np.float16)),
    "float32": Format("float32", 23, -126, 127, np.dtype(np.float32)),
}

E4M3 = Format("float8_e4m3fn", 3, -6, 8, np.dtype(ml_dtypes.float8_e4m3fn))
E4M3_MAX = 448.0  # the significand 1.111 of its last binade is NaN


def format_of(out_dtype: object) -> Format:
    """The format of an output type given as a name, a NumPy dtype or a scalar type.

    Raises ValueError for anything but bfloat16, float16 and float32.
    """
    return FORMATS[out_dtype_name(out_dtype)]


def _quantum(x: Float64, fmt: Format) -> Float64:
    """The distance between neighbours of `fmt` in the binade of each finite `x`; its smallest at 0."""
    _, exponent = np.frexp(x)  # |x| = [0.5, 1) * 2**exponent; 0 has exponent 0, which the mask below handles
    exponent = np.where(x == 0, fmt.min_exponent, exponent - 1)
    exponent = np.clip(exponent, fmt.min_exponent, fmt.max_exponent)
    quantum: Float64 = np.ldexp(1.0, exponent - fmt.fraction_bits)
    return quantum


def ulp(x: Float64, out_dtype: object) -> Float64:
    """The unit in the last place of `out_dtype` at each value of `x` (float64, any shape).

    Zero and subnormals have the smallest subnormal; values past the largest finite number have its spacing;
    NaN and infinities give NaN.
    """
    return _spacing(x, format_of(out_dtype))


def e4m3_step(x: Float64) -> Float64:
    """The distance between neighbouring e4m3 values at each value of `x` (float64, any shape), as `ulp`."""
    return _spacing(x, E4M3)


def _spacing(x: Float64, fmt: Format) -> Float64:
    x = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(x)
    spacing: Float64 = np.asarray(_quantum(np.where(finite, x, 0.0), fmt))
    spacing[~finite] = np.nan
    return spacing


def round_to(x: Float64, out_dtype: object) -> NDArray[Any]:
    """`x` (float64, any shape) rounded once, to nearest with ties to even, as an array of `out_dtype`.

    Values that round past the largest finite number become infinite, as IEEE 754 has it; NaN stays NaN.
    """
    fmt = format_of(out_dtype)
    x = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(x)
    quantum = _quantum(np.where(finite, x, 0.0), fmt)
    rounded = np.where(finite, np.rint(np.where(finite, x, 0.0) / quantum) * quantum, x)
    limit = np.ldexp(2.0 - np.ldexp(1.0, -fmt.fraction_bits), fmt.max_exponent)
    # rint drops the sign of nothing: -0.25 gives -0.0, so copysign is only for the overflow.
    rounded = np.where(np.abs(rounded) > limit, np.copysign(np.inf, rounded), rounded)
    # Every value is now representable, so this cast is exact however many steps it takes.
    return rounded.astype(fmt.numpy_dtype)


def to_e4m3(x: NDArray[Any]) -> NDArray[Any]:
    """`x` (float32 or float64, any shape) as float8_e4m3fn: rounded once, to nearest with ties to even, and
    saturating at +-448, infinities too. NaN becomes 0x7f, as GPUs write it."""
    clamped = np.asarray(np.clip(x, -E4M3_MAX, E4M3_MAX))
    if clamped.dtype == np.float64:  # not through float32, as ml_dtypes would
        quantum = _quantum(np.where(np.isnan(clamped), 0.0, clamped), E4M3)
        clamped = np.rint(clamped / quantum) * quantum
    codes: NDArray[Any] = clamped.astype(E4M3.numpy_dtype)
    codes.view(np.uint8)[np.isnan(clamped)] = 0x7F
    return codes

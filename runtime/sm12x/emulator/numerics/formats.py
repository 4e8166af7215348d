"""The floating-point formats of PTX: exact decoding, and encoding with every rounding mode.

PTX ISA 9.3, 5.2.3 (alternate formats), 6.5.2 (rounding modifiers), 9.7.9.22 (``cvt``: saturation, NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sm12x.emulator.numerics.arrays import Array, Floats
from sm12x.emulator.numerics.unsupported import Unsupported

_STORAGE = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_HARDWARE = {2: np.float16, 4: np.float32, 8: np.float64}
ROUNDINGS = frozenset({"rn", "rna", "rz", "rm", "rp", "rs"})


@dataclass(frozen=True)
class Format:
    """A binary floating-point encoding: sign, exponent, fraction, from the top bit down.

    ``infinity``: the all-ones exponent holds infinities and NaNs, as in IEEE 754. ``nan``: the NaN that
    instructions return, or None where there is none. ``maximum``: code of the largest finite magnitude.
    ``shift``: unused low bits (tf32 lives in the upper 19 bits of a register).
    """

    name: str
    bits: int
    exponent_bits: int
    fraction_bits: int
    bias: int
    maximum: int
    nan: int | None
    infinity: bool = False
    signed: bool = True
    shift: int = 0

    @property
    def storage(self) -> type[np.unsignedinteger[Any]]:
        """The unsigned integer type that holds one code."""
        return _STORAGE[max(self.bits + self.shift, 8)]

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormals share it."""
        return (0 if self.fraction_bits == 0 else 1) - self.bias


FORMATS = {
    f.name: f
    for f in (
        Format("e4m3", 8, 4, 3, 7, 0x7E, 0x7F),
        Format("e5m2", 8, 5, 2, 15, 0x7B, 0x7F, infinity=True),
        Format("e2m3", 6, 2, 3, 1, 0x1F, None),
        Format("e3m2", 6, 3, 2, 3, 0x1F, None),
        Format("e2m1", 4, 2, 1, 1, 0x7, None),
        Format("ue8m0", 8, 8, 0, 127, 0xFE, 0xFF, signed=False),
        Format("ue4m3", 7, 4, 3, 7, 0x7E, 0x7F, signed=False),
        Format("f16", 16, 5, 10, 15, 0x7BFF, 0x7FFF, infinity=True),
        Format("bf16", 16, 8, 7, 127, 0x7F7F, 0x7FFF, infinity=True),
        Format("tf32", 19, 8, 10, 127, 0x3FBFF, 0x3FFFF, infinity=True, shift=13),
        Format("f32", 32, 8, 23, 127, 0x7F7FFFFF, 0x7FFFFFFF, infinity=True),
        Format("f64", 64, 11, 52, 1023, 0x7FEFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF, infinity=True),
    )
}


def format_of(name: str) -> Format:
    """The format called ``name``; Unsupported if there is none."""
    if name not in FORMATS:
        raise Unsupported(f"floating-point format .{name}: not one of {', '.join(FORMATS)}")
    return FORMATS[name]


@cache
def table(name: str) -> Floats:
    """The 256 values of a format of at most 8 bits, read-only; bits above the code are ignored."""
    form = format_of(name)
    if form.bits > 8:
        raise Unsupported(f"a table of .{name}: wider than 8 bits")
    codes = np.arange(256) & ((1 << form.bits) - 1)
    magnitude = codes & ((1 << (form.bits - form.signed)) - 1)
    exponent = magnitude >> form.fraction_bits
    fraction = magnitude & ((1 << form.fraction_bits) - 1)
    normal = (exponent > 0) | (form.fraction_bits == 0)
    values = np.ldexp(
        np.where(normal, fraction + (1 << form.fraction_bits), fraction).astype(np.float64),
        np.where(normal, exponent, 1) - form.bias - form.fraction_bits,
    )
    if form.infinity:
        values[magnitude == form.maximum + 1] = np.inf
        values[magnitude > form.maximum + 1] = np.nan
    elif form.nan is not None:
        values[magnitude == form.nan] = np.nan
    if form.signed:
        values = np.where(codes >> (form.bits - 1), -values, values)
    values.flags.writeable = False
    shared: Floats = values
    return shared


def decode(name: str, bits: ArrayLike) -> Floats:
    """The exact values of ``bits``, an unsigned integer array of one code per element, as float64.

    Formats narrower than the element ignore the bits above the code; tf32 ignores the low 13 bits of the
    register.
    """
    form = format_of(name)
    codes = np.asarray(bits)
    values: Floats
    if form.bits <= 8:
        values = table(name).take(codes if codes.dtype == np.uint8 else codes.astype(np.uint8))
        return values
    codes = codes.astype(form.storage, copy=False)
    if name == "bf16":
        codes = codes.astype(np.uint32) << 16
    elif name == "tf32":
        codes = codes & np.uint32(0xFFFFE000)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = codes.view(_HARDWARE[codes.dtype.itemsize]).astype(np.float64, copy=False)
    return values


def encode(
    name: str,
    values: ArrayLike,
    rounding: str = "rn",
    *,
    satfinite: bool = False,
    sat: bool = False,
    relu: bool = False,
    ftz: bool = False,
    random: tuple[Array, int] | None = None,
) -> Array:
    """The codes of ``values`` in format ``name``, in the format's storage type (uint8 for 4 to 8 bits).

    ``values``: float64, exact or rounded to odd (see ``rounding``). ``rounding``: "rn" (ties to even),
    "rna" (ties away from zero), "rz", "rm", "rp", or "rs" with ``random = (bits, count)``: ``count`` random
    bits are added to the first ``count`` bits that are cut off, and the carry rounds away from zero.
    ``sat`` clamps to [0, 1] and makes NaN +0; ``relu`` makes negative results +0; ``satfinite`` makes what
    exceeds the largest finite number that number. Without it, overflow gives infinity or the largest finite
    number as the rounding mode says, NaN in a format without infinities, and the largest number in a format
    without either. ``ftz`` makes subnormal results zeros of their sign, see ``_is_tiny``. NaN gives the
    format's NaN (e4m3, e5m2, f16, bf16: all ones below the sign) or, where there is none, the largest number.
    ue8m0 ignores the sign of its input, and rounds only by "rz" and "rp". Unsupported: another mode.
    ValueError: a negative value for ue4m3.
    """
    form = format_of(name)
    if rounding not in ROUNDINGS or (rounding == "rs") != (random is not None):
        raise Unsupported(f"rounding .{rounding} to .{name}")
    exact = np.asarray(values, dtype=np.float64)
    if sat:
        exact = np.where(exact > 0, np.minimum(exact, 1.0), 0.0)
    negative = np.signbit(exact)
    if not form.signed:
        if name == "ue8m0":
            if rounding not in ("rz", "rp"):
                raise Unsupported(f"rounding .{rounding} to .ue8m0: PTX has .rz and .rp")
            negative = np.zeros_like(negative)
        elif (exact < 0).any():
            raise ValueError("ue4m3 holds no negative numbers")
    special = np.isnan(exact)
    if ftz:
        exact = np.where(_is_tiny(form, exact, rounding), np.copysign(0.0, exact), exact)
    negative = negative & ~special
    codes: Array
    if name == "f64":
        # a float64 value is its own code; results that float64 cannot hold are rounded where they arise
        codes = np.where(negative & relu, 0, exact.view(np.uint64))
        return codes.astype(np.uint64)
    if rounding == "rn" and name in ("f16", "f32") and not (satfinite or relu):
        # NumPy's conversions round once, to nearest even
        with np.errstate(all="ignore"):
            rounded = exact.astype(_HARDWARE[form.bits // 8])
        codes = rounded.view(form.storage)
        return np.where(special, form.storage(form.nan or 0), codes) if special.any() else codes
    with np.errstate(all="ignore"):
        codes = _magnitudes(form, np.abs(exact), negative, rounding, satfinite, random)
    codes = np.where(negative, 0 if relu else codes | (form.signed << (form.bits - 1)), codes)
    codes = np.where(special, form.maximum if form.nan is None else form.nan, codes).astype(form.storage)
    return codes << np.uint32(form.shift) if form.shift else codes


def _is_tiny(form: Format, values: Floats, rounding: str) -> NDArray[np.bool_]:
    """Where a result counts as subnormal for ``.ftz``: below the smallest normal number after rounding to the
    format's precision, as if exponents had no end.

    So some results are zeros that would be the smallest normal number without ``.ftz``, where subnormals
    are coarser. The ISA says "subnormal results"; the H200 does this in mul, fma and div (flushing all that
    is below that number before rounding would not give its fma), and the code that ptxas writes for
    ``cvt.ftz.f32.f64``, on sm_90a and sm_120a alike, compares with the same limits.
    """
    smallest = 2.0**form.lowest_exponent
    unit = smallest * 2.0 ** -(form.fraction_bits + 1)  # between numbers just below it
    magnitude = np.abs(values)
    if rounding == "rn":
        return magnitude < smallest - unit / 2
    if rounding == "rz":
        return magnitude < smallest
    outward = np.signbit(values) == (rounding == "rm")
    return np.where(outward, magnitude <= smallest - unit, magnitude < smallest)


def _magnitudes(
    form: Format,
    magnitude: Floats,
    negative: NDArray[np.bool_],
    rounding: str,
    satfinite: bool,
    random: tuple[Array, int] | None,
) -> NDArray[np.int64]:
    """Codes without sign of non-negative ``magnitude``; what stands for a NaN is meaningless."""
    infinite = np.isinf(magnitude)
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    exponent = np.where(finite == 0, form.lowest_exponent, np.frexp(finite)[1].astype(np.int64) - 1)
    exponent = np.maximum(exponent, form.lowest_exponent)
    scaled = np.ldexp(finite, form.fraction_bits - exponent)  # a power of two: exact
    whole = np.floor(scaled)
    rest = scaled - whole
    integer = whole.astype(np.int64)
    if rounding == "rn":
        up = (rest > 0.5) | ((rest == 0.5) & ((integer & 1) == 1))
    elif rounding == "rna":
        up = rest >= 0.5
    elif rounding == "rz":
        up = np.zeros(rest.shape, dtype=np.bool_)
    elif rounding == "rs":
        assert random is not None
        bits, count = random
        up = np.floor(np.ldexp(rest, count)) + np.asarray(bits, dtype=np.float64) >= float(1 << count)
    else:
        up = (rest > 0) & (negative if rounding == "rm" else ~negative)
    # the leading one of a normal number adds one to its exponent field, as does a carry out of the fraction
    codes: NDArray[np.int64] = ((exponent - form.lowest_exponent) << form.fraction_bits) + integer + up
    if form.fraction_bits == 0:
        codes = np.maximum(codes - 1, 0)  # no subnormals, and no zero: code 0 is the smallest power of two
    too_large = (codes > form.maximum) | infinite
    if too_large.any():
        if satfinite or (form.nan is None and not form.infinity):
            beyond = np.full(codes.shape, form.maximum, dtype=np.int64)
        elif form.infinity:
            to_finite = {"rz": np.True_, "rm": ~negative, "rp": negative}.get(rounding, np.False_)
            beyond = np.where(to_finite & ~infinite, form.maximum, form.maximum + 1)
        else:
            assert form.nan is not None
            beyond = np.full(codes.shape, form.nan, dtype=np.int64)
        codes = np.where(too_large, beyond, codes)
    return codes

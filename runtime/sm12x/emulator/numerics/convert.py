"""``cvt``: conversions between scalars. The packed forms are in ``convert_packed``.

PTX ISA 9.3, 6.5.1, 9.7.9.22.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from sm12x.emulator.numerics import bitwise, convert_packed, integers
from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.formats import decode, encode, format_of
from sm12x.emulator.numerics.integers import INTEGERS, Integer
from sm12x.emulator.numerics.rounding import to_odd
from sm12x.emulator.numerics.unsupported import Unsupported

Function = Callable[..., Array]

_FLOATS = ("f16", "bf16", "f32", "f64")
_FLOAT_ROUNDINGS = ("rn", "rz", "rm", "rp")
_INTEGER_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")
# conversions in which every value of the source is a value of the destination: no rounding modifier
_WIDENING = {("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32")}


def convert(
    destination_type: str, source_type: str, rounding: str | None, flags: frozenset[str], *operands: Array
) -> Array:
    """The bits of ``cvt.rounding.flags.destination_type.source_type`` of the operands' bits.

    Types as PTX writes them, packed ones included ("f16x2", "e4m3x2", "ue8m0x2", "s2f6x2", "e4m3x4", ...).
    ``rounding``: "rn", "rna", "rz", "rm", "rp", "rs", "rni", "rzi", "rmi", "rpi" or None. ``flags``: of
    "ftz", "sat", "satfinite", "relu", "scaled::n2::ue8m0". ``operands``: unsigned arrays in the order of
    PTX (``a``; ``a, b``; ``a, b, e, f``; then the scale factor or the random bits); wider registers than
    the source type are allowed. The result is uint16 for destinations of 8 and 16 bits, uint32, or uint64;
    an s8 is sign-extended, see ``integers.extend`` for registers that are wider still. Unsupported: a form
    that PTX does not have.
    """
    run = lookup(destination_type, source_type, rounding, flags)
    with np.errstate(all="ignore"):
        return run(*operands)


@cache
def lookup(destination_type: str, source_type: str, rounding: str | None, flags: frozenset[str]) -> Function:
    """The function that ``convert`` calls; call it under ``np.errstate(all="ignore")``."""
    name = ".".join(x for x in ("cvt", rounding, *sorted(flags), destination_type, source_type) if x)
    run: Function | None = None
    if destination_type in INTEGERS and source_type in INTEGERS:
        if rounding is None and flags <= {"sat"}:
            run = _integer_to_integer(INTEGERS[destination_type], INTEGERS[source_type], bool(flags))
    elif destination_type in INTEGERS and source_type in _FLOATS:
        allowed = {"sat", "ftz"} if source_type == "f32" else {"sat"}
        if rounding in _INTEGER_ROUNDINGS and flags <= allowed:
            run = _float_to_integer(destination_type, source_type, rounding, "ftz" in flags)
    elif destination_type in _FLOATS and source_type in INTEGERS:
        allowed = {"f32": {"sat", "ftz"}, "f16": {"sat"}, "f64": {"sat"}}.get(destination_type, set())
        if rounding in _FLOAT_ROUNDINGS and flags <= allowed:
            run = _integer_to_float(destination_type, INTEGERS[source_type], rounding, "sat" in flags)
    elif destination_type in (*_FLOATS, "tf32") and source_type in _FLOATS:
        if _float_form_exists(destination_type, source_type, rounding, flags):
            run = _float_to_float(destination_type, source_type, rounding, flags)
    else:
        run = convert_packed.function(destination_type, source_type, rounding, flags)
    if run is None:
        raise Unsupported(name)
    return run


def _float_form_exists(destination: str, source: str, rounding: str | None, flags: frozenset[str]) -> bool:
    if destination == "tf32":
        allowed = {"satfinite"} if rounding == "rna" else {"satfinite", "relu"}
        return source == "f32" and rounding in ("rna", "rn", "rz") and flags <= allowed
    if "ftz" in flags and "f32" not in (destination, source):
        return False
    if "sat" in flags and (destination == "bf16" or flags & {"relu", "satfinite"}):
        return False
    if flags & {"relu", "satfinite"}:
        narrow = destination in ("f16", "bf16") and source == "f32" and rounding in ("rn", "rz")
        return narrow and flags <= {"relu", "satfinite"}
    if destination == source:
        return rounding is None or rounding in _INTEGER_ROUNDINGS
    if (destination, source) in _WIDENING:
        return rounding is None
    return rounding in _FLOAT_ROUNDINGS


def _float_to_float(destination: str, source: str, rounding: str | None, flags: frozenset[str]) -> Function:
    ftz, sat = "ftz" in flags, "sat" in flags
    satfinite, relu = "satfinite" in flags, "relu" in flags
    if destination == source and rounding is None and not flags:
        # a move, or for 16 bits an addition of -0, which makes a NaN canonical
        return bitwise.canonical(destination) if destination in ("f16", "bf16") else lambda a: a
    if destination == "tf32" and rounding == "rna":
        return _nearest_away_tf32(satfinite)
    if (destination, source) == ("f32", "bf16") and not (sat or ftz):
        return lambda a: a.astype(np.uint32) << np.uint32(16)  # no arithmetic: a NaN keeps its payload
    if (destination, source, rounding) == ("bf16", "f32", "rn") and not flags:
        return convert_packed.nearest_bf16
    integral = rounding if rounding in _INTEGER_ROUNDINGS else None
    mode = "rn" if integral or rounding is None else rounding

    # To f16, ptxas drops .ftz: rounded up or down, a subnormal f32 becomes the smallest number of f16, where
    # the ISA has a zero ("subnormal inputs are flushed to sign-preserving zero").
    flushed = ftz and source == "f32" and destination != "f16"
    # conversions from and to f64 pass a NaN on, others make it canonical
    keeps_nan = "f64" in (destination, source) and destination != source and not (sat or flushed)

    def run(a: Array) -> Array:
        if source == "f32":
            a = a.astype(np.uint32, copy=False)
            # a multiplication by 1, which makes a NaN canonical
            a = bitwise.canonical("f32")(bitwise.flush("f32", a)) if flushed else a
        values = decode(source, a)
        if integral:
            values = integers.to_integral(values, integral)
        flush = ftz and destination == "f32"
        result = encode(destination, values, mode, sat=sat, satfinite=satfinite, relu=relu, ftz=flush)
        return _with_nan(destination, source, a, result) if keeps_nan else result

    return run


def _with_nan(destination: str, source: str, a: Array, result: Array) -> Array:
    """``result`` with the NaN of ``a``, made quiet: the sign and the upper bits of the fraction for which
    there is room (open in the ISA, as the H200 does it).
    """
    special = bitwise.is_nan(source, a)
    if not special.any():
        return result
    to, form = format_of(destination), format_of(source)
    wide = a.astype(np.uint64)
    sign = wide >> np.uint64(form.bits - 1) << np.uint64(to.bits - 1)
    fraction = wide & np.uint64((1 << form.fraction_bits) - 1)
    room = to.fraction_bits - form.fraction_bits
    fraction = fraction << np.uint64(room) if room > 0 else fraction >> np.uint64(-room)
    quiet = np.uint64(to.maximum + 1 | 1 << to.fraction_bits - 1)
    return np.where(special, (sign | quiet | fraction).astype(to.storage), result)


def _nearest_away_tf32(satfinite: bool) -> Function:
    """Integer arithmetic on the bits, as ptxas writes it for every architecture: a NaN only loses its low
    bits, and may become an infinity by that.
    """

    def run(a: Array) -> Array:
        bits = a.astype(np.uint32, copy=False)
        infinity, magnitude = np.uint32(0x7F800000), np.uint32(0x7FFFFFFF)
        rounded: Array = np.where(bits & magnitude < infinity, bits + np.uint32(0x1000), bits) & np.uint32(
            0xFFFFE000
        )
        if satfinite:
            rounded = np.where(rounded & magnitude >= infinity, rounded - np.uint32(0x2000), rounded)
        return rounded

    return run


def _integer_to_integer(destination: Integer, source: Integer, sat: bool) -> Function:
    def run(a: Array) -> Array:
        values = integers.read(source, a)
        return integers.write(destination, integers.saturate(destination, values) if sat else values)

    return run


def _float_to_integer(destination: str, source: str, rounding: str, ftz: bool) -> Function:
    integer = INTEGERS[destination]
    # zero, except where a 64-bit type is involved on either side
    nan = 1 << (integer.bits - 1) if source == "f64" or integer.bits == 64 else 0

    def run(a: Array) -> Array:
        if source == "f32":
            a = a.astype(np.uint32, copy=False)
            a = bitwise.flush("f32", a) if ftz else a
        values = integers.to_integral(decode(source, a), rounding)
        return integers.from_integral(integer, values, nan)

    return run


def _integer_to_float(destination: str, source: Integer, rounding: str, sat: bool) -> Function:
    def run(a: Array) -> Array:
        nearest, error = integers.to_float(integers.read(source, a))
        if destination == "f64":
            return encode("f64", integers.directed(nearest, error, rounding), sat=sat)
        return encode(destination, to_odd(nearest, error), rounding, sat=sat)

    return run

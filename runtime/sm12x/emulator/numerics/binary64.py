"""Double precision in every rounding mode: native where hardware does the same, else exact rationals.

PTX ISA 9.3, 9.7.3.3 to 9.7.3.15. Of NaN operands one is passed on, made quiet; of several the one that
the H200 passes on, see ``_PRIORITY`` (open in the ISA). An invalid operation gives 0xfff8000000000000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np

from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.bitwise import quiet_double

_DEFAULT_NAN = np.uint64(0xFFF8000000000000)

# Which operand's NaN is the result, the first choice first. DADD, DMUL and DFMA look at the second operand
# before the others, and DFMA at its first operand last; a division is a routine that looks at the dividend.
_PRIORITY = {"add": (1, 0), "sub": (1, 0), "mul": (1, 0), "fma": (1, 2, 0), "div": (0, 1)}

_NATIVE: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1.0 / a,
}


@cache
def function(op: str, rounding: str) -> Callable[..., Array]:
    """``op`` ("add", "sub", "mul", "fma", "div", "rcp", "sqrt") on uint64 arrays in mode rn, rz, rm or rp."""
    native = rounding == "rn" and op in _NATIVE

    def run(*operands: Array) -> Array:
        values = [np.ascontiguousarray(x).view(np.float64) for x in operands]
        if native:
            result = _NATIVE[op](*values)
        else:
            flat = [np.broadcast_to(v, operands[0].shape).ravel().tolist() for v in values]
            result = np.array([_one(op, rounding, *lane) for lane in zip(*flat, strict=True)])
            result = result.reshape(operands[0].shape)
        bits: Array = result.view(np.uint64)
        special = np.isnan(result)
        if special.any():
            bits = np.where(special, _DEFAULT_NAN, bits)
            for at in reversed(_PRIORITY.get(op, (0,))):
                bits = np.where(np.isnan(values[at]), quiet_double(operands[at]), bits)
        return bits

    return run


def _one(op: str, rounding: str, *x: float) -> float:
    """One result; NaN stands for any NaN."""
    if (
        not all(map(math.isfinite, x))
        or (op in ("div", "rcp") and x[-1] == 0)
        or (op == "sqrt" and x[0] <= 0)
    ):
        return _special(op, *x)
    if op == "sqrt":
        return nearby(_root(x[0]), rounding)
    if op in ("div", "rcp"):
        numerator = 1.0 if op == "rcp" else x[0]
        if numerator == 0:
            return numerator / x[-1]
        return nearby(Fraction(numerator) / Fraction(x[-1]), rounding)
    if op == "mul":
        return nearby(Fraction(x[0]) * Fraction(x[1]), rounding) if x[0] and x[1] else x[0] * x[1]
    if op == "fma":
        product, addend = Fraction(x[0]) * Fraction(x[1]), x[2]
        minus = math.copysign(1, x[0]) * math.copysign(1, x[1]) < 0
    else:
        product, addend = Fraction(x[0]), x[1] if op == "add" else -x[1]
        minus = math.copysign(1, x[0]) < 0
    total = product + Fraction(addend)
    if total:
        return nearby(total, rounding)
    other = math.copysign(1, addend) < 0
    return -0.0 if (minus and other) or (rounding == "rm" and (minus or other)) else 0.0


def _special(op: str, *x: float) -> float:
    """Results with infinities, NaN, a zero divisor or a root of something not positive: never rounded."""
    with np.errstate(all="ignore"):
        values = [np.float64(v) for v in x]
        if op != "fma":
            return float(_NATIVE[op](*values))
        a, b, c = values
        if np.isinf(c) and np.isfinite(a) and np.isfinite(b):
            return float(c)  # the product may overflow where the fused one does not
        return float(a * b + c)


def _root(x: float) -> Fraction:
    """The square root to 64 bits and a sticky bit."""
    mantissa, exponent = math.frexp(x)
    scaled = int(math.ldexp(mantissa, 53))
    exponent -= 53
    if exponent % 2:
        scaled, exponent = scaled * 2, exponent - 1
    wide = scaled << 128
    root = math.isqrt(wide)
    sticky = 2 * root + (root * root != wide)
    return Fraction(sticky) * Fraction(2) ** (exponent // 2 - 65)


def nearby(value: Fraction, rounding: str) -> float:
    """A rational other than zero, rounded to binary64 in mode rn, rz, rm or rp."""
    minus, magnitude = value < 0, abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    quantum = max(exponent - 52, -1074)
    steps = magnitude / Fraction(2) ** quantum
    whole, rest = divmod(steps.numerator, steps.denominator)
    outward = rounding == ("rm" if minus else "rp")
    if rounding == "rn":
        twice = 2 * rest - steps.denominator
        whole += twice > 0 or (twice == 0 and whole % 2 == 1)
    else:
        whole += outward and rest > 0
    if whole >= 1 << max(1024 - quantum, 0):
        beyond = math.inf if outward or rounding == "rn" else math.nextafter(math.inf, 0)
        return -beyond if minus else beyond
    result = math.ldexp(whole, quantum)
    return -result if minus else result

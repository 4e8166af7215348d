"""The ``.approx`` and ``.full`` instructions: float64 functions rounded once, within the ISA's errors.

PTX ISA 9.3, 9.7.3.8, 9.7.3.13 to 9.7.3.22, 9.7.4.9, 9.7.4.10. The hardware's own last bits are not
documented and are not imitated; special inputs give what the tables of the ISA say. ``ex2.approx.f16`` cuts
subnormal results off: of the H200's results for all 65536 operands, 300 are then further from the exact
function than 2^-9.9 of it and half a unit, and those are the ones that were.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from sm12x.emulator.numerics import bitwise
from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.formats import decode, encode
from sm12x.emulator.numerics.unsupported import Unsupported

_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1.0 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
    "ex2": np.exp2,
    "tanh": np.tanh,
}
_HIGH_WORD = np.uint64(0xFFFFFFFF00000000)
_NAN_HIGH = np.uint64(0x7FFFFFFF00000000)


@cache
def function(op: str, type_: str, kind: str, ftz: bool) -> Callable[..., Array]:
    """``op.kind{.ftz}.type`` on bit arrays; ``kind`` is "approx", or "full" for ``div``."""
    if type_ == "f64":
        return _high_word(op) if ftz else _double_rsqrt(op)
    if type_ == "bf16" and op == "ex2" and not ftz:
        raise Unsupported("ex2.approx.bf16 without .ftz")
    evaluate = _divide if op == "div" and kind == "approx" else _FUNCTIONS[op]

    def run(*operands: Array) -> Array:
        if ftz:
            operands = tuple(bitwise.flush(type_, x) for x in operands)
        values = evaluate(*(decode(type_, x) for x in operands))
        result = encode(type_, values)
        if (op, type_) == ("ex2", "f16"):
            result = np.where(values < 2.0**-14, encode(type_, values, "rz"), result)
        return bitwise.flush(type_, result) if ftz else result

    return run


def _divide(a: Array, b: Array) -> Array:
    """``div.approx``: beyond 2^126 the divisor's reciprocal is zero, times infinity NaN."""
    quotient = a / b
    large = np.isfinite(b) & (np.abs(b) > 2.0**126)
    zero = np.copysign(0.0, quotient)
    return np.where(large & ~np.isnan(quotient), np.where(np.isinf(a), np.nan, zero), quotient)


def _double_rsqrt(op: str) -> Callable[[Array], Array]:
    if op != "rsqrt":
        raise Unsupported(f"{op}.approx.f64 without .ftz")

    def run(a: Array) -> Array:
        result: Array = (1.0 / np.sqrt(np.ascontiguousarray(a).view(np.float64))).view(np.uint64)
        return result

    return run


def _high_word(op: str) -> Callable[[Array], Array]:
    """``rcp`` and ``rsqrt.approx.ftz.f64``: 1.11.20 bits in, 1.11.20 bits out, the low word zero."""

    def run(a: Array) -> Array:
        operand = bitwise.flush("f64", a & _HIGH_WORD)
        result = _FUNCTIONS[op](operand.view(np.float64))
        bits = bitwise.flush("f64", result.view(np.uint64) & _HIGH_WORD)
        return np.where(np.isnan(result), _NAN_HIGH, bits)

    return run

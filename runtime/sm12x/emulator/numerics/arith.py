"""Floating-point arithmetic of PTX on bit arrays, with one rounding of the exact result.

PTX ISA 9.3, 9.7.3 (.f32, .f64, .f32x2), 9.7.4 (.f16, .bf16 and their pairs), 9.7.5 (mixed precision). Where
the ISA leaves the NaN open ("unspecified NaN"), results are the NaN that current hardware returns:
0x7fffffff, 0x7fff.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from sm12x.emulator.numerics import approx, binary64, bitwise
from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.formats import decode, encode
from sm12x.emulator.numerics.rounding import has_nan, quotient_to_odd, root_to_odd, sum_to_odd
from sm12x.emulator.numerics.unsupported import Unsupported

Function = Callable[..., Array]

_DIRECTED = ("rn", "rz", "rm", "rp")


@dataclass(frozen=True)
class _Form:
    """What PTX allows on an operation and type."""

    roundings: tuple[str | None, ...]
    flags: frozenset[str]


def _forms() -> dict[tuple[str, str], _Form]:
    forms: dict[tuple[str, str], _Form] = {}

    def allow(operations: str, types: str, roundings: tuple[str | None, ...], flags: str = "") -> None:
        for operation in operations.split():
            for type_ in types.split():
                forms[operation, type_] = _Form(roundings, frozenset(flags.split()))

    allow("add sub mul", "f32", (*_DIRECTED, None), "ftz sat")
    allow("add sub mul", "f32x2", (*_DIRECTED, None), "ftz")
    allow("add sub mul", "f64", (*_DIRECTED, None))
    allow("add sub mul", "f16 f16x2", ("rn", None), "ftz sat")
    allow("add sub mul", "bf16 bf16x2", ("rn", None))
    allow("fma mad", "f32", _DIRECTED, "ftz sat")
    allow("fma mad", "f64", _DIRECTED)
    allow("fma", "f32x2", _DIRECTED, "ftz")
    allow("fma", "f16 f16x2", ("rn",), "ftz sat relu")
    allow("fma", "bf16 bf16x2", ("rn",), "relu")
    allow("add sub", "f32.f16 f32.bf16", (*_DIRECTED, None), "sat")
    allow("fma", "f32.f16 f32.bf16", _DIRECTED, "sat")
    allow("div", "f32", (*_DIRECTED, "approx", "full"), "ftz")
    allow("rcp sqrt", "f32", (*_DIRECTED, "approx"), "ftz")
    allow("div rcp sqrt", "f64", _DIRECTED)
    allow("rcp", "f64", (*_DIRECTED, "approx"), "ftz")
    allow("rsqrt", "f32 f64", ("approx",), "ftz")
    allow("sin cos lg2 ex2", "f32", ("approx",), "ftz")
    allow("tanh", "f32 f16 f16x2 bf16 bf16x2", ("approx",))
    allow("ex2", "f16 f16x2", ("approx",))
    allow("ex2", "bf16 bf16x2", ("approx",), "ftz")
    allow("min max", "f32", (None,), "ftz NaN xorsign abs")
    allow("min max", "f16 f16x2", (None,), "ftz NaN xorsign abs")
    allow("min max", "bf16 bf16x2", (None,), "NaN xorsign abs")
    allow("min max neg abs copysign", "f64", (None,))
    allow("neg abs", "f32 f16 f16x2", (None,), "ftz")
    allow("neg abs", "bf16 bf16x2", (None,))
    allow("copysign", "f32", (None,))
    return forms


_FORMS = _forms()


def apply(op: str, type_: str, rounding: str | None, flags: frozenset[str], *operands: Array) -> Array:
    """The bits of ``op.rounding.flags.type`` of the operands' bits.

    ``op``: "add", "sub", "mul", "fma" (or "mad"), "div", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2",
    "ex2", "tanh", "min", "max", "neg", "abs", "copysign". ``type_``: "f32", "f64", "f16", "bf16", "f16x2",
    "bf16x2", "f32x2", or "f32.f16", "f32.bf16" for mixed precision (the last operand is f32). ``rounding``:
    "rn", "rz", "rm", "rp", "approx", "full", or None for an instruction without. ``flags``: of "ftz",
    "sat", "relu", "NaN", "xorsign", "abs". ``operands``: unsigned arrays of one shape, of the width of the
    type; so is the result. ``min`` and ``max`` of f32 take two or three operands. Unsupported: a form that
    PTX does not have, and ``fma.oob``.
    """
    run = lookup(op, type_, rounding, flags)
    with np.errstate(all="ignore"):
        return run(*operands)


@cache
def lookup(op: str, type_: str, rounding: str | None, flags: frozenset[str]) -> Function:
    """The function of the operands that ``apply`` calls; call it under ``np.errstate(all="ignore")``."""
    form = _FORMS.get((op, type_))
    both = ("sat" in flags and "relu" in flags) or ("xorsign" in flags and "abs" not in flags)
    # of rcp.f64 only the approximation has .ftz
    both = both or ((op, type_) == ("rcp", "f64") and ("ftz" in flags) != (rounding == "approx"))
    lone_abs = "abs" in flags and "xorsign" not in flags and type_ != "f32"
    if form is None or rounding not in form.roundings or not flags <= form.flags or both or lone_abs:
        qualifiers = "".join(f".{q}" for q in (rounding, *sorted(flags)) if q)
        raise Unsupported(f"{op}{qualifiers}.{type_}")
    if op == "mad":
        op = "fma"
    if type_.endswith("x2"):
        return _pairwise(lookup(op, type_.removesuffix("x2"), rounding, flags), type_)
    if op in ("min", "max"):
        return bitwise.extremum(op, type_, flags)
    if op in ("neg", "abs", "copysign"):
        return bitwise.sign_operation(op, type_, "ftz" in flags)
    if rounding in ("approx", "full"):
        return approx.function(op, type_, rounding, "ftz" in flags)
    if type_ == "f64":
        return binary64.function(op, rounding or "rn")
    if type_ == "f32" and rounding in ("rn", None) and not flags and op in _NATIVE:
        return _NATIVE[op]
    if "." in type_:
        return _mixed(op, type_.split(".")[1], rounding or "rn", "sat" in flags)
    return _rounded(op, type_, rounding or "rn", flags)


def _pairwise(scalar: Function, type_: str) -> Function:
    part = np.uint32 if type_ == "f32x2" else np.uint16
    whole = np.uint64 if type_ == "f32x2" else np.uint32

    def run(*operands: Array) -> Array:
        return scalar(*(np.ascontiguousarray(x).view(part) for x in operands)).view(whole)

    return run


def _exact(op: str, rounding: str) -> Function:
    """The operation on float64 arrays, rounded to odd, with the sign of a zero that ``rounding`` asks for."""
    if op == "mul":
        return np.multiply  # products of 24-bit significands are exact
    if op == "div":
        return quotient_to_odd
    if op == "rcp":
        return lambda a: quotient_to_odd(np.ones_like(a), a)
    if op == "sqrt":
        return root_to_odd

    def add(x: Array, y: Array) -> Array:
        total = sum_to_odd(x, y)
        if rounding == "rm":
            # an exact zero is -0 when rounding down, unless both addends are +0
            total = np.where((total == 0) & (np.signbit(x) | np.signbit(y)), -0.0, total)
        return total

    if op == "add":
        return add
    if op == "sub":
        return lambda a, b: add(a, -b)
    return lambda a, b, c: add(a * b, c)


def _rounded(op: str, type_: str, rounding: str, flags: frozenset[str]) -> Function:
    exact, ftz = _exact(op, rounding), "ftz" in flags
    sat, relu = "sat" in flags, "relu" in flags

    def run(*operands: Array) -> Array:
        if ftz:
            operands = tuple(bitwise.flush(type_, x) for x in operands)
        values = exact(*(decode(type_, x) for x in operands))
        return encode(type_, values, rounding, sat=sat, relu=relu, ftz=ftz)

    return run


def _mixed(op: str, narrow: str, rounding: str, sat: bool) -> Function:
    exact = _exact(op, rounding)

    def run(*operands: Array) -> Array:
        values = exact(*(decode(narrow, x) for x in operands[:-1]), decode("f32", operands[-1]))
        return encode("f32", values, rounding, sat=sat)

    return run


def _single(values: Array) -> Array:
    """Bits of float32 results, with the canonical NaN."""
    bits: Array = values.view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), bits) if has_nan(values) else bits


def _fma(a: Array, b: Array, c: Array) -> Array:
    product = a.view(np.float32).astype(np.float64) * b.view(np.float32)
    return _single(sum_to_odd(product, c.view(np.float32).astype(np.float64)).astype(np.float32))


# the float32 instructions of ordinary code, in hardware arithmetic
_NATIVE: dict[str, Function] = {
    "add": lambda a, b: _single(a.view(np.float32) + b.view(np.float32)),
    "sub": lambda a, b: _single(a.view(np.float32) - b.view(np.float32)),
    "mul": lambda a, b: _single(a.view(np.float32) * b.view(np.float32)),
    "div": lambda a, b: _single(a.view(np.float32) / b.view(np.float32)),
    "sqrt": lambda a: _single(np.sqrt(a.view(np.float32))),
    "fma": _fma,
}

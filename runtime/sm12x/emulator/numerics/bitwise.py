"""Operations of PTX that only look at the bits: flushing subnormals, neg, abs, copysign, min and max.

PTX ISA 9.3, 9.7.3.2, 9.7.3.9 to 9.7.3.12, 9.7.4.5 to 9.7.4.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.formats import format_of


class _Masks(NamedTuple):
    sign: np.unsignedinteger[Any]
    exponent: np.unsignedinteger[Any]
    magnitude: np.unsignedinteger[Any]
    nan: np.unsignedinteger[Any]


def _masks(type_: str) -> _Masks:
    form = format_of(type_)
    top = 1 << (form.bits - 1)
    exponent = form.maximum + 1  # the infinity
    return _Masks(*(form.storage(x) for x in (top, exponent, top - 1, form.nan or 0)))


def flush(type_: str, bits: Array) -> Array:
    """Subnormal numbers of an IEEE type made zeros of their sign (``.ftz``)."""
    masks = _masks(type_)
    return np.where(bits & masks.exponent, bits, bits & masks.sign)


def is_nan(type_: str, bits: Array) -> Array:
    """Where the bits of an IEEE type are a NaN."""
    masks = _masks(type_)
    found: Array = (bits & masks.magnitude) > masks.exponent
    return found


def quiet_double(bits: Array) -> Array:
    """NaN of f64 made quiet, with their sign and the rest of their payload."""
    quiet: Array = bits | np.uint64(1 << 51)
    return quiet


def canonical(type_: str) -> Callable[[Array], Array]:
    """The identity, but for NaN, which become the canonical one."""
    masks = _masks(type_)

    def run(a: Array) -> Array:
        bits = a.astype(masks.nan.dtype, copy=False)
        return np.where(is_nan(type_, bits), masks.nan, bits)

    return run


def sign_operation(op: str, type_: str, ftz: bool) -> Callable[..., Array]:
    """``neg``, ``abs`` or ``copysign``.

    A NaN becomes the canonical one, in f64 a quiet one of the same sign and payload (open in the ISA): neg
    and abs are additions of -0 in hardware.
    """
    masks = _masks(type_)

    def copysign(a: Array, b: Array) -> Array:
        result: Array = (a & masks.sign) | (b & masks.magnitude)
        return result

    def run(a: Array) -> Array:
        if ftz:
            a = flush(type_, a)
        result: Array = a ^ masks.sign if op == "neg" else a & masks.magnitude
        special = is_nan(type_, a)
        nan = quiet_double(a) if type_ == "f64" else masks.nan
        return np.where(special, nan, result) if special.any() else result

    return copysign if op == "copysign" else run


def extremum(op: str, type_: str, flags: frozenset[str]) -> Callable[..., Array]:
    """``min`` or ``max`` of two or three operands, with -0 below +0; NaN loses, or wins with ``.NaN``."""
    masks = _masks(type_)
    sign_shift = masks.sign.dtype.type(format_of(type_).bits - 1)

    def key(bits: Array) -> Array:
        """Unsigned numbers in the order of the values: sign bit flipped, or all bits of a negative number."""
        return bits ^ np.where(bits >> sign_shift, masks.sign | masks.magnitude, masks.sign)

    def of_two(a: Array, b: Array) -> Array:
        first = key(a) < key(b) if op == "min" else key(a) > key(b)
        result = np.where(first, a, b)
        nan_a, nan_b = is_nan(type_, a), is_nan(type_, b)
        if not (nan_a.any() or nan_b.any()):
            return result
        if "NaN" in flags:
            return np.where(nan_a | nan_b, masks.nan, result)
        # of two NaN, f64 gives the second, made quiet
        both = quiet_double(b) if type_ == "f64" else masks.nan
        return np.where(nan_a, np.where(nan_b, both, b), np.where(nan_b, a, result))

    def run(*operands: Array) -> Array:
        allowed = (2, 3) if type_ == "f32" else (2,)
        if "abs" in flags:
            allowed = (2,) if "xorsign" in flags else (3,)
        if len(operands) not in allowed:
            raise ValueError(f"{op}.{type_} takes {' or '.join(map(str, allowed))} operands here")
        if "ftz" in flags:
            operands = tuple(flush(type_, x) for x in operands)
        signs = operands[0] ^ operands[1]
        if "abs" in flags:
            operands = tuple(x & masks.magnitude for x in operands)
        result = operands[0]
        for other in operands[1:]:
            result = of_two(result, other)
        if "xorsign" in flags:
            special = is_nan(type_, result)
            result = np.where(special, result, (result & masks.magnitude) | (signs & masks.sign))
        return result

    return run

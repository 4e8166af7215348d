"""Floating-point arithmetic in every precision (PTX ISA, "Floating Point Instructions", "Half Precision
Floating Point Instructions", "Mixed Precision Floating Point Instructions"). What it computes is in
`numerics.arith`.
"""

from __future__ import annotations

from ..emitter import Emitter
from ..memory import Array
from ..numerics import arith
from ..numerics.unsupported import Unsupported
from ..ptx.ir import Instruction
from ..registry import instruction, unsupported

_ROUNDINGS = {"rn", "rz", "rm", "rp", "approx", "full"}
_MIXED = {("f32", "f16"), ("f32", "bf16")}


@instruction(
    *("add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh"),
    *("min", "max", "neg", "abs", "copysign"),
)
def floating(i: Instruction, e: Emitter) -> None:
    mixed = i.opcode[-2:] in _MIXED
    kind = ".".join(i.opcode[-2:]) if mixed else i.opcode[-1]
    words = i.opcode[1 : -2 if mixed else -1]
    rounding = next((word for word in words if word in _ROUNDINGS), None)
    flags = frozenset(word for word in words if word not in _ROUNDINGS)
    try:
        run = arith.lookup(i.opcode[0], kind, rounding, flags)
    except Unsupported as error:
        raise unsupported(i, str(error)) from error
    d, *sources = i.operands
    types = [i.opcode[-1]] * (len(sources) - 1) + ["f32"] if mixed else [kind] * len(sources)
    values = [e.value(source, type_).u for source, type_ in zip(sources, types, strict=True)]
    e.assign(d, "f32" if mixed else kind, f"{e.bind(run)}({', '.join(values)})")


@instruction("testp")
def testp(i: Instruction, e: Emitter) -> None:
    """Classes of floating-point numbers."""
    how, kind = i.opcode[1:]
    if kind not in ("f32", "f64") or how not in _CLASSES:
        raise unsupported(i)
    d, a = i.operands
    e.assign(d, "pred", f"{e.bind(_CLASSES[how])}({e.value(a, kind).u})")


def _fields(a: Array) -> tuple[Array, int, Array, Array]:
    """Exponent field, its largest value, fraction, and the bits without the sign."""
    bits, fraction_bits = 8 * a.dtype.itemsize, 23 if a.dtype.itemsize == 4 else 52
    word = a.dtype.type
    magnitude = a & word((1 << bits - 1) - 1)
    return (
        magnitude >> word(fraction_bits),
        (1 << bits - 1 - fraction_bits) - 1,
        magnitude & word((1 << fraction_bits) - 1),
        magnitude,
    )


def _finite(a: Array) -> Array:
    exponent, most, _, _ = _fields(a)
    found: Array = exponent != most
    return found


def _infinite(a: Array) -> Array:
    exponent, most, fraction, _ = _fields(a)
    found: Array = (exponent == most) & (fraction == 0)
    return found


def _nan(a: Array) -> Array:
    exponent, most, fraction, _ = _fields(a)
    found: Array = (exponent == most) & (fraction != 0)
    return found


def _normal(a: Array) -> Array:
    """Zeros count as normal (PTX ISA, "testp")."""
    exponent, most, fraction, _ = _fields(a)
    found: Array = ((exponent != 0) | (fraction == 0)) & (exponent != most)
    return found


def _subnormal(a: Array) -> Array:
    exponent, _, fraction, _ = _fields(a)
    found: Array = (exponent == 0) & (fraction != 0)
    return found


_CLASSES = {
    "finite": _finite,
    "infinite": _infinite,
    "number": lambda a: ~_nan(a),
    "notanumber": _nan,
    "normal": _normal,
    "subnormal": _subnormal,
}

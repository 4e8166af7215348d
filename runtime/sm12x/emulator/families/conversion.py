"""cvt (PTX ISA, "cvt", "cvt.pack"). What has a floating-point side is computed by `numerics.convert`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..emitter import Emitter, container
from ..memory import Array
from ..numerics import convert
from ..numerics.unsupported import Unsupported
from ..ptx.ir import TYPE_BITS, Instruction
from ..registry import instruction, unsupported

_INTEGERS = {f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)}
_ROUNDINGS = {"rn", "rz", "rm", "rp", "rna", "rs", "rni", "rzi", "rmi", "rpi"}


@instruction("cvt")
def cvt(i: Instruction, e: Emitter) -> None:
    to, source = i.opcode[-2:]
    words = i.opcode[1:-2]
    if to in _INTEGERS and source in _INTEGERS and set(words) <= {"sat"}:
        return _between_integers(i, e, to, source)
    rounding = next((word for word in words if word in _ROUNDINGS), None)
    flags = frozenset(word for word in words if word not in _ROUNDINGS)
    try:
        run = convert.lookup(to, source, rounding, flags)
    except Unsupported as error:
        raise unsupported(i, str(error)) from error
    d, *operands = i.operands
    types = [source] * len(operands)
    if rounding == "rs":
        types[-1] = "b32"  # the random bits
    values = [e.value(operand, kind).u for operand, kind in zip(operands, types, strict=True)]
    return e.assign(d, to, f"{e.bind(run)}({', '.join(values)})")


def _between_integers(i: Instruction, e: Emitter, to: str, source: str) -> None:
    d, a = i.operands
    value, signed = e.value(a, source), source[0] == "s"
    text = value.s if signed else value.u
    if "sat" in i.opcode:
        return e.assign(d, to, f"{e.bind(_saturating(to))}({text})")
    if TYPE_BITS[to] == 8:
        return e.assign(d, to, f"({text}.astype(u2) & {e.constant('u2', 255)})")
    wide = container(to)
    if signed and TYPE_BITS[to] > TYPE_BITS[source]:
        return e.assign(d, to, f"{text}.astype(i{wide[1:]}).view({wide})")
    return e.assign(
        d, to, value.u if container(source) == wide and TYPE_BITS[source] > 8 else f"{text}.astype({wide})"
    )


def _saturating(to: str) -> Callable[[Array], Array]:
    """Values of any integer type clamped to the range of `to`, as its container."""
    bits = TYPE_BITS[to]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)

    def run(a: Array) -> Array:
        limits = np.iinfo(a.dtype)
        clamped = np.clip(a, a.dtype.type(max(low, limits.min)), a.dtype.type(min(high, limits.max)))
        found: Array = clamped.astype(container(to))
        return found & np.uint16(255) if bits == 8 else found

    return run


@instruction("cvt.pack.sat")
def cvt_pack(i: Instruction, e: Emitter) -> None:
    """Two s32 clamped and packed: b in the low part, a above it, and above both the low part of c where there
    is one.
    """
    to, source = i.opcode[3], i.opcode[-1]
    bits = {"u16": 16, "s16": 16, "u8": 8, "s8": 8}.get(to, 0)
    if bits == 0 or i.opcode[4] != "s32" or (bits == 8) != (source == "b32" and len(i.operands) == 4):
        raise unsupported(i)
    d, a, b, *rest = i.operands
    clamp = e.bind(_saturating(to))
    high, low = (f"{clamp}({e.value(operand, 's32').s}).astype(u4)" for operand in (a, b))
    text = f"({high} << {e.constant('u4', bits)} | {low})"
    if rest:
        text = f"({text} | {e.value(rest[0], 'b32').u} << {e.constant('u4', 16)})"
    e.assign(d, "b32", text)

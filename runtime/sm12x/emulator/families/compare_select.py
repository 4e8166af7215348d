"""Comparison and selection (PTX ISA, "Comparison and Selection Instructions")."""

from __future__ import annotations

import numpy as np

from ..emitter import Emitter
from ..memory import Array
from ..ptx.ir import Instruction, Negated, Pair, Sink
from ..registry import instruction, unsupported
from .integer import TYPES

_MARKS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
_BOOLEAN = {"and": "&", "or": "|", "xor": "^"}
_BITS = {"b16", "b32", "b64"}
_FLOATS = {"f32", "f64"}


def _comparison(i: Instruction, e: Emitter, how: str, kind: str) -> str:
    """Source of the bool array of `a how b`."""
    first, second = (e.value(operand, kind) for operand in i.operands[1:3])
    if kind in _FLOATS:
        a, b = first.f, second.f
        if "ftz" in i.opcode:
            a, b = (f"{e.bind(_flushed)}({x})" for x in (a, b))
        unordered = f"(({a} != {a}) | ({b} != {b}))"
        if how == "num":
            return f"~{unordered}"
        if how == "nan":
            return unordered
        if how in _UNORDERED:
            return f"(({a} {_UNORDERED[how]} {b}) | {unordered})"
        if how == "ne":
            return f"(({a} != {b}) & ~{unordered})"
        if how in _MARKS:
            return f"({a} {_MARKS[how]} {b})"
    elif how in _UNSIGNED and kind[0] == "u":
        return f"({first.u} {_UNSIGNED[how]} {second.u})"
    elif how in _MARKS and (kind in TYPES or (kind in _BITS and how in ("eq", "ne"))):
        signed = kind[0] == "s" and how not in ("eq", "ne")
        return f"({first.s if signed else first.u} {_MARKS[how]} {second.s if signed else second.u})"
    raise unsupported(i, f"comparison .{how} of type .{kind}")


def _flushed(values: Array) -> Array:
    """float32 subnormals as zero."""
    return np.where(abs(values) < np.float32(2.0**-126), values * np.float32(0), values)


def _compared(i: Instruction, e: Emitter) -> tuple[str, str]:
    """Source of the result of a comparison with its Boolean operation, and of that of its complement."""
    words = [word for word in i.opcode[1:] if word not in ("ftz",)]
    how, kind = words[0], words[-1]
    text = _comparison(i, e, how, kind)
    combine = words[1] if words[1] in _BOOLEAN else None
    if combine is None:
        return text, f"~{text}"
    c = e.value(i.operands[3], "pred").u
    return f"{text} {_BOOLEAN[combine]} {c}", f"~{text} {_BOOLEAN[combine]} {c}"


@instruction("setp")
def setp(i: Instruction, e: Emitter) -> None:
    d = i.operands[0]
    text, complement = _compared(i, e)
    if not isinstance(d, Pair):
        return e.assign(d, "pred", text)
    # Both are found before either is written: an operand may be one of the destinations.
    e.line(f"x, y = {text}, {complement}")
    e.assign(d.first, "pred", "x")
    if not isinstance(d.second, Sink):
        e.assign(d.second, "pred", "y")
    return None


@instruction("set")
def set_(i: Instruction, e: Emitter) -> None:
    """As setp, with an integer of all ones or a float of 1.0 for true."""
    words = [word for word in i.opcode[1:] if word != "ftz"]
    result = words[-2]
    text, _ = _compared(i, e)
    if result in ("u32", "s32"):
        return e.assign(
            i.operands[0], result, f"where({text}, {e.constant('u4', -1)}, {e.constant('u4', 0)})"
        )
    if result == "f32":
        one = e.constant("u4", 0x3F800000)
        return e.assign(i.operands[0], result, f"where({text}, {one}, {e.constant('u4', 0)})")
    raise unsupported(i)


@instruction("selp")
def selp(i: Instruction, e: Emitter) -> None:
    kind = i.opcode[-1]
    if len(i.opcode) != 2 or kind not in TYPES | _BITS | _FLOATS:
        raise unsupported(i)
    d, a, b, c = i.operands
    if isinstance(c, Negated):
        raise unsupported(i)
    e.assign(d, kind, f"where({e.value(c, 'pred').u}, {e.value(a, kind).u}, {e.value(b, kind).u})")


@instruction("slct")
def slct(i: Instruction, e: Emitter) -> None:
    """a where c is not negative, else b."""
    kind, by = i.opcode[-2:]
    if by not in ("s32", "f32") or "ftz" in i.opcode or kind not in TYPES | _BITS | _FLOATS:
        raise unsupported(i)
    d, a, b, c = i.operands
    source = e.value(c, by)
    test = f"{source.s} >= 0" if by == "s32" else f"{source.f} >= 0"
    e.assign(d, kind, f"where({test}, {e.value(a, kind).u}, {e.value(b, kind).u})")

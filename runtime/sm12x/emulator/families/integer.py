"""Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions"). Floating-point forms of the same names:
`floating`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..emitter import Emitter, Source, container
from ..memory import Array
from ..ptx.ir import TYPE_BITS, Instruction
from ..registry import instruction, unsupported

TYPES = {f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64)}


def type_of(i: Instruction, allowed: set[str] = TYPES) -> str:
    """The instruction's type, its last word. Raises EmulatorError where it is not one of `allowed`."""
    kind = i.opcode[-1]
    if kind not in allowed:
        raise unsupported(i, f"type .{kind}")
    return kind


def plain(i: Instruction, *expected: str) -> None:
    """Raises EmulatorError where there are modifiers other than the type and those expected."""
    extra = [word for word in i.opcode[1:-1] if word not in expected]
    if extra:
        raise unsupported(i, f"modifier .{extra[0]}")


def seen(source: Source, kind: str) -> str:
    """An operand with the sign that its type has."""
    return source.s if kind[0] == "s" else source.u


def bits_of(text: str, kind: str) -> str:
    """A result with a sign as the unsigned bits that registers hold."""
    return f"({text}).view({container(kind)})" if kind[0] == "s" else text


@instruction(*(f"add.{kind}" for kind in TYPES), *(f"sub.{kind}" for kind in TYPES))
def add_sub(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    d, a, b = i.operands
    sign = "+" if i.opcode[0] == "add" else "-"
    e.assign(d, kind, f"{e.value(a, kind).u} {sign} {e.value(b, kind).u}")


@instruction("add.sat.s32", "sub.sat.s32")
def add_sub_saturated(i: Instruction, e: Emitter) -> None:
    d, a, b = i.operands
    sign = "+" if i.opcode[0] == "add" else "-"
    wide = f"{e.value(a, 's32').s}.astype(i8) {sign} {e.value(b, 's32').s}"
    limits = e.constant("i8", -(1 << 31)), e.constant("i8", (1 << 31) - 1)
    e.assign(d, "s32", f"minimum(maximum({wide}, {limits[0]}), {limits[1]}).astype(i4).view(u4)")


def _wide(source: Source, kind: str) -> str:
    """An operand in twice its width."""
    return f"{seen(source, kind)}.astype({kind[0].replace('s', 'i')}{TYPE_BITS[kind] // 4})"


def product(i: Instruction, e: Emitter, form: str, kind: str) -> tuple[str, str]:
    """Source of the product of operands 1 and 2 in one of its forms, and the type of the result."""
    a, b = e.value(i.operands[1], kind), e.value(i.operands[2], kind)
    bits = TYPE_BITS[kind]
    if form == "lo":
        return f"{a.u} * {b.u}", kind
    if form == "wide" and bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        return bits_of(f"{_wide(a, kind)} * {seen(b, kind)}", wide), wide
    if form == "hi" and bits < 64:
        narrow = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
        high = f"({_wide(a, kind)} * {seen(b, kind)} >> {bits}).astype({narrow})"
        return bits_of(high, kind), kind
    if form == "hi":
        return f"{e.bind(_high_signed if kind == 's64' else _high_unsigned)}({a.u}, {b.u})", kind
    raise unsupported(i)


@instruction("mul.lo", "mul.hi", "mul.wide")
def mul(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    plain(i, i.opcode[1])
    text, result = product(i, e, i.opcode[1], kind)
    e.assign(i.operands[0], result, text)


@instruction("mad.lo", "mad.hi", "mad.wide")
def mad(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    plain(i, i.opcode[1])
    text, result = product(i, e, i.opcode[1], kind)
    e.assign(i.operands[0], result, f"({text}) + {e.value(i.operands[3], result).u}")


def _high_unsigned(a: Array, b: Array) -> Array:
    """The upper 64 bits of a product of 64-bit integers."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    found: Array = a1 * b1 + (middle >> half) + (other >> half)
    return found


def _high_signed(a: Array, b: Array) -> Array:
    zero = np.uint64(0)
    found: Array = _high_unsigned(a, b)
    found = found - np.where(a.view(np.int64) < 0, b, zero) - np.where(b.view(np.int64) < 0, a, zero)
    return found


@instruction(*(f"div.{kind}" for kind in TYPES), *(f"rem.{kind}" for kind in TYPES))
def div_rem(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    d, a, b = i.operands
    function = e.bind(_quotient if i.opcode[0] == "div" else _remainder)
    text = f"{function}({seen(e.value(a, kind), kind)}, {seen(e.value(b, kind), kind)})"
    e.assign(d, kind, bits_of(text, kind))


def _quotient(a: Array, b: Array) -> Array:
    """Truncated; a division by zero gives all ones, one of the values that PTX leaves open."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    found: Any = a // divisor
    if a.dtype.kind == "i":
        found = found + ((a % divisor != 0) & ((a < 0) != (divisor < 0)))
    result: Array = np.where(zero, ~a.dtype.type(0), found.astype(a.dtype))
    return result


def _remainder(a: Array, b: Array) -> Array:
    """With the sign of the dividend; modulo zero gives the dividend."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    found: Any = np.fmod(a, divisor)
    result: Array = np.where(b == 0, a, found.astype(a.dtype))
    return result


@instruction(
    *(f"min.{kind}" for kind in TYPES),
    *(f"max.{kind}" for kind in TYPES),
    *(f"{name}.relu.s32" for name in ("min", "max")),
)
def min_max(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    d, a, b = i.operands
    text = f"{i.opcode[0]}imum({seen(e.value(a, kind), kind)}, {seen(e.value(b, kind), kind)})"
    if "relu" in i.opcode:
        text = f"maximum({text}, 0)"
    e.assign(d, kind, bits_of(text, kind))


@instruction(*(f"{name}.s{bits}" for name in ("abs", "neg") for bits in (16, 32, 64)))
def abs_neg(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    d, a = i.operands
    source = e.value(a, kind).s
    e.assign(d, kind, bits_of(f"abs({source})" if i.opcode[0] == "abs" else f"-{source}", kind))


@instruction("sad")
def sad(i: Instruction, e: Emitter) -> None:
    kind = type_of(i)
    plain(i)
    d, a, b, c = i.operands
    x, y = seen(e.value(a, kind), kind), seen(e.value(b, kind), kind)
    e.assign(d, kind, f"{bits_of(f'maximum({x}, {y}) - minimum({x}, {y})', kind)} + {e.value(c, kind).u}")


@instruction("mul24.lo", "mad24.lo")
def mul24(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, {"u32", "s32"})
    plain(i, "lo")
    sources = [e.value(operand, kind) for operand in i.operands[1:]]
    if kind == "s32":
        a, b = ((f"(({s.s} << 8) >> 8).view(u4)") for s in sources[:2])
    else:
        a, b = ((f"({s.u} & {e.constant('u4', 0xFFFFFF)})") for s in sources[:2])
    text = f"{a} * {b}"
    e.assign(i.operands[0], kind, text if len(sources) == 2 else f"{text} + {sources[2].u}")


@instruction("dp4a")
def dp4a(i: Instruction, e: Emitter) -> None:
    """d = c + the dot product of four bytes each."""
    signs = (i.opcode[1], i.opcode[-1])
    if len(i.opcode) != 3 or signs not in _dot4_by_signs:
        raise unsupported(i)
    d, a, b, c = i.operands
    function = e.bind(_dot4_by_signs[signs])
    e.assign(d, "u32", f"{function}({e.value(a, 'u32').u}, {e.value(b, 'u32').u}, {e.value(c, 'u32').u})")


def _dot4(a_type: Any, b_type: Any) -> Any:
    def run(a: Array, b: Array, c: Array) -> Array:
        left = a.view(a_type).reshape(32, 4).astype(np.int64)
        total = (left * b.view(b_type).reshape(32, 4)).sum(axis=1)
        found: Array = (total + c).astype(np.uint32)
        return found

    return run


_dot4_by_signs = {
    (x, y): _dot4(np.uint8 if x == "u32" else np.int8, np.uint8 if y == "u32" else np.int8)
    for x in ("u32", "s32")
    for y in ("u32", "s32")
}

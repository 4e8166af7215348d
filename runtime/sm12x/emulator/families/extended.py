"""Integer arithmetic with a carry (PTX ISA, "Extended-Precision Integer Arithmetic Instructions").

The carry is a register of the warp's that has no name in PTX; a subtraction leaves a borrow in it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..emitter import Emitter, container
from ..memory import Array
from ..ptx.ir import Instruction
from ..registry import instruction, unsupported
from .integer import product, type_of

_TYPES = {"u32", "s32", "u64", "s64"}


def _sum(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    partial = a + b
    total = partial + carry
    return total, (partial < a) | (total < partial)


def _difference(a: Array, b: Array, borrow: Array) -> tuple[Array, Array]:
    partial = a - b
    total = partial - borrow
    return total, (partial > a) | (total > partial)


def _emit(
    i: Instruction, e: Emitter, kind: str, function: Callable[..., tuple[Array, Array]], a: str, b: str
) -> None:
    dtype = container(kind)
    takes = i.opcode[0] in ("addc", "subc", "madc")
    carry = f"w.carry.astype({dtype})" if takes else e.constant(dtype, 0)
    e.line(f"x, y = {e.bind(function)}({a}, {b}, {carry})")
    e.assign(i.operands[0], kind, "x")
    if "cc" in i.opcode:
        mask = e.mask
        e.line("w.carry = y" if mask is None else f"w.carry = where({mask}, y, w.carry)")


@instruction("add.cc", "addc", "sub.cc", "subc")
def add_sub_carry(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, _TYPES)
    _, a, b = i.operands
    function = _sum if i.opcode[0][:3] == "add" else _difference
    _emit(i, e, kind, function, e.value(a, kind).u, e.value(b, kind).u)


@instruction("mad.lo.cc", "mad.hi.cc", "madc.lo", "madc.hi")
def mad_carry(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, _TYPES)
    if len(i.opcode) != 3 + ("cc" in i.opcode):
        raise unsupported(i)
    text, _ = product(i, e, i.opcode[1], kind)
    _emit(i, e, kind, _sum, f"({text})", e.value(i.operands[3], kind).u)

"""Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions" and the bit-field part of "Integer
Arithmetic Instructions").
"""

from __future__ import annotations

import numpy as np

from ..emitter import Emitter, container
from ..memory import Array
from ..ptx.ir import TYPE_BITS, Immediate, Instruction
from ..registry import instruction, unsupported
from .integer import bits_of, plain, type_of

_BITS = {"pred", "b16", "b32", "b64"}
_INTEGERS = {"u32", "s32", "u64", "s64"}


@instruction("and", "or", "xor")
def and_or_xor(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, _BITS)
    plain(i)
    d, a, b = i.operands
    mark = {"and": "&", "or": "|", "xor": "^"}[i.opcode[0]]
    e.assign(d, kind, f"{e.value(a, kind).u} {mark} {e.value(b, kind).u}")


@instruction("not")
def not_(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, _BITS)
    d, a = i.operands
    e.assign(d, kind, f"~{e.value(a, kind).u}")


@instruction("cnot")
def cnot(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, _BITS - {"pred"})
    d, a = i.operands
    e.assign(d, kind, f"({e.value(a, kind).u} == 0).astype({container(kind)})")


@instruction("lop3")
def lop3(i: Instruction, e: Emitter) -> None:
    if i.opcode != ("lop3", "b32"):
        raise unsupported(i)
    d, a, b, c, table = i.operands
    if not isinstance(table, Immediate):
        raise unsupported(i, "a table that is no constant")
    x, y, z = (e.value(operand, "b32").u for operand in (a, b, c))
    terms = [
        f"({'' if row & 4 else '~'}{x} & {'' if row & 2 else '~'}{y} & {'' if row & 1 else '~'}{z})"
        for row in range(8)
        if table.value >> row & 1
    ]
    e.assign(d, "b32", " | ".join(terms) or e.constant("u4", 0))


@instruction("shl", "shr")
def shift(i: Instruction, e: Emitter) -> None:
    """Amounts are unsigned 32 bits, and those past the width count as the width."""
    kind = type_of(i, {"b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"})
    plain(i)
    d, a, amount = i.operands
    source, bits, left = e.value(a, kind), TYPE_BITS[kind], i.opcode[0] == "shl"
    signed = kind[0] == "s" and not left
    mark = "<<" if left else ">>"
    number = container(kind).replace("u", "i") if signed else container(kind)
    if isinstance(amount, Immediate):
        value = amount.value & 0xFFFFFFFF
        if value >= bits and not signed:
            return e.assign(d, kind, e.constant(container(kind), 0))
        text = f"{source.s if signed else source.u} {mark} {e.constant(number, min(value, bits - 1))}"
        return e.assign(d, kind, bits_of(text, kind) if signed else text)
    n = e.value(amount, "u32").u
    if signed:
        text = f"{source.s} >> minimum({n}, {e.constant('u4', bits - 1)}).astype({number})"
        return e.assign(d, kind, bits_of(text, kind))
    text = f"({source.u} {mark} ({n} & {e.constant('u4', bits - 1)}).astype({number}))"
    return e.assign(d, kind, f"where({n} > {e.constant('u4', bits - 1)}, {e.constant(number, 0)}, {text})")


@instruction("shf.l", "shf.r")
def funnel_shift(i: Instruction, e: Emitter) -> None:
    """The upper (shf.l) or lower (shf.r) half of the 64 bits `high:low`, shifted."""
    if i.opcode[2] not in ("wrap", "clamp") or i.opcode[3:] != ("b32",):
        raise unsupported(i)
    d, a, b, c = i.operands
    low, high, n = (e.value(operand, "u32").u for operand in (a, b, c))
    amount = (
        f"({n} & {e.constant('u4', 31)})"
        if i.opcode[2] == "wrap"
        else f"minimum({n}, {e.constant('u4', 32)})"
    )
    both = f"({high}.astype(u8) << {e.constant('u8', 32)} | {low})"
    if i.opcode[1] == "l":
        text = f"({both} << {amount}.astype(u8) >> {e.constant('u8', 32)}).astype(u4)"
    else:
        text = f"({both} >> {amount}.astype(u8)).astype(u4)"
    e.assign(d, "b32", text)


@instruction("prmt")
def prmt(i: Instruction, e: Emitter) -> None:
    """Bytes of `b:a` chosen by the nibbles of c; modes f4e, b4e, rc8, ecl, ecr and rc16 derive the choice
    from it.
    """
    if i.opcode[1] != "b32" or len(i.opcode) > 3:
        raise unsupported(i)
    d, a, b, c = i.operands
    mode = i.opcode[2] if len(i.opcode) == 3 else ""
    if mode and mode not in _PERMUTE_MODES:
        raise unsupported(i)
    x, y, n = (e.value(operand, "u32").u for operand in (a, b, c))
    e.assign(d, "b32", f"{e.bind(_permute_modes_run[mode])}({x}, {y}, {n})")


# Byte choices for each value of c's two low bits (PTX ISA, "prmt").
_PERMUTE_MODES = {
    "f4e": ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)),
    "b4e": ((0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)),
    "rc8": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
    "ecl": ((0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)),
    "ecr": ((0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)),
    "rc16": ((0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)),
}


def _permute(mode: str) -> object:
    table = np.array(_PERMUTE_MODES[mode], np.int64) if mode else None

    def run(a: Array, b: Array, c: Array) -> Array:
        pool = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
        if table is not None:
            chosen = np.take_along_axis(pool, table[(c & np.uint32(3)).astype(np.int64)], axis=1)
        else:
            nibbles = c[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
            chosen = np.take_along_axis(pool, (nibbles & np.uint32(7)).astype(np.int64), axis=1)
            sign = np.where(chosen & np.uint8(0x80), np.uint8(0xFF), np.uint8(0))
            chosen = np.where(nibbles & np.uint32(8), sign, chosen)
        found: Array = np.ascontiguousarray(chosen).view(np.uint32)[:, 0]
        return found

    return run


_permute_modes_run = {mode: _permute(mode) for mode in ("", *_PERMUTE_MODES)}


@instruction("brev")
def brev(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, {"b32", "b64"})
    d, a = i.operands
    e.assign(d, kind, f"{e.bind(_reversed)}({e.value(a, kind).u})")


_REVERSED_BYTE = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint8)


def _reversed(a: Array) -> Array:
    found: Array = _REVERSED_BYTE[a.byteswap().view(np.uint8)].view(a.dtype)
    return found


def _top_bit(a: Array) -> Array:
    """Position of the highest bit that is set as int64, -1 for zero."""
    high = a >> a.dtype.type(32) if a.dtype.itemsize == 8 else np.zeros_like(a)
    # Doubles hold 32-bit integers exactly; frexp's exponent is one more than the position of their highest
    # bit.
    upper = np.frexp(high.astype(np.float64))[1].astype(np.int64) - 1
    lower = np.frexp((a & a.dtype.type(0xFFFFFFFF)).astype(np.float64))[1].astype(np.int64) - 1
    top: Array = np.where(high != 0, upper + 32, lower)
    return top


@instruction("bfind")
def bfind(i: Instruction, e: Emitter) -> None:
    """The highest bit that differs from the sign; .shiftamt: how far to shift it to the top; all ones for
    none.
    """
    kind = type_of(i, _INTEGERS)
    plain(i, "shiftamt")
    d, a = i.operands
    source = e.value(a, kind)
    text = f"where({source.s} < 0, ~{source.u}, {source.u})" if kind[0] == "s" else source.u
    function = _shift_amount if i.has("shiftamt") else _top
    e.assign(d, "u32", f"{e.bind(function)}({text})")


def _top(a: Array) -> Array:
    return _top_bit(a).astype(np.uint32)


def _shift_amount(a: Array) -> Array:
    top = _top_bit(a)
    return np.where(top < 0, np.int64(-1), 8 * a.dtype.itemsize - 1 - top).astype(np.uint32)


@instruction("clz")
def clz(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, {"b32", "b64"})
    d, a = i.operands
    e.assign(d, "u32", f"{e.bind(_leading_zeros)}({e.value(a, kind).u})")


def _leading_zeros(a: Array) -> Array:
    found: Array = (8 * a.dtype.itemsize - 1 - _top_bit(a)).astype(np.uint32)
    return found


@instruction("popc")
def popc(i: Instruction, e: Emitter) -> None:
    kind = type_of(i, {"b32", "b64"})
    d, a = i.operands
    e.assign(d, "u32", f"{e.bind(_population)}({e.value(a, kind).u})")


def _population(a: Array) -> Array:
    found: Array = np.unpackbits(a[:, None].view(np.uint8), axis=1).sum(axis=1).astype(np.uint32)
    return found


@instruction("bfe")
def bfe(i: Instruction, e: Emitter) -> None:
    """Bits `position` to `position + length` of a; the signed form extends the field's (or a's) sign."""
    kind = type_of(i, _INTEGERS)
    d, a, b, c = i.operands
    function = e.bind(_extract_signed if kind[0] == "s" else _extract)
    e.assign(d, kind, f"{function}({e.value(a, kind).u}, {e.value(b, 'u32').u}, {e.value(c, 'u32').u})")


def _field(a: Array, position: Array, length: Array) -> tuple[Array, Array, Array]:
    """The field at bit 0 as uint64, its position and length as uint64."""
    at, size = _place(a, position, length)
    wide = a.astype(np.uint64)
    shifted = np.where(at < 64, wide >> np.minimum(at, np.uint64(63)), np.uint64(0))
    return shifted & _ones(size), at, size


def _place(a: Array, position: Array, length: Array) -> tuple[Array, Array]:
    """Position and length of a field as uint64.

    The ISA takes 8 bits of each ("pos = b & 0xff"), and so does hardware for operands of 32 bits. Those of
    64 are shifted by all 32 bits, clamped (H200; sm_90a and sm_120a alike in SASS): 256 is beyond them all.
    """
    kept = np.uint32(255 if a.dtype.itemsize == 4 else 0xFFFFFFFF)
    return (position & kept).astype(np.uint64), (length & kept).astype(np.uint64)


def _ones(count: Array) -> Array:
    """uint64 with that many low bits set."""
    partial = (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1)
    found: Array = np.where(count >= 64, ~np.uint64(0), partial)
    return found


def _extract(a: Array, position: Array, length: Array) -> Array:
    return _field(a, position, length)[0].astype(a.dtype)


def _extract_signed(a: Array, position: Array, length: Array) -> Array:
    field, at, size = _field(a, position, length)
    bits = np.uint64(8 * a.dtype.itemsize)
    sign_at = np.minimum(at + size - np.uint64(1), bits - np.uint64(1))
    sign = (a.astype(np.uint64) >> sign_at & np.uint64(1)) != 0
    kept = _ones(np.where(at >= bits, np.uint64(0), np.minimum(size, bits - np.minimum(at, bits))))
    found = np.where(sign, field | ~kept, field & kept)
    return np.where(size == 0, np.uint64(0), found).astype(a.dtype)


@instruction("bfi")
def bfi(i: Instruction, e: Emitter) -> None:
    """b with `length` bits from `position` on replaced by the low bits of a."""
    kind = type_of(i, {"b32", "b64"})
    d, a, b, c, n = i.operands
    x, y = e.value(a, kind).u, e.value(b, kind).u
    e.assign(d, kind, f"{e.bind(_insert)}({x}, {y}, {e.value(c, 'u32').u}, {e.value(n, 'u32').u})")


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    at, size = _place(a, position, length)
    inside = at < np.uint64(8 * a.dtype.itemsize)
    shift = np.minimum(at, np.uint64(63))
    field = np.where(inside, _ones(size) << shift, np.uint64(0))
    found: Array = (b & ~field | (a.astype(np.uint64) << shift & field)).astype(a.dtype)
    return found


@instruction("szext")
def szext(i: Instruction, e: Emitter) -> None:
    """The low `b` bits of a, sign- or zero-extended."""
    kind = type_of(i, {"u32", "s32"})
    if i.opcode[1] not in ("wrap", "clamp"):
        raise unsupported(i)
    d, a, b = i.operands
    length = e.value(b, "u32").u
    length = (
        f"({length} & {e.constant('u4', 31)})"
        if i.opcode[1] == "wrap"
        else f"minimum({length}, {e.constant('u4', 32)})"
    )
    function = e.bind(_extract_signed if kind == "s32" else _extract)
    e.assign(d, kind, f"{function}({e.value(a, kind).u}, {e.constant('u4', 0)}, {length})")

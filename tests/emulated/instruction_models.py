"""What instruction forms compute, in Python's integers: for those that no other test has a model of.

A model takes the operands of one thread, or of one warp for what lanes exchange, and gives the results as
unsigned integers; `model_of` finds it by the form's opcode. Nothing here is imported from the emulator.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from typing import Any

Row = Sequence[int]
ALL = 0xFFFFFFFF


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def read(value: int, kind: str) -> Any:
    """The number that bits stand for."""
    bits = int(kind[1:])
    if kind[0] == "f":
        return struct.unpack("<f" if bits == 32 else "<d", value.to_bytes(bits // 8, "little"))[0]
    return signed(value, bits) if kind[0] == "s" else value & (1 << bits) - 1


def low(value: int, kind: str) -> int:
    return value & (1 << int(kind[1:])) - 1


# Comparison and selection

_COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
_COMPARE |= {"ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
_COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def compared(words: Sequence[str], a: int, b: int) -> bool:
    """The comparison that an opcode's second word names, of operands of the type that its last word names."""
    how, kind = words[1], words[-1]
    x, y = (read(value, kind) for value in (a, b))
    if kind[0] != "f":
        return bool(_COMPARE[how](x, y))
    if "ftz" in words:
        x, y = (0.0 if abs(v) < 2.0**-126 else v for v in (x, y))
    unordered = x != x or y != y
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    if how.endswith("u") and how not in ("num",):
        return unordered or bool(_COMPARE[how[:-1]](x, y))
    return not unordered and bool(_COMPARE[how](x, y))


def comparison(words: Sequence[str], row: Row, negated: bool) -> list[int]:
    true = compared(words, row[0], row[1])
    combine = next((w for w in words if w in _COMBINE), None)
    results = [true, not true]
    if combine:
        c = bool(row[2]) != negated
        results = [bool(_COMBINE[combine](value, c)) for value in results]
    if words[0] == "setp":
        return [int(value) for value in results]
    true_value = 0x3F800000 if words[-2] == "f32" else ALL
    return [true_value if results[0] else 0]


# Logic and integers

_PERMUTE = {
    "f4e": lambda c: [c, c + 1, c + 2, c + 3],
    "b4e": lambda c: [c, (c - 1) % 8, (c - 2) % 8, (c - 3) % 8],
    "rc8": lambda c: [c] * 4,
    "ecl": lambda c: [max(c, n) for n in range(4)],
    "ecr": lambda c: [min(c, n) for n in range(4)],
    "rc16": lambda c: [2 * (c & 1), 2 * (c & 1) + 1] * 2,
}


def permuted(mode: str, a: int, b: int, c: int) -> int:
    pool = (b << 32 | a).to_bytes(8, "little")
    if mode:
        return int.from_bytes(bytes(pool[n] for n in _PERMUTE[mode](c & 3)), "little")
    found = []
    for n in range(4):
        choice = c >> 4 * n & 15
        byte = pool[choice & 7]
        found.append((255 if byte >> 7 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def looked_up(table: int, a: int, b: int, c: int) -> int:
    return sum((table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) << n for n in range(32))


def extended_to(mode: str, kind: str, a: int, b: int) -> int:
    length = b & 31 if mode == "wrap" else min(b, 32)
    value = a & (1 << length) - 1
    if kind == "s32" and length and value >> length - 1:
        value -= 1 << length
    return value & ALL


def dotted(words: Sequence[str], a: int, b: int, c: int) -> int:
    parts = [
        [signed(x >> 8 * n, 8) if k == "s32" else x >> 8 * n & 255 for n in range(4)]
        for x, k in ((a, words[1]), (b, words[2]))
    ]
    return (c + sum(x * y for x, y in zip(*parts, strict=True))) & ALL


def product24(words: Sequence[str], row: Row) -> int:
    a, b = (signed(v, 24) if words[-1] == "s32" else v & 0xFFFFFF for v in row[:2])
    return (a * b + (row[2] if len(row) > 2 else 0)) & ALL


def multiplied_with_carry(words: Sequence[str], row: Row) -> list[int]:
    """mad.cc and the carry; madc behind an addition of its first two operands, whose sum is result 1."""
    kind = words[-1]
    bits = int(kind[1:])
    a, b = (read(v, kind) for v in row[:2])
    half = a * b >> bits if "hi" in words else a * b
    total = low(half, kind) + row[2]
    if words[0] == "mad":
        return [low(total, kind), total >> bits]
    plain = row[0] + row[1]
    total += plain >> bits
    results = [low(total, kind), low(plain, kind)]
    return [*results, total >> bits] if "cc" in words else results


# Memory


def loaded(form: Any, row: Row) -> list[int]:
    """The first bytes of two 64-bit numbers, as the destination's width takes them."""
    content = b"".join(v.to_bytes(8, "little") for v in row[:2])
    kind = form.opcode.split(".")[-1]
    size = int(kind[1:]) // 8
    if form.opcode.startswith("ld.local"):
        content = content[8:] if row[2] & 1 else content
    found = []
    for n, result in enumerate(form.results):
        at = n * size if f".v{len(form.results)}." in form.opcode else 0
        value = read(
            int.from_bytes(content[at : at + size], "little"), kind.replace("f", "u").replace("b", "u")
        )
        found.append(value & (1 << (64 if result == "b64" else max(16, 8 * size))) - 1)
    return found


def stored(form: Any, row: Row) -> list[int]:
    count = len(form.results)
    content = bytearray(b"".join(v.to_bytes(8, "little") for v in row[:count]))
    size = int(form.opcode.split(".")[-1][1:]) // 8
    for n, value in enumerate(row[count:]):
        content[n * size : (n + 1) * size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return [int.from_bytes(content[8 * n : 8 * n + 8], "little") for n in range(count)]


_ATOMIC: dict[str, Callable[..., int]] = {
    "add": lambda old, b: old + b,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "min": min,
    "max": max,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: c if old == b else old,
    "inc": lambda old, b: 0 if old >= b else old + 1,
    "dec": lambda old, b: b if old == 0 or old > b else old - 1,
}


def atomically(words: Sequence[str], row: Row) -> list[int]:
    operation = next(_ATOMIC[w] for w in words if w in _ATOMIC)
    kind = words[-1].replace("b", "u")
    value = low(operation(*(read(v, kind) for v in row)), kind)
    return [value, row[0]]


def colliding(words: Sequence[str], warp: Sequence[Row]) -> list[list[int]]:
    operation = next(_ATOMIC[w] for w in words if w in _ATOMIC)
    kind = words[-1].replace("b", "u")
    value = warp[0][0]
    for row in warp:
        value = low(operation(*(read(v, kind) for v in (value, row[1]))), kind)
    return [[value]] * 32


# Warps

_REDUCE = {"add": lambda x, y: x + y, "min": min, "max": max, **_COMBINE}


def shuffled(mode: str, warp: Sequence[Row], members: int) -> list[list[int]]:
    results = []
    for lane, (value, b, c) in enumerate(warp):
        if not members >> lane & 1:
            results.append([0, 0])
            continue
        clamp, segment, step = c & 31, c >> 8 & 31, b & 31
        most = (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - step,
            "down": lane + step,
            "bfly": lane ^ step,
            "idx": (lane & segment) | (step & ~segment),
        }[mode]
        inside = source >= most if mode == "up" else source <= most
        if inside:  # the forms put 0 for what a lane that is no member has
            value = warp[source][0] if members >> source & 1 else 0
        results.append([value, int(inside)])
    return results


def exchanged(form: Any, warp: Sequence[Row]) -> list[list[int]]:
    """vote, redux, match, elect, activemask and bar.warp.sync of the lanes of a mask; zeros in the others."""
    words = form.opcode.split(".")
    note = form.name.split()
    members = int(note[-1], 16) if note[-1].startswith("0x") else ALL
    lanes = [lane for lane in range(32) if members >> lane & 1]
    values = [row[0] for row in warp]
    flags = sum(1 << lane for lane in lanes if bool(values[lane]) != ("complement" in note))
    results = [[0] * len(form.results) for _ in range(32)]
    for lane in lanes:
        same = sum(1 << other for other in lanes if values[other] == values[lane])
        if words[0] == "vote":
            full, none = flags == members, flags == 0
            found = {"all": full, "any": not none, "uni": full or none, "ballot": flags}[words[2]]
            results[lane] = [int(found)]
        elif words[0] == "redux":
            kind = words[-1].replace("b", "u")
            total = read(values[lanes[0]], kind)
            for other in lanes[1:]:
                total = _REDUCE[words[2]](total, read(values[other], kind))
            results[lane] = [total & ALL]
        elif words[:2] == ["match", "any"]:
            results[lane] = [same]
        elif words[:2] == ["match", "all"]:
            results[lane] = [members, 1] if same == members else [0, 0]
        elif words[0] == "elect":
            results[lane] = [lanes[0], int(lane == lanes[0])]
        elif words[0] == "activemask":
            results[lane] = [ALL]
        else:
            results[lane] = [values[0]]
    return results


def model_of(form: Any) -> tuple[Callable[[Any], list[Any]], bool] | None:
    """A model and whether it takes a warp (a list of 32 rows) instead of a row; None where another test has
    one."""
    words = form.opcode.split(".")
    head, note = words[0], form.name.split()[1:]
    if head in ("setp", "set"):
        return (lambda row: comparison(words, row, "complement" in note)), False
    if head == "selp":
        return (lambda row: [row[0] if row[2] else row[1]]), False
    if head == "slct":
        return (lambda row: [row[0] if read(row[2], words[-1]) >= 0 else row[1]]), False
    if head == "prmt":
        return (lambda row: [permuted("".join(words[2:]), *row)]), False
    if head == "lop3":
        return (lambda row: [looked_up(int(note[-1], 16), *row)]), False
    if head == "szext":
        return (lambda row: [extended_to(words[1], words[2], *row)]), False
    if head == "dp4a":
        return (lambda row: [dotted(words, *row)]), False
    if head in ("mul24", "mad24"):
        return (lambda row: [product24(words, row)]), False
    if head == "madc" or words[:3:2] == ["mad", "cc"]:
        return (lambda row: multiplied_with_carry(words, row)), False
    if head in ("ld", "ldu"):
        return (lambda row: loaded(form, row)), False
    if head == "st":
        return (lambda row: stored(form, row)), False
    if head in ("atom", "red") and words[-1][0] != "f":
        if "colliding" in note:
            return (lambda warp: colliding(words, warp)), True
        return (lambda row: atomically(words, row)[: len(form.results)]), False
    if head == "shfl" and note[0] in ("any", "half"):
        members = int(note[1], 16) if note[0] == "half" else ALL
        clamp = (0 if words[2] == "up" else 31) | 0x1000
        return (
            lambda warp: shuffled(words[2], [r if len(r) == 3 else (*r, clamp) for r in warp], members)
        ), True
    if head in ("vote", "redux", "match", "elect", "activemask", "bar"):
        return (lambda warp: exchanged(form, warp)), True
    return None

"""Integer, logic, comparison and conversion instructions against Python's integers, guarded and not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from emulated.lanes import THREADS, run_lanes

THIRD = np.arange(THREADS) % 3 == 0


def signed(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def read(value, kind):
    bits = int(kind[1:])
    return signed(value, bits) if kind[0] == "s" else value & (1 << bits) - 1


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return -quotient if (a < 0) != (b < 0) else quotient


def shifted(name, a, n, bits, is_signed):
    n &= 0xFFFFFFFF
    if name == "shl":
        return a << n if n < bits else 0
    return a >> min(n, bits) if is_signed or n < bits else 0


def clamp(value, low, high):
    return max(low, min(high, value))


def field(a, at, length, kind):
    bits = int(kind[1:])
    at, length = at & 255, length & 255
    a &= (1 << bits) - 1
    value = (a >> at) & ((1 << length) - 1) if at < bits else 0
    if kind[0] == "s" and length:
        top = min(at + length - 1, bits - 1)
        if a >> top & 1:
            value |= -1 << clamp(length, 0, bits - min(at, bits))
        else:
            value &= (1 << clamp(length, 0, bits - min(at, bits))) - 1
    return value


def inserted(a, b, at, length, bits):
    at, length = at & 255, length & 255
    mask = ((1 << length) - 1) << at & (1 << bits) - 1 if at < bits else 0
    return b & ~mask | (a << at) & mask


def permuted(a, b, c):
    pool = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    result = 0
    for i in range(4):
        nibble = c >> 4 * i & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def top_bit(value, kind):
    bits = int(kind[1:])
    value = read(value, kind)
    if value < 0:
        value = ~value
    return (value & (1 << bits) - 1).bit_length() - 1


CASES = {}
for _kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
    _bits = int(_kind[1:])
    CASES |= {
        f"add.{_kind}": lambda a, b: a + b,
        f"sub.{_kind}": lambda a, b: a - b,
        f"mul.lo.{_kind}": lambda a, b: a * b,
        f"mul.hi.{_kind}": lambda a, b, n=_bits: a * b >> n,
        f"mad.lo.{_kind}": lambda a, b, c: a * b + c,
        f"div.{_kind}": truncated,
        f"rem.{_kind}": lambda a, b: a - truncated(a, b) * b,
        f"min.{_kind}": min,
        f"max.{_kind}": max,
        f"sad.{_kind}": lambda a, b, c: c + abs(a - b),
    }
    if _kind[0] == "s":
        CASES |= {f"abs.{_kind}": abs, f"neg.{_kind}": lambda a: -a}
    if _bits > 16:
        CASES |= {
            f"bfind.{_kind}": lambda a, k=_kind: top_bit(a, k),
            f"bfind.shiftamt.{_kind}": lambda a, k=_kind, n=_bits: (
                n - 1 - top_bit(a, k) if top_bit(a, k) >= 0 else -1
            ),
            f"mad.hi.{_kind}": lambda a, b, c, n=_bits: (a * b >> n) + c,
        }
for _bits in (16, 32, 64):
    CASES |= {
        f"and.b{_bits}": lambda a, b: a & b,
        f"or.b{_bits}": lambda a, b: a | b,
        f"xor.b{_bits}": lambda a, b: a ^ b,
        f"not.b{_bits}": lambda a: ~a,
        f"cnot.b{_bits}": lambda a: int(a == 0),
    }
    if _bits > 16:
        CASES |= {
            f"brev.b{_bits}": lambda a, n=_bits: int(f"{a:0{n}b}"[::-1], 2),
            f"clz.b{_bits}": lambda a, n=_bits: n - a.bit_length(),
            f"popc.b{_bits}": lambda a: a.bit_count() if hasattr(a, "bit_count") else bin(a).count("1"),
        }
CASES |= {
    "add.sat.s32": lambda a, b: clamp(a + b, -(1 << 31), (1 << 31) - 1),
    "sub.sat.s32": lambda a, b: clamp(a - b, -(1 << 31), (1 << 31) - 1),
    "lop3.b32 0x96": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 0xE8": lambda a, b, c: (a & b) | (a & c) | (b & c),
    "prmt.b32": permuted,
    "prmt.b32.f4e": lambda a, b, c: (b << 32 | a) >> 8 * (c & 3),
    "prmt.b32.rc16": lambda a, b, c: (a >> 16 * (c & 1) & 0xFFFF) * 0x10001,
    "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "mul24.lo.u32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24.lo.s32": lambda a, b: signed(a, 24) * signed(b, 24),
}
# The types of operands and of the result, where they are not all the instruction's own.
RESULTS = {"bfind": "u32", "clz": "u32", "popc": "u32"}
SPECIAL = (
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    -1,
    -2,
    0x7FFF,
    0x8000,
    1 << 31,
    (1 << 31) - 1,
    1 << 63,
    (1 << 63) - 1,
)


def numbers(rng, kind, count=THREADS):
    """Random values of a type as unsigned bits; small, special and any."""
    bits = int(kind[1:])
    found = []
    for _ in range(count):
        value = rng.choice((rng.choice(SPECIAL), rng.getrandbits(bits), rng.getrandbits(6)))
        found.append(value & (1 << bits) - 1)
    return found


def container(kind):
    return f"b{max(16, int(kind[1:]))}"


def register(kind, number):
    return {16: "%h", 32: "%r", 64: "%rd"}[max(16, int(kind[1:]))] + str(number)


def check(name, kinds, result, model, values, code=None):
    """Run an instruction, then its guarded form into a register that holds the thread's number."""
    sources = ", ".join(register(kind, at) for at, kind in enumerate(kinds, 1))
    first, second = register(result, 11), register(result, 12)
    code = code or f"{name} {{d}}, {sources};"
    text = code.format(d=first) + f"\ncvt.u{first_bits(result)}.u32 {second}, %r60;\n"
    text += f"@%p1 {code.format(d=second)}"
    got, guarded = run_lanes(
        text, [(container(k), v) for k, v in zip(kinds, values, strict=True)], [container(result)] * 2
    )
    width = int(container(result)[1:])
    for lane in range(THREADS):
        operands = [read(v[lane], k) for k, v in zip(kinds, values, strict=True)]
        expected = model(*operands) & (1 << width) - 1
        if result == "u8":
            expected &= 255
        assert int(got[lane]) == expected, f"{name} of {[hex(x) for x in operands]}"
        assert int(guarded[lane]) == (expected if THIRD[lane] else lane), f"guarded {name}, lane {lane}"


def first_bits(kind):
    return max(16, int(kind[1:]))


@pytest.mark.parametrize("name", sorted(CASES))
def test_integer_instructions_compute_what_ptx_says(name):
    rng = random.Random(name)
    model = CASES[name]
    opcode, _, table = name.partition(" ")
    words = opcode.split(".")
    kind = next(w for w in reversed(words) if w[0] in "usb" and w[1:].isdigit())
    as_type = kind.replace("b", "u")
    count = model.__code__.co_argcount - len(model.__defaults__ or ()) if hasattr(model, "__code__") else 2
    count = 1 if model is abs else count
    kinds = [as_type] * count
    values = [numbers(rng, k) for k in kinds]
    if words[0] in ("div", "rem"):
        values[1] = [v or 7 for v in values[1]]
        values[0] = [5 if read(a, kind) == -(1 << int(kind[1:]) - 1) else a for a in values[0]]
    code = None
    if table:
        sources = ", ".join(register(k, at) for at, k in enumerate(kinds, 1))
        code = f"{opcode} {{d}}, {sources}, {table};"
    check(opcode, kinds, RESULTS.get(words[0], as_type), model, values, code)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    rng = random.Random(kind)
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    check(f"mul.wide.{kind}", [kind] * 2, wide, lambda a, b: a * b, [numbers(rng, kind) for _ in range(2)])
    kinds = [kind, kind, wide]
    check(f"mad.wide.{kind}", kinds, wide, lambda a, b, c: a * b + c, [numbers(rng, k) for k in kinds])


@pytest.mark.parametrize(
    "name", ["shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.s16", "shr.u32", "shr.s32", "shr.s64"]
)
def test_shifts_clamp_their_amount(name):
    rng = random.Random(name)
    op, kind = name.split(".")
    as_type = kind.replace("b", "u")
    kinds = [as_type, "u32"]

    def model(a, n):
        return shifted(op, a, n, int(kind[1:]), kind[0] == "s")

    check(name, kinds, as_type, model, [numbers(rng, k) for k in kinds])
    for amount in (0, 5, int(kind[1:]) - 1, int(kind[1:]), 200):
        code = f"{name} {{d}}, {register(kind, 1)}, {amount};"
        check(name, [as_type], as_type, lambda a, n=amount: model(a, n), [numbers(rng, as_type)], code)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    rng = random.Random(kind)
    kinds = [kind, "u32", "u32"]
    values = [numbers(rng, k) for k in kinds]
    values[1:] = [[v & 0x4F for v in values[1]], [v & 0x4F for v in values[2]]]
    check(f"bfe.{kind}", kinds, kind, lambda a, b, c: field(a, b, c, kind), values)
    if kind[0] == "u":
        bits = int(kind[1:])
        kinds = [kind, *kinds]
        check(
            f"bfi.b{bits}",
            kinds,
            kind,
            lambda a, b, c, n: inserted(a, b, c, n, bits),
            [numbers(rng, kind), *values],
        )


@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("sat", ["", ".sat"])
def test_integer_conversions(to, source, sat):
    rng = random.Random(to + source)
    bits = int(to[1:])
    limits = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)

    def model(a):
        value = clamp(read(a, source), *limits) if sat else a
        return read(value, to)  # as the register holds it: extended by the sign of the type

    check(f"cvt{sat}.{to}.{source}", [source], to, model, [numbers(rng, source)])


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64", "b32"])
def test_comparisons_and_selections(kind):
    rng = random.Random(kind)
    as_type = kind.replace("b", "u")
    hows = [h for h in COMPARISONS if (h in ("eq", "ne") or kind[0] != "b")]
    hows = [h for h in hows if h not in ("lo", "ls", "hi", "hs") or kind[0] == "u"]
    a, b = numbers(rng, as_type), numbers(rng, as_type)
    b = [x if rng.random() < 0.3 else y for x, y in zip(a, b, strict=True)]
    x, y = register(as_type, 1), register(as_type, 2)
    code, results = [], []
    for how in hows:
        code += [
            f"setp.{how}.and.{kind} %p10|%p11, {x}, {y}, %p1;",
            f"selp.b32 %r{11 + len(results)}, 1, 0, %p10;",
            f"selp.b32 %r{12 + len(results)}, 1, 0, %p11;",
        ]
        results += ["b32", "b32"]
    got = run_lanes("\n".join(code), [(container(as_type), a), (container(as_type), b)], results)
    for at, how in enumerate(hows):
        for lane in range(THREADS):
            truth = (
                COMPARISONS[how](read(a[lane], kind), read(b[lane], kind))
                if kind[0] != "b"
                else (COMPARISONS[how](a[lane], b[lane]))
            )
            assert got[2 * at][lane] == (truth and THIRD[lane]), (how, a[lane], b[lane])
            assert got[2 * at + 1][lane] == (not truth and THIRD[lane]), (how, a[lane], b[lane])


@pytest.mark.parametrize("to", ["u16", "s16", "u8", "s8"])
def test_saturated_packing(to):
    rng = random.Random(to)
    bits = int(to[1:])
    limits = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    kinds = ["s32", "s32"] + ["u32"] * (bits == 8)

    def model(a, b, c=0):
        high, low = (clamp(x, *limits) & (1 << bits) - 1 for x in (a, b))
        return high << bits | low | (c << 16 if bits == 8 else 0)

    name = f"cvt.pack.sat.{to}.s32" + (".b32" if bits == 8 else "")
    values = [[rng.randrange(-300, 70000) % (1 << 32) for _ in range(THREADS)] for _ in kinds]
    check(name, kinds, "u32", model, values)


def test_carries_ripple_through_an_addition_of_128_bits():
    rng = random.Random(7)
    parts = [numbers(rng, "u32") for _ in range(8)]
    code = "add.cc.u32 %r11, %r1, %r5;\n"
    code += "".join(f"addc.cc.u32 %r{11 + i}, %r{1 + i}, %r{5 + i};\n" for i in (1, 2))
    code += "addc.u32 %r14, %r4, %r8;\nsub.cc.u32 %r15, %r1, %r5;\n"
    code += "".join(f"subc.cc.u32 %r{15 + i}, %r{1 + i}, %r{5 + i};\n" for i in (1, 2))
    code += "subc.u32 %r18, %r4, %r8;"
    got = run_lanes(code, [("b32", part) for part in parts], ["b32"] * 8)
    for lane in range(THREADS):
        a, b = (sum(parts[first + i][lane] << 32 * i for i in range(4)) for first in (0, 4))
        total = sum(int(got[i][lane]) << 32 * i for i in range(4))
        difference = sum(int(got[4 + i][lane]) << 32 * i for i in range(4))
        assert total == (a + b) % (1 << 128)
        assert difference == (a - b) % (1 << 128)


def test_vectors_are_packed_and_unpacked():
    rng = random.Random(3)
    a, b = numbers(rng, "u32"), numbers(rng, "u64")
    code = """
    mov.b64 {%r2, %r12}, %rd2;
    mov.b32 {%h1, %h2}, %r1;
    mov.b64 %rd11, {%h2, %h1, %h1, %h2};
    mov.b64 {_, %r1}, %rd11;
    mov.b64 %rd13, {%r2, %r1};
    """
    wide, high, packed = run_lanes(code, [("b32", a), ("b64", b)], ["b64", "b32", "b64"])
    for lane in range(THREADS):
        h1, h2 = a[lane] & 0xFFFF, a[lane] >> 16
        assert int(wide[lane]) == h2 | h1 << 16 | h1 << 32 | h2 << 48
        assert int(high[lane]) == b[lane] >> 32
        assert int(packed[lane]) == b[lane] & 0xFFFFFFFF | (h1 | h2 << 16) << 32

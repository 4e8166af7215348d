"""mma.sync against exact rational arithmetic on the PTX ISA's fragment tables."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from emulated import ptx_tables as ptx
from sm12x.emulator.numerics.mma import lookup, mma
from sm12x.emulator.numerics.unsupported import Unsupported

FP8 = ("e4m3", "e5m2")
NARROW = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")

FORMS = [
    *[(f"m16n8k{k}", None, t, t, acc) for t in ("f16",) for k in (8, 16) for acc in ("f16", "f32")],
    *[(f"m16n8k{k}", None, "bf16", "bf16", "f32") for k in (8, 16)],
    *[(f"m16n8k{k}", None, "tf32", "tf32", "f32") for k in (4, 8)],
    *[(f"m16n8k{k}", None, a, b, acc) for k in (16, 32) for a in FP8 for b in FP8 for acc in ("f16", "f32")],
    *[("m16n8k32", "f8f6f4", a, b, "f32") for a in NARROW for b in NARROW],
    ("m16n8k32", "f8f6f4", "e2m3", "e2m1", "f16"),
]


def width(kind: str | None, type_: str) -> int:
    """Bits that an element takes in its register."""
    if kind in ("mxf4", "mxf4nvf4"):
        return 4
    return {"f16": 16, "bf16": 16, "tf32": 32}.get(type_, 8)


def number(kind: str | None, type_: str, code: int) -> ptx.Value:
    """The value of an element in its container."""
    if type_ == "tf32":
        return ptx.value("tf32", code >> 13)
    if type_ == "e2m1" and kind in ("f8f6f4", "mxf8f6f4"):
        return ptx.value("e2m1", code >> 2 & 15)
    if type_ in ("e2m3", "e3m2"):
        return ptx.value(type_, code & 63)
    return ptx.value(type_, code)


def exact_sum(terms: list[tuple[ptx.Value, ...]], addend: ptx.Value) -> ptx.Value:
    """The sum of products and addend, with infinities and NaN as in IEEE 754."""
    total = Fraction(0)
    infinities: set[str] = set()
    for factors in [*terms, (addend,)]:
        if "nan" in factors:
            return "nan"
        infinite = [f for f in factors if isinstance(f, str)]
        if infinite:
            if 0 in factors:
                return "nan"
            minus = sum(f == "-inf" or (isinstance(f, Fraction) and f < 0) for f in factors) % 2
            infinities.add("-inf" if minus else "inf")
            continue
        product = Fraction(1)
        for f in factors:
            assert isinstance(f, Fraction)
            product *= f
        total += product
    if len(infinities) == 2:
        return "nan"
    return infinities.pop() if infinities else total


def code_of(accumulator: str, x: ptx.Value, truncate_bits: int | None) -> int:
    if isinstance(x, str):
        infinity = ptx.largest(accumulator) + 1
        top = 1 << (ptx.LAYOUT[accumulator][0] - 1)
        return {"nan": top - 1, "inf": infinity, "-inf": infinity | top}[x]
    if truncate_bits is not None and x:
        exponent = 0
        while Fraction(2) ** (exponent + 1) <= abs(x):
            exponent += 1
        while Fraction(2) ** exponent > abs(x):
            exponent -= 1
        unit = max(Fraction(2) ** (exponent - truncate_bits + 1), Fraction(2) ** -149)
        x = (abs(x) // unit) * unit * (1 if x > 0 else -1)
        return ptx.rounded(accumulator, x, "rn", negative=x < 0)
    return ptx.rounded(accumulator, x, "rn")


def expected(
    shape,
    kind,
    a_type,
    b_type,
    accumulator,
    a,
    b,
    c,
    scales=None,
    vec=1,
    scale_type="ue8m0",
    truncate_bits=None,
):
    """Codes of D by rows, and the registers' codes of C by rows."""
    k = int(shape.rpartition("k")[2])
    wa, wb = width(kind, a_type), width(kind, b_type)
    ma = ptx.matrix(a, wa, (16, k), lambda lane, i: ptx.a_place(shape, wa, lane, i))
    mb = ptx.matrix(b, wb, (k, 8), lambda lane, i: ptx.b_place(shape, wb, lane, i))
    mc = ptx.matrix(c, 32 if accumulator == "f32" else 16, (16, 8), ptx.c_place)
    result = [[0] * 8 for _ in range(16)]
    for row in range(16):
        for column in range(8):
            terms = []
            for j in range(k):
                factors = (number(kind, a_type, ma[row][j]), number(kind, b_type, mb[j][column]))
                if scales is not None:
                    sa, byte_a, thread_a, sb, byte_b, thread_b = scales
                    chunk = j * vec // k
                    factors += (
                        ptx.value(scale_type, ptx.scale_a(sa, vec, byte_a, thread_a, row, chunk)),
                        ptx.value(scale_type, ptx.scale_b(sb, vec, byte_b, thread_b, column, chunk)),
                    )
                terms.append(factors)
            total = exact_sum(terms, ptx.value(accumulator, mc[row][column]))
            result[row][column] = code_of(accumulator, total, truncate_bits)
    return result


def as_rows(d, accumulator):
    bits = 32 if accumulator == "f32" else 16
    return ptx.matrix([r.tolist() for r in d], bits, (16, 8), ptx.c_place)


def same(got: int, want: int, accumulator: str) -> bool:
    top = 1 << (ptx.LAYOUT[accumulator][0] - 1)
    return got == want or (got | want) == top  # the sign of a zero sum is not specified


def check(d, want, accumulator):
    got = as_rows(d, accumulator)
    wrong = [
        (r, c, hex(got[r][c]), hex(want[r][c]))
        for r in range(16)
        for c in range(8)
        if not same(got[r][c], want[r][c], accumulator)
    ]
    assert not wrong, f"{len(wrong)} elements differ, first (row, column, got, expected) {wrong[0]}"


def counts(shape: str, kind: str | None, a_type: str, b_type: str, accumulator: str) -> tuple[int, int, int]:
    k = int(shape.rpartition("k")[2])
    return (
        16 * k * width(kind, a_type) // 1024,
        8 * k * width(kind, b_type) // 1024,
        4 if accumulator == "f32" else 2,
    )


def registers(rng, count, lead=()):
    return [rng.integers(0, 1 << 32, size=(*lead, 32), dtype=np.uint32) for _ in range(count)]


def gentle(rng, count, type_, kind):
    """Registers of finite values in a range as in practice: exponents near 1, all fractions."""
    bits = width(kind, type_)
    if bits == 32:
        values = rng.standard_normal((count, 32)).astype(np.float32)
        return list(values.view(np.uint32))
    if bits == 16:
        values = rng.standard_normal((count, 64)).astype(np.float32)
        halves = (
            values.astype(np.float16).view(np.uint16)
            if type_ == "f16"
            else (values.view(np.uint32) >> 16).astype(np.uint16)
        )
        return list(np.ascontiguousarray(halves).view(np.uint32))
    if bits == 8 and type_ in FP8:
        # exponent fields within 6 of the bias
        _, _, fraction_bits, bias = ptx.LAYOUT[type_]
        codes = rng.integers((bias - 6) << fraction_bits, (bias + 3) << fraction_bits, size=(count, 128))
        return list((codes | rng.integers(0, 2, size=codes.shape) << 7).astype(np.uint8).view(np.uint32))
    return registers(rng, count)


def addends(rng, count, accumulator):
    if accumulator == "f32":
        return list((rng.standard_normal((count, 32)) * 8).astype(np.float32).view(np.uint32))
    return list((rng.standard_normal((count, 64)) * 8).astype(np.float16).view(np.uint32))


def lists(regs):
    return [r.tolist() for r in regs]


@pytest.mark.parametrize(("shape", "kind", "a_type", "b_type", "accumulator"), FORMS)
@pytest.mark.parametrize("inputs", ["gentle", "any bits"])
def test_mma_is_the_exact_sum_rounded_once(shape, kind, a_type, b_type, accumulator, inputs):
    seed = 4
    print("seed", seed)
    rng = np.random.default_rng(seed)
    na, nb, nc = counts(shape, kind, a_type, b_type, accumulator)
    if inputs == "gentle":
        a, b = gentle(rng, na, a_type, kind), gentle(rng, nb, b_type, kind)
        c = addends(rng, nc, accumulator)
    else:
        a, b, c = registers(rng, na), registers(rng, nb), registers(rng, nc)
    d = mma(shape, kind, a_type, b_type, accumulator, accumulator, a, b, c)
    assert [r.dtype for r in d] == [np.uint32] * nc
    assert [r.shape for r in d] == [(32,)] * nc
    check(d, expected(shape, kind, a_type, b_type, accumulator, lists(a), lists(b), lists(c)), accumulator)


SELECTORS = [
    *[
        ("mxf8f6f4", "1X", "ue8m0", a, ta, b, tb)
        for a, ta, b, tb in [(0, 0, 0, 0), (1, 1, 3, 2), (3, 0, 2, 1), (2, 1, 1, 3)]
    ],
    *[("mxf4", "2X", "ue8m0", a, ta, b, tb) for a, ta, b, tb in [(0, 0, 2, 3), (2, 1, 0, 1)]],
    *[("mxf4nvf4", "2X", "ue8m0", a, ta, b, tb) for a, ta, b, tb in [(2, 0, 2, 0)]],
    *[("mxf4nvf4", "4X", t, 0, ta, 0, tb) for t in ("ue8m0", "ue4m3") for ta, tb in [(0, 2), (1, 3)]],
]


@pytest.mark.parametrize(("kind", "vec", "scale_type", "byte_a", "thread_a", "byte_b", "thread_b"), SELECTORS)
@pytest.mark.parametrize("near", [True, False], ids=["scales near 1", "any scales"])
def test_block_scales_are_chosen_by_the_selectors(
    kind, vec, scale_type, byte_a, thread_a, byte_b, thread_b, near
):
    seed = 5
    print("seed", seed)
    rng = np.random.default_rng(seed)
    shape, type_ = ("m16n8k32", "e4m3") if kind == "mxf8f6f4" else ("m16n8k64", "e2m1")
    na, nb, nc = counts(shape, kind, type_, type_, "f32")
    a, b, c = gentle(rng, na, type_, kind), gentle(rng, nb, type_, kind), addends(rng, nc, "f32")
    one = 0x7F if scale_type == "ue8m0" else 0x38
    low, high = (one - 4, one + 4) if near else (0, 0x100)
    sa, sb = (rng.integers(low, high, size=128).astype(np.uint8).view(np.uint32) for _ in range(2))
    scales = (sa, byte_a, thread_a, sb, byte_b, thread_b)
    d = mma(shape, kind, type_, type_, "f32", "f32", a, b, c, scales, scale_vec=vec, scale_type=scale_type)
    plain = (sa.tolist(), byte_a, thread_a, sb.tolist(), byte_b, thread_b)
    want = expected(
        shape, kind, type_, type_, "f32", lists(a), lists(b), lists(c), plain, int(vec[0]), scale_type
    )
    check(d, want, "f32")


@pytest.mark.parametrize("kind", ["mxf8f6f4", "mxf4"])
def test_unit_scales_do_nothing(kind):
    seed = 6
    print("seed", seed)
    rng = np.random.default_rng(seed)
    shape, type_ = ("m16n8k32", "e4m3") if kind == "mxf8f6f4" else ("m16n8k64", "e2m1")
    na, nb, nc = counts(shape, kind, type_, type_, "f32")
    a, b, c = gentle(rng, na, type_, kind), gentle(rng, nb, type_, kind), addends(rng, nc, "f32")
    ones = np.full(32, 0x7F7F7F7F, dtype=np.uint32)
    d = mma(shape, kind, type_, type_, "f32", "f32", a, b, c, (ones, 0, 1, ones, 2, 3))
    check(d, expected(shape, kind, type_, type_, "f32", lists(a), lists(b), lists(c)), "f32")


@pytest.mark.parametrize("a_type", NARROW)
@pytest.mark.parametrize("b_type", NARROW)
def test_block_scaled_types_mix(a_type, b_type):
    seed = 7
    print("seed", seed)
    rng = np.random.default_rng(seed)
    a, b, c = gentle(rng, 4, a_type, "mxf8f6f4"), gentle(rng, 2, b_type, "mxf8f6f4"), addends(rng, 4, "f32")
    sa, sb = (rng.integers(0x78, 0x86, size=128).astype(np.uint8).view(np.uint32) for _ in range(2))
    d = mma("m16n8k32", "mxf8f6f4", a_type, b_type, "f32", "f32", a, b, c, (sa, 1, 0, sb, 3, 1))
    plain = (sa.tolist(), 1, 0, sb.tolist(), 3, 1)
    want = expected("m16n8k32", "mxf8f6f4", a_type, b_type, "f32", lists(a), lists(b), lists(c), plain)
    check(d, want, "f32")


@pytest.mark.parametrize("a_type", ["s8", "u8"])
@pytest.mark.parametrize("b_type", ["s8", "u8"])
@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k32"])
@pytest.mark.parametrize("satfinite", [False, True])
def test_integer_mma_wraps_or_saturates(shape, a_type, b_type, satfinite):
    seed = 8
    print("seed", seed)
    rng = np.random.default_rng(seed)
    k = int(shape[6:])
    a, b = registers(rng, k // 8), registers(rng, k // 16)
    ends = np.array([0x7FFFFFFF, 0x80000000, 0x7FFF0000, 5], dtype=np.uint32)
    c = [ends[rng.integers(0, 4, size=32)] for _ in range(4)]
    d = mma(shape, None, a_type, b_type, "s32", "s32", a, b, c, satfinite=satfinite)
    signed = {"s8": lambda x: x - 256 * (x > 127), "u8": lambda x: x}
    ma = ptx.matrix(lists(a), 8, (16, k), lambda lane, i: ptx.a_place(shape, 8, lane, i))
    mb = ptx.matrix(lists(b), 8, (k, 8), lambda lane, i: ptx.b_place(shape, 8, lane, i))
    mc = ptx.matrix(lists(c), 32, (16, 8), ptx.c_place)
    got = ptx.matrix(lists(d), 32, (16, 8), ptx.c_place)
    hit = 0
    for row in range(16):
        for column in range(8):
            c_value = mc[row][column] - (1 << 32) * (mc[row][column] >> 31)
            total = c_value + sum(
                signed[a_type](ma[row][j]) * signed[b_type](mb[j][column]) for j in range(k)
            )
            limited = min(max(total, -(1 << 31)), (1 << 31) - 1)
            hit += limited != total
            assert got[row][column] == (limited if satfinite else total) & 0xFFFFFFFF
    assert hit, "no sum left the range: the test shows nothing"


@pytest.mark.parametrize("bits", [22, 14])
def test_truncation_cuts_the_exact_sum_toward_zero(bits):
    seed = 9
    print("seed", seed)
    rng = np.random.default_rng(seed)
    a, b, c = gentle(rng, 4, "e4m3", None), gentle(rng, 2, "e4m3", None), addends(rng, 4, "f32")
    c[0][:4] = [0x00000003, 0x80000003, 0x7F7FFFFF, 0x7F800000]
    a[0][0] = 0
    d = mma("m16n8k32", None, "e4m3", "e4m3", "f32", "f32", a, b, c, truncate_bits=bits)
    want = expected("m16n8k32", None, "e4m3", "e4m3", "f32", lists(a), lists(b), lists(c), truncate_bits=bits)
    check(d, want, "f32")
    nearest = mma("m16n8k32", None, "e4m3", "e4m3", "f32", "f32", a, b, c)
    assert any((x != y).any() for x, y in zip(d, nearest, strict=True))


def test_truncation_of_subnormal_sums_keeps_multiples_of_the_smallest_number():
    zero = [np.zeros(32, dtype=np.uint32)] * 4
    c = [np.full(32, 0x80000007, dtype=np.uint32)] * 4
    d = mma("m16n8k32", None, "e4m3", "e4m3", "f32", "f32", zero, zero[:2], c, truncate_bits=22)
    assert {int(x) for r in d for x in r} == {0x80000007}


def test_a_tie_is_broken_by_the_smallest_term():
    """2^23 + 0.5 is a tie; a product of 2^-18 must decide it."""
    a = [np.zeros(32, dtype=np.uint32) for _ in range(4)]
    b = [np.zeros(32, dtype=np.uint32) for _ in range(2)]
    c = [np.full(32, np.float32(2**23).view(np.uint32)) for _ in range(4)]
    # k = 0: 0.5 (e4m3 0x30) * 1 (0x38) makes 2^23 + 0.5; k = 1: 2^-9 (0x01) * 2^-9 (0x01)
    a[0][:] = a[1][:] = 0x0130
    b[0][:] = 0x0138
    a[0][np.arange(32) % 4 != 0] = a[1][np.arange(32) % 4 != 0] = 0
    d = mma("m16n8k32", None, "e4m3", "e4m3", "f32", "f32", a, b, c)
    assert {float(x) for r in d for x in r.view(np.float32)} == {2.0**23 + 1}
    a[0][:] = a[1][:] = np.where(np.arange(32) % 4 == 0, 0x0030, 0).astype(np.uint32)
    d = mma("m16n8k32", None, "e4m3", "e4m3", "f32", "f32", a, b, c)
    assert {float(x) for r in d for x in r.view(np.float32)} == {2.0**23}


def constant(count: int, code: int) -> list[np.ndarray]:
    """Registers with the same byte everywhere."""
    return [np.full(32, code * 0x01010101, dtype=np.uint32) for _ in range(count)]


def test_a_sum_that_float64_cannot_hold_is_exact():
    """31 products of 1.75 * 2^12 squared need 53 bits above one product of 1.25 * 2^-11 squared; C removes
    them.
    """
    big, small = (12 + 15) << 2 | 3, (15 - 11) << 2 | 1
    a, b = constant(4, big), constant(2, big)
    for register in (a[0], a[1], b[0]):
        register[::4] = register[::4] & 0xFFFFFF00 | small  # k = 0
    total = np.float32(31 * (1.75 * 2**12) ** 2)
    c = [np.full(32, -total).view(np.uint32) for _ in range(4)]
    d = mma("m16n8k32", None, "e5m2", "e5m2", "f32", "f32", a, b, c)
    assert {float(x) for r in d for x in r.view(np.float32)} == {(1.25 * 2.0**-11) ** 2}


def test_chunks_with_distant_scales_are_summed_exactly():
    """One chunk of a row is 2^60 times the other, and C removes it."""
    a, b = ([np.zeros(32, dtype=np.uint32) for _ in range(n)] for n in (4, 2))
    a[0][::4], a[1][::4], b[0][::4] = 7, 7, 7  # k = 0: 6 * 6, in the first chunk
    a[2][::4], a[3][::4], b[1][::4] = 1, 1, 1  # k = 32: 0.5 * 0.5, in the second
    sa = np.full(32, 0x7F7F7F7F & ~0xFF | (127 + 60), dtype=np.uint32)
    sb = np.full(32, 0x7F7F7F7F, dtype=np.uint32)
    c = [np.full(32, -36 * 2.0**60, dtype=np.float32).view(np.uint32) for _ in range(4)]
    d = mma("m16n8k64", "mxf4", "e2m1", "e2m1", "f32", "f32", a, b, c, (sa, 0, 0, sb, 0, 0))
    assert {float(x) for r in d for x in r.view(np.float32)} == {0.25}


@pytest.mark.parametrize(("kind", "type_"), [("mxf8f6f4", "e4m3"), (None, "e5m2"), (None, "f16")])
def test_a_batch_is_its_members(kind, type_):
    seed = 10
    print("seed", seed)
    rng = np.random.default_rng(seed)
    shape = "m16n8k16" if type_ == "f16" else "m16n8k32"
    na, nb, nc = counts(shape, kind, type_, type_, "f32")
    a = [np.stack(x) for x in zip(*(gentle(rng, na, type_, kind) for _ in range(5)), strict=True)]
    b = gentle(rng, nb, type_, kind)  # one B for all: leading axes broadcast
    c = [np.stack(x) for x in zip(*(addends(rng, nc, "f32") for _ in range(5)), strict=True)]
    a[0][3] |= 0x7F  # one member with a NaN or a large value
    scales = None
    if kind:
        scales = (
            rng.integers(0x7C, 0x83, size=(5, 128)).astype(np.uint8).view(np.uint32),
            0,
            1,
            np.full(32, 0x7F7F7F7F, np.uint32),
            0,
            2,
        )
    d = mma(shape, kind, type_, type_, "f32", "f32", a, b, c, scales)
    for n in range(5):
        one = (scales[0][n], *scales[1:]) if scales else None
        alone = mma(shape, kind, type_, type_, "f32", "f32", [r[n] for r in a], b, [r[n] for r in c], one)
        for got, want in zip(d, alone, strict=True):
            np.testing.assert_array_equal(got[n], want)


def test_special_values():
    a = [np.zeros(32, dtype=np.uint32) for _ in range(4)]
    b = [np.zeros(32, dtype=np.uint32) for _ in range(2)]
    c = [np.zeros(32, dtype=np.uint32) for _ in range(4)]
    a[0][0] = 0x7C  # e5m2 infinity in row 0, k 0
    b[0][:] = 0
    b[0][4] = 0x3C  # 1.0 in column 1
    b[0][8] = 0xBC  # -1.0 in column 2
    b[0][12] = 0x7D  # NaN in column 3
    d = mma("m16n8k32", None, "e5m2", "e5m2", "f32", "f32", a, b, c)
    rows = as_rows(d, "f32")
    assert rows[0][:4] == [0x7FFFFFFF, 0x7F800000, 0xFF800000, 0x7FFFFFFF]
    assert rows[1][:4] == [0, 0, 0, 0x7FFFFFFF]


def test_a_nan_scale_makes_its_row_nan():
    a, b, c = ([np.zeros(32, dtype=np.uint32)] * n for n in (4, 2, 4))
    sa = np.full(32, 0x7F7F7F7F, dtype=np.uint32)
    sa[4 * 3 + 1] = 0x7F7F7FFF  # quad 3, second lane: row 11
    ones = np.full(32, 0x7F7F7F7F, dtype=np.uint32)
    rows = as_rows(
        mma("m16n8k32", "mxf8f6f4", "e4m3", "e4m3", "f32", "f32", a, b, c, (sa, 0, 0, ones, 0, 0)), "f32"
    )
    assert [r for r in range(16) if rows[r] == [0x7FFFFFFF] * 8] == [11]
    assert sum(x != 0 for row in rows for x in row) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m16n8k32", None, "f16", "f16", "f32", "f32"), "m16n8k32"),
        (("m16n8k16", None, "bf16", "bf16", "f16", "f16"), "bf16"),
        (("m16n8k16", None, "f16", "f16", "f32", "f16"), "f16"),
        (("m16n8k32", None, "e2m1", "e2m1", "f32", "f32"), "e2m1"),
        (("m16n8k32", "mxf8f6f4", "e4m3", "e4m3", "f16", "f16"), "mxf8f6f4"),
        (("m16n8k64", "mxf4nvf4", "e2m1", "e2m1", "f32", "f32"), "scale_vec"),
        (("m16n8k64", "mxf4", "e2m1", "e2m1", "f32", "f32", "4X"), "4X"),
        (("m16n8k64", "mxf4", "e2m1", "e2m1", "f32", "f32", "2X", "ue4m3"), "ue4m3"),
        (("m8n8k4", None, "f64", "f64", "f64", "f64"), "f64"),
    ],
)
def test_forms_that_ptx_lacks_are_refused(arguments, message):
    with pytest.raises(Unsupported, match=message):
        lookup(*arguments)


@pytest.mark.parametrize(
    ("kind", "vec", "byte", "thread"),
    [("mxf8f6f4", "1X", 4, 0), ("mxf8f6f4", "1X", 0, 2), ("mxf4", "2X", 1, 0), ("mxf4nvf4", "4X", 2, 0)],
)
def test_undefined_selectors_are_refused(kind, vec, byte, thread):
    shape, type_ = ("m16n8k32", "e4m3") if kind == "mxf8f6f4" else ("m16n8k64", "e2m1")
    a, b, c = ([np.zeros(32, dtype=np.uint32)] * n for n in (4, 2, 4))
    s = np.zeros(32, dtype=np.uint32)
    with pytest.raises(ValueError, match="-id-a is"):
        mma(shape, kind, type_, type_, "f32", "f32", a, b, c, (s, byte, thread, s, 0, 0), scale_vec=vec)


def test_scales_must_match_the_kind():
    a, b, c = ([np.zeros(32, dtype=np.uint32)] * n for n in (4, 2, 4))
    with pytest.raises(ValueError, match="needs scales"):
        mma("m16n8k32", "mxf8f6f4", "e4m3", "e4m3", "f32", "f32", a, b, c)
    with pytest.raises(ValueError, match="without .block_scale"):
        mma("m16n8k32", None, "e4m3", "e4m3", "f32", "f32", a, b, c, (a[0], 0, 0, a[0], 0, 0))

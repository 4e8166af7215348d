"""cvt in every form of PTX against exact rationals."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from emulated import ptx_tables as ptx
from sm12x.emulator.numerics.convert import convert, lookup
from sm12x.emulator.numerics.convert_packed import pack
from sm12x.emulator.numerics.integers import extend
from sm12x.emulator.numerics.unsupported import Unsupported

NONE = frozenset()
SATFINITE = frozenset({"satfinite"})
SCALED = "scaled::n2::ue8m0"
WORD = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "e4m3": 0x7F, "e5m2": 0x7F}
MODES = ("rn", "rz", "rm", "rp")
INTEGER_MODES = ("rni", "rzi", "rmi", "rpi")
INTEGERS = tuple(f"{s}{b}" for s in "us" for b in (8, 16, 32, 64))
NARROW = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def register(type_: str):
    bits = int(type_[1:])
    return np.uint16 if bits <= 16 else np.uint32 if bits == 32 else np.uint64


def floats(rng, name: str, count: int = 3000) -> np.ndarray:
    """Special codes, ends of the integer types, ties of the narrower formats, and random codes: any, near
    one.
    """
    bits, exponent_bits, fraction_bits, bias = ptx.LAYOUT[name]
    first, one, top = 1 << fraction_bits, bias << fraction_bits, ptx.largest(name)
    special = [0, 1, first - 1, first, one - 1, one, one + 1, top - 1, top, top + 1, top + 2]
    for exponent in (-1, 0, 1, 7, 8, 15, 16, 31, 32, 63, 64):
        if exponent < 1 << (exponent_bits - 1):
            code = (bias + exponent) << fraction_bits
            special += [code - 2, code - 1, code, code + 1, code | first >> 1]
    anything = rng.integers(0, 1 << (bits - 1), count, dtype=np.uint64)
    near_one = rng.integers(one - (2 << fraction_bits), one + (6 << fraction_bits), count, dtype=np.uint64)
    # ties of the formats with 1, 2, 3, 7, 10 and 23 fraction bits
    cuts = [fraction_bits - p for p in (1, 2, 3, 7, 10, 23) if p < fraction_bits]
    ties = [near_one[:60] >> np.uint64(c) << np.uint64(c) | np.uint64(1 << (c - 1)) for c in cuts]
    codes = np.concatenate([anything, near_one, *ties, np.array(special, dtype=np.uint64)])
    return np.concatenate([codes, codes | np.uint64(1 << (bits - 1))]).astype(WORD[name])


def integral(x: Fraction, mode: str) -> int:
    down, rest = divmod(x.numerator, x.denominator)
    if mode == "rmi" or rest == 0:
        return down
    if mode == "rpi":
        return down + 1
    if mode == "rzi":
        return down + (x.numerator < 0)
    twice = 2 * rest
    return down + (twice > x.denominator or (twice == x.denominator and down % 2 == 1))


def limits(type_: str) -> tuple[int, int]:
    bits = int(type_[1:])
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)


def extended(type_: str, value: int) -> int:
    """Register bits of an integer result: an 8-bit one is extended to 16 bits."""
    bits = int(type_[1:])
    value &= (1 << bits) - 1
    if type_[0] == "s" and value >> (bits - 1):
        value -= 1 << bits
    return value & ((1 << max(bits, 16)) - 1)


@pytest.mark.parametrize("mode", INTEGER_MODES)
@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_float_to_integer_clamps(name, mode):
    seed = 40
    print("seed", seed)
    codes = floats(np.random.default_rng(seed), name, 300)
    values = [ptx.value(name, int(c)) for c in codes]
    for type_ in INTEGERS:
        bits = int(type_[1:])
        low, high = limits(type_)
        got = convert(type_, name, mode, NONE, codes)
        assert got.dtype == register(type_)
        want = []
        for x in values:
            if x == "nan":
                whole = 1 << (bits - 1) if name == "f64" or bits == 64 else 0
            elif isinstance(x, str):
                whole = high if x == "inf" else low
            else:
                whole = min(max(integral(x, mode), low), high)
            want.append(extended(type_, whole))
        assert got.tolist() == want, type_


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_every_half_to_s32(name):
    values = ptx.all_values(name)
    for mode in INTEGER_MODES:
        want = [
            0
            if x == "nan"
            else (1 << 31) - (x == "inf")
            if isinstance(x, str)
            else min(max(integral(x, mode), -(1 << 31)), (1 << 31) - 1) & 0xFFFFFFFF
            for x in values
        ]
        assert convert("s32", name, mode, NONE, EVERY_16_BITS).tolist() == want


def test_ftz_of_a_subnormal_source():
    tiny = np.array([1, 0x80000001], dtype=np.uint32)
    assert convert("s32", "f32", "rpi", NONE, tiny).tolist() == [1, 0]
    assert convert("s32", "f32", "rpi", frozenset({"ftz"}), tiny).tolist() == [0, 0]
    assert convert("s32", "f32", "rmi", NONE, tiny).tolist() == [0, 0xFFFFFFFF]
    assert convert("f64", "f32", None, frozenset({"ftz"}), tiny).tolist() == [0, 1 << 63]
    assert convert("f16", "f32", "rp", NONE, tiny).tolist() == [1, 0x8000]
    # the ISA says zero; the H200 and ptxas ignore .ftz here
    assert convert("f16", "f32", "rp", frozenset({"ftz"}), tiny).tolist() == [1, 0x8000]
    assert convert("bf16", "f32", "rp", frozenset({"ftz"}), tiny).tolist() == [0, 0x8000]
    small = np.array([2.0**-140]).view(np.uint64)
    assert convert("f32", "f64", "rn", NONE, small).tolist() == [1 << 9]
    assert convert("f32", "f64", "rn", frozenset({"ftz"}), small).tolist() == [0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("type_", INTEGERS)
def test_integer_to_float_rounds_once(type_, name, mode):
    seed = 41
    print("seed", seed)
    rng = np.random.default_rng(seed)
    bits = int(type_[1:])
    low, high = limits(type_)
    if bits <= 16:
        numbers = list(range(low, high + 1, 1 if bits == 8 else 7))
    else:
        # both ends, ties of every format, and anything
        ties = [
            (1 << e) + (1 << (e - p)) + d
            for e in range(bits - 1)
            for p in (8, 11, 24, 53)
            if p <= e
            for d in (-1, 0, 1)
        ]
        numbers = [
            low,
            low + 1,
            high,
            high - 1,
            *ties,
            *(
                int(x) >> int(s)
                for x, s in zip(
                    rng.integers(low, high, 300, dtype=np.int64 if low else np.uint64),
                    rng.integers(0, bits, 300),
                    strict=True,
                )
            ),
        ]
        numbers = [n for n in [*numbers, *(-n for n in numbers)] if low <= n <= high]
    registers = np.array([n & ((1 << max(bits, 16)) - 1) for n in numbers], dtype=np.uint64).astype(
        register(type_)
    )
    got = convert(name, type_, mode, NONE, registers)
    assert got.dtype == WORD[name]
    assert got.tolist() == [ptx.rounded(name, Fraction(n), mode) for n in numbers]


@pytest.mark.parametrize("sat", [False, True])
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_integer_chops_extends_and_saturates(source, sat):
    bits = int(source[1:])
    low, high = limits(source)
    numbers = sorted(
        {
            n
            for e in (0, 7, 8, 15, 16, 31, 32, 63, 64)
            for n in (1 << e, -(1 << e))
            for n in (n - 1, n, n + 1)
            if low <= n <= high
        }
    )
    # what lies above the source's own bits does not count
    junk = np.uint64(0xA5A5A5A5A5A5A5A5 << bits & 0xFFFFFFFFFFFFFFFF)
    clean = np.array([n & ((1 << bits) - 1) for n in numbers], dtype=np.uint64)
    for destination in INTEGERS:
        smallest, largest = limits(destination)
        want = [extended(destination, min(max(n, smallest), largest) if sat else n) for n in numbers]
        for registers in (clean.astype(register(source)), clean | junk):
            got = convert(destination, source, None, frozenset({"sat"}) if sat else NONE, registers)
            assert got.dtype == register(destination)
            assert got.tolist() == want, destination


def test_results_are_extended_to_wider_registers():
    a = np.array([0xFFFFFF80, 0x7F], dtype=np.uint32)
    assert extend("s8", convert("s8", "s32", None, NONE, a), 64).tolist() == [0xFFFFFFFFFFFFFF80, 0x7F]
    assert extend("u8", convert("u8", "s32", None, NONE, a), 32).tolist() == [0x80, 0x7F]
    assert extend("s32", a, 64).tolist() == [0xFFFFFFFFFFFFFF80, 0x7F]
    assert extend("f16", np.array([0x8000], dtype=np.uint16), 32).tolist() == [0x8000]


NARROWING = [
    ("f32", "f64"),
    ("f16", "f64"),
    ("bf16", "f64"),
    ("f16", "f32"),
    ("bf16", "f32"),
    ("f16", "bf16"),
    ("bf16", "f16"),
]


def compare(
    name: str,
    sources: list[ptx.Value],
    minus: list[bool],
    got: np.ndarray,
    mode: str,
    *,
    satfinite=False,
    relu=False,
):
    top = 1 << (ptx.LAYOUT[name][0] - 1)
    for x, m, result in zip(sources, minus, got.tolist(), strict=True):
        if x == "nan":
            want = NAN.get(name, ptx.largest(name))
        elif m and relu:
            want = 0
        elif isinstance(x, str):
            largest = ptx.largest(name)
            beyond = 0x7F if name == "e4m3" else largest + 1
            want = (largest if satfinite else beyond) | (top if m else 0)
        else:
            want = ptx.rounded(name, x, mode, satfinite=satfinite, negative=m)
        assert result == want, (x if isinstance(x, str) else float(x), hex(result), hex(want))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("destination", "source"), NARROWING)
def test_float_to_float_rounds_once(destination, source, mode):
    seed = 42
    print("seed", seed)
    every = ptx.LAYOUT[source][0] == 16
    codes = EVERY_16_BITS if every else floats(np.random.default_rng(seed), source, 1500)
    values = ptx.all_values(source) if every else [ptx.value(source, int(c)) for c in codes]
    minus = (codes >> codes.dtype.type(ptx.LAYOUT[source][0] - 1) == 1).tolist()
    got = convert(destination, source, mode, NONE, codes)
    assert got.dtype == WORD[destination]
    if source == "f64":  # the NaN of the source: test_nan_of_f64_keep_what_there_is_room_for
        keep = np.array([x != "nan" for x in values])
        values, minus = ([v for v, k in zip(column, keep, strict=True) if k] for column in (values, minus))
        got = got[keep]
    compare(destination, values, minus, got, mode)


@pytest.mark.parametrize("destination", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_of_f64_keep_what_there_is_room_for(destination, mode):
    """Sign and upper fraction bits, with the quiet bit set, as on the H200."""
    seed = 49
    print("seed", seed)
    fraction = np.random.default_rng(seed).integers(1, 1 << 52, 200, dtype=np.uint64)
    fraction[:3] = 1, 1 << 51, (1 << 52) - 1
    sign = np.arange(200, dtype=np.uint64) & np.uint64(1)
    got = convert(destination, "f64", mode, NONE, sign << np.uint64(63) | np.uint64(0x7FF << 52) | fraction)
    bits, exponent_bits, fraction_bits, _ = ptx.LAYOUT[destination]
    for s, f, found in zip(sign.tolist(), fraction.tolist(), got.tolist(), strict=True):
        payload = f >> (52 - fraction_bits) | 1 << (fraction_bits - 1)
        assert found == s << (bits - 1) | ((1 << exponent_bits) - 1) << fraction_bits | payload


@pytest.mark.parametrize(
    ("destination", "source"), [("f32", "f16"), ("f64", "f16"), ("f64", "bf16"), ("f32", "bf16")]
)
def test_widening_is_exact(destination, source):
    values = ptx.all_values(source)
    got = convert(destination, source, None, NONE, EVERY_16_BITS)
    assert got.dtype == WORD[destination]
    wide = [ptx.value(destination, int(c)) for c in got]
    assert tuple(wide) == values
    zeros = got[[0, 0x8000]].tolist()
    assert zeros == [0, 1 << (ptx.LAYOUT[destination][0] - 1)]
    if (destination, source) == ("f32", "f16"):
        assert set(got[np.isnan(got.view(np.float32))]) == {0x7FFFFFFF}
    if (destination, source) == ("f32", "bf16"):  # a shift
        np.testing.assert_array_equal(got, EVERY_16_BITS.astype(np.uint32) << 16)
        flushed = convert(destination, source, None, frozenset({"ftz"}), EVERY_16_BITS)  # no shift: F2F
        assert set(flushed[np.isnan(flushed.view(np.float32))]) == {0x7FFFFFFF}
    if (destination, source) == ("f64", "f16"):  # quiet, with sign and payload
        signalling = np.array([0x7C01, 0xFDFF], np.uint16)
        want = [0x7FF8040000000000, 0xFFFFFC0000000000]
        assert convert("f64", "f16", None, NONE, signalling).tolist() == want


def test_f32_to_f64_is_exact():
    seed = 43
    print("seed", seed)
    codes = floats(np.random.default_rng(seed), "f32")
    got = convert("f64", "f32", None, NONE, codes)
    assert [ptx.value("f64", int(c)) for c in got] == [ptx.value("f32", int(c)) for c in codes]


@pytest.mark.parametrize("flags", ["satfinite", "relu", "relu satfinite"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_relu_and_satfinite_from_f32(name, mode, flags):
    seed = 44
    print("seed", seed)
    codes = floats(np.random.default_rng(seed), "f32", 600)
    values, minus = [ptx.value("f32", int(c)) for c in codes], (codes >> 31 == 1).tolist()
    kwargs = {"satfinite": "satfinite" in flags, "relu": "relu" in flags}
    scalar = convert(name, "f32", mode, frozenset(flags.split()), codes)
    compare(name, values, minus, scalar, mode, **kwargs)
    pair = convert(f"{name}x2", "f32", mode, frozenset(flags.split()), codes, codes[::-1].copy())
    np.testing.assert_array_equal(pair, scalar.astype(np.uint32) << 16 | scalar[::-1])


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs_of_halves_from_f32(name, mode):
    """The first operand goes to the upper half."""
    seed = 45
    print("seed", seed)
    codes = floats(np.random.default_rng(seed), "f32", 2000)
    scalar = convert(name, "f32", mode, NONE, codes)
    pair = convert(f"{name}x2", "f32", mode, NONE, codes, codes[::-1].copy())
    assert pair.dtype == np.uint32
    np.testing.assert_array_equal(pair, scalar.astype(np.uint32) << 16 | scalar[::-1])
    if name == "bf16" and mode == "rn":
        with np.errstate(all="ignore"):
            want = codes.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
        finite = ~np.isnan(codes.view(np.float32))
        np.testing.assert_array_equal(scalar[finite], want[finite])
        assert set(scalar[~finite]) == {0x7FFF}


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("rna", ""), ("rna", "satfinite"), ("rn", "relu"), ("rz", "satfinite relu"), ("rn", "")],
)
def test_tf32(mode, flags):
    seed = 46
    print("seed", seed)
    codes = floats(np.random.default_rng(seed), "f32", 600)
    got = convert("tf32", "f32", mode, frozenset(flags.split()), codes)
    nan = np.isnan(codes.view(np.float32))
    if mode == "rna":  # integer arithmetic, which only cuts a NaN
        less = 0x2000 if flags else 0
        assert got[nan].tolist() == [(c & 0xFFFFE000) - less for c in codes[nan].tolist()]
    else:
        assert set(got[nan]) == {0x7FFFE000}
    assert not (got & 0x1FFF).any()
    values, minus = [ptx.value("f32", int(c)) for c in codes[~nan]], (codes[~nan] >> 31 == 1).tolist()
    compare(
        "tf32", values, minus, got[~nan] >> 13, mode, satfinite="satfinite" in flags, relu="relu" in flags
    )


@pytest.mark.parametrize("mode", INTEGER_MODES)
@pytest.mark.parametrize("name", ["f16", "f32", "f64", "bf16"])
def test_rounding_to_an_integral_value(name, mode):
    seed = 47
    print("seed", seed)
    codes = EVERY_16_BITS if WORD[name] is np.uint16 else floats(np.random.default_rng(seed), name, 1000)
    got = convert(name, name, mode, NONE, codes)
    top = 1 << (ptx.LAYOUT[name][0] - 1)
    if WORD[name] is np.uint16:
        value = ptx.all_values(name).__getitem__
    else:
        value = functools.partial(ptx.value, name)
    for code, result in zip(codes.tolist(), got.tolist(), strict=True):
        x = value(code)
        if x == "nan":
            assert value(result) == "nan"
        elif isinstance(x, str):
            assert result == code
        else:
            assert value(result) == integral(x, mode)
            assert result & top == code & top, "the sign of a zero is that of the operand"


@pytest.mark.parametrize(
    ("destination", "source", "mode"),
    [("f32", "f32", None), ("f16", "f32", "rn"), ("f32", "s32", "rz"), ("f64", "f64", "rni")],
)
def test_sat_to_the_unit_interval(destination, source, mode):
    if source == "s32":
        codes = np.array([0xFFFFFFFF, 0, 1, 2], dtype=np.uint32)
        want = [0.0, 0.0, 1.0, 1.0]
    else:
        word = {"f32": np.float32, "f64": np.float64}[source]
        codes = np.array([-1.0, -0.0, 0.25, 1.0, 7.0, np.inf, -np.inf, np.nan], dtype=word).view(WORD[source])
        want = [0.0, 0.0, 0.0 if mode == "rni" else 0.25, 1.0, 1.0, 1.0, 0.0, 0.0]
    got = convert(destination, source, mode, frozenset({"sat"}), codes)
    wide = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[destination]
    assert got.view(wide).tolist() == want
    assert not np.signbit(got.view(wide)).any()


def test_a_plain_copy_keeps_every_bit():
    codes = np.array([0x7F800001, 0x00000001, 0xFFC12345], dtype=np.uint32)
    assert convert("f32", "f32", None, NONE, codes).tolist() == codes.tolist()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_a_plain_copy_of_16_bits_makes_nan_canonical(name):
    codes = EVERY_16_BITS
    special = (codes & 0x7FFF) > (0x7C00 if name == "f16" else 0x7F80)
    got = convert(name, name, None, NONE, codes)
    np.testing.assert_array_equal(got, np.where(special, 0x7FFF, codes))


# --- packed narrow formats
# ---------------------------------------------------------------------------------------------


def pitch(name: str) -> int:
    return 4 if name == "e2m1" else 8


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("source", ["f16", "bf16"])
@pytest.mark.parametrize("name", NARROW)
def test_every_half_to_narrow_pairs(name, source, relu):
    """Both positions; without .relu all 65536 codes of the source."""
    codes = EVERY_16_BITS[:: 17 if relu else 1]
    registers = codes.astype(np.uint32) << 16 | codes[::-1]
    flags = frozenset({"satfinite", "relu"}) if relu else SATFINITE
    got = convert(f"{name}x2", f"{source}x2", "rn", flags, registers)
    assert got.dtype == np.uint16
    upper, lower = got >> pitch(name), got & ((1 << pitch(name)) - 1)
    np.testing.assert_array_equal(upper, lower[::-1])
    values = [ptx.all_values(source)[c] for c in codes]
    compare(name, values, (codes >> 15 == 1).tolist(), upper, "rn", satfinite=True, relu=relu)


@pytest.mark.parametrize("name", NARROW)
def test_f32_to_narrow_pairs(name):
    seed = 48
    print("seed", seed)
    codes = floats(np.random.default_rng(seed), "f32", 2000)
    got = convert(f"{name}x2", "f32", "rn", SATFINITE, codes, np.zeros_like(codes))
    assert not (got & ((1 << pitch(name)) - 1)).any()
    values = [ptx.value("f32", int(c)) for c in codes]
    compare(name, values, (codes >> 31 == 1).tolist(), got >> pitch(name), "rn", satfinite=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("half", ["f16", "bf16"])
@pytest.mark.parametrize("name", NARROW)
def test_every_narrow_pair_to_halves(name, half, relu):
    pairs = EVERY_16_BITS if pitch(name) == 8 else EVERY_16_BITS[:256]
    got = convert(f"{half}x2", f"{name}x2", "rn", frozenset({"relu"}) if relu else NONE, pairs)
    assert got.dtype == np.uint32
    codes = range(1 << pitch(name))
    bits = ptx.LAYOUT[name][0]
    table = []
    for code in codes:
        x = ptx.value(name, code & ((1 << bits) - 1))
        minus = bool(code >> (bits - 1) & 1)
        if x == "nan":
            table.append(0x7FFF)
        elif minus and relu:
            table.append(0)
        elif isinstance(x, str):
            table.append(ptx.largest(half) + 1 | minus << 15)
        else:
            table.append(ptx.rounded(half, x, "rn", negative=minus))
    table = np.array(table, dtype=np.uint32)
    want = table[pairs >> pitch(name)] << 16 | table[pairs & ((1 << pitch(name)) - 1)]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", [*NARROW, "s2f6"])
@pytest.mark.parametrize("satfinite", [False, True])
def test_scaled_pairs_to_bf16(name, satfinite):
    seed = 49
    print("seed", seed)
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 256 if name == "e2m1" else 1 << 16, 3000, dtype=np.uint16)
    factors = rng.integers(0, 1 << 16, 3000, dtype=np.uint16)
    flags = frozenset({SCALED, *(["satfinite"] if satfinite else [])})
    got = convert("bf16x2", f"{name}x2", "rn", flags, pairs, factors)
    step = pitch(name)
    for position, shift in ((1, step), (0, 0)):
        results = got >> np.uint32(16 * position) & np.uint32(0xFFFF)
        for pair, factor, result in zip(pairs.tolist(), factors.tolist(), results.tolist(), strict=True):
            code = pair >> shift & ((1 << step) - 1)
            bits = 8 if name == "s2f6" else ptx.LAYOUT[name][0]
            x = (
                Fraction(code - 256 * (code >> 7), 64)
                if name == "s2f6"
                else ptx.value(name, code & ((1 << bits) - 1))
            )
            s = ptx.value("ue8m0", factor >> (8 * position) & 0xFF)
            minus = bool(code >> (bits - 1) & 1)
            if "nan" in (x, s):
                want = 0x7FFF
            elif isinstance(x, str):
                want = ptx.largest("bf16") + (not satfinite) | minus << 15
            else:
                want = ptx.rounded("bf16", x * s, "rn", satfinite=satfinite, negative=minus)
            assert result == want


@pytest.mark.parametrize(
    ("source", "scaled"), [("f32", False), ("f32", True), ("bf16x2", False), ("bf16x2", True)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_to_s2f6(source, scaled, relu):
    seed = 50
    print("seed", seed)
    rng = np.random.default_rng(seed)
    half = source == "bf16x2"
    name = "bf16" if half else "f32"
    numbers = (rng.standard_normal((2, 2000)) * 1.5).astype(np.float32).view(np.uint32)
    numbers[:, :4] = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x80000000], dtype=np.uint32)
    codes = numbers >> 16 if half else numbers
    operands = [codes[0] << 16 | codes[1]] if half else [codes[0], codes[1]]
    factors = rng.integers(0x7C, 0x83, (2, 2000)).astype(np.uint16)
    if scaled:
        operands.append(factors[0] << 8 | factors[1])
    flags = frozenset({"satfinite", *(["relu"] if relu else []), *([SCALED] if scaled else [])})
    got = convert("s2f6x2", source, "rn", flags, *operands)
    assert got.dtype == np.uint16
    for i, shift in ((0, 8), (1, 0)):
        for code, factor, result in zip(
            codes[i].tolist(), factors[i].tolist(), (got >> shift & 0xFF).tolist(), strict=True
        ):
            x = ptx.value(name, code)
            s = Fraction(2) ** (factor - 127) if scaled else 1
            if isinstance(x, str):
                steps = -128 if x == "-inf" else 127
            else:
                steps = min(max(integral(x / s * 64, "rni"), -128), 127)
            assert result == (max(steps, 0) if relu else steps) & 0xFF


def test_every_s2f6_to_bf16():
    codes = np.arange(256, dtype=np.uint16)
    got = convert("bf16x2", "s2f6x2", "rn", NONE, codes << 8)
    assert not (got & 0xFFFF).any()
    assert [ptx.value("bf16", int(c) >> 16) for c in got] == [
        Fraction(c - 256 * (c > 127), 64) for c in range(256)
    ]


@pytest.mark.parametrize("satfinite", [False, True])
@pytest.mark.parametrize("mode", ["rz", "rp"])
def test_every_bf16_to_ue8m0(mode, satfinite):
    registers = EVERY_16_BITS.astype(np.uint32) << 16 | EVERY_16_BITS[::-1]
    got = convert("ue8m0x2", "bf16x2", mode, SATFINITE if satfinite else NONE, registers)
    np.testing.assert_array_equal(got >> 8, (got & 0xFF)[::-1])
    for code, (x, result) in enumerate(zip(ptx.all_values("bf16"), (got >> 8).tolist(), strict=True)):
        if x == "nan":
            want = 0xFF
        elif isinstance(x, str):
            want = 0xFE if satfinite else 0xFF
        else:
            # floor or ceiling of log2; 2^-127 is as far down as it goes
            mantissa, exponent = math.frexp(abs(x))
            exponent -= mode == "rz" or mantissa == 0.5
            want = max(exponent + 127, 0) if x else 0
            if satfinite:
                want = min(want, 0xFE)
        assert result == want, hex(code)


def test_f32_to_ue8m0_puts_the_first_operand_on_top():
    a, b = (
        np.array(x, dtype=np.float32).view(np.uint32)
        for x in ([1.0, 1.5, -3.0, np.nan], [0.0, 2.0**-130, 3e38, np.inf])
    )
    assert convert("ue8m0x2", "f32", "rz", SATFINITE, a, b).tolist() == [0x7F00, 0x7F00, 0x80FE, 0xFFFE]
    assert convert("ue8m0x2", "f32", "rp", NONE, a, b).tolist() == [0x7F00, 0x8000, 0x81FF, 0xFFFF]


def test_every_ue8m0_to_bf16():
    codes = np.arange(256, dtype=np.uint16)
    got = convert("bf16x2", "ue8m0x2", "rn", NONE, codes << 8 | 0x7F)
    assert set(got & 0xFFFF) == {0x3F80}
    want = [ptx.value("ue8m0", c) for c in range(256)]
    assert [ptx.value("bf16", int(c) >> 16) for c in got] == want
    assert got[255] >> 16 == 0x7FFF


@pytest.mark.parametrize(("name", "used"), [("f16", 13), ("bf16", 16)])
def test_stochastic_pairs(name, used):
    """Two halves of the random bits, the upper for the first operand."""
    seed = 51
    print("seed", seed)
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((2, 2000)) * 100).astype(np.float32).view(np.uint32)
    bits = rng.integers(0, 1 << 32, 2000, dtype=np.uint32)
    got = convert(f"{name}x2", "f32", "rs", NONE, a, b, bits)
    for x, random, result in ((a, bits >> 16, got >> 16), (b, bits & 0xFFFF, got & 0xFFFF)):
        down = convert(name, "f32", "rz", NONE, x).astype(np.uint32)
        wide = convert("f32", name, None, NONE, down.astype(np.uint16)).view(np.float32).astype(np.float64)
        exact = x.view(np.float32).astype(np.float64)
        step = np.abs(convert("f32", name, None, NONE, (down + 1).astype(np.uint16)).view(np.float32) - wide)
        carry = (
            np.floor(np.abs(exact - wide) / step * (1 << used)) + (random & ((1 << used) - 1)) >= 1 << used
        )
        np.testing.assert_array_equal(result, down + carry)
        assert 0.3 < carry.mean() < 0.7


@pytest.mark.parametrize("name", NARROW)
def test_stochastic_quadruples(name):
    """Zero random bits truncate, all ones round every inexact value away; a is on top."""
    values = np.array([[1.3], [-0.7], [5.9], [1e9]], dtype=np.float32)
    operands = list(values.view(np.uint32))
    step = pitch(name)
    flags = SATFINITE
    for random, mode in ((0, "rz"), (0xFFFFFFFF, "away")):
        got = int(convert(f"{name}x4", "f32", "rs", flags, *operands, np.array([random], dtype=np.uint32))[0])
        want = 0
        for x in values[:, 0].tolist():
            towards = mode if mode == "rz" else "rm" if x < 0 else "rp"
            want = want << step | ptx.rounded(name, Fraction(x), towards, satfinite=True)
        assert got == want
    upper = convert(f"{name}x4", "f32", "rs", flags, *operands, np.array([0xFFFF0000], dtype=np.uint32))
    assert upper[0] != convert(f"{name}x4", "f32", "rs", flags, *operands, np.array([0], dtype=np.uint32))[0]


def test_pack():
    a, b, c = (np.array([x], dtype=np.uint32) for x in (0xFFFFFF00, 300, 0x12345678))
    assert pack("s16", a, b).tolist() == [0xFF00012C]
    assert pack("u16", a, b).tolist() == [0x0000012C]
    assert pack("s8", a, b, c).tolist() == [0x5678807F]
    assert pack("u8", a, b, c).tolist() == [0x567800FF]
    assert pack("s4", a, b, c).tolist() == [0x34567887]
    assert pack("u2", a, b, c).tolist() == [0x23456783]
    for arguments in (("u16", a, b, c), ("u8", a, b), ("u32", a, b)):
        with pytest.raises(Unsupported, match="cvt.pack"):
            pack(*arguments)


@pytest.mark.parametrize(
    ("destination", "source", "mode", "flags"),
    [
        ("f16", "f32", None, ""),
        ("f32", "f16", "rn", ""),
        ("s32", "f32", "rn", ""),
        ("f32", "s32", None, ""),
        ("f32", "f64", "rni", ""),
        ("s32", "u32", "rni", ""),
        ("bf16", "f32", "rn", "sat"),
        ("f16", "f64", "rn", "ftz"),
        ("f16", "f32", "rm", "relu"),
        ("tf32", "f32", "rp", ""),
        ("tf32", "f32", "rna", "relu"),
        ("e4m3x2", "f32", "rn", ""),
        ("e4m3x2", "f32", "rz", "satfinite"),
        ("e4m3x4", "f32", "rs", ""),
        ("f16x2", "e4m3x2", "rn", "satfinite"),
        ("f16x2", "e4m3x2", None, ""),
        ("f16x2", "ue8m0x2", "rn", ""),
        ("ue8m0x2", "f32", "rn", "satfinite"),
        ("bf16x2", "ue8m0x2", "rn", "relu"),
        ("s2f6x2", "f16x2", "rn", "satfinite"),
        ("f8", "f32", "rn", ""),
    ],
)
def test_forms_that_ptx_lacks_are_refused(destination, source, mode, flags):
    with pytest.raises(Unsupported, match="cvt"):
        lookup(destination, source, mode, frozenset(flags.split()))


def test_arrays_of_any_shape():
    codes = floats(np.random.default_rng(1), "f32", 50)[:64].reshape(2, 32)
    for form in itertools.product(("s32", "f16", "u8", "s64"), ("f32",)):
        mode = "rn" if form[0] == "f16" else "rzi"
        got = convert(*form, mode, NONE, codes)
        assert got.shape == (2, 32)
        np.testing.assert_array_equal(got[1], convert(*form, mode, NONE, codes[1]))

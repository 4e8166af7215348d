"""Decoding and encoding of every PTX floating-point format."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from emulated import ptx_tables as ptx
from sm12x.emulator.numerics.formats import FORMATS, decode, encode
from sm12x.emulator.numerics.unsupported import Unsupported

ML = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "ue8m0": ml_dtypes.float8_e8m0fnu,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
NARROW = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
MODES = ("rn", "rna", "rz", "rm", "rp")


def plain(x: ptx.Value) -> float:
    return float(x)


def all_values(name: str) -> np.ndarray:
    """Every value of a 16-bit format, by its own code."""
    return decode(name, np.arange(1 << 16, dtype=np.uint16))


@pytest.mark.parametrize("name", [*NARROW, "ue8m0", "ue4m3", "f16", "bf16"])
def test_every_code_decodes_to_its_value(name):
    bits = FORMATS[name].bits
    codes = np.arange(1 << bits, dtype=np.uint8 if bits <= 8 else np.uint16)
    got = decode(name, codes)
    want = np.array([plain(ptx.value(name, int(c))) for c in codes])
    np.testing.assert_array_equal(got, want)
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(
        np.signbit(got[finite]), (codes[finite] >> (bits - 1) & 1 == 1) & FORMATS[name].signed
    )
    if name in ML:
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(got, codes.view(ML[name]).astype(np.float64))


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "ue4m3"])
def test_bits_above_the_code_are_ignored(name):
    bits = FORMATS[name].bits
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(decode(name, codes), decode(name, codes & ((1 << bits) - 1)))


def test_tf32_ignores_the_low_thirteen_bits():
    codes = np.array([0x3F800000, 0x3F801FFF, 0xC2FFE000, 0x7F800000, 0x00002000], dtype=np.uint32)
    want = [plain(ptx.value("tf32", int(c) >> 13)) for c in codes]
    np.testing.assert_array_equal(decode("tf32", codes), want)


@pytest.mark.parametrize("name", [*NARROW, "f16", "bf16"])
@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_nearest_even_is_that_of_ml_dtypes(name, source):
    values = all_values(source)
    with np.errstate(all="ignore"):
        want = values.astype(ML[name])  # from float64, one rounding
    got = encode(name, values)
    special = np.isnan(values) | np.isnan(want.astype(np.float64))
    np.testing.assert_array_equal(got[~special], want.view(got.dtype)[~special])
    nan = FORMATS[name].nan
    if nan is not None:
        assert set(got[np.isnan(values)]) == {nan}
        np.testing.assert_array_equal(got[special & ~np.isnan(values)] & 0x7F, 0x7F)
    else:
        assert set(got[np.isnan(values)]) == {FORMATS[name].maximum}


def by_table(name: str, values: np.ndarray, mode: str, satfinite: bool) -> np.ndarray:
    """Codes from the sorted table of magnitudes: exact, because a float64 holds them and their midpoints."""
    top = ptx.largest(name)
    table = np.array([plain(ptx.value(name, c)) for c in range(top + 1)])
    step = table[-1] - table[-2]
    table = np.append(table, table[-1] + step)  # what the number above the largest would be
    magnitude, minus = np.abs(values), np.signbit(values)
    low = np.clip(np.searchsorted(table, magnitude, side="right") - 1, 0, top)
    middle = (table[low] + table[low + 1]) / 2
    exact = magnitude == table[low]
    up = {
        "rn": (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1)),
        "rna": magnitude >= middle,
        "rz": np.zeros_like(minus),
        "rm": minus & ~exact,
        "rp": ~minus & ~exact,
    }[mode]
    codes = low + up
    too_large = codes > top
    if name not in ("e2m3", "e3m2", "e2m1") and not satfinite:
        codes = np.where(too_large, top + 1, codes)
        if name == "e4m3":  # beyond the range there is no number to stop at
            codes = np.where(magnitude >= table[-1], 0x7F, codes)
        else:
            codes = np.where(np.isinf(values), top + 1, codes)
    else:
        codes = np.minimum(codes, top)
    return codes | minus.astype(np.int64) << (ptx.LAYOUT[name][0] - 1)


@pytest.mark.parametrize("satfinite", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_every_16_bit_number_in_every_rounding_mode(source, name, mode, satfinite):
    values = all_values(source)
    values = values[~np.isnan(values)]
    got = encode(name, values, mode, satfinite=satfinite)
    np.testing.assert_array_equal(got, by_table(name, values, mode, satfinite))


def around(name: str, codes: list[int]) -> list[Fraction]:
    """For every code: its value, the middle to the next, and points just beside both, with both signs."""
    points = []
    for code in codes:
        low = ptx.value(name, code)
        high = ptx.value(name, code + 1) if code < ptx.largest(name) else 2 * low - ptx.value(name, code - 1)
        middle, little = (low + high) / 2, (high - low) / 1024
        for point in (low, low + little, middle - little, middle, middle + little, high - little, high):
            points += [point, -point]
    return points


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*NARROW, "f16", "bf16", "tf32", "f32"])
def test_values_beside_and_between_codes_round_as_rationals_do(name, mode):
    seed = 11
    print("seed", seed)
    rng = np.random.default_rng(seed)
    top = ptx.largest(name)
    first = 1 << ptx.LAYOUT[name][2]  # the smallest normal number
    codes = (
        list(range(top + 1))
        if top < 300
        else sorted({0, 1, 2, first - 1, first, top - 1, top, *rng.integers(0, top, 400).tolist()})
    )
    points = around(name, codes)
    values = np.array([float(p) for p in points])
    assert [Fraction(v) for v in values] == points, "the points are not exact in float64"
    got = encode(name, values, mode)
    shift = FORMATS[name].shift
    want = [
        ptx.rounded(name, p, mode, negative=bool(np.signbit(v))) << shift
        for p, v in zip(points, values, strict=True)
    ]
    assert got.tolist() == want


def test_rounding_to_odd_keeps_the_side_of_a_tie():
    """The smallest float64 steps beside a tie of e4m3 and of f32 decide."""
    for name, tie in (("e4m3", 17.0), ("f32", 1 + 2.0**-24)):
        below, above = np.nextafter(tie, 0), np.nextafter(tie, 99)
        codes = encode(name, np.array([below, tie, above]))
        assert codes[1] == codes[0]
        assert codes[2] == codes[0] + 1


@pytest.mark.parametrize(
    ("mode", "codes"), [("rz", (0, 0, 0, 1, 126, 127, 127, 254)), ("rp", (0, 0, 1, 1, 127, 127, 128, 255))]
)
def test_ue8m0_takes_the_exponent(mode, codes):
    values = np.array([0.0, 2.0**-149, 1.5 * 2.0**-127, 2.0**-126, 0.75, 1.0, -1.0000001, 1.5 * 2.0**127])
    assert encode("ue8m0", values, mode).tolist() == list(codes)
    finite = encode("ue8m0", np.append(values, [np.inf, np.nan]), mode, satfinite=True)
    assert finite.tolist() == [*(min(c, 254) for c in codes), 254, 255]
    assert encode("ue8m0", np.array([np.inf, -np.inf, np.nan]), mode).tolist() == [255] * 3


def test_ue8m0_powers_survive():
    codes = np.arange(255, dtype=np.uint8)
    for mode in ("rz", "rp"):
        np.testing.assert_array_equal(encode("ue8m0", decode("ue8m0", codes), mode), codes)


def test_ue4m3_survives():
    codes = np.arange(127, dtype=np.uint8)
    np.testing.assert_array_equal(encode("ue4m3", decode("ue4m3", codes)), codes)
    with pytest.raises(ValueError, match="ue4m3"):
        encode("ue4m3", np.array([-1.0]))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "f16", "bf16", "f32", "tf32", "e2m1"])
def test_relu_and_sat(name):
    values = np.array([-2.0, -0.0, 0.0, 1.0, 2.0, -np.inf, np.nan, -np.nan])
    form = FORMATS[name]
    relu = encode(name, values, relu=True)
    assert relu[[0, 1, 2, 5]].tolist() == [0] * 4
    nan = 0x7FFFE000 if name == "tf32" else form.maximum if form.nan is None else form.nan
    assert relu[[6, 7]].tolist() == [nan, nan]
    one, zero = encode(name, np.array([1.0, 0.0]))
    assert encode(name, values, sat=True).tolist() == [zero, zero, zero, one, one, zero, zero, zero]


def test_stochastic_rounding_is_the_carry_of_an_addition():
    seed = 12
    print("seed", seed)
    rng = np.random.default_rng(seed)
    bits = (
        rng.integers(0x38800000, 0x47000000, size=4000, dtype=np.uint32)
        | rng.integers(0, 2, 4000, np.uint32) << 31
    )
    for name, shift in (("bf16", 16), ("f16", 13)):
        random = rng.integers(0, 1 << shift, size=4000, dtype=np.uint32)
        got = encode(name, decode("f32", bits), "rs", random=(random, shift))
        carried = (bits & np.uint32(0x7FFFFFFF)) + random >> np.uint32(shift)  # of the f32 magnitude
        if name == "f16":
            carried = carried - np.uint32((127 - 15) << 10)
        np.testing.assert_array_equal(got, carried | (bits >> 31) << 15)
        assert (got != encode(name, decode("f32", bits), "rz")).any()


def test_unknown_formats_and_modes_are_refused():
    with pytest.raises(Unsupported, match="e3m4"):
        decode("e3m4", np.zeros(1, np.uint8))
    with pytest.raises(Unsupported, match="rx"):
        encode("f16", np.zeros(1), "rx")
    with pytest.raises(Unsupported, match="ue8m0"):
        encode("ue8m0", np.zeros(1), "rn")
    with pytest.raises(Unsupported, match="rs"):
        encode("f16", np.zeros(1), "rs")

"""The reference against arithmetic that shares nothing with it: Python fractions and plain loops."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from sm12x import reference

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
OUT_DTYPES = ("bfloat16", "float16", "float32")
FRACTION_BITS_AND_LEAST_EXPONENT = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126)}
LARGEST = {
    "bfloat16": float(ml_dtypes.finfo("bfloat16").max),
    "float16": 65504.0,
    "float32": float(np.finfo("f4").max),
}


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def fp8_value(bits: int, fp8: np.dtype) -> Fraction:
    """A finite FP8 bit pattern decoded by hand."""
    exponent_bits, fraction_bits, bias = (4, 3, 7) if fp8 == E4M3 else (5, 2, 15)
    exponent = bits >> fraction_bits & (1 << exponent_bits) - 1
    fraction = Fraction(bits & (1 << fraction_bits) - 1, 1 << fraction_bits)
    value = (
        fraction * Fraction(2) ** (1 - bias)
        if exponent == 0
        else (1 + fraction) * Fraction(2) ** (exponent - bias)
    )
    return -value if bits & 0x80 else value


def nearest_even(x: Fraction, out_dtype: str) -> float:
    """`x` rounded exactly, on integers, as a float (infinite on overflow)."""
    fraction_bits, least = FRACTION_BITS_AND_LEAST_EXPONENT[out_dtype]
    if x == 0:
        return 0.0
    exponent = math.frexp(float(abs(x)))[1]
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    quantum = Fraction(2) ** (max(exponent, least) - fraction_bits)
    steps, rest = divmod(abs(x), quantum)
    if rest * 2 > quantum or (rest * 2 == quantum and steps % 2):
        steps += 1
    rounded = float(steps * quantum) if steps * quantum <= LARGEST[out_dtype] else math.inf
    return math.copysign(rounded, x)


def offsets_of(counts, dtype=np.int32):
    return np.concatenate([[0], np.cumsum(counts)]).astype(dtype)


def slow_packed(a, b, a_scale_of, b_scale_of, offsets, bias):
    """D and sum |a b| by a triple loop over exact fractions. a_scale_of(m, e), b_scale_of(e, n): floats."""
    exact = np.empty((a.shape[0], b.shape[1]), dtype=object)
    absolute = np.empty_like(exact)
    a_bits, b_bits = a.view(np.uint8), b.view(np.uint8)
    for e in range(b.shape[0]):
        for m in range(offsets[e], offsets[e + 1]):
            for n in range(b.shape[1]):
                total = spread = Fraction(0)
                for k in range(a.shape[1]):
                    product = fp8_value(int(a_bits[m, k]), a.dtype) * fp8_value(int(b_bits[e, n, k]), b.dtype)
                    total += product
                    spread += abs(product)
                scale = Fraction(float(a_scale_of(m, e))) * Fraction(float(b_scale_of(e, n)))
                exact[m, n] = total * scale + (Fraction(float(bias[e, n])) if bias is not None else 0)
                absolute[m, n] = spread * abs(scale)
    return exact, absolute


def random_scale(shape, rng):
    return (rng.uniform(0.25, 4.0, size=shape) * rng.choice([-1, 1], size=shape)).astype(np.float32)


A_SCALES = {
    "none": lambda M, E, rng: None,
    "value": lambda M, E, rng: 0.37,
    "one": lambda M, E, rng: random_scale((1,), rng),
    "token": lambda M, E, rng: random_scale((M,), rng),
    "token_column": lambda M, E, rng: random_scale((M, 1), rng),
    "expert": lambda M, E, rng: random_scale((E, 1, 1), rng),
}
B_SCALES = {
    "none": lambda E, N, rng: None,
    "value": lambda E, N, rng: -1.9,
    "one": lambda E, N, rng: random_scale((1, 1), rng),
    "expert": lambda E, N, rng: random_scale((E,), rng),
    "expert_column": lambda E, N, rng: random_scale((E, 1), rng),
    "channel": lambda E, N, rng: random_scale((E, N), rng),
    "channel_column": lambda E, N, rng: random_scale((E, N, 1), rng),
}


def a_scale_at(kind, scale):
    if kind in ("none", "value", "one"):
        value = 1.0 if scale is None else np.float32(np.asarray(scale).item())
        return lambda m, e: value
    flat = scale.reshape(-1)
    return (lambda m, e: flat[e]) if kind == "expert" else (lambda m, e: flat[m])


def b_scale_at(kind, scale):
    if kind in ("none", "value", "one"):
        value = 1.0 if scale is None else np.float32(np.asarray(scale).item())
        return lambda e, n: value
    return (
        (lambda e, n: scale.reshape(-1)[e])
        if "expert" in kind
        else (lambda e, n: scale.reshape(scale.shape[:2])[e, n])
    )


@pytest.mark.parametrize("counts", [[2, 0, 1], [1, 1, 1]], ids=["empty_middle", "rows_equal_experts"])
@pytest.mark.parametrize(("a_kind", "b_kind"), list(itertools.product(A_SCALES, B_SCALES)))
def test_every_scale_combination_matches_exact_fractions(a_kind, b_kind, counts, rng):
    """Each operand's scale lands on its own axis, M = E included, in the reference and in the backend."""
    M, E, N, K = sum(counts), len(counts), 8, 16
    a, b = reference.random_fp8((M, K), rng), reference.random_fp8((E, N, K), rng)
    a_scale, b_scale = A_SCALES[a_kind](M, E, rng), B_SCALES[b_kind](E, N, rng)
    bias = random_scale((E, N), rng)
    offsets = offsets_of(counts)
    exact, absolute = slow_packed(
        a, b, a_scale_at(a_kind, a_scale), b_scale_at(b_kind, b_scale), offsets, bias
    )

    operands = {"a_scale": a_scale, "b_scale": b_scale, "offsets": offsets, "bias": bias}
    ref, abs_sum = reference.grouped_gemm_float64(a, b, **operands)
    np.testing.assert_allclose(ref, exact.astype(np.float64), rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(abs_sum, absolute.astype(np.float64), rtol=1e-13)

    out = reference.grouped_gemm_numpy(a, b, out_dtype="float32", **operands)
    _, ratio = reference.check(out, ref, abs_sum, K)
    assert ratio <= 1


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize(
    ("fp8_a", "fp8_b"), list(itertools.product(["float8_e4m3fn", "float8_e5m2"], repeat=2))
)
def test_every_fp8_mix_and_output_type(fp8_a, fp8_b, out_dtype, rng):
    """The decoded operands and the rounded result are right for every input mix and output type."""
    counts, N, K = [0, 3, 1, 0], 16, 32
    a, b = reference.random_fp8((4, K), rng, fp8_a), reference.random_fp8((4, N, K), rng, fp8_b)
    offsets = offsets_of(counts, np.int64)
    exact, _ = slow_packed(a, b, lambda m, e: 2.0**-12, lambda e, n: 1.0, offsets, None)
    operands = {"a_scale": 2.0**-12, "offsets": offsets}
    ref, abs_sum = reference.grouped_gemm_float64(a, b, **operands)
    if fp8_a == fp8_b == "float8_e4m3fn":  # these sums are exact in float64, so the rounding is, too
        expected = np.vectorize(lambda x: nearest_even(x, out_dtype), otypes=[np.float64])(exact)
        np.testing.assert_array_equal(reference.round_to(ref, out_dtype).astype(np.float64), expected)
    np.testing.assert_allclose(ref, exact.astype(np.float64), rtol=1e-12, atol=1e-9)
    out = reference.grouped_gemm_numpy(a, b, out_dtype=out_dtype, **operands)
    assert out.dtype.name == out_dtype
    assert reference.check(out, ref, abs_sum, K)[1] <= 1


def test_uint8_operands_need_dtype_and_give_the_same_bits(rng):
    a, b = reference.random_fp8((5, 16), rng, "float8_e5m2"), reference.random_fp8((2, 8, 16), rng)
    offsets = offsets_of([2, 3])
    expected = reference.grouped_gemm_numpy(a, b, offsets=offsets)
    bits = a.view(np.uint8), b.view(np.uint8)
    got = reference.grouped_gemm_numpy(*bits, offsets=offsets, dtype=("float8_e5m2", "float8_e4m3fn"))
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))
    with pytest.raises(TypeError, match=r"^a: uint8"):
        reference.grouped_gemm_numpy(*bits, offsets=offsets)


def test_list_call_equals_packed_call_group_by_group(rng):
    """Groups of their own shape, an empty one among them, with scales and bias of their own."""
    shapes = [(3, 8, 16), (0, 16, 32), (1, 24, 48)]
    a = [reference.random_fp8((m, k), rng) for m, n, k in shapes]
    b = [reference.random_fp8((n, k), rng) for m, n, k in shapes]
    a_scale = [random_scale((3,), rng), 0.5, random_scale((1, 1), rng)]
    b_scale = [random_scale((8, 1), rng), None, random_scale((24,), rng)]
    bias = [None, random_scale((16,), rng), random_scale((24,), rng).astype(ml_dtypes.bfloat16)]
    outs = reference.grouped_gemm_numpy(a, b, a_scale=a_scale, b_scale=b_scale, bias=bias)
    refs, abs_sums = reference.grouped_gemm_float64(a, b, a_scale=a_scale, b_scale=b_scale, bias=bias)
    assert [out.shape for out in outs] == [(3, 8), (0, 16), (1, 24)]
    assert reference.check_list(outs, refs, abs_sums, [16, 32, 48])[1] <= 1
    for i in (0, 2):
        m, n, _ = shapes[i]
        column = b_scale[i].reshape(1, n)
        alone, _ = reference.grouped_gemm_float64(
            a[i],
            b[i][None],
            a_scale=a_scale[i],
            b_scale=column,
            offsets=offsets_of([m]),
            bias=None if bias[i] is None else bias[i][None],
        )
        np.testing.assert_array_equal(alone, refs[i])


def test_list_call_takes_one_scale_for_all_groups(rng):
    a = [reference.random_fp8((2, 16), rng) for _ in range(3)]
    b = [reference.random_fp8((8, 16), rng) for _ in range(3)]
    each, _ = reference.grouped_gemm_float64(a, b, a_scale=[0.25] * 3)
    for one in (0.25, np.array([0.25], np.float32)):
        for got, expected in zip(reference.grouped_gemm_float64(a, b, a_scale=one)[0], each, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("experts", [1, 33, 1024])
def test_no_rows_and_many_experts(experts, rng):
    b = reference.random_fp8((experts, 8, 16), rng)
    empty = reference.grouped_gemm_numpy(
        reference.random_fp8((0, 16), rng), b, offsets=np.zeros(experts + 1, np.int32)
    )
    assert empty.shape == (0, 8)
    assert reference.check(empty, np.zeros((0, 8)), np.zeros((0, 8)), 16) == (0.0, 0.0)
    a = reference.random_fp8((7, 16), rng)
    offsets = offsets_of(np.bincount(rng.integers(0, experts, 7), minlength=experts))
    ref, abs_sum = reference.grouped_gemm_float64(
        a, b, offsets=offsets, a_scale=np.full(7, 2.0**-9, np.float32)
    )
    out = reference.grouped_gemm_numpy(a, b, offsets=offsets, a_scale=np.full(7, 2.0**-9, np.float32))
    assert reference.check(out, ref, abs_sum, 16)[1] <= 1


def test_rows_outside_the_offsets_are_left_alone(rng):
    a, b = reference.random_fp8((6, 16), rng), reference.random_fp8((2, 8, 16), rng)
    out = np.full((6, 8), 7, np.float16)
    offsets = np.array([1, 3, 5], np.int32)
    returned = reference.grouped_gemm_numpy(
        a, b, offsets=offsets, out=out, out_dtype="float16", a_scale=2.0**-9
    )
    assert returned is out
    assert (out[[0, 5]] == 7).all()
    fresh = reference.grouped_gemm_numpy(a, b, offsets=offsets, out_dtype="float16", a_scale=2.0**-9)
    assert not fresh[[0, 5]].any()
    np.testing.assert_array_equal(fresh[1:5], out[1:5])
    ref, abs_sum = reference.grouped_gemm_float64(a, b, offsets=offsets, a_scale=2.0**-9)
    assert np.isnan(ref[[0, 5]]).all()
    assert reference.check(out[1:5], ref[1:5], abs_sum[1:5], 16)[1] <= 1


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_rounding_is_single_and_ties_to_even(out_dtype, rng):
    """Ties, their float64 neighbours, subnormals and the edge of overflow, against integer arithmetic."""
    fraction_bits, least = FRACTION_BITS_AND_LEAST_EXPONENT[out_dtype]
    largest = LARGEST[out_dtype]
    ties = (rng.integers(1 << fraction_bits, 2 << fraction_bits, 200) + 0.5) * 2.0 ** (
        rng.integers(least, 15, 200) - fraction_bits
    )
    subnormal_ties = (rng.integers(0, 1 << fraction_bits, 50) + 0.5) * 2.0 ** (least - fraction_bits)
    half = largest * (1 + 2.0 ** -(fraction_bits + 1) / (2 - 2.0**-fraction_bits))  # midway to the overflow
    x = np.concatenate([ties, subnormal_ties, rng.standard_normal(200), [largest, half, half * 2, 0.0]])
    x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])
    x = np.concatenate([x, -x])
    expected = [nearest_even(Fraction(value), out_dtype) for value in x]
    np.testing.assert_array_equal(reference.round_to(x, out_dtype).astype(np.float64), expected)


def test_rounding_differs_from_the_way_through_float32():
    """The value this module exists for: just above a bfloat16 tie, where float32 lands on the tie."""
    x = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(reference.round_to(x, "bfloat16")[0]) == 1 + 2.0**-7
    assert float(x.astype(np.float32).astype(ml_dtypes.bfloat16)[0]) == 1.0


def test_rounding_keeps_nan_infinity_and_signed_zero():
    got = reference.round_to(np.array([np.nan, np.inf, -np.inf, -0.0, -1e-300]), "float16")
    assert np.isnan(got[0])
    np.testing.assert_array_equal(got[1:], np.array([np.inf, -np.inf, 0.0, 0.0], np.float16))
    assert np.signbit(got[3:]).all()


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_ulp_is_the_gap_to_the_next_value(out_dtype, rng):
    dtype = np.dtype(getattr(ml_dtypes, out_dtype, None) or out_dtype)
    x = np.abs(rng.standard_normal(100)).astype(dtype)
    above = np.nextafter(x, np.asarray(np.inf, dtype)).astype(np.float64)
    np.testing.assert_array_equal(
        reference.ulp(x.astype(np.float64), out_dtype), above - x.astype(np.float64)
    )
    fraction_bits, least = FRACTION_BITS_AND_LEAST_EXPONENT[out_dtype]
    assert reference.ulp(np.float64(0.0), out_dtype) == 2.0 ** (least - fraction_bits)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_the_check_catches_one_wrong_element(out_dtype, rng):
    """Two units in the last place beyond the drift bound fail; the right output passes; so does nothing with
    NaN."""
    a, b = reference.random_fp8((40, 64), rng), reference.random_fp8((2, 48, 64), rng)
    operands = {
        "a_scale": random_scale((40,), rng) / 1024,
        "b_scale": random_scale((2, 48), rng),
        "offsets": offsets_of([15, 25]),
    }
    ref, abs_sum = reference.grouped_gemm_float64(a, b, **operands)
    out = reference.grouped_gemm_numpy(a, b, out_dtype=out_dtype, **operands)
    rel, ratio = reference.check(out, ref, abs_sum, 64)
    assert 0 <= rel < 1
    assert ratio <= 1
    m, n = rng.integers(40), rng.integers(48)
    wrong = out.astype(np.float64)
    wrong[m, n] = ref[m, n] + 2.1 * reference.tolerance(ref, abs_sum, 64, out_dtype)[m, n]
    assert reference.check(reference.round_to(wrong, out_dtype), ref, abs_sum, 64)[1] > 1
    for bad in (np.nan, np.inf):
        wrong[m, n] = bad
        assert reference.check(reference.round_to(wrong, out_dtype), ref, abs_sum, 64)[1] > 1
    with_nan = ref.copy()
    with_nan[m, n] = np.nan
    assert reference.check(out, with_nan, abs_sum, 64) == (np.inf, np.inf)


def test_the_bound_holds_what_design_says():
    ref, abs_sum = np.array([[3.0]]), np.array([[100.0]])
    assert reference.tolerance(ref, abs_sum, 704, "bfloat16") == 2.0**-6 + 2.0**-20 * 22 * 100


def test_the_check_takes_an_infinity_only_where_the_reference_overflows():
    abs_sum = np.zeros((1, 1))
    infinite = np.full((1, 1), np.inf, np.float16)
    assert reference.check(infinite, np.full((1, 1), 1e6), abs_sum, 16)[1] == 0
    assert (
        reference.check(infinite, np.full((1, 1), 65519.0), abs_sum, 16)[1] <= 1
    )  # half a unit from overflow
    assert reference.check(infinite, np.full((1, 1), 60000.0), abs_sum, 16)[1] > 1
    assert reference.check(-infinite, np.full((1, 1), 1e6), abs_sum, 16)[1] > 1
    assert reference.check(np.full((1, 1), 65504, np.float16), np.full((1, 1), 1e6), abs_sum, 16)[1] > 1


BAD_PACKED = {
    "a dtype": ({"a": np.zeros((4, 16), np.float32)}, TypeError, "^a: "),
    "b dtype": ({"b": np.zeros((2, 8, 16), np.int8)}, TypeError, "^b: "),
    "a rank": ({"a": np.zeros((1, 4, 16), E4M3)}, ValueError, "^a: "),
    "b rank": ({"b": np.zeros((8, 16), E4M3)}, ValueError, "^b: "),
    "K differs": ({"b": np.zeros((2, 8, 32), E4M3)}, ValueError, "^b: .*32"),
    "K % 16": ({"a": np.zeros((4, 24), E4M3), "b": np.zeros((2, 8, 24), E4M3)}, ValueError, "16, got .*24"),
    "N % 8": ({"b": np.zeros((2, 12, 16), E4M3)}, ValueError, "^b: .*8, got .*12"),
    "too many experts": (
        {"b": np.zeros((1025, 8, 16), E4M3), "offsets": np.zeros(1026, np.int32)},
        ValueError,
        "1024",
    ),
    "a_scale shape": ({"a_scale": np.ones((2, 1), np.float32)}, ValueError, "^a_scale: "),
    "a_scale per expert in one axis": ({"a_scale": np.ones(2, np.float32)}, ValueError, "^a_scale: "),
    "a_scale dtype": ({"a_scale": np.ones(4)}, TypeError, "^a_scale: .*float64"),
    "b_scale shape": ({"b_scale": np.ones((8,), np.float32)}, ValueError, "^b_scale: "),
    "b_scale dtype": ({"b_scale": "1.0"}, TypeError, "^b_scale: .*str"),
    "offsets length": ({"offsets": np.array([0, 4], np.int32)}, ValueError, "^offsets: "),
    "offsets dtype": ({"offsets": np.array([0, 2, 4], np.int16)}, TypeError, "^offsets: .*int16"),
    "offsets decrease": ({"offsets": np.array([0, 3, 2], np.int32)}, ValueError, "^offsets: "),
    "offsets past M": ({"offsets": np.array([0, 3, 5], np.int32)}, ValueError, "^offsets: "),
    "offsets negative": ({"offsets": np.array([-1, 3, 4], np.int32)}, ValueError, "^offsets: "),
    "bias shape": ({"bias": np.ones(8, np.float32)}, ValueError, "^bias: "),
    "bias dtype": ({"bias": np.ones((2, 8), np.int32)}, TypeError, "^bias: "),
    "out dtype": ({"out": np.zeros((4, 8), np.float32)}, (TypeError, ValueError), "^out: .*float32"),
    "out shape": ({"out": np.zeros((4, 16), ml_dtypes.bfloat16)}, ValueError, "^out: "),
    "out_dtype": ({"out_dtype": "float64"}, ValueError, "^out_dtype: .*float64"),
    "dtype": ({"dtype": "float8_e4m3"}, ValueError, "^dtype: "),
    "dtype contradicts": ({"dtype": "float8_e5m2"}, (TypeError, ValueError), "e5m2"),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_bad_packed_arguments_name_the_argument(case):
    changes, error, message = BAD_PACKED[case]
    arguments = {
        "a": np.zeros((4, 16), E4M3),
        "b": np.zeros((2, 8, 16), E4M3),
        "offsets": np.array([0, 2, 4], np.int32),
    }
    reference.grouped_gemm_numpy(**arguments)
    with pytest.raises(error, match=message):
        reference.grouped_gemm_numpy(**(arguments | changes))


def test_out_that_overlaps_an_operand_is_refused_and_untouched():
    memory = np.zeros(4 * 16 * 2, np.uint8)
    a = memory[:64].view(E4M3).reshape(4, 16)
    out = memory[32:96].view(ml_dtypes.bfloat16).reshape(4, 8)
    with pytest.raises(ValueError, match=r"^out: .*overlaps a"):
        reference.grouped_gemm_numpy(
            a,
            np.ones((1, 8, 16), E4M3),
            offsets=np.array([0, 4], np.int32),
            out=out,
            bias=np.ones((1, 8), np.float32),
        )
    assert not memory.any()


def test_bad_list_arguments_name_the_entry():
    a, b = [np.zeros((2, 16), E4M3)] * 2, [np.zeros((8, 16), E4M3)] * 2
    with pytest.raises(ValueError, match=r"^b: expected 2"):
        reference.grouped_gemm_numpy(a, b[:1])
    with pytest.raises(ValueError, match=r"^a_scale\[1\]: "):
        reference.grouped_gemm_numpy(a, b, a_scale=[1.0, np.ones(3, np.float32)])
    with pytest.raises(ValueError, match=r"^b_scale: expected 2"):
        reference.grouped_gemm_numpy(a, b, b_scale=[1.0])
    with pytest.raises(ValueError, match=r"^b\[1\]: "):
        reference.grouped_gemm_numpy(a, [b[0], np.zeros((8, 32), E4M3)])
    with pytest.raises(TypeError, match=r"^a: expected a sequence"):
        reference.grouped_gemm_numpy(a[0], b)


def test_quantisers_follow_fp8_dynamic(rng):
    """scale = max / 448 of each row or channel, true division, nearest even; the largest value maps to
    448."""
    x = reference.random_bfloat16((5, 32), rng, 3.0)
    q, scale = reference.quantize_per_token(x)
    assert q.dtype == E4M3
    assert q.shape == (5, 32)
    assert scale.dtype == np.float32
    assert scale.shape == (5, 1)
    values = x.astype(np.float32)
    np.testing.assert_array_equal(scale[:, 0], np.abs(values).max(1) / np.float32(448))
    assert (np.abs(q.astype(np.float32)).max(1) == 448).all()
    every = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    every = np.unique(every[np.isfinite(every)])
    for value, quantised, s in zip(
        values.ravel(), q.astype(np.float64).ravel(), np.repeat(scale, 32), strict=True
    ):
        assert (
            abs(quantised - np.float32(value / s)) == np.abs(every - np.float64(np.float32(value / s))).min()
        )
    w = reference.random_bfloat16((2, 8, 16), rng)
    q_w, scale_w = reference.quantize_per_channel(w)
    assert q_w.shape == (2, 8, 16)
    assert scale_w.shape == (2, 8, 1)
    np.testing.assert_array_equal(scale_w[..., 0], np.abs(w.astype(np.float32)).max(-1) / np.float32(448))


def test_quantisers_divide_and_do_not_multiply_by_a_reciprocal(rng):
    """Values that lie on ties of e4m3 after the division; a reciprocal moves many."""
    largest = rng.uniform(0.1, 10, size=(50, 1)).astype(np.float32)
    ties = np.arange(17, 31, 2, dtype=np.float32)  # e4m3 has every second integer here
    x = np.concatenate([largest, ties * (largest / np.float32(448))], axis=1)
    q, scale = reference.quantize_per_token(x)
    divided = x / scale
    on_tie = divided[:, 1:] == ties
    assert on_tie.mean() > 0.5
    even = np.round(ties / 4) * 4  # of two neighbours 2 apart, ties go to the multiple of 4
    np.testing.assert_array_equal(
        q[:, 1:].astype(np.float32)[on_tie], np.broadcast_to(even, on_tie.shape)[on_tie]
    )


def test_quantisers_saturate_and_survive_zero_rows():
    q, scale = reference.quantize_per_token(np.zeros((1, 16), np.float32))
    assert scale[0, 0] == np.finfo(np.float32).eps
    assert not q.astype(np.float32).any()
    with pytest.raises(TypeError, match=r"^x: .*float64"):
        reference.quantize_per_token(np.zeros((1, 16)))
    with pytest.raises(ValueError, match=r"^w: "):
        reference.quantize_per_channel(np.zeros((8, 16), np.float32))


def test_routing_sends_each_token_to_its_k_best_experts(rng):
    logits = rng.standard_normal((9, 16)).astype(np.float32)
    tokens, weights, offsets = reference.route_top_k(logits, 3)
    assert offsets.dtype == np.int32
    assert offsets.shape == (17,)
    assert offsets[0] == 0
    assert offsets[-1] == 27
    chosen = [set() for _ in range(9)]
    for e in range(16):
        rows = tokens[offsets[e] : offsets[e + 1]]
        assert (np.diff(rows) > 0).all()
        for token, weight in zip(rows, weights[offsets[e] : offsets[e + 1]], strict=True):
            chosen[token].add(e)
            best = np.sort(np.exp(logits[token].astype(np.float64)))[-3:]
            np.testing.assert_allclose(weight, np.exp(np.float64(logits[token, e])) / best.sum(), rtol=1e-5)
    assert chosen == [set(np.argsort(row)[-3:].tolist()) for row in logits]
    tokens, offsets = reference.random_routing(6, 8, 2, rng)
    assert len(tokens) == 12
    assert offsets[-1] == 12
    tokens, offsets = reference.random_routing(0, 8, 2, rng)
    assert len(tokens) == 0
    assert offsets[-1] == 0
    with pytest.raises(ValueError, match=r"^k: "):
        reference.route_top_k(logits, 17)

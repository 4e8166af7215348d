"""row_index, masked rows and row_weight in the reference, against the plain packed call that each means."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

import sm12x
from sm12x import reference

E, N, K, MAX_M = 5, 24, 48, 6


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def weights(rng, *shape):
    return rng.uniform(-2, 2, shape).astype(np.float32)


def packed(rng, counts=(3, 0, 4, 1, 2)):
    m = sum(counts)
    return {
        "a": reference.random_fp8((m, K), rng),
        "b": reference.random_fp8((E, N, K), rng),
        "a_scale": weights(rng, m),
        "b_scale": weights(rng, E, N),
        "bias": weights(rng, E, N),
        "offsets": np.cumsum([0, *counts]).astype(np.int32),
    }


def same(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("wide", [np.int32, np.int64])
@pytest.mark.parametrize("per", ["token", "expert", "value"])
def test_gathered_rows_are_those_of_a_permuted_copy(rng, wide, per):
    plain = packed(rng)
    tokens = reference.random_fp8((7, K), rng)
    index = rng.integers(0, 7, 10).astype(wide)
    scales = {"token": weights(rng, 7, 1), "expert": weights(rng, E, 1, 1), "value": 0.25}[per]
    gathered = {**plain, "a": tokens, "a_scale": scales, "row_index": index}
    plain.update(a=tokens[index], a_scale=scales[index] if per == "token" else scales)
    for out_dtype in ("bfloat16", "float16", "float32"):
        expected = sm12x.grouped_gemm(**plain, out_dtype=out_dtype)
        same(sm12x.grouped_gemm(**gathered, out_dtype=out_dtype), expected)
    for ours, theirs in zip(
        reference.grouped_gemm_float64(**gathered), reference.grouped_gemm_float64(**plain), strict=True
    ):
        same(ours, theirs)


def test_an_index_outside_of_a_reads_zeros(rng):
    arguments = packed(rng)
    arguments["row_index"] = np.array([0, -1, 10, 2**31 - 1, 1, -(2**31), 3, 9, 5, 7], np.int32)
    out = sm12x.grouped_gemm(**arguments, out_dtype="float32")
    ref, abs_sum = reference.grouped_gemm_float64(**arguments)
    for row, expert in ((1, 0), (2, 0), (3, 2), (5, 2)):
        np.testing.assert_array_equal(out[row], arguments["bias"][expert])
        np.testing.assert_array_equal(ref[row], arguments["bias"][expert].astype(np.float64))
        assert not abs_sum[row].any()
    assert reference.check(out, ref, abs_sum, K)[1] <= 1
    none = {**arguments, "a": arguments["a"][:0], "a_scale": 1.0}
    np.testing.assert_array_equal(sm12x.grouped_gemm(**none, out_dtype="float32")[0], arguments["bias"][0])


@pytest.mark.parametrize("shape", [(10,), (10, 1)])
def test_row_weights_multiply_after_the_bias(rng, shape):
    arguments = packed(rng)
    weight = weights(rng, *shape)
    ref, abs_sum = reference.grouped_gemm_float64(**arguments)
    weighted, magnitude = reference.grouped_gemm_float64(**arguments, row_weight=weight)
    column = weight.reshape(-1, 1).astype(np.float64)
    same(weighted, ref * column)
    same(magnitude, abs_sum * np.abs(column))
    out = sm12x.grouped_gemm(**arguments, row_weight=weight, out_dtype="float32")
    plain = sm12x.grouped_gemm(**arguments, out_dtype="float32")
    same(out, plain * weight.reshape(-1, 1))
    assert reference.check(out, weighted, magnitude, K)[1] <= 1
    nothing = sm12x.grouped_gemm(**arguments, row_weight=np.zeros(10, np.float32), out_dtype="float32")
    assert not nothing.any()


@pytest.mark.parametrize("wide", [np.int32, np.int64])
@pytest.mark.parametrize("per", ["token", "expert", "value"])
def test_a_masked_call_is_a_packed_one_of_the_rows_that_count(rng, wide, per):
    counts = rng.integers(0, MAX_M + 1, E)
    a = reference.random_fp8((E, MAX_M, K), rng)
    scales = {"token": weights(rng, E, MAX_M), "expert": weights(rng, E, 1, 1), "value": 0.25}[per]
    row_weight = weights(rng, E, MAX_M, 1)
    shared = {name: value for name, value in packed(rng).items() if name in ("b", "b_scale", "bias")}
    rows = [(e, m) for e, count in enumerate(counts) for m in range(count)]
    pick = tuple(np.array(rows, int).reshape(-1, 2).T)
    plain = {
        **shared,
        "a": a[pick],
        "a_scale": scales[pick].reshape(-1) if per == "token" else scales,
        "offsets": np.cumsum([0, *counts]).astype(np.int32),
        "row_weight": row_weight[pick],
    }
    arguments = {**shared, "a": a, "a_scale": scales, "row_weight": row_weight, "rows": counts.astype(wide)}
    out = np.full((E, MAX_M, N), 7, np.float32)
    assert sm12x.grouped_gemm(**arguments, out=out, out_dtype="float32", expected_m=2) is out
    expected = sm12x.grouped_gemm(**plain, out_dtype="float32")
    same(out[pick], expected)
    beyond = np.ones((E, MAX_M), bool)
    beyond[pick] = False
    assert (out[beyond] == 7).all()
    ref, abs_sum = reference.grouped_gemm_float64(**arguments)
    assert np.isnan(ref[beyond]).all()
    assert np.isnan(abs_sum[beyond]).all()
    for ours, theirs in zip((ref, abs_sum), reference.grouped_gemm_float64(**plain), strict=True):
        same(ours[pick], theirs)
    new = sm12x.grouped_gemm(**arguments)
    assert (new.shape, new.dtype) == ((E, MAX_M, N), ml_dtypes.bfloat16)
    assert not np.float32(new[beyond]).any()


def masked(rng):
    plain = packed(rng)
    a = reference.random_fp8((E, MAX_M, K), rng)
    return {"a": a, "b": plain["b"], "rows": np.array([1, 0, 6, 2, 3], np.int32)}


def f32(*shape):
    return np.zeros(shape, np.float32)


PACKED = [
    ({"row_index": np.zeros((10, 1), np.int32)}, ValueError, r"row_index: expected shape \(M,\)"),
    ({"row_index": np.zeros(10, np.uint32)}, TypeError, "row_index: expected int32 or int64, got uint32"),
    ({"row_index": np.zeros(20, np.int32)[::2]}, ValueError, "row_index: expected contiguous"),
    ({"row_index": [0] * 10}, TypeError, "row_index: expected a NumPy array"),
    ({"row_index": np.zeros(3, np.int32)}, ValueError, "offsets: expected values from 0 to M = 3"),
    ({"row_weight": f32(9)}, ValueError, r"row_weight: expected shape \(10,\) or \(10, 1\), got \(9,\)"),
    ({"row_weight": f32(10).astype(np.float16)}, TypeError, "row_weight: expected float32, got float16"),
    ({"row_weight": 1.0}, TypeError, "row_weight: expected a NumPy array"),
    ({"expected_m": 3}, ValueError, "expected_m: expected None where rows is not given"),
    ({"rows": np.zeros(E, np.int32)}, ValueError, "offsets: expected None where rows is given"),
]
MASKED = [
    (
        {"rows": np.array([1, 0, 7, 2, 3])},
        ValueError,
        "rows: expected values from 0 to max_m = 6, got 0 to 7",
    ),
    ({"rows": np.array([1, -1, 6, 2, 3])}, ValueError, "rows: expected values from 0 to max_m = 6, got -1"),
    ({"rows": np.zeros(E - 1, np.int32)}, ValueError, r"rows: expected shape \(5,\), one for each expert"),
    ({"rows": f32(E)}, TypeError, "rows: expected int32 or int64, got float32"),
    ({"expected_m": 0}, ValueError, "expected_m: expected at least 1, got 0"),
    ({"row_index": np.zeros(3, np.int32)}, ValueError, "row_index: expected None where rows is given"),
    ({"a_scale": f32(E * MAX_M)}, ValueError, r"a_scale: expected one value, per token \(5, 6\)"),
    ({"row_weight": f32(E, MAX_M + 1)}, ValueError, r"row_weight: expected shape \(5, 6\)"),
    (
        {"a": np.zeros((E + 1, MAX_M, K), ml_dtypes.float8_e4m3fn)},
        ValueError,
        "a: expected 5 experts, as many as b, got 6",
    ),
    ({"a": np.zeros((MAX_M, K), ml_dtypes.float8_e4m3fn)}, ValueError, r"a: expected shape \(E, max_m, K\)"),
    ({"out": f32(E, MAX_M, N + 4)}, ValueError, r"out: expected shape \(5, 6, 24\)"),
    (
        {"out": np.lib.stride_tricks.as_strided(f32(E * MAX_M, N), (E, MAX_M, N), (0, 4 * N, 4))},
        ValueError,
        "out: expected experts that lie apart",
    ),
]


@pytest.mark.parametrize(
    ("make", "changes", "error", "words"),
    [(packed, *case) for case in PACKED] + [(masked, *case) for case in MASKED],
)
def test_bad_arguments_name_the_argument(rng, make, changes, error, words):
    arguments = {**make(rng), **changes}
    with pytest.raises(error, match=f"^{words}"):
        sm12x.grouped_gemm(**arguments, out_dtype="float32")
    if "out" not in changes:
        with pytest.raises(error, match=f"^{words}"):
            reference.grouped_gemm_float64(**arguments)


def test_lists_take_no_rows(rng):
    lists = {"a": [reference.random_fp8((3, K), rng)], "b": [reference.random_fp8((N, K), rng)]}
    for call, (name, value) in itertools.product(
        (sm12x.grouped_gemm, reference.grouped_gemm_float64),
        (("row_index", np.zeros(3, np.int32)), ("row_weight", f32(3)), ("expected_m", 3)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected None where"):
            call(**lists, **{name: value})

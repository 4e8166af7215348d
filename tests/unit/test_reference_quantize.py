"""`quantize_fp8` on NumPy arrays: codes and scales against exact arithmetic, and the edges of the rule."""

from __future__ import annotations

import bisect
import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sm12x
from sm12x import reference
from unit.moe_oracle import code, decode, nearest

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)]
ALL = np.array([decode(byte) for byte in range(256)])
FINITE = np.unique(ALL[np.isfinite(ALL)]).tolist()


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def values(q):
    """Codes as numbers, decoded by hand."""
    return ALL[q.view(np.uint8)]


def nearest_code(x):
    """The e4m3 value nearest to a Fraction, of two that are as near the one with an even code."""
    x = max(min(x, Fraction(448)), Fraction(-448))
    at = bisect.bisect(FINITE, x)
    near = sorted(FINITE[max(at - 1, 0) : at + 1], key=lambda v: abs(Fraction(v) - x))
    if len(near) == 2 and abs(Fraction(near[0]) - x) == abs(Fraction(near[1]) - x):
        return next(v for v in near if np.flatnonzero(abs(v) == ALL)[0] % 2 == 0)
    return near[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [True, False])
def test_codes_and_scales_are_those_of_the_definition(dtype, per_token, rng):
    """Every value of random rows, by loops in Python."""
    x = (rng.standard_normal((6, 32)) * 10.0 ** rng.uniform(-6, 3, (6, 1))).astype(dtype)
    q, scale = sm12x.quantize_fp8(x, per_token=per_token)
    assert q.dtype == E4M3
    assert scale.dtype == np.float32
    assert scale.shape == ((6, 1) if per_token else (1,))
    largest = np.abs(x.astype(np.float64)).max(axis=1 if per_token else None, keepdims=True)
    for t, i in np.ndindex(x.shape):
        expected = nearest(max(float(largest[t if per_token else 0, 0]), 1 / 512) / 448, "float32")
        assert scale[t if per_token else 0] == expected
        assert values(q)[t, i] == code(nearest(float(x[t, i]) / expected, "float32"))


def test_rounding_to_e4m3_is_exact_and_ties_to_even(rng):
    """All midpoints, their neighbours, subnormals and saturation, from float32 and from float64."""
    middles = (np.array(FINITE[1:]) + FINITE[:-1]) / 2
    x = np.concatenate([FINITE, middles, rng.standard_normal(100) * 100, [449, 464, 1e30, -1e30]])
    x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf)])
    expected = [nearest_code(Fraction(v)) for v in x]
    np.testing.assert_array_equal(values(reference.to_e4m3(x)), expected)
    single = x.astype(np.float32)
    single = np.concatenate([single, np.nextafter(single, np.float32(np.inf))])
    expected = [nearest_code(Fraction(float(v))) for v in single]
    np.testing.assert_array_equal(values(reference.to_e4m3(single)), expected)


def test_float64_is_not_rounded_through_float32():
    """A value just above a tie, which float32 would put on the tie, and e4m3 then below."""
    above = np.array([1 + 1 / 16 + 2.0**-40])
    assert values(reference.to_e4m3(above))[0] == 1.125
    assert values(reference.to_e4m3(above.astype(np.float32)))[0] == 1.0


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_infinity_saturates_and_nan_is_one_code(kind):
    got = reference.to_e4m3(np.array([np.inf, -np.inf, np.nan, -np.nan, -0.0, 0.0], kind))
    assert got.view(np.uint8).tolist() == [0x7E, 0xFE, 0x7F, 0x7F, 0x80, 0x00]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_floor_is_that_of_vllm(dtype):
    """Rows of zeros and of values below 1/512: the scale is 1 / (448 * 512), not one of their own."""
    x = np.zeros((4, 16), dtype)
    x[1, 0], x[2, 0], x[3, 0] = 1 / 1024, -1 / 512, 1 / 256
    q, scale = sm12x.quantize_fp8(x)
    floor = np.float32(1) / np.float32(448 * 512)
    assert scale[:3, 0].tolist() == [floor] * 3
    assert scale[3, 0] > floor
    assert values(q)[:, 0].tolist() == [0, 224, -448, 448]
    assert sm12x.quantize_fp8(x[:3], per_token=False)[1].tolist() == [floor]


def test_a_nan_leaves_its_row_alone_and_an_infinity_does_not():
    x = np.ones((4, 16), np.float32)
    x[0, 3], x[1, 3], x[2] = np.nan, -np.inf, np.nan
    q, scale = sm12x.quantize_fp8(x)
    unit = np.float32(1) / np.float32(448)
    floor = np.float32(1) / np.float32(448 * 512)
    assert scale[:, 0].tolist() == [unit, np.inf, floor, unit]
    assert np.isnan(values(q)[0, 3])
    assert (np.delete(values(q)[0], 3) == 448).all()
    assert np.isnan(values(q)[1, 3])
    assert (np.delete(values(q)[1], 3) == 0).all()
    assert np.isnan(values(q)[2]).all()
    static = values(sm12x.quantize_fp8(x, scale=1.0)[0])
    assert static[1, 3] == -448
    assert np.isnan(static[0, 3])
    assert sm12x.quantize_fp8(x[[0, 3]], per_token=False)[1] == unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["float", "int", "array", "array_2d", "numpy"])
def test_a_static_scale_divides_all_rows(dtype, scale, rng):
    x = (rng.standard_normal((5, 32)) * 3).astype(dtype)
    value = 2 if scale == "int" else float(np.float32(rng.uniform(1e-3, 1e-1)))
    given = {
        "float": value,
        "int": value,
        "array": np.array([value], np.float32),
        "array_2d": np.array([[value]], np.float32),
        "numpy": np.float32(value),
    }[scale]
    q, returned = sm12x.quantize_fp8(x, scale=given)
    assert (returned.dtype, returned.shape, returned[0]) == (np.float32, (1,), value)
    expected = [[code(nearest(float(v) / value, "float32")) for v in row] for row in x]
    np.testing.assert_array_equal(values(q), expected)


def test_outputs_are_written_where_they_are_given(rng):
    """Strided rows of x and out, codes as uint8, either shape of the scale; nothing beside them."""
    wide = rng.standard_normal((5, 48), dtype=np.float32)
    x = wide[:, 16:]
    q, scale = sm12x.quantize_fp8(np.ascontiguousarray(x))
    for dtype, shape in itertools.product([np.uint8, E4M3], [(5,), (5, 1)]):
        target = np.full((5, 64), 3, np.uint8)
        out, out_scale = target.view(dtype)[:, :32], np.zeros(shape, np.float32)
        got = sm12x.quantize_fp8(x, out=out, out_scale=out_scale)
        assert got[0] is out
        assert got[1] is out_scale
        np.testing.assert_array_equal(target[:, :32], q.view(np.uint8))
        assert (target[:, 32:] == 3).all()
        np.testing.assert_array_equal(out_scale.reshape(5, 1), scale)
    one = np.zeros(1, np.float32)
    assert sm12x.quantize_fp8(x, per_token=False, out_scale=one)[1] is one
    assert one == sm12x.quantize_fp8(x, per_token=False)[1]


@pytest.mark.parametrize("per_token", [True, False])
def test_no_rows(per_token):
    q, scale = sm12x.quantize_fp8(np.zeros((0, 32), np.float16), per_token=per_token)
    assert q.shape == (0, 32)
    assert scale.shape == ((0, 1) if per_token else (1,))


@given(st.integers(0, 2**32 - 1), st.floats(-12, 3))
@settings(max_examples=100, deadline=None)
def test_it_differs_from_compressed_tensors_only_in_the_floor(seed, power):
    """Above 1/512 both rules give the same bits, below the scale of vLLM's is larger."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 16)) * 10.0**power).astype(np.float32)
    ours, theirs = sm12x.quantize_fp8(x), reference.quantize_per_token(x)
    large = np.abs(x).max(axis=1) >= 1 / 512
    np.testing.assert_array_equal(ours[1][large], theirs[1][large])
    np.testing.assert_array_equal(ours[0][large].view(np.uint8), theirs[0][large].view(np.uint8))
    assert (ours[1][~large] > theirs[1][~large]).all()


X = np.ones((4, 32), np.float32)
OUT = np.zeros((4, 32), np.uint8)
BAD = {
    "x dtype": (
        {"x": X.astype(np.float64)},
        TypeError,
        "x: expected bfloat16, float16, float32, got float64",
    ),
    "x codes": ({"x": OUT}, TypeError, "x: expected bfloat16, float16, float32, got uint8"),
    "x rank": ({"x": X[0]}, ValueError, r"x: expected shape \(T, K\), got \(32,\)"),
    "K": ({"x": X[:, :24]}, ValueError, "x: expected K to be a positive multiple of 16, got 24"),
    "K = 0": ({"x": X[:, :0]}, ValueError, "x: expected K to be a positive multiple of 16, got 0"),
    "x transposed": ({"x": np.ones((32, 16), np.float32).T}, ValueError, "x: expected its last axis"),
    "x row stride": (
        {"x": np.ones((4, 33), np.float32)[:, :32]},
        ValueError,
        "x: expected a row stride of at least 32 elements and a multiple of 4",
    ),
    "x no array": ({"x": [[1.0] * 16]}, TypeError, "x: expected an array"),
    "per_token": ({"per_token": 1}, TypeError, "per_token: expected a bool, got int"),
    "scale zero": ({"scale": 0.0}, ValueError, "scale: expected a positive finite value of float32, got 0.0"),
    "scale negative": ({"scale": -1.0}, ValueError, "scale: expected a positive finite value"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale: expected a positive finite value"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "scale: expected a positive finite value"),
    "scale too small": ({"scale": 1e-60}, ValueError, "scale: expected a positive finite value"),
    "scale too large": ({"scale": 1e39}, ValueError, "scale: expected a value that float32 holds"),
    "scale bool": ({"scale": True}, TypeError, "scale: expected a float or a float32 array, got a bool"),
    "scale str": ({"scale": "1"}, TypeError, "scale: expected a NumPy array"),
    "scale dtype": ({"scale": np.ones(1)}, TypeError, "scale: expected float32, got float64"),
    "scale shape": (
        {"scale": np.ones((4, 1), np.float32)},
        ValueError,
        r"scale: expected one value, got .*\(4, 1\)",
    ),
    "out dtype": ({"out": OUT.astype(np.int8)}, TypeError, "out: expected float8_e4m3fn or uint8, got int8"),
    "out shape": ({"out": OUT[:2]}, ValueError, r"out: expected shape \(4, 32\), got \(2, 32\)"),
    "out stride": ({"out": np.zeros((4, 40), np.uint8)[:, :32]}, ValueError, "out: expected a row stride"),
    "out rows": ({"out": np.zeros((32, 4), np.uint8).T}, ValueError, "out: expected its last axis"),
    "out_scale dtype": (
        {"out_scale": np.ones((4, 1))},
        TypeError,
        "out_scale: expected float32, got float64",
    ),
    "out_scale shape": (
        {"out_scale": np.ones((1, 4), np.float32)},
        ValueError,
        r"out_scale: expected shape \(4, 1\) or \(4,\), got \(1, 4\)",
    ),
    "out_scale per tensor": (
        {"per_token": False, "out_scale": np.ones((4, 1), np.float32)},
        ValueError,
        r"out_scale: expected shape \(1,\), got \(4, 1\)",
    ),
    "out_scale strides": (
        {"out_scale": np.ones(8, np.float32)[::2]},
        ValueError,
        "out_scale: expected contiguous values",
    ),
    "out_scale static": (
        {"scale": 1.0, "out_scale": np.ones(1, np.float32)},
        ValueError,
        "out_scale: expected None where scale is given, got an array",
    ),
    "stream": ({"stream": 7}, ValueError, "stream: expected None with NumPy arrays"),
    "backend": ({"backend": "cpu"}, ValueError, "backend: expected one of auto, emulator, got 'cpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument_and_writes_nothing(name):
    edit, error, words = BAD[name]
    arguments = {"x": X, "out": OUT.copy(), "out_scale": np.full((4, 1), 5, np.float32), **edit}
    if "scale" in edit and "out_scale" not in edit:
        arguments["out_scale"] = None
    before = {name: arguments[name].copy() for name in ("out", "out_scale") if arguments[name] is not None}
    with pytest.raises(error, match=f"^{words}"):
        sm12x.quantize_fp8(**arguments)
    for name, kept in before.items():
        np.testing.assert_array_equal(arguments[name], kept)


def test_outputs_share_no_memory_with_anything():
    x = np.ones((4, 32), np.float32)
    with pytest.raises(ValueError, match="^out: expected memory of its own, got an array that overlaps x"):
        sm12x.quantize_fp8(x, out=x.view(np.uint8)[:, :32])
    scale = x.reshape(-1)[:4]
    with pytest.raises(ValueError, match="^out_scale: expected memory of its own, .* overlaps x"):
        sm12x.quantize_fp8(x, out_scale=scale)
    out = np.zeros((4, 32), np.uint8)
    with pytest.raises(ValueError, match="^out_scale: expected memory of its own, .* overlaps out"):
        sm12x.quantize_fp8(x, out=out, out_scale=out.reshape(-1)[:16].view(np.float32))
    with pytest.raises(ValueError, match="^out: expected memory of its own, .* overlaps scale"):
        sm12x.quantize_fp8(np.ones((4, 32), np.float16), scale=out.reshape(-1)[:4].view(np.float32), out=out)
    assert (x == 1).all()
    assert not out.any()


@pytest.mark.parametrize("name", ["out", "out_scale"])
def test_outputs_that_cannot_be_written(name):
    arguments = {"out": OUT.copy(), "out_scale": np.zeros((4, 1), np.float32)}
    arguments[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"^{name}: expected an array that can be written"):
        sm12x.quantize_fp8(X, **arguments)

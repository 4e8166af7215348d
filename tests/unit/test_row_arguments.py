"""Bad input of row_index, rows, expected_m, row_weight and masked arrays: named, and nothing is launched."""

from __future__ import annotations

import random

import numpy as np
import pytest

import sm12x
from sm12x.arrays import make_array
from sm12x.ops import row_layout
from sm12x.ops.memory import overlaps
from sm12x.ops.validate import Matrix
from unit.fake_driver import install
from unit.gemm_cases import STREAM, E, K, M, N, nothing_happened, operands

MAX_M, T = 24, 7
E4M3 = "float8_e4m3fn"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path, packed=True)
    fake.streams[0] = STREAM
    return fake


def packed(fake):
    t = fake.tensor
    return operands(
        fake, a=t((T, K), E4M3), row_index=t((M,), "int32"), row_weight=t((M,), "float32"), a_scale=0.5
    )


def masked(fake):
    t = fake.tensor
    return {
        "a": t((E, MAX_M, K), E4M3),
        "b": t((E, N, K), E4M3),
        "rows": t((E,), "int32"),
        "out": t((E, MAX_M, N), "bfloat16"),
        "row_weight": t((E, MAX_M), "float32"),
        "expected_m": 3,
    }


def bad(name, *args, **options):
    """An edit that replaces one argument by a fake tensor."""
    return lambda fake: {name: fake.tensor(*args, **options)}


def moved(name, *args, by):
    """The same, at an address that is so many bytes off."""
    return bad(name, *args, offset=by)


def gone(name, *args):
    """The same, with its memory gone."""

    def edit(fake):
        tensor = fake.tensor(*args)
        tensor.address = 0
        return {name: tensor}

    return edit


def given(**values):
    return lambda fake: values


PACKED = [
    (bad("row_index", (M,), "float32"), TypeError, "row_index: expected int32 or int64, got float32"),
    (bad("row_index", (M,), "uint8"), TypeError, "row_index: expected int32 or int64, got uint8"),
    (bad("row_index", (M, 1), "int32"), ValueError, r"row_index: expected shape \(M,\), got \(48, 1\)"),
    (bad("row_index", (), "int32"), ValueError, r"row_index: expected shape \(M,\), got \(\)"),
    (bad("row_index", (M,), "int32", strides=(2,)), ValueError, "row_index: expected contiguous.*stride 2"),
    (bad("row_index", (M,), "int32", -1), ValueError, "row_index: expected memory of CUDA device 0.*host"),
    (bad("row_index", (M,), "int32", 1), ValueError, "row_index: .*got device 1"),
    (bad("row_index", (M - 1,), "int32"), ValueError, r"row_weight: expected shape \(47,\)"),
    (moved("row_index", (M,), "int32", by=2), ValueError, "row_index: expected an address.*multiple of 4"),
    (moved("row_index", (M,), "int64", by=4), ValueError, "row_index: expected an address.*multiple of 8"),
    (gone("row_index", (M,), "int32"), ValueError, "row_index: expected an array that has memory"),
    (given(row_index=[1, 2]), TypeError, "row_index: expected an array"),
    (given(row_index=None), ValueError, r"out: expected shape \(7, 64\)|row_weight: expected shape \(7,\)"),
    (bad("out", (T, N), "bfloat16"), ValueError, r"out: expected shape \(48, 64\), got \(7, 64\)"),
    (bad("a_scale", (M,), "float32"), ValueError, r"a_scale: expected one value, per token \(7,\)"),
    (bad("row_weight", (M,), "float16"), TypeError, "row_weight: expected float32, got float16"),
    (bad("row_weight", (M + 1,), "float32"), ValueError, r"row_weight: expected shape \(48,\) or \(48, 1\)"),
    (bad("row_weight", (1, M), "float32"), ValueError, r"row_weight: expected shape .*got \(1, 48\)"),
    (bad("row_weight", (1,), "float32"), ValueError, r"row_weight: expected shape .*got \(1,\)"),
    (bad("row_weight", (M,), "float32", strides=(0,)), ValueError, "row_weight: expected contiguous"),
    (bad("row_weight", (M, 1), "float32", strides=(4, 1)), ValueError, "row_weight: expected contiguous"),
    (bad("row_weight", (M,), "float32", -1), ValueError, "row_weight: .*host memory"),
    (moved("row_weight", (M,), "float32", by=2), ValueError, "row_weight: expected an address"),
    (gone("row_weight", (M,), "float32"), ValueError, "row_weight: expected an array that has memory"),
    (given(row_weight=2.0), TypeError, "row_weight: expected an array"),
    (given(expected_m=4), ValueError, "expected_m: expected None where rows is not given, got 4"),
    (bad("rows", (E,), "int32"), ValueError, "offsets: expected None where rows is given"),
]
MASKED = [
    (bad("rows", (E,), "float32"), TypeError, "rows: expected int32 or int64, got float32"),
    (bad("rows", (E + 1,), "int32"), ValueError, r"rows: expected shape \(12,\), one for each.*got \(13,\)"),
    (bad("rows", (E, 1), "int32"), ValueError, r"rows: expected shape \(12,\)"),
    (bad("rows", (E,), "int32", strides=(2,)), ValueError, "rows: expected contiguous.*stride 2"),
    (bad("rows", (E,), "int64", -1), ValueError, "rows: .*host memory"),
    (moved("rows", (E,), "int64", by=4), ValueError, "rows: expected an address.*multiple of 8"),
    (gone("rows", (E,), "int32"), ValueError, "rows: expected an array that has memory"),
    (given(rows=[1] * E), TypeError, "rows: expected an array"),
    (given(rows=None), ValueError, "expected_m: expected None where rows is not given"),
    (given(rows=None, expected_m=None), ValueError, "row_weight: expected None where neither offsets nor"),
    (
        given(rows=None, expected_m=None, row_weight=None),
        TypeError,
        "a: expected a sequence of arrays where offsets is not given",
    ),
    (given(expected_m=0), ValueError, "expected_m: expected at least 1, got 0"),
    (given(expected_m=-3), ValueError, "expected_m: expected at least 1, got -3"),
    (given(expected_m=2.0), TypeError, "expected_m: expected an int, got float"),
    (given(expected_m=True), TypeError, "expected_m: expected an int, got bool"),
    (given(expected_m="4"), TypeError, "expected_m: expected an int, got str"),
    (given(early_weights=1), TypeError, "early_weights: expected a bool, got int"),
    (given(early_weights=None), TypeError, "early_weights: expected a bool, got NoneType"),
    (bad("row_index", (M,), "int32"), ValueError, "row_index: expected None where rows is given"),
    (bad("offsets", (E + 1,), "int32"), ValueError, "offsets: expected None where rows is given"),
    (bad("a", (MAX_M, K), E4M3), ValueError, r"a: expected shape \(E, max_m, K\), got \(24, 128\)"),
    (bad("a", (E + 1, MAX_M, K), E4M3), ValueError, "a: expected 12 experts, as many as b, got 13"),
    (bad("a", (E, MAX_M, K + 16), E4M3), ValueError, "b: expected K = 144, the last axis of a, got 128"),
    (
        bad("a", (E, MAX_M, K), E4M3, strides=(MAX_M * K, 1, MAX_M)),
        ValueError,
        "a: expected its last axis",
    ),
    (
        bad("a", (E, MAX_M, K), E4M3, strides=(MAX_M * K, K + 8, 1)),
        ValueError,
        "a: expected a row stride.*multiple of 16",
    ),
    (
        bad("a", (E, MAX_M, K), E4M3, strides=(MAX_M * K + 8, K, 1)),
        ValueError,
        "a: expected the stride between experts to be a multiple of 16 and",
    ),
    (
        bad("out", (E, MAX_M, N), "bfloat16", strides=(MAX_M * N + 4, N, 1)),
        ValueError,
        "out: expected the stride between experts to be a multiple of 8 and",
    ),
    (
        bad("out", (E, MAX_M, N), "bfloat16", strides=(-MAX_M * N, N, 1)),
        ValueError,
        "out: expected the stride between experts .*not negative",
    ),
    (
        bad("out", (E, MAX_M, N), "bfloat16", strides=(0, N, 1)),
        ValueError,
        "out: expected experts that lie apart",
    ),
    (
        bad("out", (E, MAX_M, N), "bfloat16", strides=((MAX_M - 1) * N, N, 1)),
        ValueError,
        "out: expected experts that lie apart",
    ),
    (bad("out", (E * MAX_M, N), "bfloat16"), ValueError, r"out: expected shape \(12, 24, 64\)"),
    (moved("out", (E, MAX_M, N), "bfloat16", by=8), ValueError, "out: expected an address"),
    (bad("a_scale", (E * MAX_M,), "float32"), ValueError, r"a_scale: expected one value, per token \(12, 24"),
    (bad("a_scale", (MAX_M,), "float32"), ValueError, "a_scale: expected one value"),
    (bad("a_scale", (E, MAX_M), "float32", strides=(1, E)), ValueError, "a_scale: expected contiguous"),
    (bad("a_scale", (E, MAX_M), "bfloat16"), TypeError, "a_scale: expected float32, got bfloat16"),
    (bad("row_weight", (E * MAX_M,), "float32"), ValueError, r"row_weight: expected shape \(12, 24\) or"),
    (
        bad("row_weight", (E, MAX_M), "float32", strides=(MAX_M + 1, 1)),
        ValueError,
        "row_weight: expected contiguous",
    ),
]


@pytest.mark.parametrize(
    ("base", "edit", "error", "words"),
    [(packed, *case) for case in PACKED] + [(masked, *case) for case in MASKED],
)
@pytest.mark.parametrize("warm", [False, True])
def test_bad_input_names_the_argument_and_launches_nothing(fake, base, edit, error, words, warm):
    args = base(fake)
    if warm:  # a known plan of the good call must not let the bad one pass
        sm12x.grouped_gemm(**args)
        fake.launches.clear()
        fake.allocated.clear()
    with pytest.raises(error, match=f"^({words})"):
        sm12x.grouped_gemm(**{**base(fake), **edit(fake)})
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["row_index", "row_weight"])
def test_lists_take_no_rows_of_that_kind(fake, name):
    lists = {"a": [fake.tensor((3, K), E4M3)], "b": [fake.tensor((N, K), E4M3)]}
    for argument in (name, "expected_m"):
        with pytest.raises(ValueError, match=f"^{argument}: expected None where"):
            sm12x.grouped_gemm(**lists, **{argument: 1})
    with pytest.raises(TypeError, match=r"^a: expected one \(E, max_m, K\) array where rows is given"):
        sm12x.grouped_gemm(**lists, rows=fake.tensor((1,), "int32"))
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_masked_out_that_overlaps_an_input(fake, name, where):
    args = masked(fake)
    rows = N if name == "b" else MAX_M
    if where == "first":  # expert of the input, and last of out
        args["out"].address = args[name].address + rows * K - 16 - (E - 1) * MAX_M * N * 2
    else:
        args["out"].address = args[name].address + E * rows * K - 16
    with pytest.raises(ValueError, match=f"^out: expected memory of its own.*overlaps {name}"):
        sm12x.grouped_gemm(**args)
    assert nothing_happened(fake)


@pytest.mark.parametrize("most", [MAX_M, 1])
def test_experts_of_out_and_a_may_share_rows_of_one_buffer(fake, most):
    """Columns of one array: neither touches the other's bytes."""
    args = masked(fake)
    wide = 2 * N + K
    buffer = fake.tensor((E, most, wide), "uint8")
    args["row_weight"] = fake.tensor((E, most), "float32")
    args["a"] = fake.tensor((E, most, K), E4M3, strides=(most * wide, wide, 1))
    args["out"] = fake.tensor((E, most, N), "bfloat16", strides=(most * wide // 2, wide // 2, 1))
    args["a"].address, args["out"].address = buffer.address, buffer.address + K
    sm12x.grouped_gemm(**args)
    assert len(fake.launches) == 1


@pytest.mark.parametrize(
    ("shape", "strides"), [((E, 1), (1, 99)), ((1, MAX_M), (0, 1)), ((E, 1, 1), (1, 7, 0))]
)
def test_strides_of_axes_of_one_element_mean_nothing(fake, shape, strides):
    t = fake.tensor
    e, most = shape[:2]
    args = {
        "a": t((e, most, K), E4M3),
        "b": t((e, N, K), E4M3),
        "rows": t((e,), "int32"),
        "row_weight": t(shape, "float32", strides=strides),
        "a_scale": t(shape, "float32", strides=strides),
    }
    sm12x.grouped_gemm(**args)
    assert fake.launches[0].params.row_weight == args["row_weight"].address


def _array(shape, strides):
    return make_array((256, shape, strides, "float8_e4m3fn", 0, "torch", None, False))


def test_what_is_said_of_strides_against_a_map_of_bytes():
    """`disjoint` refuses what shares an element, and `whole` never lies inside what it stands for."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    refused = kept = 0
    for _ in range(600):
        groups, rows, length = rng.randint(1, 4), rng.randint(1, 4), 16 * rng.randint(1, 3)
        stride = length + 16 * rng.randint(0, 8)
        between = 16 * rng.randint(0, 30)
        array = _array((groups, rows, length), (between, stride, 1))
        inner = Matrix(rows, length, length if rows == 1 else stride, 1)
        apart = row_layout.group_stride(array, "out", inner)
        starts = [e * apart + r * inner.stride for e in range(groups) for r in range(rows)]
        bytes_of = np.concatenate([np.arange(start, start + length) for start in starts])
        shares = len(np.unique(bytes_of)) < len(bytes_of)
        try:
            row_layout.disjoint(array, "out", inner, apart)
        except ValueError:
            refused += 1
            # Only what shares bytes is refused, or is too entangled to be anybody's tensor.
            assert shares or (apart < inner.span and inner.stride < (groups - 1) * apart + length)
            continue
        kept += 1
        assert not shares
        covering = row_layout.whole(inner, groups, apart)
        assert covering.span == bytes_of.max() + 1
        for probe in range(0, covering.span, 16):
            if probe in bytes_of:
                assert overlaps(0, covering, probe, Matrix(1, 16, 16, 1)), "covers every byte"
    assert refused > 50
    assert kept > 50

"""Bad input of a packed call: the argument is named and nothing is launched."""

from __future__ import annotations

import random

import numpy as np
import pytest

import sm12x
from sm12x.ops import memory
from sm12x.ops.validate import Matrix
from unit.fake_driver import Tensor, install
from unit.gemm_cases import STREAM, E, K, M, N, groups, nothing_happened, operands


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


def bad(name, *args, **options):
    """An edit that replaces one argument by a fake tensor."""
    return lambda fake: {name: fake.tensor(*args, **options)}


BAD = [
    # dtype
    (bad("a", (M, K), "float16"), TypeError, r"a: expected float8_e4m3fn or float8_e5m2.*got float16"),
    (bad("b", (E, N, K), "int8"), TypeError, r"b: expected float8_e4m3fn.*got int8"),
    (
        bad("a", (M, K), "float8_e5m2"),
        ValueError,
        r"a, b, out_dtype: no kernel for float8_e5m2 x .* there are",
    ),
    (bad("offsets", (E + 1,), "float32"), TypeError, r"offsets: expected int32 or int64, got float32"),
    (bad("a_scale", (M,), "float16"), TypeError, r"a_scale: expected float32, got float16"),
    (bad("b_scale", (E,), "float64"), TypeError, r"b_scale: expected float32, got float64"),
    (bad("bias", (E, N), "int32"), TypeError, r"bias: expected float32, bfloat16 or float16, got int32"),
    (bad("out", (M, N), "float16"), TypeError, r"out: expected bfloat16, as out_dtype says, got float16"),
    # rank and shape
    (bad("a", (M, 1, K), "float8_e4m3fn"), ValueError, r"a: expected shape \(M, K\), got \(48, 1, 128\)"),
    (bad("b", (N, K), "float8_e4m3fn"), ValueError, r"b: expected shape \(E, N, K\), got \(64, 128\)"),
    (
        bad("b", (E, N, K + 16), "float8_e4m3fn"),
        ValueError,
        r"b: expected K = 128, the last axis of a, got 144",
    ),
    (
        bad("b", (E, N + 4, K), "float8_e4m3fn"),
        ValueError,
        r"b: expected N to be a positive multiple of 8, got 68",
    ),
    (
        bad("b", (E, 0, K), "float8_e4m3fn"),
        ValueError,
        r"b: expected N to be a positive multiple of 8, got 0",
    ),
    (bad("b", (1025, N, K), "float8_e4m3fn"), ValueError, r"b: expected at most 1024 experts, got 1025"),
    (bad("offsets", (E,), "int32"), ValueError, r"offsets: expected shape \(13,\), one more.*got \(12,\)"),
    (bad("offsets", (E + 1, 1), "int32"), ValueError, r"offsets: expected shape \(13,\)"),
    (bad("out", (M, N + 8), "bfloat16"), ValueError, r"out: expected shape \(48, 64\), got \(48, 72\)"),
    (
        bad("a_scale", (E,), "float32"),
        ValueError,
        r"a_scale: expected one value, per token \(48,\).*got shape \(12,\)",
    ),
    (bad("a_scale", (E, 1), "float32"), ValueError, r"a_scale: expected one value"),
    (bad("a_scale", (M, 1, 1), "float32"), ValueError, r"a_scale: expected one value"),
    (bad("a_scale", (1, M), "float32"), ValueError, r"a_scale: expected one value"),
    (bad("b_scale", (N,), "float32"), ValueError, r"b_scale: expected one value, per expert \(12,\)"),
    (bad("b_scale", (N, E), "float32"), ValueError, r"b_scale: expected one value"),
    (bad("b_scale", (E, 1, N), "float32"), ValueError, r"b_scale: expected one value"),
    (bad("bias", (N,), "float32"), ValueError, r"bias: expected shape \(12, 64\), got \(64,\)"),
    # strides
    (
        bad("a", (M, K), "float8_e4m3fn", strides=(1, M)),
        ValueError,
        r"a: expected its last axis to be contiguous",
    ),
    (
        bad("a", (M, K), "float8_e4m3fn", strides=(K + 8, 1)),
        ValueError,
        r"a: expected a row stride.*multiple of 16",
    ),
    (
        bad("a", (M, K), "float8_e4m3fn", strides=(0, 1)),
        ValueError,
        r"a: expected a row stride of at least 128",
    ),
    (bad("b", (E, N, K), "float8_e4m3fn", strides=(N * K, 1, N)), ValueError, r"b: expected its last axis"),
    (
        bad("b", (E, N, K), "float8_e4m3fn", strides=(N * K + 8, K, 1)),
        ValueError,
        r"b: expected the stride between",
    ),
    (
        bad("out", (M, N), "bfloat16", strides=(N + 4, 1)),
        ValueError,
        r"out: expected a row stride.*multiple of 8",
    ),
    (
        bad("out", (M, N), "bfloat16", strides=(1, M)),
        ValueError,
        r"out: expected its last axis to be contiguous",
    ),
    (bad("offsets", (E + 1,), "int32", strides=(2,)), ValueError, r"offsets: expected contiguous"),
    (bad("a_scale", (M,), "float32", strides=(2,)), ValueError, r"a_scale: expected contiguous"),
    (bad("b_scale", (E, N), "float32", strides=(1, E)), ValueError, r"b_scale: expected contiguous"),
    (bad("bias", (E, N), "float32", strides=(1, E)), ValueError, r"bias: expected contiguous"),
    # devices
    (
        bad("a", (M, K), "float8_e4m3fn", -1),
        ValueError,
        r"a: expected memory of CUDA device.*got host memory \(torch\)",
    ),
    (
        bad("b", (E, N, K), "float8_e4m3fn", 1),
        ValueError,
        r"b: expected memory of CUDA device 0 like a, got device 1",
    ),
    (bad("offsets", (E + 1,), "int32", -1), ValueError, r"offsets: expected memory of CUDA device 0.*host"),
    (bad("offsets", (E + 1,), "int32", 1), ValueError, r"offsets: .*got device 1"),
    (bad("a_scale", (M,), "float32", -1), ValueError, r"a_scale: .*host memory"),
    (bad("b_scale", (), "float32", 1), ValueError, r"b_scale: .*got device 1"),
    (bad("bias", (E, N), "float32", -1), ValueError, r"bias: .*host memory"),
    (
        bad("out", (M, N), "bfloat16", -1),
        ValueError,
        r"out: expected memory of a CUDA device, got host memory",
    ),
    (bad("out", (M, N), "bfloat16", 1), ValueError, r"CUDA device 0 like a, got device 1"),
    (bad("workspace", (1 << 20,), "uint8", -1), ValueError, r"workspace: .*host memory"),
    (
        lambda fake: {"b": np.zeros((E, N, K), np.uint8), "dtype": "float8_e4m3fn"},
        (ValueError, TypeError),
        r"b: .*numpy",
    ),
    (lambda fake: {"offsets": np.zeros(E + 1, np.int32)}, ValueError, r"offsets: .*host memory \(numpy\)"),
    (lambda fake: {"offsets": [0] * (E + 1)}, TypeError, r"offsets: expected an array"),
    # addresses
    (
        bad("a", (M, K), "float8_e4m3fn", offset=8),
        ValueError,
        r"a: expected an address that is a multiple of 16 bytes",
    ),
    (
        bad("b", (E, N, K), "float8_e4m3fn", offset=1),
        ValueError,
        r"b: expected an address.*16 bytes.*\(1 beyond",
    ),
    (bad("out", (M, N), "bfloat16", offset=2), ValueError, r"out: expected an address.*16 bytes"),
    (bad("offsets", (E + 1,), "int64", offset=4), ValueError, r"offsets: expected an address.*8 bytes"),
    (bad("offsets", (E + 1,), "int32", offset=2), ValueError, r"offsets: expected an address.*4 bytes"),
    (bad("a_scale", (M,), "float32", offset=2), ValueError, r"a_scale: expected an address.*4 bytes"),
    (bad("b_scale", (E,), "float32", offset=1), ValueError, r"b_scale: expected an address.*4 bytes"),
    (bad("bias", (E, N), "bfloat16", offset=1), ValueError, r"bias: expected an address.*2 bytes"),
    # workspace
    (bad("workspace", (64,), "uint8"), ValueError, r"workspace: expected at least \d+ bytes.*got 64"),
    (
        bad("workspace", (1 << 20, 2), "uint8", strides=(4, 1)),
        ValueError,
        r"workspace: expected a contiguous",
    ),
    # values
    (lambda fake: {"a_scale": True}, TypeError, r"a_scale: expected a float or a float32 array, got a bool"),
    (lambda fake: {"b_scale": 1e39}, ValueError, r"b_scale: expected a value that float32 holds, got 1e\+39"),
    (lambda fake: {"a_scale": "x"}, TypeError, r"a_scale: expected an array"),
    (
        lambda fake: {"out_dtype": "float8"},
        ValueError,
        r"out_dtype: expected one of bfloat16, float16, float32",
    ),
    (lambda fake: {"out_dtype": []}, TypeError, r"out_dtype: expected the name of a dtype"),
    (lambda fake: {"dtype": {}}, (TypeError, ValueError), r"dtype: expected"),
    (
        lambda fake: {"out": None, "out_dtype": "float32"},
        ValueError,
        r"out_dtype: no kernel for .* -> float32 on sm_120a",
    ),
    (
        lambda fake: {"variant": "fp8"},
        ValueError,
        r"variant: expected one of fp8_ptr_array_.*got 'fp8': there is none",
    ),
    (lambda fake: {"variant": 3}, TypeError, r"variant: expected the key"),
    (
        lambda fake: {"variant": "fp8_ptr_array_128x16x128_swap_fp16"},
        ValueError,
        r"variant: expected one of .*it out is float16, not bfloat16",
    ),
    (
        lambda fake: {"variant": "fp8_ptr_array_prepare_list"},
        ValueError,
        r"variant: .*it is a prepare_list kernel",
    ),
    (lambda fake: {"a": [1]}, TypeError, r"a: expected one \(M, K\) array where offsets is given, got list"),
    (lambda fake: {"a": None}, TypeError, r"a: expected an array"),
    (
        lambda fake: {"offsets": None},
        TypeError,
        r"a: expected a sequence of arrays where offsets is not given",
    ),
]


@pytest.mark.parametrize(("edit", "error", "words"), BAD)
@pytest.mark.parametrize("warm", [False, True])
def test_bad_input_names_the_argument_and_launches_nothing(fake, edit, error, words, warm):
    if warm:  # a known plan of the good call must not let the bad one pass
        sm12x.grouped_gemm(**operands(fake))
        fake.launches.clear()
        fake.allocated.clear()
    with pytest.raises(error, match=words):
        sm12x.grouped_gemm(**{**operands(fake), **edit(fake)})
    assert nothing_happened(fake)


@pytest.mark.parametrize("k", [0, 8, 24, 120])
def test_k_that_is_no_multiple_of_16(fake, k):
    with pytest.raises(ValueError, match=f"a: expected K to be a positive multiple of 16, got {k}"):
        sm12x.grouped_gemm(**operands(fake, k=k))
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("warm", [False, True])
def test_out_that_overlaps_an_input(fake, name, warm):
    args = operands(fake)
    if warm:
        sm12x.grouped_gemm(**args)
        fake.launches.clear()
        fake.allocated.clear()
    inputs = args[name]
    size = M * K if name == "a" else E * N * K
    for offset in (0, 16, size - 16, -(M * N * 2 - 16)):
        out = Tensor(inputs.address + offset, (M, N), "bfloat16")
        with pytest.raises(
            ValueError, match=f"out: expected memory of its own, got an array that overlaps {name}"
        ):
            sm12x.grouped_gemm(**{**args, "out": out})
    assert nothing_happened(fake)
    for offset in (size, -(M * N * 2)):
        sm12x.grouped_gemm(**{**args, "out": Tensor(inputs.address + offset, (M, N), "bfloat16")})


def test_out_in_the_gaps_between_rows_of_a_is_no_overlap(fake):
    stride = K + 2 * N
    base = fake.memory.take(M * stride)
    a = Tensor(base, (M, K), "float8_e4m3fn", (stride, 1))
    sm12x.grouped_gemm(**operands(fake, a=a, out=Tensor(base + K, (M, N), "bfloat16", (stride // 2, 1))))
    assert len(fake.launches) == 2
    with pytest.raises(ValueError, match="overlaps a"):
        sm12x.grouped_gemm(
            **operands(fake, a=a, out=Tensor(base + K - 16, (M, N), "bfloat16", (stride // 2, 1)))
        )


@pytest.mark.parametrize("name", ["a", "b", "out"])
def test_a_workspace_that_overlaps_an_operand(fake, name):
    args = operands(fake)
    workspace = Tensor(args[name].address - 256, (sm12x.workspace_size(E) + 512,), "uint8")
    with pytest.raises(ValueError, match=f"workspace: expected memory of its own.*{name}"):
        sm12x.grouped_gemm(**args, workspace=workspace)
    assert nothing_happened(fake)


def test_a_workspace_one_byte_too_small_is_refused_and_the_exact_one_taken(fake):
    sm12x.grouped_gemm(**operands(fake))
    (needed,) = fake.allocated.values()
    fake.launches.clear()
    exact = fake.tensor((needed,), "uint8")
    sm12x.grouped_gemm(**operands(fake, workspace=exact))
    fake.launches.clear()
    small = Tensor(exact.address, (needed - 1,), "uint8")
    shifted = Tensor(exact.address + 16, (needed,), "uint8")
    for workspace in (small, shifted):
        with pytest.raises(ValueError, match=f"workspace: expected at least {needed} bytes"):
            sm12x.grouped_gemm(**operands(fake, workspace=workspace))
    assert fake.launches == []


def test_overlap_of_rows_against_a_map_of_bytes():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2000):
        size = rng.choice([1, 2])

        def matrix(stride, size=size):
            return Matrix(rng.randrange(1, 5), rng.randrange(1, 6), stride, size)

        stride = rng.randrange(6, 12)
        x, y = matrix(stride), matrix(stride)
        p, q = 1000, 1000 + rng.randrange(-60, 60)

        def cells(at, m):
            return {
                at + (r * m.stride + c) * m.element_bytes + i
                for r in range(m.rows)
                for c in range(m.length)
                for i in range(m.element_bytes)
            }

        shared = bool(cells(p, x) & cells(q, y))
        found = memory.overlaps(p, x, q, y)
        assert found == memory.overlaps(q, y, p, x)
        # Never missed; and with rows beside each other, never claimed either.
        assert found or not shared
        if found and not shared:
            assert (q - p) % (stride * size), "exact where both start in the same column"


def test_an_empty_workspace_is_too_small_and_not_replaced_by_our_own(fake):
    empty = fake.tensor((0,), "uint8")
    empty.address = 0
    for _ in range(2):
        with pytest.raises(ValueError, match="workspace: expected at least .* bytes .*, got 0"):
            sm12x.grouped_gemm(**operands(fake, workspace=empty))
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["a", "b", "out", "offsets"])
def test_an_array_whose_memory_is_gone_is_refused(fake, name):
    sm12x.grouped_gemm(**operands(fake))
    fake.launches.clear()
    args = operands(fake)
    args[name].address = 0  # what torch says once the storage was resized to nothing
    with pytest.raises(ValueError, match=f"^{name}: expected an array that has memory"):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


def test_a_group_whose_memory_is_gone_is_refused(fake):
    args = groups(fake, [(3, 64, 128), (1, 8, 16)])
    args["b"][1].address = 0
    with pytest.raises(ValueError, match=r"^b\[1\]: expected an array that has memory"):
        sm12x.grouped_gemm(**args)
    assert nothing_happened(fake)


def test_an_integer_scale_past_every_float_is_refused(fake):
    with pytest.raises(ValueError, match="^a_scale: expected a value that float32 holds"):
        sm12x.grouped_gemm(**operands(fake, a_scale=10**400))
    assert nothing_happened(fake)

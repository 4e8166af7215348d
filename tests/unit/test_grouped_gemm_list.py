"""The list call on a fake driver: records, chunks, outputs, bad input."""

from __future__ import annotations

import pytest

import sm12x
from sm12x import abi
from sm12x.errors import CudaError
from unit.fake_driver import Tensor, install
from unit.gemm_cases import STREAM, groups, nothing_happened


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


SHAPES = [(3, 64, 128), (0, 8, 16), (130, 72, 704), (1, 256, 32)]


def records(fake):
    found = []
    for each in fake.launches:
        if each.symbol.endswith("prepare_list"):
            assert each.params.first_group == len(found)
            found += [each.params.groups[i] for i in range(each.params.count)]
    return found


def test_a_list_call_sends_a_record_for_each_group_with_rows(fake):
    t = fake.tensor
    args = groups(fake, SHAPES)
    a_scale = [0.5, None, t((130, 1), "float32"), t((), "float32")]
    b_scale = [t((64,), "float32"), 2.0, 4, t((256, 1), "float32")]
    bias = [t((64,), "float16"), None, None, t((256,), "float16")]
    outs = sm12x.grouped_gemm(**args, a_scale=a_scale, b_scale=b_scale, bias=bias)
    assert all(x is y for x, y in zip(outs, args["out"], strict=True))
    assert [each.symbol.rpartition("_")[2] for each in fake.launches] == ["list", "bf16"]
    sent = records(fake)
    assert [(r.m, r.n, r.k) for r in sent] == [s for s in SHAPES if s[0]]
    for i, r in zip((0, 2, 3), sent, strict=True):
        assert (r.a, r.b, r.d) == tuple(args[x][i].address for x in ("a", "b", "out"))
        assert (r.stride_a, r.stride_b, r.stride_d) == (SHAPES[i][2], SHAPES[i][2], SHAPES[i][1])
    assert [r.a_scale_mode for r in sent] == [
        abi.SM12X_SCALE_VALUE,
        abi.SM12X_SCALE_VECTOR,
        abi.SM12X_SCALE_ONE,
    ]
    assert [r.b_scale_mode for r in sent] == [
        abi.SM12X_SCALE_VECTOR,
        abi.SM12X_SCALE_VALUE,
        abi.SM12X_SCALE_VECTOR,
    ]
    assert [r.a_scale_value for r in sent] == [0.5, 1.0, 1.0]
    assert [r.b_scale_value for r in sent] == [1.0, 4.0, 1.0]
    assert [r.bias for r in sent] == [bias[0].address, 0, bias[3].address]
    g = fake.launches[1].params
    assert (g.num_groups, g.bias_type) == (3, abi.SM12X_BIAS_FLOAT16)
    assert fake.launches[0].params.num_groups == 3
    assert g.group_arrays == fake.launches[0].params.group_arrays
    ((base, size),) = fake.allocated.items()
    assert g.group_arrays + abi.group_arrays_bytes(3) == base + size
    assert [entry[0] for entry in fake.log] == ["alloc", "launch", "launch", "free"]


@pytest.mark.parametrize("count", [1, 340, 341, 700])
def test_more_groups_than_one_launch_carries(fake, count):
    args = groups(fake, [(1 + i % 3, 8, 16) for i in range(count)])
    workspace = fake.tensor((sm12x.workspace_size(count),), "uint8")
    sm12x.grouped_gemm(**args, a_scale=fake.tensor((1,), "float32"), workspace=workspace)
    prepares = fake.launches[:-1]
    assert len(prepares) == -(-count // abi.SM12X_LIST_CAPACITY)
    assert {each.params.num_groups for each in prepares} == {count}
    sent = records(fake)
    assert [r.a for r in sent] == [x.address for x in args["a"]]
    assert fake.allocated == {}
    assert fake.launches[-1].params.tensor_maps == workspace.address


def test_a_list_call_takes_an_exact_workspace_and_none_smaller(fake):
    args = groups(fake, SHAPES)
    sm12x.grouped_gemm(**args)
    (needed,) = fake.allocated.values()
    exact = fake.tensor((needed,), "uint8")
    sm12x.grouped_gemm(**args, workspace=exact)
    assert fake.launches[-1].params.tensor_maps == exact.address
    fake.launches.clear()
    with pytest.raises(ValueError, match=f"workspace: expected at least {needed} bytes"):
        sm12x.grouped_gemm(**args, workspace=Tensor(exact.address, (needed - 1,), "uint8"))
    inside = Tensor(args["a"][2].address - 256, (needed + 512,), "uint8")
    with pytest.raises(ValueError, match=r"workspace: expected memory of its own.*overlaps a\[2\]"):
        sm12x.grouped_gemm(**args, workspace=inside)
    assert fake.launches == []


def test_a_list_call_without_out(fake):
    args = groups(fake, SHAPES)
    del args["out"]
    outs = sm12x.grouped_gemm(**args, out_dtype="float16")
    assert [(x.shape, x.dtype.name) for x in outs] == [((m, n), "float16") for m, n, _ in SHAPES]
    assert [r.d for r in records(fake)] == [x.address for x in outs if x.shape[0]]


def test_a_list_call_with_nothing_to_do(fake):
    assert len(sm12x.grouped_gemm(**groups(fake, [(0, 8, 16), (0, 16, 32)]))) == 2
    assert nothing_happened(fake)
    assert sm12x.grouped_gemm([], []) == []


def test_a_list_call_loads_no_weights_early(fake):
    with pytest.raises(ValueError, match=r"early_weights: expected False .* \(a list call\), got True"):
        sm12x.grouped_gemm(**groups(fake, [(3, 16, 32)]), early_weights=True)
    assert nothing_happened(fake)


def test_outputs_may_be_column_slices_of_one_buffer(fake):
    args = groups(fake, [(40, 64, 128), (40, 32, 128)])
    base = fake.memory.take(40 * 96 * 2)
    args["out"] = [
        Tensor(base, (40, 64), "bfloat16", (96, 1)),
        Tensor(base + 128, (40, 32), "bfloat16", (96, 1)),
    ]
    sm12x.grouped_gemm(**args)
    assert [r.stride_d for r in records(fake)] == [96, 96]
    args["out"][1] = Tensor(base + 112, (40, 32), "bfloat16", (96, 1))
    fake.launches.clear()
    with pytest.raises(ValueError, match=r"out\[[01]\]: expected memory of its own.*out\[[01]\]"):
        sm12x.grouped_gemm(**args)
    assert fake.launches == []


def test_an_output_deep_inside_an_input_is_found_behind_shorter_arrays(fake):
    args = groups(fake, [(1000, 64, 128), (1, 64, 128)])
    start = args["a"][0].address
    args["a"][1] = Tensor(start + 1024, (1, 128), "float8_e4m3fn")  # inputs may overlap each other
    args["out"][1] = Tensor(start + 64000, (1, 64), "bfloat16")
    with pytest.raises(ValueError, match=r"out\[1\]: expected memory of its own, .* overlaps a\[0\]"):
        sm12x.grouped_gemm(**args)
    assert nothing_happened(fake)


def one_bad(name, index, *args, **options):
    def edit(fake, good):
        good[name] = list(good.get(name) or [None] * len(SHAPES))
        good[name][index] = fake.tensor(*args, **options)

    return edit


def put(**changes):
    return lambda fake, good: good.update(changes)


BAD_LISTS = [
    (put(b=[]), ValueError, r"b: expected 4 arrays, as many as a, got 0"),
    (put(out=[]), ValueError, r"out: expected 4 entries"),
    (put(a_scale=[1.0]), ValueError, r"a_scale: expected 4 entries, one for each group, got 1"),
    (put(bias=[None]), ValueError, r"bias: expected 4 entries"),
    (put(stream="x"), TypeError, r"stream: expected"),
    (put(variant="x"), ValueError, r"variant: expected one of"),
    (lambda fake, good: good.update(b=fake.tensor((8, 16), "uint8")), TypeError, r"b: expected a sequence"),
    (
        lambda fake, good: good.update(out=fake.tensor((8, 16), "uint8")),
        TypeError,
        r"out: expected a sequence",
    ),
    (
        lambda fake, good: good.update(a_scale=fake.tensor((4,), "float32")),
        TypeError,
        r"a_scale: expected a sequence",
    ),
    (one_bad("a", 2, (130, 1, 704), "float8_e4m3fn"), ValueError, r"a\[2\]: expected shape \(M, K\)"),
    (one_bad("a", 2, (130, 704), "float16"), TypeError, r"a\[2\]: expected float8_e4m3fn"),
    (one_bad("a", 2, (130, 704), "float8_e5m2"), TypeError, r"a\[2\]: expected float8_e4m3fn like a\[0\]"),
    (
        one_bad("b", 2, (72, 720), "float8_e4m3fn"),
        ValueError,
        r"b\[2\]: expected K = 704, the last axis of a\[2\]",
    ),
    (
        one_bad("b", 2, (70, 704), "float8_e4m3fn"),
        ValueError,
        r"b\[2\]: expected N to be a positive multiple of 8",
    ),
    (one_bad("b", 0, (64, 128), "float8_e4m3fn", 1), ValueError, r"b\[0\]: .*got device 1"),
    (one_bad("b", 0, (64, 128), "float8_e4m3fn", offset=4), ValueError, r"b\[0\]: expected an address"),
    (one_bad("out", 0, (3, 64), "float16"), TypeError, r"out\[0\]: expected bfloat16"),
    (one_bad("out", 0, (3, 72), "bfloat16"), ValueError, r"out\[0\]: expected shape \(3, 64\)"),
    (
        one_bad("a_scale", 0, (4,), "float32"),
        ValueError,
        r"a_scale\[0\]: expected one value, or per token \(3,\)",
    ),
    (
        one_bad("b_scale", 0, (3,), "float32"),
        ValueError,
        r"b_scale\[0\]: expected one value, or per channel \(64,\)",
    ),
    (one_bad("bias", 0, (3,), "float32"), ValueError, r"bias\[0\]: expected shape \(64,\)"),
    (one_bad("workspace_", 0, (1,), "uint8"), TypeError, r"workspace_"),
]


@pytest.mark.parametrize(("edit", "error", "words"), BAD_LISTS)
def test_bad_lists_name_the_entry_and_launch_nothing(fake, edit, error, words):
    good = groups(fake, SHAPES)
    edit(fake, good)
    with pytest.raises(error, match=words):
        sm12x.grouped_gemm(**good)
    assert nothing_happened(fake)


def test_biases_of_two_dtypes(fake):
    t = fake.tensor
    bias = [t((64,), "float16"), None, t((72,), "float32"), None]
    with pytest.raises(TypeError, match=r"bias\[2\]: expected float16 like bias\[0\], got float32"):
        sm12x.grouped_gemm(**groups(fake, SHAPES), bias=bias)


def test_a_failed_launch_of_a_list_frees_the_workspace(fake):
    fake.fail["cuLaunchKernel"] = [0, 1]
    with pytest.raises(CudaError) as caught:
        sm12x.grouped_gemm(**groups(fake, SHAPES))
    assert caught.value.shapes == "list of 3 groups, at most M=130 N=256 K=704"
    assert list(fake.allocated) == fake.freed


def test_the_error_of_a_failed_launch_is_not_hidden_by_the_free_that_fails_too(fake):
    fake.fail["cuLaunchKernel"] = [719]
    fake.fail["cuMemFreeAsync"] = 719
    with pytest.raises(CudaError, match="cuLaunchKernel failed"):
        sm12x.grouped_gemm(**groups(fake, SHAPES))


def test_no_groups_are_no_outputs_whatever_else_is_given(fake):
    workspace = fake.tensor((64,), "uint8")
    assert sm12x.grouped_gemm([], [], out=[], workspace=workspace, stream=STREAM) == []
    assert nothing_happened(fake)

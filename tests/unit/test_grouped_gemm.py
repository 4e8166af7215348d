"""What a call launches, with which parameters, on a fake driver."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

import sm12x
from sm12x import abi, manifest
from sm12x.ops import grouped_gemm as module
from sm12x.ops import launch, validate
from unit.fake_driver import CONTEXT, FakeGpu, Tensor, install
from unit.gemm_cases import PREPARE, SHIPPED, STREAM, E, K, M, N, groups, nothing_happened, operands


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


def test_a_packed_call_prepares_and_multiplies_on_the_callers_stream(fake):
    args = operands(fake, a_scale=fake.tensor((M,), "float32"), b_scale=fake.tensor((E, N), "float32"))
    out = sm12x.grouped_gemm(**args)
    assert out is args["out"]
    prepare, gemm = fake.launches
    assert (prepare.symbol, prepare.grid, prepare.block) == (PREPARE, (1, 1, 1), (1024, 1, 1))
    variant = manifest.default().variants[gemm.symbol.removeprefix("sm12x_")]
    assert gemm.block == (variant.threads, 1, 1)
    assert gemm.shared_memory == variant.shared_memory
    assert (prepare.stream, gemm.stream) == (STREAM, STREAM)
    assert (prepare.context, gemm.context) == (CONTEXT, CONTEXT)
    p = prepare.params
    assert (p.a, p.b, p.d) == tuple(args[x].address for x in ("a", "b", "out"))
    assert (p.offsets, p.offsets_are_64_bit) == (args["offsets"].address, 0)
    assert (p.a_scale, p.a_scale_mode) == (args["a_scale"].address, abi.SM12X_SCALE_VECTOR)
    assert (p.b_scale, p.b_scale_mode) == (args["b_scale"].address, abi.SM12X_SCALE_VECTOR)
    assert p.stride_b_scale == N
    assert (p.rows, p.n, p.k, p.num_groups) == (M, N, K, E)
    assert (p.stride_a, p.stride_b, p.stride_b_group, p.stride_d) == (K, K, N * K, N)
    assert (p.d_element_bytes, p.bias, p.bias_element_bytes) == (2, 0, 0)
    assert p.swap_ab == variant.swap_ab
    g = gemm.params
    assert (g.num_groups, g.ctas, g.group_arrays) == (E, max(gemm.grid), p.group_arrays)
    assert bytes(g.map_a)[:8] == b"0 2 [128"
    # Own workspace: allocated before and freed after, on the stream, and everything lies within.
    ((base, size),) = fake.allocated.items()
    assert g.tensor_maps == base
    assert p.group_arrays % 128 == 0
    assert g.tensor_maps + g.ctas * variant.workspace_per_cta <= p.group_arrays
    assert p.group_arrays + abi.group_arrays_bytes(E) == base + size
    kinds = [entry[0] for entry in fake.log]
    assert kinds == ["alloc", "launch", "launch", "free"]
    assert {entry[-1] for entry in fake.log} == {STREAM}
    assert fake.context == 0, "the caller's context is put back"


def test_the_second_call_loads_and_validates_nothing_and_writes_its_own_addresses(fake):
    workspace = fake.tensor((sm12x.workspace_size(E),), "uint8")
    fake.context = CONTEXT
    sm12x.grouped_gemm(**operands(fake, workspace=workspace))
    fake.calls.clear()
    later = operands(fake, workspace=workspace)
    sm12x.grouped_gemm(**later)
    assert fake.calls == ["cuCtxGetCurrent", "cuLaunchKernel", "cuLaunchKernel"]
    params = fake.launches[-2].params
    assert (params.a, params.d) == (later["a"].address, later["out"].address)
    assert fake.allocated == {}, "out and workspace given: nothing is allocated"
    assert len(module._plans) == 1


def test_a_workspace_is_used_from_its_first_aligned_byte(fake):
    size = sm12x.workspace_size(E)
    workspace = fake.tensor((size + 256,), "uint8", offset=16)
    sm12x.grouped_gemm(**operands(fake, workspace=workspace))
    base = fake.launches[1].params.tensor_maps
    assert base % 256 == 0
    assert 0 < base - workspace.address < 256
    assert fake.launches[0].params.group_arrays + abi.group_arrays_bytes(E) <= workspace.address + size + 256


def test_workspace_size_is_enough_for_every_variant_and_shape(fake):
    for gpu in (0, 1):
        for e in (1, 4, 33, 1024):
            size = sm12x.workspace_size(e, device=gpu)
            assert size % 256 == 0
            for variant in manifest.default().gemms():
                maps = launch.scratch_bytes(variant, fake.gpus[gpu].sm_count)
                assert maps + abi.group_arrays_bytes(e) <= size
    assert sm12x.workspace_size(0) > 0
    for bad in (-1, 1.5, True, "4"):
        with pytest.raises((TypeError, ValueError), match="num_groups"):
            sm12x.workspace_size(bad)
    with pytest.raises(TypeError, match="device"):
        sm12x.workspace_size(4, device="cuda")


@pytest.mark.parametrize(
    "variant", ["128x128x128_coop", "64x128x128_pingpong", "128x32x128_swap", "128x16x128_swap"]
)
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
def test_a_forced_variant_runs(fake, variant, out_dtype):
    key = f"fp8_ptr_array_{variant}_{'bf16' if out_dtype == 'bfloat16' else 'fp16'}"
    out = fake.tensor((M, N), out_dtype)
    sm12x.grouped_gemm(**operands(fake, out=out, out_dtype=out_dtype, variant=key))
    assert fake.launches[1].symbol == f"sm12x_{key}"
    axis = manifest.default().variants[key].grid_axis
    assert fake.launches[1].grid[1 if axis == "y" else 0] == fake.launches[1].params.ctas
    assert fake.launches[0].params.swap_ab == ("swap" in variant)


def test_the_grid_is_no_larger_than_the_device_or_the_tiles(fake):
    key = "fp8_ptr_array_128x128x128_coop_bf16"
    for m, e, n, expected in ((1, 8, 64, 1), (8, 128, 256, 16), (4096, 128, 2048, 170), (129, 1, 64, 2)):
        fake.launches.clear()
        sm12x.grouped_gemm(**operands(fake, m, e, n, variant=key))
        assert fake.launches[1].grid == (expected, 1, 1)


NINE = [(a, b) for a in ("value", "one", "vector", "group") for b in ("value", "one", "vector", "group")]
MODES = {
    "value": abi.SM12X_SCALE_VALUE,
    "one": abi.SM12X_SCALE_ONE,
    "group": abi.SM12X_SCALE_GROUP,
    "vector": abi.SM12X_SCALE_VECTOR,
}


@pytest.mark.parametrize(("kind_a", "kind_b"), NINE)
@pytest.mark.parametrize("m", [M, E, 0, 1])
@pytest.mark.parametrize("column", [False, True])
def test_every_combination_of_scales(fake, kind_a, kind_b, m, column):
    tail = (1,) if column else ()
    shapes_a = {"one": (1, 1) if column else (), "vector": (m, *tail), "group": (E, 1, 1)}
    shapes_b = {"one": (1,), "vector": (E, N, *tail), "group": (E, *tail)}
    a_scale = 0.25 if kind_a == "value" else fake.tensor(shapes_a[kind_a], "float32")
    b_scale = 3 if kind_b == "value" else fake.tensor(shapes_b[kind_b], "float32")
    sm12x.grouped_gemm(**operands(fake, m, a_scale=a_scale, b_scale=b_scale))
    if m == 0:
        assert nothing_happened(fake)
        return
    p = fake.launches[0].params
    # One row: (1,) is one value.
    assert p.a_scale_mode == (abi.SM12X_SCALE_ONE if (m, kind_a) == (1, "vector") else MODES[kind_a])
    assert p.b_scale_mode == MODES[kind_b]
    assert p.a_scale == (0 if kind_a == "value" else a_scale.address)
    assert p.b_scale == (0 if kind_b == "value" else b_scale.address)
    assert p.a_scale_value == (0.25 if kind_a == "value" else 1.0)
    assert p.b_scale_value == (3.0 if kind_b == "value" else 1.0)


def test_values_are_not_cached_with_the_plan(fake):
    for value in (2.0, 0.5, None, np.float32(1.5)):
        sm12x.grouped_gemm(**operands(fake, a_scale=value, b_scale=value))
        p = fake.launches[-2].params
        assert p.a_scale_value == p.b_scale_value == (1.0 if value is None else float(value))
    assert len(module._plans) == 1


def test_one_axis_is_per_token_also_where_m_equals_e(fake):
    sm12x.grouped_gemm(**operands(fake, E, a_scale=fake.tensor((E,), "float32")))
    assert fake.launches[0].params.a_scale_mode == abi.SM12X_SCALE_VECTOR


def test_one_expert_of_one_value(fake):
    sm12x.grouped_gemm(
        **operands(
            fake, 5, 1, a_scale=fake.tensor((1, 1, 1), "float32"), b_scale=fake.tensor((1,), "float32")
        )
    )
    p = fake.launches[0].params
    assert (p.a_scale_mode, p.b_scale_mode) == (abi.SM12X_SCALE_ONE, abi.SM12X_SCALE_ONE)


@pytest.mark.parametrize(
    ("dtype", "size", "code"), [("float32", 4, 0), ("bfloat16", 2, 1), ("float16", 2, 2)]
)
def test_bias(fake, dtype, size, code):
    bias = fake.tensor((E, N), dtype, strides=(2 * N, 1))
    sm12x.grouped_gemm(**operands(fake, bias=bias))
    p, g = (each.params for each in fake.launches)
    assert (p.bias, p.stride_bias, p.bias_element_bytes, g.bias_type) == (bias.address, 2 * N, size, code)


def test_strides_and_wide_offsets_travel_in_elements(fake):
    t = fake.tensor
    args = operands(
        fake,
        a=t((M, K), "float8_e4m3fn", strides=(K + 16, 1)),
        b=t((E, N, K), "float8_e4m3fn", strides=(N * K * 2, K + 32, 1)),
        out=t((M, N), "bfloat16", strides=(N + 8, 1)),
        offsets=t((E + 1,), "int64"),
        b_scale=t((E, N), "float32", strides=(N + 3, 1)),
    )
    sm12x.grouped_gemm(**args)
    p = fake.launches[0].params
    assert (p.stride_a, p.stride_b, p.stride_b_group, p.stride_d) == (K + 16, K + 32, 2 * N * K, N + 8)
    assert (p.offsets_are_64_bit, p.stride_b_scale) == (1, N + 3)


def test_the_stride_of_a_single_row_means_nothing(fake):
    t = fake.tensor
    sm12x.grouped_gemm(
        **operands(
            fake,
            1,
            1,
            a=t((1, K), "float8_e4m3fn", strides=(3, 1)),
            out=t((1, N), "bfloat16", strides=(1, 1)),
        )
    )
    p = fake.launches[0].params
    assert (p.stride_a, p.stride_d) == (K, N)


def test_without_out_a_new_tensor_of_the_same_framework(fake):
    for name in ("bfloat16", "float16"):
        args = operands(fake, out_dtype=name)
        del args["out"]
        out = sm12x.grouped_gemm(**args)
        assert isinstance(out, Tensor)
        assert (out.shape, out.dtype.name) == ((M, N), name)
        assert fake.launches[-2].params.d == out.address


def test_out_dtype_may_be_the_frameworks_own(fake):
    out = sm12x.grouped_gemm(**{**operands(fake), "out": None, "out_dtype": sys.modules["torch"].float16})
    assert out.dtype.name == "float16"


@pytest.mark.parametrize(("m", "e"), [(0, E), (5, 0), (0, 0)])
def test_nothing_to_do_launches_nothing(fake, m, e):
    args = operands(fake, m, e)
    assert sm12x.grouped_gemm(**args) is args["out"]
    del args["out"]
    assert sm12x.grouped_gemm(**args).shape == (m, N)
    assert nothing_happened(fake)


def test_uint8_takes_its_type_from_dtype(fake):
    t = fake.tensor
    raw = {"a": t((M, K), "uint8"), "b": t((E, N, K), "uint8")}
    for dtype in ("float8_e4m3fn", ("float8_e4m3fn", "float8_e4m3fn"), ["float8_e4m3fn"] * 2):
        sm12x.grouped_gemm(**operands(fake, **raw, dtype=dtype))
    assert len(fake.launches) == 6
    with pytest.raises(TypeError, match="a: uint8 data needs dtype="):
        sm12x.grouped_gemm(**operands(fake, **raw))
    with pytest.raises(ValueError, match="dtype: expected one of float8_e4m3fn, float8_e5m2"):
        sm12x.grouped_gemm(**operands(fake, **raw, dtype="float8"))
    with pytest.raises(TypeError, match="a: expected float8_e5m2 as dtype= says, got float8_e4m3fn"):
        sm12x.grouped_gemm(**operands(fake, dtype="float8_e5m2"))


@pytest.mark.skipif(not (SHIPPED / "manifest.json").exists(), reason="cubins/manifest.json is not built")
@pytest.mark.parametrize("major", ["12", "13"])
@pytest.mark.parametrize("capability", [(12, 0), (12, 1), (9, 0)])
def test_every_shipped_variant_is_launched_as_its_manifest_says(monkeypatch, capability, major):
    fake = install(monkeypatch, SHIPPED, major=major, gpus=[FakeGpu("x", capability, 48)])
    for variant in manifest.default().gemms("fp8_ptr_array"):
        out = fake.tensor((M, N), variant.out)
        sm12x.grouped_gemm(**operands(fake, out=out, out_dtype=variant.out, variant=variant.key))
        prepare, gemm = fake.launches[-2:]
        assert gemm.symbol == variant.symbol
        assert (gemm.block[0], gemm.shared_memory) == (variant.threads, variant.shared_memory)
        assert prepare.params.swap_ab == variant.swap_ab
        args = {**groups(fake, [(3, 64, 128), (5, 8, 16)]), "out": None}
        sm12x.grouped_gemm(**args, out_dtype=variant.out, variant=variant.key)
        assert fake.launches[-1].symbol == variant.symbol
        assert fake.launches[-2].params.count == 2
    assert all(image.startswith(b"\x7fELF") for image in fake.loaded)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("uint8", 1),
        ("bool", 1),
        ("float8_e4m3fn", 1),
        ("bfloat16", 2),
        ("int64", 8),
        ("float32", 4),
        ("int8", 1),
    ],
)
def test_itemsize(dtype, size):
    assert validate.itemsize(dtype) == size


def test_one_device_of_two_generations(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path, gpus=[FakeGpu("GB10", (12, 1), 48), FakeGpu("H200", (9, 0), 132)])
    for device in (0, 1):
        args = {
            name: fake.tensor(x.shape, x.dtype.name, device)
            for name, x in operands(fake, 4096, 128, 2048).items()
        }
        sm12x.grouped_gemm(**args)
        assert fake.launches[-1].params.ctas == fake.gpus[device].sm_count


def test_a_framework_of_another_kind_of_array(fake):
    array = types.SimpleNamespace(shape=(M, K))
    with pytest.raises(TypeError, match="a: expected an array"):
        sm12x.grouped_gemm(**{**operands(fake), "a": array})

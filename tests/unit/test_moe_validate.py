"""What the checks of an expert layer say of its arrays: sizes, modes, strides, for any framework's memory."""

from __future__ import annotations

import pytest

from sm12x.abi import SM12X_SCALE_GROUP, SM12X_SCALE_ONE, SM12X_SCALE_VALUE, SM12X_SCALE_VECTOR
from sm12x.arrays import Array, compact_strides
from sm12x.ops.moe_validate import (
    CallArrays,
    LayerArrays,
    LayerOptions,
    take_call,
    take_layer,
    take_quantisation,
    take_routes,
)
from sm12x.ops.validate import Matrix

E4M3 = "float8_e4m3fn"
T, K, E, H, INNER = 6, 4, 8, 64, 32


def array(shape, dtype, strides=None, device=0, readonly=False):
    """Memory of a GPU that nobody has."""
    strides = compact_strides(shape) if strides is None else strides
    return Array(0x7F00_0000_0000, shape, strides, dtype, device, "torch", None, readonly)


def layer(**more):
    given = {
        "w1": array((E, 2 * INNER, H), E4M3),
        "w2": array((E, H, INNER), E4M3),
        "w1_scale": 1.0,
        "w2_scale": 1.0,
        "a1_scale": None,
        "a2_scale": None,
        "expert_map": None,
        "bias1": None,
        "bias2": None,
    }
    return LayerArrays(**{**given, **more})


def call(**more):
    given = {
        "x": array((T, H), "bfloat16"),
        "topk_weights": array((T, K), "float32"),
        "topk_ids": array((T, K), "int32"),
        "out": None,
        "workspace": None,
    }
    return CallArrays(**{**given, **more})


def test_a_plain_layer():
    got = take_layer(layer(), LayerOptions())
    assert (got.experts, got.hidden, got.intermediate, got.global_experts) == (E, H, INNER, 0)
    assert (got.activation.name, got.activation.gated, got.weight_on_input) == ("silu", True, False)
    assert (got.a1_scale_mode, got.a2_scale_mode) == (None, None)
    assert got.w1.inner == Matrix(2 * INNER, H, H, 1)
    assert got.w2.inner == Matrix(H, INNER, INNER, 1)
    assert (got.w1.group_stride, got.w2.group_stride) == (2 * INNER * H, H * INNER)
    for weights in (got.w1, got.w2):
        assert (weights.scale_mode, weights.scale_stride, weights.bias) == (SM12X_SCALE_VALUE, 0, None)


@pytest.mark.parametrize(
    ("shape", "mode", "stride"),
    [
        ((1,), SM12X_SCALE_ONE, 0),
        ((), SM12X_SCALE_ONE, 0),
        ((E,), SM12X_SCALE_GROUP, 0),
        ((E, 1), SM12X_SCALE_GROUP, 0),
        ((E, 2 * INNER), SM12X_SCALE_VECTOR, 2 * INNER),
        ((E, 2 * INNER, 1), SM12X_SCALE_VECTOR, 2 * INNER),
    ],
)
def test_scales_of_weights(shape, mode, stride):
    got = take_layer(layer(w1_scale=array(shape, "float32")), LayerOptions())
    assert (got.w1.scale_mode, got.w1.scale_stride) == (mode, stride)


def test_strides_of_weights_scales_and_biases():
    """Slices of larger arrays: elements between rows and between experts."""
    got = take_layer(
        layer(
            w1=array((E, 2 * INNER, H), "uint8", (9000 * 16, 96, 1)),
            w2=array((E, H, INNER), E4M3, (16, E * 16 + 16, 1)),
            w2_scale=array((E, H), "float32", (100, 1)),
            bias1=array((E, 2 * INNER), "float16", (70, 1)),
            bias2=array((E, H), "float32"),
        ),
        LayerOptions(dtype=E4M3),
    )
    assert (got.w1.inner.stride, got.w1.group_stride) == (96, 9000 * 16)
    assert (got.w2.inner.stride, got.w2.group_stride) == (E * 16 + 16, 16)
    assert (got.w2.scale_mode, got.w2.scale_stride) == (SM12X_SCALE_VECTOR, 100)
    assert (got.w1.bias, got.w1.bias_stride) == ("float16", 70)
    assert (got.w2.bias, got.w2.bias_stride) == ("float32", H)


@pytest.mark.parametrize(("scale", "mode"), [(0.5, SM12X_SCALE_VALUE), ((1, 1), SM12X_SCALE_ONE)])
def test_static_scales_each_by_itself(scale, mode):
    given = scale if isinstance(scale, float) else array(scale, "float32")
    first = take_layer(layer(a1_scale=given), LayerOptions())
    assert (first.a1_scale_mode, first.a2_scale_mode) == (mode, None)
    second = take_layer(layer(a2_scale=given), LayerOptions())
    assert (second.a1_scale_mode, second.a2_scale_mode) == (None, mode)


def test_not_gated_and_mapped():
    got = take_layer(
        layer(w1=array((E, INNER, H), E4M3), expert_map=array((99,), "int32")),
        LayerOptions(activation="relu2", gated=False, apply_router_weight_on_input=True, early_routes=True),
    )
    assert (got.intermediate, got.global_experts, got.weight_on_input) == (INNER, 99, True)
    assert got.early_routes
    assert not take_layer(layer(), LayerOptions()).early_routes


def test_what_a_call_brings():
    plan = take_layer(layer(), LayerOptions())
    got = take_call(plan, call(), None)
    assert (got.dtype, got.x, got.out) == ("bfloat16", Matrix(T, H, H, 2), Matrix(T, H, H, 2))
    routes = got.routes
    assert (routes.tokens, routes.top_k, routes.experts, routes.most_rows) == (T, K, E, T * K)
    assert (routes.global_experts, routes.wide_ids, routes.weighted) == (0, False, True)
    assert got.workspace_bytes is None
    more = call(
        x=array((T, H), "float16", (96, 1)),
        out=array((T, H), "float16", (128, 1)),
        topk_ids=array((T, K), "int64"),
        workspace=array((100, 4), "float32"),
    )
    got = take_call(plan, more, array((9,), "int32"))
    assert (got.dtype, got.x.stride, got.out.stride, got.workspace_bytes) == ("float16", 96, 128, 1600)
    assert (got.routes.wide_ids, got.routes.global_experts) == (True, 9)


def test_bad_workspaces():
    plan = take_layer(layer(), LayerOptions())
    with pytest.raises(ValueError, match="^workspace: expected a contiguous array"):
        take_call(plan, call(workspace=array((10, 4), "uint8", (8, 1))), None)
    with pytest.raises(ValueError, match="^workspace: expected an array that can be written"):
        take_call(plan, call(workspace=array((10, 4), "uint8", readonly=True)), None)


def test_every_array_has_its_name():
    """What the check of devices is given: all arrays, and no numbers."""
    w1_scale = array((E,), "float32")
    named = dict(layer(w1_scale=w1_scale, a1_scale=0.5).named())
    assert list(named) == list(LayerArrays._fields)
    assert named["w1_scale"] is w1_scale
    assert [name for name, value in named.items() if value is not None] == ["w1", "w2", "w1_scale"]
    assert list(dict(call().named())) == list(CallArrays._fields)


def test_quantisations():
    x = array((T, H), "bfloat16", (96, 1))
    got = take_quantisation(x, None, True, None, None)
    assert (got.tokens, got.k, got.x_dtype, got.mode) == (T, H, "bfloat16", "per_token")
    assert (got.scale_mode, got.scale_shape) == (None, (T, 1))
    assert (got.x, got.q) == (Matrix(T, H, 96, 2), Matrix(T, H, H, 1))
    got = take_quantisation(x, None, False, array((T, H), E4M3, (80, 1)), array((1,), "float32"))
    assert (got.mode, got.scale_shape, got.q.stride) == ("per_tensor", (1,), 80)
    for scale, mode in ((2.0, SM12X_SCALE_VALUE), (array((), "float32"), SM12X_SCALE_ONE)):
        got = take_quantisation(x, scale, True, None, None)
        assert (got.mode, got.scale_mode, got.scale_shape) == ("static", mode, (1,))


def test_one_row_and_none_may_have_any_strides():
    """As frameworks give them."""
    plan = take_layer(layer(), LayerOptions())
    for tokens in (0, 1):
        given = call(
            x=array((tokens, H), "bfloat16", (0, 1)),
            topk_ids=array((tokens, 1), "int32", (7, 5)),
            topk_weights=array((tokens, 1), "float32", (0, 0)),
        )
        assert take_call(plan, given, None).x.rows == tokens
    assert take_routes(array((1, 3), "int32", (0, 1)), 2, None, None).weighted is False

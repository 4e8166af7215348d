"""Bad input of `fused_moe`: the argument is named, and `out` is not written."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

import sm12x

T, K, E, H, INNER = 5, 2, 3, 32, 48
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


def layer():
    """A good call: every argument that may be an array is one."""
    return {
        "x": np.ones((T, H), BF16),
        "w1": np.ones((E, 2 * INNER, H), E4M3),
        "w2": np.ones((E, H, INNER), E4M3),
        "topk_weights": np.ones((T, K), np.float32),
        "topk_ids": np.zeros((T, K), np.int32),
        "w1_scale": np.ones((E, 2 * INNER), np.float32),
        "w2_scale": np.ones((E, H, 1), np.float32),
        "a1_scale": np.ones(1, np.float32),
        "a2_scale": np.ones(1, np.float32),
        "expert_map": np.zeros(4, np.int32),
        "bias1": np.ones((E, 2 * INNER), np.float32),
        "bias2": np.ones((E, H), BF16),
        "out": np.full((T, H), 7, BF16),
    }


def given(**values):
    return lambda: values


def shaped(name, *shape, dtype=None):
    """The argument with another shape, or also another dtype."""
    return lambda: {name: np.ones(shape, layer()[name].dtype if dtype is None else dtype)}


def typed(name, dtype):
    return lambda: {name: layer()[name].astype(dtype)}


def strided(name, *shape, at=np.s_[...]):
    """A view of an array of `shape`."""
    return lambda: {name: np.ones(shape, layer()[name].dtype)[at]}


BAD = [
    # dtypes
    (typed("x", np.float32), TypeError, "x: expected bfloat16 or float16, got float32"),
    (typed("x", np.float64), TypeError, "x: expected bfloat16 or float16, got float64"),
    (typed("w1", np.float16), TypeError, "w1: expected float8_e4m3fn, or uint8 with dtype=, got float16"),
    (typed("w2", ml_dtypes.float8_e5m2), TypeError, "w2: expected float8_e4m3fn, .*got float8_e5m2"),
    (typed("w1", np.uint8), TypeError, "w1: uint8 data needs dtype='float8_e4m3fn'"),
    (typed("w2", np.uint8), TypeError, "w2: uint8 data needs dtype='float8_e4m3fn'"),
    (given(dtype="float8_e5m2"), ValueError, "dtype: expected float8_e4m3fn, got 'float8_e5m2'"),
    (given(dtype=("float8_e4m3fn",) * 2), TypeError, "dtype: expected the name of a dtype"),
    (typed("topk_weights", BF16), TypeError, "topk_weights: expected float32, got bfloat16"),
    (typed("topk_weights", np.float16), TypeError, "topk_weights: expected float32, got float16"),
    (typed("topk_ids", np.uint8), TypeError, "topk_ids: expected int32 or int64, got uint8"),
    (typed("w1_scale", np.float64), TypeError, "w1_scale: expected float32, got float64"),
    (typed("w2_scale", BF16), TypeError, "w2_scale: expected float32, got bfloat16"),
    (typed("a1_scale", np.float16), TypeError, "a1_scale: expected float32, got float16"),
    (typed("a2_scale", np.float64), TypeError, "a2_scale: expected float32, got float64"),
    (typed("expert_map", np.int64), TypeError, "expert_map: expected int32, got int64"),
    (typed("bias1", np.float64), TypeError, "bias1: expected float32, bfloat16 or float16, got float64"),
    (typed("bias2", np.int32), TypeError, "bias2: expected float32, bfloat16 or float16, got int32"),
    (typed("out", np.float16), TypeError, "out: expected bfloat16, the dtype of x, got float16"),
    # ranks and shapes
    (shaped("x", T, 1, H), ValueError, r"x: expected shape \(T, H\), got \(5, 1, 32\)"),
    (shaped("x", T, H + 16), ValueError, "x: expected H = 32, the last axis of w1, got 48"),
    (shaped("w1", 2 * INNER, H), ValueError, r"w1: expected shape \(E, 2I, H\), got \(96, 32\)"),
    (shaped("w2", H, INNER), ValueError, r"w2: expected shape \(E, H, I\), got \(32, 48\)"),
    (shaped("w1", 0, 2 * INNER, H), ValueError, "w1: expected 1 to 1024 experts, got 0"),
    (shaped("w1", 1025, 32, 16), ValueError, "w1: expected 1 to 1024 experts, got 1025"),
    (shaped("w1", E, 2 * INNER, 24), ValueError, "w1: expected H to be a positive multiple of 16, got 24"),
    (shaped("w1", E, 2 * INNER, 0), ValueError, "w1: expected H to be a positive multiple of 16, got 0"),
    (
        shaped("w1", E, INNER, H),
        ValueError,
        "w1: expected 2I rows an expert, I a positive multiple of 16, got 48",
    ),
    (shaped("w1", E, 0, H), ValueError, "w1: expected 2I rows an expert.*got 0"),
    (
        shaped("w2", E, H, 2 * INNER),
        ValueError,
        r"w2: expected shape \(E, H, I\) = \(3, 32, 48\).*\(3, 32, 96\)",
    ),
    (shaped("w2", E, INNER, H), ValueError, r"w2: expected shape .*got \(3, 48, 32\)"),
    (shaped("w2", E + 1, H, INNER), ValueError, r"w2: expected shape .*got \(4, 32, 48\)"),
    (shaped("topk_ids", T), ValueError, r"topk_ids: expected shape \(T, k\), got \(5,\)"),
    (shaped("topk_ids", T, 0), ValueError, "topk_ids: expected at least one route per token"),
    (
        lambda: {"topk_ids": np.zeros((4, K), np.int32), "topk_weights": np.ones((4, K), np.float32)},
        ValueError,
        "topk_ids: expected 5 tokens, as many as x, got 4",
    ),
    (
        shaped("topk_weights", T, K + 1),
        ValueError,
        r"topk_weights: expected shape \(5, 2\), that of topk_ids",
    ),
    (shaped("expert_map", 2, 2), ValueError, r"expert_map: expected shape \(E_global,\), got \(2, 2\)"),
    (shaped("expert_map", 0), ValueError, "expert_map: expected 1 to .*got 0"),
    (
        shaped("w1_scale", 2 * INNER),
        ValueError,
        r"w1_scale: expected one value, per expert \(3,\).*got shape \(96,\)",
    ),
    (
        shaped("w1_scale", E, INNER),
        ValueError,
        r"w1_scale: expected one value.*\(3, 96\).*got shape \(3, 48\)",
    ),
    (
        shaped("w2_scale", E, INNER),
        ValueError,
        r"w2_scale: expected one value.*\(3, 32\).*got shape \(3, 48\)",
    ),
    (shaped("a1_scale", T, 1), ValueError, r"a1_scale: expected one value, got shape \(5, 1\)"),
    (shaped("a2_scale", E), ValueError, r"a2_scale: expected one value, got shape \(3,\)"),
    (shaped("bias1", E, INNER), ValueError, r"bias1: expected shape \(3, 96\), got \(3, 48\)"),
    (shaped("bias2", H), ValueError, r"bias2: expected shape \(3, 32\), got \(32,\)"),
    (shaped("out", T, H + 16), ValueError, r"out: expected shape \(5, 32\), that of x, got \(5, 48\)"),
    # strides
    (lambda: {"x": np.ones((H, T), BF16).T}, ValueError, "x: expected its last axis to be contiguous"),
    (strided("x", T, H + 4, at=np.s_[:, :H]), ValueError, "x: expected a row stride .*multiple of 8"),
    (strided("w1", E, 2 * INNER, H + 8, at=np.s_[..., :H]), ValueError, "w1: expected a row stride"),
    (strided("w2", E, H, 2 * INNER, at=np.s_[..., ::2]), ValueError, "w2: expected its last axis"),
    (strided("out", T, H + 1, at=np.s_[:, 1:]), ValueError, "out: expected a row stride"),
    (strided("topk_ids", T, 2 * K, at=np.s_[:, :K]), ValueError, "topk_ids: expected contiguous values"),
    (
        lambda: {"topk_weights": np.ones((K, T), np.float32).T},
        ValueError,
        "topk_weights: expected contiguous",
    ),
    (strided("expert_map", 8, at=np.s_[::2]), ValueError, "expert_map: expected contiguous values"),
    (strided("w1_scale", E, 4 * INNER, at=np.s_[:, ::2]), ValueError, "w1_scale: expected contiguous values"),
    (strided("bias1", E, 4 * INNER, at=np.s_[:, ::2]), ValueError, "bias1: expected contiguous values"),
    (strided("bias2", E, H, at=np.s_[::-1]), ValueError, "bias2: expected strides that are not negative"),
    # values
    (given(w1_scale=True), TypeError, "w1_scale: expected a float or a float32 array, got a bool"),
    (given(w2_scale=1e39), ValueError, "w2_scale: expected a value that float32 holds"),
    (given(a1_scale=0.0), ValueError, "a1_scale: expected a positive finite value of float32, got 0.0"),
    (given(a2_scale=-1.0), ValueError, "a2_scale: expected a positive finite value of float32, got -1.0"),
    (given(a2_scale=math.nan), ValueError, "a2_scale: expected a positive finite value"),
    (given(a1_scale="x"), TypeError, "a1_scale: expected a NumPy array"),
    # options
    (given(activation="swish"), ValueError, "activation: expected one of silu, .*got 'swish'"),
    (given(activation=None), TypeError, "activation: expected a str, got NoneType"),
    (given(gated=0), TypeError, "gated: expected a bool, got int"),
    (given(gated=False, activation="swigluoai"), ValueError, "gated: expected True with activation"),
    (given(alpha=1.0), ValueError, "alpha: expected None with activation 'silu'"),
    (given(beta=1.0), ValueError, "beta: expected None with activation 'silu'"),
    (given(activation="gelu", limit=7.0), ValueError, "limit: expected None with activation 'gelu'"),
    (given(limit=-7.0), ValueError, "limit: expected a positive number, got -7.0"),
    (
        given(early_routes=1),
        TypeError,
        "early_routes: expected a bool, got int",
    ),
    (
        given(apply_router_weight_on_input=1),
        TypeError,
        "apply_router_weight_on_input: expected a bool, got int",
    ),
    (
        given(apply_router_weight_on_input=True),
        ValueError,
        r"apply_router_weight_on_input: expected one route per token .*got shape \(5, 2\)",
    ),
    # what there is not with NumPy arrays
    (given(stream=0), ValueError, "stream: expected None with NumPy arrays"),
    (given(workspace=np.zeros(1 << 20, np.uint8)), ValueError, "workspace: expected None with NumPy arrays"),
    (given(backend="cuda"), ValueError, "backend: expected one of auto, emulator, got 'cuda'"),
    # what is no array
    (given(x=[[1.0]]), TypeError, "x: expected an array"),
    (given(w1=None), TypeError, "w1: expected a NumPy array like the other arguments, got NoneType"),
    (given(topk_weights=None), TypeError, "topk_weights: expected a NumPy array"),
    (given(topk_ids=[[0, 1]] * T), TypeError, "topk_ids: expected a NumPy array like the other .*got list"),
    (given(bias1=1.0), TypeError, "bias1: expected a NumPy array"),
    (given(out=[]), TypeError, "out: expected a NumPy array"),
]


def call(arguments):
    names = ("x", "w1", "w2", "topk_weights", "topk_ids")
    rest = {name: value for name, value in arguments.items() if name not in names}
    return sm12x.fused_moe(*(arguments[name] for name in names), **rest)


def test_the_good_call_is_good():
    arguments = layer()
    assert call(arguments) is arguments["out"]
    assert (arguments["out"] != 7).all()


@pytest.mark.parametrize(("edit", "error", "words"), BAD)
def test_bad_input_names_the_argument_and_writes_nothing(edit, error, words):
    arguments = {**layer(), **edit()}
    before = np.array(arguments["out"])
    with pytest.raises(error, match=f"^{words}"):
        call(arguments)
    np.testing.assert_array_equal(np.array(arguments["out"]), before)


@pytest.mark.parametrize("name", [name for name in layer() if name != "out"])
def test_out_shares_no_memory_with_any_input(name):
    """Not even with the routes, which are read before the first output is written."""
    arguments = layer()
    room = np.zeros(1 << 14, np.uint8)
    taken = arguments[name]
    view = room[: taken.nbytes].view(taken.dtype).reshape(taken.shape)
    view[...] = taken
    arguments[name] = view
    arguments["out"] = room[: T * H * 2].view(BF16).reshape(T, H)
    with pytest.raises(ValueError, match=f"^out: expected memory of its own, .* overlaps {name}"):
        call(arguments)
    np.testing.assert_array_equal(view, taken)


def test_out_that_cannot_be_written():
    arguments = layer()
    arguments["out"].flags.writeable = False
    with pytest.raises(ValueError, match="^out: expected an array that can be written"):
        call(arguments)


def test_not_gated_w1_has_one_row_for_each_of_w2s_columns():
    arguments = layer()
    arguments.update(
        gated=False,
        w1=np.ones((E, INNER, H), E4M3),
        w1_scale=np.ones((E, INNER), np.float32),
        bias1=np.ones((E, INNER), np.float32),
    )
    assert call(arguments) is arguments["out"]
    with pytest.raises(ValueError, match=r"^w2: expected shape \(E, H, I\) = \(3, 32, 96\)"):
        call({**layer(), "gated": False})
    with pytest.raises(ValueError, match=r"^w1: expected shape \(E, I, H\)"):
        call({**arguments, "w1": np.ones((INNER, H), E4M3)})


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="variant"):
        call({**layer(), "variant": None})

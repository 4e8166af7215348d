"""Checks of what a caller passes to `quantize_fp8`, `route` and `fused_moe`.

As in `validate`, every failure is a ValueError or TypeError that names the argument, and nothing here looks
at addresses or devices: arrays of the host and of a GPU are checked by the same rules. What a layer is made
of (`take_layer`) is checked apart from what each call brings (`take_call`), so that a plan checks it once.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..abi import SM12X_SCALE_ONE, SM12X_SCALE_VALUE
from ..arrays import Array
from . import row_layout, validate
from .activation import Activation, activation, flag
from .validate import Matrix, Scale

E4M3 = "float8_e4m3fn"
QUANTISED_FROM = ("bfloat16", "float16", "float32")
LAYER_DTYPES = ("bfloat16", "float16")
MAX_TOKENS = 65_536

PER_TOKEN, PER_TENSOR, STATIC = "per_token", "per_tensor", "static"


def static_scale(scale: Scale, argument: str) -> int:
    """The SM12X_SCALE_* mode of a static scale of activations, which is one value. What an array holds is not
    looked at; a number must be positive, since values are divided by it."""
    if not isinstance(scale, Array):
        held = ctypes.c_float(scale).value
        if not 0 < held < math.inf:
            raise ValueError(f"{argument}: expected a positive finite value of float32, got {scale!r}")
        return SM12X_SCALE_VALUE
    validate.float32(scale, argument)
    if math.prod(scale.shape) != 1:
        raise ValueError(f"{argument}: expected one value, got shape {scale.shape}")
    return SM12X_SCALE_ONE


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A call of `quantize_fp8`. `mode` is PER_TOKEN, PER_TENSOR or STATIC; `scale_mode` that of a static
    scale, SM12X_SCALE_VALUE or SM12X_SCALE_ONE; `scale_shape` that of the scale that is returned."""

    tokens: int
    k: int
    x_dtype: str
    mode: str
    scale_mode: int | None
    scale_shape: tuple[int, ...]
    x: Matrix
    q: Matrix


def take_quantisation(
    x: Array, scale: Scale | None, per_token: Any, out: Array | None, out_scale: Array | None
) -> Quantisation:
    """The arguments of `quantize_fp8`, validated but for addresses. Raises as it says."""
    if x.dtype not in QUANTISED_FROM:
        raise TypeError(f"x: expected {', '.join(QUANTISED_FROM)}, got {x.dtype}")
    flag(per_token, "per_token")
    validate.rank(x, "x", "(T, K)", 2)
    tokens, k = x.shape
    if k <= 0 or k % 16:
        raise ValueError(f"x: expected K to be a positive multiple of 16, got {k}")
    for letter, extent in (("T", tokens), ("K", k)):
        if extent > validate.INT32_MAX:
            raise ValueError(f"x: expected {letter} of at most {validate.INT32_MAX}, got {extent}")
    rows = validate.matrix(x, "x", validate.itemsize(x.dtype))
    mode = STATIC if scale is not None else PER_TOKEN if per_token else PER_TENSOR
    scale_mode = None if scale is None else static_scale(scale, "scale")
    codes = Matrix(tokens, k, k, 1)
    if out is not None:
        if out.dtype not in (E4M3, "uint8"):
            raise TypeError(f"out: expected {E4M3} or uint8, got {out.dtype}")
        if out.shape != x.shape:
            raise ValueError(f"out: expected shape {x.shape}, got {out.shape}")
        validate.writable(out, "out")
        codes = validate.matrix(out, "out", 1)
    if out_scale is not None:
        _quantised_scale(out_scale, mode, tokens)
    shape = (tokens, 1) if mode == PER_TOKEN else (1,)
    return Quantisation(tokens, k, x.dtype, mode, scale_mode, shape, rows, codes)


def _quantised_scale(out_scale: Array, mode: str, tokens: int) -> None:
    if mode == STATIC:
        raise ValueError("out_scale: expected None where scale is given, got an array")
    validate.float32(out_scale, "out_scale")
    shapes = ((tokens, 1), (tokens,)) if mode == PER_TOKEN else ((1,), (), (1, 1))
    if out_scale.shape not in shapes:
        wanted = " or ".join(map(str, shapes[:2])) if mode == PER_TOKEN else "(1,)"
        raise ValueError(f"out_scale: expected shape {wanted}, got {out_scale.shape}")
    if mode == PER_TOKEN:
        validate.dense(out_scale, "out_scale", 0)
    validate.writable(out_scale, "out_scale")


@dataclass(frozen=True, slots=True)
class Routes:
    """A call of `route`. `global_experts`: entries of expert_map, 0 where there is none."""

    tokens: int
    top_k: int
    experts: int
    global_experts: int
    wide_ids: bool
    weighted: bool

    @property
    def most_rows(self) -> int:
        """Rows where every route is valid."""
        return self.tokens * self.top_k


def take_routes(
    topk_ids: Array, num_experts: Any, topk_weights: Array | None, expert_map: Array | None
) -> Routes:
    """The arguments of `route`, validated but for addresses. Raises as it says."""
    if isinstance(num_experts, bool) or not isinstance(num_experts, int):
        raise TypeError(f"num_experts: expected an int, got {type(num_experts).__name__}")
    if not 1 <= num_experts <= validate.MAX_GROUPS:
        raise ValueError(f"num_experts: expected 1 to {validate.MAX_GROUPS}, got {num_experts}")
    if topk_ids.dtype not in ("int32", "int64"):
        raise TypeError(f"topk_ids: expected int32 or int64, got {topk_ids.dtype}")
    validate.rank(topk_ids, "topk_ids", "(T, k)", 2)
    tokens, top_k = topk_ids.shape
    if tokens > MAX_TOKENS:
        raise ValueError(f"topk_ids: expected at most {MAX_TOKENS} tokens, got {tokens}")
    if top_k < 1:
        raise ValueError(f"topk_ids: expected at least one route per token, got shape {topk_ids.shape}")
    if tokens * top_k > validate.INT32_MAX:
        raise ValueError(
            f"topk_ids: expected at most {validate.INT32_MAX} routes, got {tokens * top_k} of shape "
            f"{topk_ids.shape}"
        )
    row_layout.dense_rows(topk_ids, "topk_ids", 2)
    if topk_weights is not None:
        validate.float32(topk_weights, "topk_weights")
        if topk_weights.shape != topk_ids.shape:
            raise ValueError(
                f"topk_weights: expected shape {topk_ids.shape}, that of topk_ids, got {topk_weights.shape}"
            )
        row_layout.dense_rows(topk_weights, "topk_weights", 2)
    global_experts = 0 if expert_map is None else _expert_map(expert_map)
    return Routes(
        tokens, top_k, num_experts, global_experts, topk_ids.dtype == "int64", topk_weights is not None
    )


def _expert_map(array: Array) -> int:
    """Entries of an expert_map."""
    if array.dtype != "int32":
        raise TypeError(f"expert_map: expected int32, got {array.dtype}")
    validate.rank(array, "expert_map", "(E_global,)", 1)
    entries = array.shape[0]
    if not 1 <= entries <= validate.INT32_MAX:
        raise ValueError(f"expert_map: expected 1 to {validate.INT32_MAX} entries, got {entries}")
    validate.dense(array, "expert_map", 0)
    return entries


class LayerOptions(NamedTuple):
    """The arguments of a layer that are no arrays."""

    activation: Any = "silu"
    gated: Any = True
    apply_router_weight_on_input: Any = False
    alpha: Any = None
    beta: Any = None
    limit: Any = None
    dtype: Any = None
    early_routes: Any = False


class LayerArrays(NamedTuple):
    """The arrays of a layer as they were taken in; a scale of weights that is not given is 1.0, one of
    activations None."""

    w1: Array
    w2: Array
    w1_scale: Scale
    w2_scale: Scale
    a1_scale: Scale | None
    a2_scale: Scale | None
    expert_map: Array | None
    bias1: Array | None
    bias2: Array | None

    def named(self) -> tuple[tuple[str, Array | None], ...]:
        """Every array by its argument's name."""
        pairs = zip(self._fields, self, strict=True)
        return tuple((name, value if isinstance(value, Array) else None) for name, value in pairs)


@dataclass(frozen=True, slots=True)
class Weights:
    """One of the layer's two weights, (E, rows, k): `inner` its rows of one expert, `group_stride` elements
    between experts; the SM12X_SCALE_* mode of its scale with elements between experts where it is per
    channel; the dtype of its bias, None where there is none, with elements between experts."""

    inner: Matrix
    group_stride: int
    scale_mode: int
    scale_stride: int
    bias: str | None
    bias_stride: int


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer is, whatever its tokens. `a1_scale_mode`, `a2_scale_mode`: None for dynamic scales per
    token, else SM12X_SCALE_VALUE or SM12X_SCALE_ONE. `global_experts`: 0 where there is no expert_map."""

    experts: int
    hidden: int
    intermediate: int
    global_experts: int
    activation: Activation
    weight_on_input: bool
    w1: Weights
    w2: Weights
    a1_scale_mode: int | None
    a2_scale_mode: int | None
    early_routes: bool


def take_layer(given: LayerArrays, options: LayerOptions) -> Layer:
    """The arguments of `fused_moe` that make the layer, validated but for addresses. Raises as it says."""
    w1, w2 = given.w1, given.w2
    _fp8(w1, "w1", options.dtype)
    _fp8(w2, "w2", options.dtype)
    chosen = activation(options.activation, options.gated, options.alpha, options.beta, options.limit)
    weight_on_input = flag(options.apply_router_weight_on_input, "apply_router_weight_on_input")
    validate.rank(w1, "w1", "(E, 2I, H)" if chosen.gated else "(E, I, H)", 3)
    validate.rank(w2, "w2", "(E, H, I)", 3)
    experts, n1, hidden = w1.shape
    if not 1 <= experts <= validate.MAX_GROUPS:
        raise ValueError(f"w1: expected 1 to {validate.MAX_GROUPS} experts, got {experts}")
    if hidden <= 0 or hidden % 16:
        raise ValueError(f"w1: expected H to be a positive multiple of 16, got {hidden}")
    step = 32 if chosen.gated else 16
    if n1 <= 0 or n1 % step:
        raise ValueError(
            f"w1: expected {'2I' if chosen.gated else 'I'} rows an expert, I a positive multiple of 16, "
            f"got {n1}"
        )
    for letter, extent in (("rows", n1), ("H", hidden)):
        if extent > validate.INT32_MAX:
            raise ValueError(f"w1: expected {letter} of at most {validate.INT32_MAX}, got {extent}")
    intermediate = n1 // 2 if chosen.gated else n1
    if w2.shape != (experts, hidden, intermediate):
        raise ValueError(
            f"w2: expected shape (E, H, I) = {(experts, hidden, intermediate)} as w1 has them, got {w2.shape}"
        )
    return Layer(
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        global_experts=0 if given.expert_map is None else _expert_map(given.expert_map),
        activation=chosen,
        weight_on_input=weight_on_input,
        w1=_weights(w1, given.w1_scale, given.bias1, "1"),
        w2=_weights(w2, given.w2_scale, given.bias2, "2"),
        a1_scale_mode=None if given.a1_scale is None else static_scale(given.a1_scale, "a1_scale"),
        a2_scale_mode=None if given.a2_scale is None else static_scale(given.a2_scale, "a2_scale"),
        early_routes=flag(options.early_routes, "early_routes"),
    )


def _fp8(weights: Array, argument: str, dtype: Any) -> None:
    """Checks that weights are e4m3fn, or uint8 that `dtype=` says are."""
    named = None if dtype is None else validate.dtype_name(dtype, "dtype")
    if named not in (None, E4M3):
        raise ValueError(f"dtype: expected {E4M3}, got {dtype!r}")
    if weights.dtype == "uint8":
        if named is None:
            raise TypeError(f"{argument}: uint8 data needs dtype={E4M3!r}")
    elif weights.dtype != E4M3:
        raise TypeError(f"{argument}: expected {E4M3}, or uint8 with dtype=, got {weights.dtype}")


def _weights(weights: Array, scale: Scale, bias: Array | None, which: str) -> Weights:
    """One of the layer's weights with what belongs to it; `which`: "1" or "2"."""
    experts, n, _ = weights.shape
    inner = validate.matrix(weights, f"w{which}", 1, (1, 2))
    group_stride = row_layout.group_stride(weights, f"w{which}", inner)
    mode, stride = validate.packed_b_scale(scale, experts, n, f"w{which}_scale")
    if bias is None:
        return Weights(inner, group_stride, mode, stride, None, 0)
    validate.bias(bias, (experts, n), f"bias{which}")
    between = validate.between(bias, f"bias{which}", n)
    return Weights(inner, group_stride, mode, stride, bias.dtype, between)


class CallArrays(NamedTuple):
    """The arrays that each call of a layer brings, as they were taken in."""

    x: Array
    topk_weights: Array
    topk_ids: Array
    out: Array | None
    workspace: Array | None

    def named(self) -> tuple[tuple[str, Array | None], ...]:
        """Every array by its argument's name."""
        return tuple(zip(self._fields, self, strict=True))


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer. `x`, `out`: their rows; `dtype`: that of both."""

    dtype: str
    routes: Routes
    x: Matrix
    out: Matrix
    workspace_bytes: int | None


def take_call(layer: Layer, given: CallArrays, expert_map: Array | None) -> Call:
    """The arguments of `fused_moe` that each call brings, validated but for addresses. Raises as it says."""
    x, out = given.x, given.out
    if x.dtype not in LAYER_DTYPES:
        raise TypeError(f"x: expected {' or '.join(LAYER_DTYPES)}, got {x.dtype}")
    element = validate.itemsize(x.dtype)
    validate.rank(x, "x", "(T, H)", 2)
    tokens, hidden = x.shape
    if hidden != layer.hidden:
        raise ValueError(f"x: expected H = {layer.hidden}, the last axis of w1, got {hidden}")
    rows = validate.matrix(x, "x", element)
    routes = take_routes(given.topk_ids, layer.experts, given.topk_weights, expert_map)
    if routes.tokens != tokens:
        raise ValueError(f"topk_ids: expected {tokens} tokens, as many as x, got {routes.tokens}")
    if layer.weight_on_input and routes.top_k != 1:
        raise ValueError(
            "apply_router_weight_on_input: expected one route per token (topk_ids of shape (T, 1)), got "
            f"shape {given.topk_ids.shape}"
        )
    written = Matrix(tokens, hidden, hidden, element)
    if out is not None:
        if out.dtype != x.dtype:
            raise TypeError(f"out: expected {x.dtype}, the dtype of x, got {out.dtype}")
        if out.shape != x.shape:
            raise ValueError(f"out: expected shape {x.shape}, that of x, got {out.shape}")
        validate.writable(out, "out")
        written = validate.matrix(out, "out", element)
    workspace_bytes = None if given.workspace is None else validate.workspace_bytes(given.workspace)
    return Call(x.dtype, routes, rows, written, workspace_bytes)

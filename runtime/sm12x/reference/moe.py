"""The expert layer ``sm12x.fused_moe`` in NumPy: the backend, in float32, and the whole layer in float64.

Both quantise at the same points. What lies between them is rounded as the operation says in the backend, and
not at all in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.ops import moe_validate
from sm12x.ops.moe_validate import CallArrays, LayerArrays, LayerOptions
from sm12x.ops.route import Routing
from sm12x.reference.activation import activate, split
from sm12x.reference.backend import grouped_gemm_numpy
from sm12x.reference.gemm import grouped_gemm_float64
from sm12x.reference.problem import FP8, describe, described_scale, one_value, own_memory
from sm12x.reference.quantize import quantize_fp8_numpy
from sm12x.reference.rounding import Float64, format_of, round_to, to_e4m3
from sm12x.reference.route import route_numpy


@dataclass(frozen=True)
class Problem:
    """A layer and its tokens, checked. `call` also names the dtype of x."""

    layer: moe_validate.Layer
    call: moe_validate.Call
    x: NDArray[Any]  # (T, H), times the routes' weights where they apply to the input
    w1: NDArray[Any]  # (E, 2I, H), FP8
    w2: NDArray[Any]  # (E, H, I), FP8
    w1_scale: Any
    w2_scale: Any
    a1_scale: NDArray[np.float32] | None  # (1,)
    a2_scale: NDArray[np.float32] | None  # (1,)
    bias1: Any
    bias2: Any
    routing: Routing

    @property
    def rows(self) -> int:
        """Valid routes."""
        return int(self.routing.offsets[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of x, of what the stages give and of the result."""
        return format_of(self.call.dtype).numpy_dtype

    def gemm1(self) -> dict[str, Any]:
        """Arguments of the first grouped GEMM but for a and a_scale."""
        return {
            "b": self.w1,
            "b_scale": self.w1_scale,
            "offsets": self.routing.offsets,
            "row_index": self.routing.row_index[: self.rows],
            "bias": self.bias1,
        }

    def gemm2(self) -> dict[str, Any]:
        """Arguments of the second grouped GEMM but for a and a_scale."""
        weighted = not self.layer.weight_on_input
        return {
            "b": self.w2,
            "b_scale": self.w2_scale,
            "offsets": self.routing.offsets,
            "bias": self.bias2,
            "row_weight": self.routing.row_weight[: self.rows] if weighted else None,
        }


@dataclass(frozen=True)
class Stages:
    """What each stage of a layer gives. Rows are valid routes sorted by expert, R of them.

    x: (T, H), what is quantised: the argument, or weighted where the weights apply to the input.
    q1, s1: (T, H) float8_e4m3fn, (T, 1) or static (1,) float32.
    h: (R, I), the activation's result: of x's dtype, or float32 where a2_scale is static.
    q2, s2: (R, I) float8_e4m3fn, (R, 1) or static (1,) float32.
    y: (R, H) of x's dtype, weighted unless the weights apply to the input.
    out: (T, H) of x's dtype.
    """

    routing: Routing
    x: NDArray[Any]
    q1: NDArray[Any]
    s1: NDArray[np.float32]
    h: NDArray[Any]
    q2: NDArray[Any]
    s2: NDArray[np.float32]
    y: NDArray[Any]
    out: NDArray[Any]


def fused_moe_numpy(
    x: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *, out: Any = None, **options: Any
) -> NDArray[Any]:
    """``sm12x.fused_moe`` for NumPy arrays; arguments, result and errors are the same.

    Every rounding is where ``sm12x.fused_moe`` says; products and sums are float32 by BLAS, whose order
    differs from that of a GPU.
    """
    return fused_moe_stages(x, w1, w2, topk_weights, topk_ids, out=out, **options).out


def fused_moe_stages(
    x: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *, out: Any = None, **options: Any
) -> Stages:
    """`fused_moe_numpy` with what each of its stages gives."""
    problem = take_problem(x, w1, w2, topk_weights, topk_ids, out=out, **options)
    q1, s1 = quantize_fp8_numpy(problem.x, scale=problem.a1_scale)
    pre = grouped_gemm_numpy(q1, a_scale=s1, out_dtype="float32", **problem.gemm1())
    h = activate(*split(pre, problem.layer.activation), problem.layer.activation)
    if problem.a2_scale is None:
        h = rounded(h, problem.dtype)
    q2, s2 = quantize_fp8_numpy(h, scale=problem.a2_scale)
    y = grouped_gemm_numpy(q2, a_scale=s2, out_dtype=problem.call.dtype, **problem.gemm2())
    total = combine(y, problem.routing.route_row)
    if out is None:
        out = np.empty(problem.x.shape, problem.dtype)
    out[...] = rounded(total, problem.dtype)
    return Stages(problem.routing, problem.x, q1, s1, h, q2, s2, y, out)


def fused_moe_float64(x: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **options: Any) -> Float64:
    """``sm12x.fused_moe`` in float64, quantised at the same points; (T, H) float64, not rounded.

    Arguments are those of ``sm12x.fused_moe`` on NumPy arrays, without `out`. x is quantised as it says; the
    activation's result is rounded to x's dtype and quantised (static: divided by a2_scale and rounded to
    e4m3) from its float64 value; nothing else is rounded. Raises ValueError and TypeError as it does.
    """
    problem = take_problem(x, w1, w2, topk_weights, topk_ids, **options)
    q1, s1 = quantize_fp8_numpy(problem.x, scale=problem.a1_scale)
    pre, _ = grouped_gemm_float64(q1, a_scale=s1, **problem.gemm1())
    h = activate(*split(pre, problem.layer.activation), problem.layer.activation)
    if problem.a2_scale is None:
        q2, s2 = quantize_fp8_numpy(round_to(h, problem.call.dtype))
    else:
        q2, s2 = to_e4m3(h / problem.a2_scale.astype(np.float64)), problem.a2_scale
    y, _ = grouped_gemm_float64(q2, a_scale=s2, **problem.gemm2())
    return combine(y, problem.routing.route_row)


def take_problem(
    x: Any,
    w1: Any,
    w2: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    w1_scale: Any = None,
    w2_scale: Any = None,
    a1_scale: Any = None,
    a2_scale: Any = None,
    activation: Any = "silu",
    gated: Any = True,
    expert_map: Any = None,
    apply_router_weight_on_input: Any = False,
    bias1: Any = None,
    bias2: Any = None,
    alpha: Any = None,
    beta: Any = None,
    limit: Any = None,
    out: Any = None,
    dtype: Any = None,
    early_routes: Any = False,
) -> Problem:
    """The arguments of ``sm12x.fused_moe`` on NumPy arrays, checked, and routed. Raises as it says."""
    static = [
        (None, None) if scale is None else one_value(scale, name)
        for name, scale in (("a1_scale", a1_scale), ("a2_scale", a2_scale))
    ]

    def take(value: Any, name: str) -> Any:
        return None if value is None else describe(value, name)

    arrays = LayerArrays(
        w1=describe(w1, "w1"),
        w2=describe(w2, "w2"),
        w1_scale=described_scale(w1_scale, "w1_scale"),
        w2_scale=described_scale(w2_scale, "w2_scale"),
        a1_scale=static[0][1],
        a2_scale=static[1][1],
        expert_map=take(expert_map, "expert_map"),
        bias1=take(bias1, "bias1"),
        bias2=take(bias2, "bias2"),
    )
    options = LayerOptions(
        activation, gated, apply_router_weight_on_input, alpha, beta, limit, dtype, early_routes
    )
    layer = moe_validate.take_layer(arrays, options)
    brought = CallArrays(
        x=describe(x, "x"),
        topk_weights=describe(topk_weights, "topk_weights"),
        topk_ids=describe(topk_ids, "topk_ids"),
        out=take(out, "out"),
        workspace=None,
    )
    call = moe_validate.take_call(layer, brought, arrays.expert_map)
    if out is not None:
        inputs = (*arrays.named(), *brought.named()[:3])
        own_memory(out, "out", ((name, array.owner) for name, array in inputs if array is not None))
    if layer.weight_on_input:
        x = weighted(x, topk_weights)
    return Problem(
        layer=layer,
        call=call,
        x=x,
        w1=w1.view(FP8[moe_validate.E4M3]),
        w2=w2.view(FP8[moe_validate.E4M3]),
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=static[0][0],
        a2_scale=static[1][0],
        bias1=bias1,
        bias2=bias2,
        routing=route_numpy(topk_ids, layer.experts, topk_weights=topk_weights, expert_map=expert_map),
    )


def weighted(x: NDArray[Any], topk_weights: NDArray[np.float32]) -> NDArray[Any]:
    """`x` (T, H) times the weight (T, 1) of each token's only route; both are rounded to x's dtype."""
    weights = rounded(topk_weights, x.dtype).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(x.astype(np.float32) * weights, x.dtype)


def rounded(x: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Float32 `x` as bfloat16 or float16, to nearest with ties to even."""
    with np.errstate(over="ignore"):  # overflow to infinity is the documented result, not worth a warning
        result: NDArray[Any] = x.astype(dtype)
    return result


def combine(y: NDArray[Any], route_row: NDArray[np.int32]) -> NDArray[Any]:
    """The sum of each token's rows of `y` (R, H), in the order of its routes (T, k), invalid ones (-1) left
    out: (T, H), float64 where y is, else in float32."""
    wide = np.dtype(np.float64 if y.dtype == np.float64 else np.float32)
    total = np.zeros((route_row.shape[0], y.shape[1]), wide)
    for rows in route_row.T:
        valid = rows >= 0
        with np.errstate(over="ignore", invalid="ignore"):
            total[valid] += y[rows[valid]].astype(wide)
    return total

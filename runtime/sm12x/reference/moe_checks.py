"""Checks of the stages of an expert layer, each against what the stage before it really gave.

A whole layer cannot be compared element by element: a last bit before a quantisation becomes an e4m3 step
behind it. So every stage is compared with its own result in float64 on what the stage before it gave in the
implementation under test, whatever backend that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.ops.activation import Activation
from sm12x.ops.route import Routing
from sm12x.reference.activation import activate, clamp, gate, gate_curvature, gate_slope, split
from sm12x.reference.gemm import check, compare, grouped_gemm_float64, tolerance
from sm12x.reference.moe import combine, rounded
from sm12x.reference.problem import dequantise
from sm12x.reference.quantize import dynamic_scale
from sm12x.reference.rounding import E4M3, E4M3_MAX, Float64, e4m3_step, to_e4m3, ulp

# What the activation itself may lose in float32, relative to its result: a few roundings and an exponential
# that is good to a few units in the last place.
_EVALUATION = 2.0**-20
# 1 + erf and 1 + tanh cancel where g is negative: float32 knows the sum to half of 2**-23, times g and u.
_CANCELLATION = 2.0**-23


@dataclass(frozen=True)
class QuantisedCheck:
    """Of `elements` codes, `wrong_codes` are more than one e4m3 step from the exact quotient, and
    `unequal_codes` are not the nearest e4m3 value of the float32 quotient; `wrong_scales` are not bit for bit
    what the rule gives."""

    elements: int
    wrong_scales: int
    wrong_codes: int
    unequal_codes: int

    @property
    def passed(self) -> bool:
        """Whether the scales are exact and all codes within one step."""
        return not (self.wrong_scales or self.wrong_codes)


def check_quantised(
    x: NDArray[Any], q: NDArray[Any], scale: NDArray[np.float32], *, static: bool = False
) -> QuantisedCheck:
    """Compare what ``sm12x.quantize_fp8`` or the like gave with the rule that it follows.

    x: (T, K) bfloat16, float16 or float32, the values that were quantised. q: (T, K) float8_e4m3fn, or uint8
    with its bits. scale: float32, (T, 1) or (T,) per token, one value per tensor or static; `static`: it was
    given, so that there is nothing to compare it with.

    A code is right within one step of e4m3 (at the quotient) from x / scale, clamped to +-448; where that is
    NaN, it must be NaN. A scale must be bit for bit ``max(amax, 1/512) / 448``.

    Raises ValueError where the shapes do not fit.
    """
    if q.shape != x.shape or x.ndim != 2:
        raise ValueError(f"q: expected the shape (T, K) of x, {x.shape}, got {q.shape}")
    tokens = x.shape[0]
    if scale.size != 1 and scale.shape not in ((tokens,), (tokens, 1)):
        raise ValueError(f"scale: expected one value or shape ({tokens}, 1), got {scale.shape}")
    column = scale.reshape(-1, 1)
    values = x.astype(np.float32)
    wrong_scales = 0
    if not static:
        expected = dynamic_scale(values, 1 if scale.shape[:1] == (tokens,) else None)
        wrong_scales = int(np.count_nonzero(expected.view(np.uint32) != column.view(np.uint32)))
    got = dequantise(q.view(E4M3.numpy_dtype), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.clip(values.astype(np.float64) / column.astype(np.float64), -E4M3_MAX, E4M3_MAX)
        nearest = dequantise(to_e4m3(values / column), np.float64)
        both_nan = np.isnan(exact) & np.isnan(got)
        within = both_nan | (np.abs(got - exact) <= e4m3_step(exact))
    return QuantisedCheck(
        elements=x.size,
        wrong_scales=wrong_scales,
        wrong_codes=int(np.count_nonzero(~within)),
        unequal_codes=int(np.count_nonzero(~(both_nan | (got == nearest)))),
    )


def activation_error(
    g: Float64, u: Float64 | None, g_error: Float64, u_error: Float64 | None, activation: Activation
) -> Float64:
    """How far ``h`` of inputs within `g_error` of g and `u_error` of u, evaluated in float32, may be from
    ``h(g, u)``; float64, all of one shape.

    Let the inputs be g + d and u + v with |d| <= g_error, |v| <= u_error, and ``h = f(g) * u``.

    1. Clamping moves two values apart by no more than they were, and a value that is clamped with all its
       neighbourhood not at all: the error of the clamped g is ``max(min(g + g_error, limit) - min(g, limit),
       min(g, limit) - min(g - g_error, limit))``, and that of u likewise. From here on g, u and their errors
       are the clamped ones; for swigluoai u is u + beta, whose error is the same.
    2. By Taylor, with c the largest |f''| anywhere (relu2's f' jumps nowhere, so that it holds there too),
       ``|f(g + d) - f(g)| <= e_f := |f'(g)| * g_error + c / 2 * g_error**2``.
    3. ``f(g + d) * (u + v) - f(g) * u = (f(g + d) - f(g)) * (u + v) + f(g) * v``, hence the propagated error
       is at most ``e_f * (|u| + u_error) + |f(g)| * u_error``; not gated, ``e_f``.
    4. f and the product are evaluated in float32: 2**-20 of the largest |h| that step 3 allows, and for gelu
       and gelu_tanh, whose ``1 + erf`` or ``1 + tanh`` may cancel, 2**-23 of |g * u| (not gated: of |g|)
       more.

    Steps 1 to 3 are exact bounds, not only of first order. The rounding of h is not part of this.
    """
    g_spread = _clamped_error(g, g_error, activation, gate_side=True)
    u_spread = (
        None if u is None or u_error is None else _clamped_error(u, u_error, activation, gate_side=False)
    )
    g, u = clamp(g, u, activation)
    f = np.abs(gate(g, activation))
    f_error = np.abs(gate_slope(g, activation)) * g_spread + gate_curvature(activation) / 2 * g_spread**2
    largest_g = np.abs(g) + g_spread
    if u is None or u_spread is None:
        propagated, largest, cancelled = f_error, f + f_error, largest_g
    else:
        up = np.abs(u + activation.beta if activation.is_swigluoai else u)
        propagated = f_error * (up + u_spread) + f * u_spread
        largest = (f + f_error) * (up + u_spread)
        cancelled = largest_g * (up + u_spread)
    error: Float64 = propagated + _EVALUATION * largest
    if activation.name in ("gelu", "gelu_tanh"):
        error += _CANCELLATION * cancelled
    return error


def _clamped_error(x: Float64, error: Float64, activation: Activation, *, gate_side: bool) -> Float64:
    """How far a clamped value may be from that of `x`, where it may be `error` away before."""

    def clamped(value: Float64) -> Float64:
        g, u = clamp(value, value, activation)
        return g if gate_side or u is None else u

    middle = clamped(x)
    spread: Float64 = np.maximum(clamped(x + error) - middle, middle - clamped(x - error))
    return spread


def check_gemm1_stage(
    h: NDArray[Any],
    q1: NDArray[Any],
    s1: Any,
    w1: NDArray[Any],
    routing: Routing,
    activation: Activation,
    *,
    w1_scale: Any = None,
    bias1: Any = None,
    a2_scale: float | None = None,
) -> float:
    """The largest error of GEMM1 with its activation over what is allowed, from the codes that it was given.

    h: (R, I) or more rows, of which the first R = offsets[E] count: bfloat16 or float16 as the stage stores
    it; with `a2_scale` (static) the float8_e4m3fn codes that it stores instead; or float32. q1 (T, H)
    float8_e4m3fn and s1: what the stage before gave. w1 (E, 2I, H) or (E, I, H) float8_e4m3fn, w1_scale,
    bias1: as ``sm12x.fused_moe`` takes them. routing: what ``sm12x.route`` gives, as NumPy arrays.

    Allowed is the rounding and what the errors of g and u do to h. Those are, by DESIGN's bound for float32,
    which is what the accumulators are scaled in,

        ``e = ulp_float32(ref) + 2**-20 * (H / 32) * sum_k |s1 * q1| |w1_scale * w1|``

    of each g and each u. `activation_error` takes them through the activation. Then h is rounded once: one
    unit in its last place is added (`ulp` of its type at the reference, as in DESIGN's bound; half of one
    where both lie in the same binade). Static: h / a2_scale is compared, clamped to +-448, with an error
    divided by a2_scale, and the unit is e4m3's step there; the division in float32 is within it.

        ``|h - ref| <= ulp(ref) + activation_error(g, u, e_g, e_u)``

    Returns the largest ratio of the two sides: at most 1 passes, infinity for a NaN.
    """
    rows = int(routing.offsets[-1])
    pre, abs_sum = grouped_gemm_float64(
        q1,
        w1,
        a_scale=s1,
        b_scale=w1_scale,
        offsets=routing.offsets,
        row_index=routing.row_index[:rows],
        bias=bias1,
    )
    error = tolerance(pre, abs_sum, q1.shape[1], "float32")
    g, u = split(pre, activation)
    g_error, u_error = split(error, activation)
    ref = activate(g, u, activation)
    allowed = activation_error(g, u, g_error, u_error, activation)
    h = h[:rows]
    if a2_scale is None:
        return compare(h, ref, ulp(ref, h.dtype) + allowed, h.dtype)[1]
    divisor = float(np.float32(a2_scale))
    quotient = np.clip(ref / divisor, -E4M3_MAX, E4M3_MAX)
    values = dequantise(h.view(E4M3.numpy_dtype), np.float64)
    # Codes have no infinities, and float32 holds all of them: compare takes them for float32.
    return compare(values, quotient, e4m3_step(quotient) + allowed / divisor, "float32")[1]


def check_gemm2_stage(
    y: NDArray[Any],
    q2: NDArray[Any],
    s2: Any,
    w2: NDArray[Any],
    routing: Routing,
    *,
    w2_scale: Any = None,
    bias2: Any = None,
    weight_on_input: bool = False,
) -> float:
    """The largest error of GEMM2 over DESIGN's bound, from the codes that it was given.

    y: (R, H) or more rows, of which the first R = offsets[E] count, bfloat16 or float16: weighted by
    routing.row_weight unless `weight_on_input`. q2 (R, I) or more rows, float8_e4m3fn, and s2, (R, 1) or more
    rows or static: what the stage before gave. w2 (E, H, I) float8_e4m3fn, w2_scale, bias2: as
    ``sm12x.fused_moe`` takes them. Returns the ratio as `check` does: at most 1 passes.
    """
    rows = int(routing.offsets[-1])
    per_row = isinstance(s2, np.ndarray) and s2.size != 1
    ref, abs_sum = grouped_gemm_float64(
        q2[:rows],
        w2,
        a_scale=s2[:rows] if per_row else s2,
        b_scale=w2_scale,
        offsets=routing.offsets,
        bias=bias2,
        row_weight=None if weight_on_input else routing.row_weight[:rows],
    )
    return check(y[:rows], ref, abs_sum, q2.shape[1])[1]


def check_combine(out: NDArray[Any], y: NDArray[Any], routing: Routing) -> int:
    """How many elements of `out` (T, H) are not the float32 sum of their token's rows of `y`, in the order of
    the token's routes, rounded to the type of `out`. All arithmetic is fixed, so 0 passes; zeros of both
    signs and all NaN are taken to be equal."""
    expected = rounded(combine(y, routing.route_row), out.dtype)
    if out.shape != expected.shape:
        raise ValueError(f"out: expected shape {expected.shape}, got {out.shape}")
    a, b = out.astype(np.float32), expected.astype(np.float32)
    return int(np.count_nonzero(~((a == b) | (np.isnan(a) & np.isnan(b)))))


def token_errors(out: NDArray[Any], ref: NDArray[Any]) -> Float64:
    """The relative Frobenius error of each token, ``|out[t] - ref[t]| / |ref[t]|``, (T,) float64; 0 where
    both are zero, infinite where only `ref` is or a NaN occurs."""
    if out.shape != ref.shape:
        raise ValueError(f"out: expected the shape of ref, {ref.shape}, got {out.shape}")
    wide = ref.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        error = np.linalg.norm(out.astype(np.float64) - wide, axis=1)
        ratio = np.where(error == 0, 0.0, error / np.linalg.norm(wide, axis=1))
    ratio[np.isnan(ratio)] = np.inf
    return ratio

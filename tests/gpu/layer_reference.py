"""The stages of an expert layer in float64 on the device: what `sm12x.reference.moe_checks` has in NumPy,
fast enough for thousands of layers. tests/unit/test_layer_reference.py compares the two.

Every stage is held to what the stage before it really gave, so that a last bit before a quantisation, which
is an e4m3 step behind it, is not taken for an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch_reference import FORMATS, ulp

from sm12x.ops.activation import Activation

E4M3_MAX, AMAX_FLOOR = 448.0, 1 / 512
E4M3 = (4, -9)  # as FORMATS has it: significand bits, exponent of the smallest step
# As in sm12x/reference/moe_checks.py: what evaluating an activation in float32 may cost.
EVALUATION, CANCELLATION = 2.0**-20, 2.0**-23

FORMATS.setdefault("e4m3", E4M3)


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """Float64 values of e4m3 bits."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32).to(torch.float64)


def over(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """A true division. torch multiplies by the reciprocal of a divisor that is a number on the host."""
    assert divisor.device == x.device
    assert divisor.ndim > 0
    return x / divisor


def dynamic_scale(x: torch.Tensor) -> torch.Tensor:
    """The scale of each row of float32 `x` (T, K), (T, 1): NaN does not count for the largest magnitude."""
    if not x.shape[0]:
        return torch.empty((0, 1), dtype=torch.float32, device=x.device)
    largest = torch.where(x.isnan(), 0.0, x.abs()).amax(1, keepdim=True).clamp(min=AMAX_FLOOR)
    return over(largest, torch.full_like(largest, E4M3_MAX))


def codes_of(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 bits of ``x / scale``, float32 (or float64), rounded once and saturated; NaN is 0x7f."""
    quotient = over(x, scale.expand(x.shape[0], 1) if scale.ndim == 2 else scale.view(1, 1)).clamp(
        -E4M3_MAX, E4M3_MAX
    )
    if quotient.dtype == torch.float64:  # not through float32, which rounds twice
        step = ulp(torch.nan_to_num(quotient), "e4m3")
        quotient = torch.where(quotient.isnan(), quotient, (quotient / step).round() * step)
    bits = quotient.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(quotient.isnan(), 0x7F, bits)


def wrong_codes(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many e4m3 `codes` (T, K) of float32 `x` are more than a step from the exact quotient, and how many
    are not the nearest to the float32 quotient, on the device."""
    column = scale.reshape(-1, 1)
    exact = (x.double() / column.double()).clamp(-E4M3_MAX, E4M3_MAX)
    found, nearest = values_of(codes), values_of(codes_of(x, column))
    both_nan = exact.isnan() & found.isnan()
    step = ulp(torch.nan_to_num(exact), "e4m3")
    far = ~(both_nan | ((found - exact).abs() <= step))
    return far.sum(), (~(both_nan | (found == nearest))).sum()


# -------------------------------------------------------------------------------------------------
# Activations
# -------------------------------------------------------------------------------------------------


def split(rows: torch.Tensor, how: Activation) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gate and up of what the first GEMM gives."""
    if not how.gated:
        return rows, None
    if how.interleaved:
        return rows[..., 0::2], rows[..., 1::2]
    half = rows.shape[-1] // 2
    return rows[..., :half], rows[..., half:]


def _sigmoid_of(g: torch.Tensor, how: Activation) -> tuple[torch.Tensor, float]:
    steepness = how.alpha if how.is_swigluoai else 1.0
    return torch.sigmoid(steepness * g), steepness


def _normal(g: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.erfc(g * -math.sqrt(0.5))


_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715


def _tanh_normal(g: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(2 * _SLOPE * g * (1 + _CUBE * g * g))


def gate(g: torch.Tensor, how: Activation) -> torch.Tensor:
    """``f(g)``, without a limit."""
    if how.name == "relu2":
        return g.clamp(min=0).square()
    if how.name == "gelu":
        return g * _normal(g)
    if how.name == "gelu_tanh":
        return g * _tanh_normal(g)
    return g * _sigmoid_of(g, how)[0]


def gate_slope(g: torch.Tensor, how: Activation) -> torch.Tensor:
    if how.name == "relu2":
        return 2 * g.clamp(min=0)
    if how.name == "gelu":
        return _normal(g) + g * torch.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    if how.name == "gelu_tanh":
        s = _tanh_normal(g)
        return s + g * s * (1 - s) * 2 * _SLOPE * (1 + 3 * _CUBE * g * g)
    s, steepness = _sigmoid_of(g, how)
    return s + steepness * g * s * (1 - s)


def gate_curvature(how: Activation) -> float:
    """The largest absolute second derivative of ``f`` anywhere."""
    if how.name == "relu2":
        return 2.0
    if how.name in ("gelu", "gelu_tanh"):
        return math.sqrt(2 / math.pi)
    return abs(how.alpha if how.is_swigluoai else 1.0) / 2


def clamp_gate(g: torch.Tensor, how: Activation) -> torch.Tensor:
    return g if how.limit is None else g.clamp(max=how.limit)


def clamp_up(u: torch.Tensor, how: Activation) -> torch.Tensor:
    return u if how.limit is None else u.clamp(-how.limit, how.limit)


def activate(g: torch.Tensor, u: torch.Tensor | None, how: Activation) -> torch.Tensor:
    """``h`` of g and u, float64."""
    h = gate(clamp_gate(g, how), how)
    if u is None:
        return h
    u = clamp_up(u, how)
    return h * (u + how.beta if how.is_swigluoai else u)


def activation_error(
    g: torch.Tensor,
    u: torch.Tensor | None,
    g_error: torch.Tensor,
    u_error: torch.Tensor | None,
    how: Activation,
) -> torch.Tensor:
    """How far ``h`` may be where g and u are within their errors: `activation_error` of moe_checks, which
    derives it."""

    def spread(x: torch.Tensor, error: torch.Tensor, clamped: Any) -> torch.Tensor:
        middle = clamped(x, how)
        return torch.maximum(clamped(x + error, how) - middle, middle - clamped(x - error, how))

    g_spread = spread(g, g_error, clamp_gate)
    g_in = clamp_gate(g, how)
    f = gate(g_in, how).abs()
    f_error = gate_slope(g_in, how).abs() * g_spread + gate_curvature(how) / 2 * g_spread.square()
    cancelled = g_in.abs() + g_spread
    if u is None or u_error is None:
        propagated, largest = f_error, f + f_error
    else:
        u_spread, up = spread(u, u_error, clamp_up), clamp_up(u, how)
        up = (up + how.beta if how.is_swigluoai else up).abs() + u_spread
        propagated, largest = f_error * up + f * u_spread, (f + f_error) * up
        cancelled = cancelled * up
    error = propagated + EVALUATION * largest
    return error + CANCELLATION * cancelled if how.name in ("gelu", "gelu_tanh") else error


# -------------------------------------------------------------------------------------------------
# Comparing
# -------------------------------------------------------------------------------------------------


def worst(found: torch.Tensor, reference: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """Largest error over its bound, on the device; infinite for a NaN on either side."""
    if not reference.numel():
        return torch.zeros((), dtype=torch.float64, device=reference.device)
    error = (found - reference).abs()
    return torch.nan_to_num(torch.where(error == 0, 0.0, error / bound), nan=torch.inf).max()


def combine(y: torch.Tensor, route_row: torch.Tensor) -> torch.Tensor:
    """The sum of each token's rows of `y` in the order of its routes (T, k), -1 left out, in the type of
    `y`."""
    total = torch.zeros((route_row.shape[0], y.shape[1]), dtype=y.dtype, device=y.device)
    if not y.shape[0]:
        return total
    for rows in route_row.long().unbind(1):
        total = torch.where((rows >= 0)[:, None], total + y[rows.clamp(min=0)], total)
    return total


def token_errors(out: torch.Tensor, reference: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """``|out[t] - reference[t]| / norm[t]`` of each token; 0 where there is no error, infinite for a NaN."""
    error = (out - reference).norm(dim=1)
    return torch.nan_to_num(torch.where(error == 0, 0.0, error / norm), nan=torch.inf)

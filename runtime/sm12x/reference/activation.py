"""The activations of an expert layer, computed in the dtype of their input, and what an error bound needs.

``h = f(g) * u`` for gated ones, ``h = f(g)`` for the others, with f one of

- silu: ``g * sigmoid(g)``
- gelu: ``g * Phi(g)``, Phi the normal distribution function; gelu_tanh: its usual approximation,
  ``0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g**3)))``
- relu2: ``max(g, 0)**2``
- swigluoai: ``g * sigmoid(alpha * g)``, times ``u + beta`` instead of u

Where there is a limit, g is ``min(g, limit)`` and u is clamped to +-limit before. A NaN in g or u gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.ops.activation import Activation

_TANH_SLOPE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def split(rows: NDArray[Any], activation: Activation) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The gate g and up u (None where not gated), each (..., I), in what GEMM1 gives: (..., 2I) in the order
    of w1's rows, or (..., I) where not gated. Also of its bias, scales or errors."""
    if not activation.gated:
        return rows, None
    if activation.interleaved:
        return rows[..., 0::2], rows[..., 1::2]
    half = rows.shape[-1] // 2
    return rows[..., :half], rows[..., half:]


def clamp(
    g: NDArray[Any], u: NDArray[Any] | None, activation: Activation
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """g and u where the limit lets them be."""
    limit = activation.limit
    if limit is None:
        return g, u
    return np.minimum(g, limit), None if u is None else np.clip(u, -limit, limit)


def activate(g: NDArray[Any], u: NDArray[Any] | None, activation: Activation) -> NDArray[Any]:
    """``h`` of g and u, float32 or float64 of one shape (u None where not gated), in their dtype."""
    g, u = clamp(g, u, activation)
    with np.errstate(over="ignore", invalid="ignore"):
        h = gate(g, activation)
        if u is None:
            return h
        product: NDArray[Any] = h * (u + activation.beta if activation.is_swigluoai else u)
    return product


def gate(g: NDArray[Any], activation: Activation) -> NDArray[Any]:
    """``f(g)``, without a limit."""
    f: NDArray[Any]
    with np.errstate(over="ignore", invalid="ignore"):
        if activation.name == "relu2":
            f = np.square(np.maximum(g, 0))
        elif activation.name == "gelu":
            f = g * _normal_distribution(g)
        elif activation.name == "gelu_tanh":
            f = g * _tanh_distribution(g)
        else:
            f = g * _sigmoid(_steepness(activation) * g)
    return f


def gate_slope(g: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    """The derivative of ``f`` at float64 `g`."""
    slope: NDArray[np.float64]
    with np.errstate(over="ignore", invalid="ignore"):
        if activation.name == "relu2":
            slope = 2 * np.maximum(g, 0)
        elif activation.name == "gelu":
            slope = _normal_distribution(g) + g * np.exp(-g * g / 2) / math.sqrt(2 * math.pi)
        elif activation.name == "gelu_tanh":
            s = _tanh_distribution(g)
            slope = s + g * s * (1 - s) * 2 * _TANH_SLOPE * (1 + 3 * _TANH_CUBE * g * g)
        else:
            steepness = _steepness(activation)
            s = _sigmoid(steepness * g)
            slope = s + steepness * g * s * (1 - s)
    return slope


def gate_curvature(activation: Activation) -> float:
    """The largest absolute second derivative of ``f`` anywhere (relu2: where it has one)."""
    if activation.name == "relu2":
        return 2.0
    if activation.name in ("gelu", "gelu_tanh"):
        return math.sqrt(2 / math.pi)  # at 0
    return abs(_steepness(activation)) / 2  # at 0


def _steepness(activation: Activation) -> float:
    return activation.alpha if activation.is_swigluoai else 1.0


def _sigmoid(x: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = 1 / (1 + np.exp(-x))
    return result


def _tanh_distribution(g: NDArray[Any]) -> NDArray[Any]:
    # (1 + tanh(z)) / 2, which cancels where g is negative, is sigmoid(2 * z), which does not.
    return _sigmoid(2 * _TANH_SLOPE * g * (1 + _TANH_CUBE * g * g))


# NumPy has no erf. The complementary one, because 1 + erf cancels where g is negative.
_erfc: Callable[[NDArray[Any]], NDArray[Any]] = np.frompyfunc(math.erfc, 1, 1)


def _normal_distribution(g: NDArray[Any]) -> NDArray[Any]:
    distribution: NDArray[Any] = 0.5 * _erfc(g * -math.sqrt(0.5)).astype(g.dtype)
    return distribution

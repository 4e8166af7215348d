"""FP8-Dynamic quantisation and routed rows, for examples, tests and benchmarks.

The quantisers follow compressed-tensors (``calculate_qparams`` in its ``quantization/utils/helpers.py`` for
the scales, ``_quantize`` in ``quantization/lifecycle/forward.py`` and ``round_to_quantized_type`` in
``quantization/quant_args.py`` for the values): symmetric, ``scale = max(|x|) / 448`` with the float32 epsilon
as its floor, a true division by the scale, saturation to +-448, round to nearest even. Scales are kept in
float32.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

E4M3_MAX = 448.0
SCALE_FLOOR = float(np.finfo(np.float32).eps)


def _quantize_rows(x: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Symmetric e4m3 quantisation with one scale for each vector along the last axis."""
    if x.dtype not in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: expected a last axis of at least one element, got shape {x.shape}")
    values = x.astype(np.float32, copy=False)
    scale = np.maximum(
        np.abs(values).max(axis=-1, keepdims=True) / np.float32(E4M3_MAX), np.float32(SCALE_FLOOR)
    )
    scaled = values / scale
    np.clip(scaled, -E4M3_MAX, E4M3_MAX, out=scaled)
    return scaled.astype(ml_dtypes.float8_e4m3fn), scale


def quantize_per_token(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Activations `x` (T, K), float32, bfloat16 or float16, to float8_e4m3fn with one scale for each token.

    Returns (T, K) float8_e4m3fn and (T, 1) float32; ``q * scale`` is about `x`. Raises TypeError or
    ValueError naming `x`.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected shape (T, K), got {x.shape}")
    return _quantize_rows(x, "x")


def quantize_per_channel(w: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Weights `w` (E, N, K), float32, bfloat16 or float16, to float8_e4m3fn with one scale for each output
    feature.

    Returns (E, N, K) float8_e4m3fn and (E, N, 1) float32; ``q * scale`` is about `w`. Raises TypeError or
    ValueError naming `w`.
    """
    if w.ndim != 3:
        raise ValueError(f"w: expected shape (E, N, K), got {w.shape}")
    return _quantize_rows(w, "w")


def route_top_k(
    logits: NDArray[Any], k: int
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.int32]]:
    """Softmax top-k routing of `logits` (T, E): each token goes to its `k` most probable experts.

    Returns, sorted by expert and within an expert by token: the token of each row (T * k,), its routing
    weight (T * k,) float32, renormalised over the k experts of its token, and the row offsets (E + 1,) int32.
    """
    experts = logits.shape[1]
    if not 0 < k <= experts:
        raise ValueError(f"k: expected 1 to {experts} (the number of experts), got {k}")
    scores = np.asarray(logits, dtype=np.float32)
    chosen = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    picked = np.take_along_axis(scores, chosen, axis=1)
    # A softmax over all experts, renormalised over the chosen ones, is the softmax of the chosen ones.
    weights = np.exp(picked - picked.max(axis=1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(axis=1, keepdims=True)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    offsets = np.zeros(experts + 1, dtype=np.int32)
    np.cumsum(np.bincount(chosen.reshape(-1), minlength=experts), out=offsets[1:])
    return order // k, weights.reshape(-1)[order].astype(np.float32), offsets


def random_routing(
    tokens: int, experts: int, k: int, rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """A uniformly random top-k routing: token of each row (T * k,), sorted by expert, and offsets (E + 1,)
    int32."""
    rows, _, offsets = route_top_k(rng.random((tokens, experts), dtype=np.float32), k)
    return rows, offsets


def random_bfloat16(shape: tuple[int, ...], rng: np.random.Generator, scale: float = 1.0) -> NDArray[Any]:
    """Normally distributed values of standard deviation `scale`, rounded to bfloat16, as bfloat16."""
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(scale)
    return values.astype(ml_dtypes.bfloat16)


def random_fp8(
    shape: tuple[int, ...], rng: np.random.Generator, dtype: str = "float8_e4m3fn"
) -> NDArray[Any]:
    """Finite FP8 values, every finite bit pattern equally likely, as an array of `dtype`."""
    fp8 = np.dtype(getattr(ml_dtypes, dtype))
    patterns = np.arange(256, dtype=np.uint8)
    finite = patterns[np.isfinite(patterns.view(fp8).astype(np.float32))]
    chosen: NDArray[Any] = finite[rng.integers(0, len(finite), size=shape, dtype=np.uint8)]
    return chosen.view(fp8)

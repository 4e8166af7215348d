"""FP8 quantisers, and routed rows for examples, tests and benchmarks.

There are two rules, and this is how they differ. Both are symmetric, ``scale = max(|x|) / 448`` in float32, a
true division by the scale, saturation to +-448, round to nearest even.

`quantize_per_token` and `quantize_per_channel` follow compressed-tensors (``calculate_qparams`` in its
``quantization/utils/helpers.py`` for the scales, ``_quantize`` in ``quantization/lifecycle/forward.py`` and
``round_to_quantized_type`` in ``quantization/quant_args.py`` for the values), which makes checkpoints:
the floor is that of the scale, the float32 epsilon (2**-23, about 1.2e-7), and a NaN makes the scale of its
vector NaN. They take any length.

`quantize_fp8_numpy` follows vLLM, which quantises activations at run time: max(|x|) has a floor of 1/512, so
that the scale has one of 1 / (448 * 512) (about 4.4e-6), and a NaN stays alone: the scale is that of the
numbers beside it. It also has one scale for all of `x`, dynamic or static, and takes lengths that are
multiples of 16. Where max(|x|) is at least 1/512 and nothing is NaN, both give the same bits.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sm12x.arrays import Array
from sm12x.ops import moe_validate
from sm12x.reference.problem import describe, one_value, own_memory
from sm12x.reference.rounding import E4M3_MAX, to_e4m3

SCALE_FLOOR = float(np.finfo(np.float32).eps)
AMAX_FLOOR = np.float32(1 / 512)


def quantize_fp8_numpy(
    x: Any, *, scale: Any = None, per_token: bool = True, out: Any = None, out_scale: Any = None
) -> tuple[Any, Any]:
    """``sm12x.quantize_fp8`` for NumPy arrays; arguments, result and errors are the same."""
    value, described_scale = (None, None) if scale is None else one_value(scale, "scale")
    call = moe_validate.take_quantisation(
        describe(x, "x"),
        described_scale,
        per_token,
        _described(out, "out"),
        _described(out_scale, "out_scale"),
    )
    inputs = ("x", x), ("scale", scale)
    if out is not None:
        own_memory(out, "out", inputs)
    if out_scale is not None:
        own_memory(out_scale, "out_scale", (*inputs, ("out", out)))
    values = x.astype(np.float32, copy=False)
    if value is None:
        axis = 1 if call.mode == moe_validate.PER_TOKEN else None
        value = dynamic_scale(values, axis).reshape(call.scale_shape)
        if out_scale is not None:
            out_scale[...] = value.reshape(out_scale.shape)
            value = out_scale
    with np.errstate(over="ignore", invalid="ignore"):  # past 448 saturates, inf / inf is NaN
        codes = to_e4m3(values / value.reshape(-1, 1))
    if out is None:
        return codes, value
    out.view(np.uint8)[...] = codes.view(np.uint8)
    return out, value


def dynamic_scale(values: NDArray[np.float32], axis: int | None) -> NDArray[np.float32]:
    """The scale of float32 `values` (T, K) over an axis, or over all for None: the largest magnitude, NaN
    left out, or 1/512 where it is smaller, over 448. Float32, the axis kept."""
    largest = np.fmax.reduce(np.abs(values), axis=axis, keepdims=True, initial=np.float32(0))
    scale: NDArray[np.float32] = np.maximum(largest, AMAX_FLOOR) / np.float32(E4M3_MAX)
    return scale


def _described(x: Any, argument: str) -> Array | None:
    return None if x is None else describe(x, argument)


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
    return to_e4m3(values / scale), scale


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

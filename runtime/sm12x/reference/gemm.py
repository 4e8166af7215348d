"""The float64 reference of the grouped GEMM, its error bound, and the check of an output against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.ops.arguments import refuse_layouts
from sm12x.reference.problem import Group, dequantise, list_groups, stacked_groups
from sm12x.reference.rounding import Float64, format_of, round_to, ulp


def grouped_gemm_float64(
    a: Any,
    b: Any,
    *,
    a_scale: Any = None,
    b_scale: Any = None,
    offsets: Any = None,
    row_index: Any = None,
    rows: Any = None,
    expected_m: Any = None,
    row_weight: Any = None,
    bias: Any = None,
    dtype: Any = None,
) -> tuple[Any, Any]:
    """The exact-as-float64 result of ``sm12x.grouped_gemm`` on the same NumPy operands, before the rounding
    to `out_dtype`.

    Arguments are those of ``sm12x.grouped_gemm``. Returns ``(ref, abs_sum)``, where ``ref[m, n]`` is
    ``(a_scale * b_scale * sum_k a * b + bias) * row_weight`` and ``abs_sum[m, n]`` is ``sum_k |a_scale * a| *
    |b_scale * b| * |row_weight|``, float64 (M, N), masked (E, max_m, N); for a list call two lists of such
    arrays. Rows that belong to no expert (of a packed call outside ``offsets[0]:offsets[-1]``, of a masked
    one beyond the count) are NaN in both.

    Raises ValueError and TypeError as ``sm12x.grouped_gemm`` does.
    """
    refuse_layouts(a, offsets, row_index, rows, expected_m, row_weight)
    if offsets is None and rows is None:
        results = [_group_float64(group) for group in list_groups(a, b, a_scale, b_scale, bias, dtype)]
        return [ref for ref, _ in results], [abs_sum for _, abs_sum in results]
    stacked = stacked_groups(
        a, b, a_scale, b_scale, offsets, row_index, rows, expected_m, row_weight, bias, dtype
    )
    ref = np.full(stacked.shape, np.nan)
    abs_sum = np.full_like(ref, np.nan)
    for group in stacked.groups:
        ref[group.rows], abs_sum[group.rows] = _group_float64(group)
    return ref, abs_sum


def _group_float64(group: Group) -> tuple[Float64, Float64]:
    a = dequantise(group.a, np.float64)
    b = dequantise(group.b, np.float64)
    scale = group.a_scale.astype(np.float64) * group.b_scale.astype(np.float64)
    ref = (a @ b.T) * scale
    if group.bias is not None:
        ref += group.bias
    abs_sum = (np.abs(a) @ np.abs(b).T) * np.abs(scale)
    if group.row_weight is not None:
        weight = group.row_weight.astype(np.float64)
        ref *= weight
        abs_sum *= np.abs(weight)
    return ref, abs_sum


def tolerance(ref: Float64, abs_sum: Float64, k: int, out_dtype: object) -> Float64:
    """The largest error allowed at each element: ``ulp(ref) + 2**-20 * (k / 32) * abs_sum``, float64, shape
    of `ref`.

    The first term is the rounding to `out_dtype`; the second is the drift of tensor cores, which keep about
    21 bits of the accumulator and add 32 products at a time. `ref`, `abs_sum`: what `grouped_gemm_float64`
    returns; `k`: the reduction length.
    """
    bound: Float64 = ulp(ref, out_dtype) + 2.0**-20 * (k / 32) * abs_sum
    return bound


def check(
    out: NDArray[Any], ref: Float64, abs_sum: Float64, k: int, out_dtype: object = None
) -> tuple[float, float]:
    """Compare an output with the float64 reference.

    `out`: (M, N), bfloat16, float16 or float32 (`out_dtype`: the type whose rounding is allowed, that of
    `out` where not given). Returns ``(max_rel_err, tolerance_ratio)``: the largest ``|out - ref|`` over the
    largest ``|ref|``, and the largest ``|out - ref| / tolerance(...)``. At most 1 passes. A NaN on either
    side gives a ratio of infinity. An infinity is right where `ref` rounds to it, and counts as the first
    value past the largest finite one elsewhere. Empty arrays give (0.0, 0.0).

    Raises ValueError where the shapes differ.
    """
    if not out.shape == ref.shape == abs_sum.shape:
        raise ValueError(
            f"out: expected the shape of ref and abs_sum, {ref.shape} and {abs_sum.shape}, got {out.shape}"
        )
    name = format_of(out.dtype if out_dtype is None else out_dtype).name
    return compare(out, ref, tolerance(ref, abs_sum, k, name), name)


def compare(out: NDArray[Any], ref: Float64, bound: Float64, out_dtype: object) -> tuple[float, float]:
    """`check` against any bound of the error at each element, for values rounded to `out_dtype`."""
    if out.size == 0:
        return 0.0, 0.0
    fmt = format_of(out_dtype)
    got = out.astype(np.float64)
    overflow = np.isinf(got)
    error = np.abs(np.where(overflow, np.copysign(np.ldexp(1.0, fmt.max_exponent + 1), got), got) - ref)
    if overflow.any():
        error = np.where(overflow & (got == round_to(ref, fmt.name).astype(np.float64)), 0.0, error)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(error == 0, 0.0, error / bound)
        largest = float(np.max(np.abs(ref)))
        max_rel_err = float(error.max()) / largest if largest else (0.0 if not error.any() else np.inf)
    if np.isnan(ratio).any() or np.isnan(max_rel_err):
        return float("inf"), float("inf")
    return max_rel_err, float(ratio.max())


def check_list(
    outs: Sequence[NDArray[Any]], refs: Sequence[Float64], abs_sums: Sequence[Float64], ks: Sequence[int]
) -> tuple[float, float]:
    """`check` over the groups of a list call (`ks`: the reduction length of each): the largest of both
    figures."""
    if not len(outs) == len(refs) == len(abs_sums) == len(ks):
        raise ValueError(f"outs: expected {len(refs)} arrays, as many as refs, got {len(outs)}")
    results = [check(*group) for group in zip(outs, refs, abs_sums, ks, strict=True)]
    return max((r[0] for r in results), default=0.0), max((r[1] for r in results), default=0.0)

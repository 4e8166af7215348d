"""The backend of ``sm12x.grouped_gemm`` for NumPy arrays: float32 arithmetic on the CPU, no GPU needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x.arrays import compact_strides
from sm12x.ops import row_layout, validate
from sm12x.ops.arguments import refuse_layouts
from sm12x.ops.memory import overlaps
from sm12x.reference.problem import Group, dequantise, describe, list_groups, own_memory, stacked_groups
from sm12x.reference.rounding import Format, format_of


def grouped_gemm_numpy(
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
    out: Any = None,
    out_dtype: object = "bfloat16",
    bias: Any = None,
    dtype: Any = None,
) -> Any:
    """``sm12x.grouped_gemm`` for NumPy arrays; arguments, result and errors are the same.

    Products and sums in float32 by BLAS, one matrix product for each expert that has rows, then scales, bias,
    row_weight and one rounding to `out_dtype` (bfloat16, float16 or float32; FP8 operands e4m3fn or e5m2, in
    any mix). Returns `out`, or a new array: (M, N) for a packed call, (E, max_m, N) for a masked one, a list
    of arrays for a list call. Rows of `out` that belong to no expert are left as they are (zero in a new
    array). Unlike on a GPU, `offsets` that decrease or run past M, and `rows` past max_m, always raise
    ValueError.
    """
    fmt = format_of(out_dtype)
    refuse_layouts(a, offsets, row_index, rows, expected_m, row_weight)
    if offsets is None and rows is None:
        groups = list_groups(a, b, a_scale, b_scale, bias, dtype)
        outs = _list_outputs(out, groups, fmt)
        for group, target in zip(groups, outs, strict=True):
            target[...] = _rounded(_group_float32(group), fmt)
        return outs
    stacked = stacked_groups(
        a, b, a_scale, b_scale, offsets, row_index, rows, expected_m, row_weight, bias, dtype
    )
    result = (
        np.zeros(stacked.shape, fmt.numpy_dtype)
        if out is None
        else _checked_output(out, stacked.shape, fmt, "out", {"a": a, "b": b})
    )
    for group in stacked.groups:
        result[group.rows] = _rounded(_group_float32(group), fmt)
    return result


def _group_float32(group: Group) -> NDArray[np.float32]:
    product: NDArray[np.float32] = dequantise(group.a, np.float32) @ dequantise(group.b, np.float32).T
    product *= group.a_scale
    product *= group.b_scale
    if group.bias is not None:
        product += group.bias
    if group.row_weight is not None:
        product *= group.row_weight
    return product


def _rounded(x: NDArray[np.float32], fmt: Format) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # overflow to infinity is the documented result, not worth a warning
        rounded: NDArray[Any] = x.astype(fmt.numpy_dtype)
    return rounded


def _checked_output(
    out: Any, shape: tuple[int, ...], fmt: Format, argument: str, inputs: dict[str, NDArray[Any]]
) -> NDArray[Any]:
    described = describe(out, argument)
    if not out.size:  # NumPy gives empty arrays strides of 0; they have no rows to be apart
        described = described._replace(strides=compact_strides(described.shape))
    matrix = validate.output(described, shape, fmt.name, argument)
    if len(shape) == 3:
        row_layout.disjoint(described, argument, matrix, row_layout.group_stride(described, argument, matrix))
    own_memory(out, argument, inputs.items())
    result: NDArray[Any] = out
    return result


def _list_outputs(out: Any, groups: list[Group], fmt: Format) -> list[NDArray[Any]]:
    shapes = [(group.a.shape[0], group.b.shape[0]) for group in groups]
    if out is None:
        return [np.empty(shape, fmt.numpy_dtype) for shape in shapes]
    if isinstance(out, np.ndarray) or not isinstance(out, Sequence):
        raise TypeError(f"out: expected a sequence of arrays, got {type(out).__name__}")
    if len(out) != len(groups):
        raise ValueError(f"out: expected {len(groups)} arrays, one for each group, got {len(out)}")
    operands = {
        f"{name}[{i}]": array for i, g in enumerate(groups) for name, array in (("a", g.a), ("b", g.b))
    }
    pairs = enumerate(zip(out, shapes, strict=True))
    outs = [_checked_output(each, shape, fmt, f"out[{i}]", operands) for i, (each, shape) in pairs]
    for i, later in enumerate(outs):
        for j, earlier in enumerate(outs[:i]):
            if np.may_share_memory(earlier, later) and overlaps(*_span(earlier), *_span(later)):
                raise ValueError(f"out[{i}]: expected memory of its own, got an array that overlaps out[{j}]")
    return outs


def _span(out: NDArray[Any]) -> tuple[int, validate.Matrix]:
    described = describe(out, "out")
    return described.ptr, validate.matrix(described, "out", out.itemsize)

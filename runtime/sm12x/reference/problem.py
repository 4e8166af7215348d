"""The operands of a call on NumPy arrays, checked by the rules of the GPU path and cut into groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sm12x.abi import SM12X_SCALE_GROUP, SM12X_SCALE_VECTOR
from sm12x.arrays import Array
from sm12x.ops import row_layout, validate
from sm12x.ops.arguments import is_sequence
from sm12x.tensors import ingest

FP8 = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class Group:
    """One expert's GEMM. `rows`: where its rows lie in `out`, as an index: its rows of a packed call, its
    number and first rows of a masked one, or all rows of a list entry."""

    rows: slice | tuple[int, slice]
    a: NDArray[Any]  # (m, k), FP8
    b: NDArray[Any]  # (n, k), FP8
    a_scale: NDArray[np.float32]  # (m, 1) or (1, 1)
    b_scale: NDArray[np.float32]  # (1, n) or (1, 1)
    bias: NDArray[np.float32] | None  # (1, n)
    row_weight: NDArray[np.float32] | None = None  # (m, 1)


@cache
def _table(fp8: str, to: str) -> NDArray[Any]:
    """All 256 values of an FP8 type: a look-up is several times faster than ml_dtypes' cast."""
    values: NDArray[Any] = np.arange(256, dtype=np.uint8).view(FP8[fp8]).astype(to)
    values.flags.writeable = False
    return values


def dequantise(x: NDArray[Any], to: type[np.floating[Any]]) -> NDArray[Any]:
    """An FP8 array as float32 or float64, exactly."""
    values: NDArray[Any] = _table(x.dtype.name, np.dtype(to).name)[x.view(np.uint8)]
    return values


def describe(x: Any, argument: str) -> Array:
    """A NumPy array as the checks see it. Raises TypeError for anything else."""
    if not isinstance(x, np.ndarray):
        raise TypeError(
            f"{argument}: expected a NumPy array like the other arguments, got {type(x).__qualname__}"
        )
    return ingest(x, argument, 0)


def own_memory(written: NDArray[Any], argument: str, others: Iterable[tuple[str, Any]]) -> None:
    """Raises ValueError where an output may share memory with another array; what is no array has none."""
    for name, other in others:
        if isinstance(other, np.ndarray) and np.may_share_memory(written, other):
            raise ValueError(f"{argument}: expected memory of its own, got an array that overlaps {name}")


def _operand(x: Any, argument: str, named: str | None, expected: str) -> tuple[NDArray[Any], Array]:
    """An operand viewed as its FP8 type; `expected` spells its shape, one word for each axis."""
    array = describe(x, argument)
    fp8 = validate.fp8_dtype(array, argument, named)
    validate.rank(array, argument, expected, expected.count(",") + 1)
    return x.view(FP8[fp8]), array


def _scale(scale: Any, argument: str) -> tuple[NDArray[np.float32], validate.Scale]:
    """A scale as an array, (1, 1) for a number, and as the checks see it."""
    value = validate.scale_value(scale, argument)
    if value is None:
        return scale, describe(scale, argument)
    return np.full((1, 1), value, dtype=np.float32), value


def described_scale(scale: Any, argument: str) -> validate.Scale:
    """A scale as the checks see it."""
    return _scale(scale, argument)[1]


def one_value(scale: Any, argument: str) -> tuple[NDArray[np.float32], validate.Scale]:
    """A scale that is one value, for `moe_validate.static_scale` to check: (1,), and as the checks see it."""
    values, described = _scale(scale, argument)
    return values.reshape(-1), described


def _bias(bias: Any, shape: tuple[int, ...], argument: str) -> NDArray[np.float32] | None:
    if bias is None:
        return None
    validate.bias(describe(bias, argument), shape, argument)
    values: NDArray[np.float32] = bias.astype(np.float32)
    return values


@dataclass(frozen=True)
class Stacked:
    """The groups of a packed or masked call that have rows, and the shape of its result."""

    groups: list[Group]
    shape: tuple[int, ...]


def stacked_groups(
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    offsets: Any,
    row_index: Any,
    rows: Any,
    expected_m: Any,
    row_weight: Any,
    bias: Any,
    dtype: Any,
) -> Stacked:
    """A packed call, or with `rows` a masked one. Raises ValueError and TypeError as ``sm12x.grouped_gemm``
    does, and ValueError for offsets and counts that a kernel would clamp.
    """
    masked = rows is not None
    name_a, name_b = validate.fp8_names(dtype)
    row_layout.expected_m(expected_m)
    a, a_array = _operand(a, "a", name_a, "(E, max_m, K)" if masked else "(M, K)")
    b, b_array = _operand(b, "b", name_b, "(E, N, K)")
    (a_rows, k), (experts, n, k_of_b) = a.shape[-2:], b.shape
    if masked and a.shape[0] != experts:
        raise ValueError(f"a: expected {experts} experts, as many as b, got {a.shape[0]}")
    validate.sizes(a_rows, n, k, k_of_b, "a", "b")
    if experts > validate.MAX_GROUPS:
        raise ValueError(f"b: expected at most {validate.MAX_GROUPS} experts, got {experts}")
    inner = validate.matrix(a_array, "a", 1, (1, 2) if masked else (0, 1))
    if masked:
        row_layout.group_stride(a_array, "a", inner)
    row_layout.group_stride(b_array, "b", validate.matrix(b_array, "b", 1, (1, 2)))
    a_scales, per_row = _a_scale(a_scale, a_rows, experts, masked)
    b_scales = _packed_b_scale(b_scale, experts, n)
    if row_index is not None:
        row_layout.row_index(describe(row_index, "row_index"))
        a = _gathered(a, row_index)
        a_scales = _gathered(a_scales, row_index) if per_row else a_scales
    m = a.shape[-2]
    out_rows = (experts, m) if masked else (m,)
    weights = None
    if row_weight is not None:
        row_layout.row_weight(describe(row_weight, "row_weight"), out_rows)
        weights = row_weight.reshape(*out_rows, 1)
    biases = _bias(bias, (experts, n), "bias")
    counts = _counts(rows, m, experts) if masked else pairwise(_bounds(offsets, m, experts))
    groups = []
    for e, (first, last) in enumerate(counts):
        if first < last:
            at = (e, slice(first, last)) if masked else slice(first, last)
            groups.append(
                Group(
                    rows=at,
                    a=a[at],
                    b=b[e],
                    a_scale=a_scales[at] if per_row else a_scales[e],
                    b_scale=b_scales[e],
                    bias=None if biases is None else biases[e][None, :],
                    row_weight=None if weights is None else weights[at],
                )
            )
    return Stacked(groups, (*out_rows, n))


def _a_scale(scale: Any, rows: int, experts: int, masked: bool) -> tuple[NDArray[np.float32], bool]:
    """(rows, 1), masked (E, rows, 1), and true where the scale is per token, else (E, 1, 1) and false."""
    values, described = _scale(scale, "a_scale")
    if masked:
        mode = row_layout.masked_a_scale(described, experts, rows)
    else:
        mode = validate.packed_a_scale(described, rows, experts)
    if mode == SM12X_SCALE_VECTOR:
        return values.reshape((experts, rows, 1) if masked else (rows, 1)), True
    if mode == SM12X_SCALE_GROUP:
        return values.reshape(experts, 1, 1), False
    return np.broadcast_to(values.reshape(1, 1, 1), (experts, 1, 1)), False


def _gathered(x: NDArray[Any], row_index: NDArray[Any]) -> NDArray[Any]:
    """The rows of `x` that an index names, zeros where it is outside."""
    inside = (row_index >= 0) & (row_index < len(x))
    rows = np.zeros((len(row_index), x.shape[1]), x.dtype)
    rows[inside] = x[row_index[inside]]
    return rows


def _packed_b_scale(scale: Any, experts: int, n: int) -> NDArray[np.float32]:
    """(E, 1, 1) or (E, 1, N)."""
    values, described = _scale(scale, "b_scale")
    mode, _ = validate.packed_b_scale(described, experts, n)
    if mode == SM12X_SCALE_VECTOR:
        return values.reshape(experts, 1, n)
    if mode == SM12X_SCALE_GROUP:
        return values.reshape(experts, 1, 1)
    return np.broadcast_to(values.reshape(1, 1, 1), (experts, 1, 1))


def _counts(counts: Any, most: int, experts: int) -> list[tuple[int, int]]:
    """First and behind last row of each group of a masked call."""
    row_layout.counts(describe(counts, "rows"), experts)
    values: list[int] = counts.tolist()
    if any(not 0 <= value <= most for value in values):
        raise ValueError(
            f"rows: expected values from 0 to max_m = {most}, got {min(values)} to {max(values)}"
        )
    return [(0, value) for value in values]


def _bounds(offsets: Any, rows: int, experts: int) -> list[int]:
    row_layout.offsets(describe(offsets, "offsets"), experts)
    bounds: list[int] = offsets.tolist()
    if any(last < first for first, last in pairwise(bounds)):
        raise ValueError("offsets: expected values that never decrease, got some that do")
    if bounds[0] < 0 or bounds[-1] > rows:
        raise ValueError(f"offsets: expected values from 0 to M = {rows}, got {bounds[0]} to {bounds[-1]}")
    return bounds


def _entries(value: Any, count: int, argument: str) -> list[Any]:
    """A scale of a list call as one entry for each group: a sequence of `count`, or one value for all."""
    if is_sequence(value):
        if len(value) != count:
            raise ValueError(f"{argument}: expected {count} entries, one for each group, got {len(value)}")
        return list(value)
    if isinstance(value, np.ndarray) and value.size != 1:
        raise TypeError(
            f"{argument}: expected one value or a sequence of {count} entries, got an array {value.shape}"
        )
    return [value] * count


def list_groups(a: Any, b: Any, a_scale: Any, b_scale: Any, bias: Any, dtype: Any) -> list[Group]:
    """The groups of a list call, empty ones included.

    Raises ValueError and TypeError as ``sm12x.grouped_gemm`` does.
    """
    for value, argument in ((a, "a"), (b, "b"), ([] if bias is None else bias, "bias")):
        if not is_sequence(value):
            raise TypeError(
                f"{argument}: expected a sequence of arrays, because offsets is not given, "
                f"got {type(value).__qualname__}"
            )
    count = len(a)
    if len(b) != count:
        raise ValueError(f"b: expected {count} arrays, as many as a, got {len(b)}")
    named = validate.fp8_names(dtype)
    scales = _entries(a_scale, count, "a_scale"), _entries(b_scale, count, "b_scale")
    biases = _entries(bias, count, "bias")
    return [
        _list_group(i, operands, named) for i, operands in enumerate(zip(a, b, *scales, biases, strict=True))
    ]


def _list_group(
    i: int, operands: tuple[Any, Any, Any, Any, Any], named: tuple[str | None, str | None]
) -> Group:
    a, b, a_scale, b_scale, bias = operands
    a, a_array = _operand(a, f"a[{i}]", named[0], "(M, K)")
    b, b_array = _operand(b, f"b[{i}]", named[1], "(N, K)")
    (m, k), (n, k_of_b) = a.shape, b.shape
    validate.sizes(m, n, k, k_of_b, f"a[{i}]", f"b[{i}]")
    if m:  # NumPy gives empty arrays strides of 0
        validate.matrix(a_array, f"a[{i}]", 1)
    validate.matrix(b_array, f"b[{i}]", 1)
    a_values, described = _scale(a_scale, f"a_scale[{i}]")
    validate.list_scale(described, m, f"a_scale[{i}]", "token")
    b_values, described = _scale(b_scale, f"b_scale[{i}]")
    validate.list_scale(described, n, f"b_scale[{i}]", "channel")
    vector = _bias(bias, (n,), f"bias[{i}]")
    return Group(
        rows=slice(0, m),
        a=a,
        b=b,
        a_scale=a_values.reshape(-1, 1),
        b_scale=b_values.reshape(1, -1),
        bias=None if vector is None else vector[None, :],
    )

"""Checks of how the rows of a call come: offsets or counts of groups, row_index, row_weight, masked arrays.

As in `validate`, every failure is a ValueError or TypeError that names the argument, and nothing looks at
addresses.
"""

from __future__ import annotations

import math
from typing import Any

from ..abi import SM12X_SCALE_GROUP, SM12X_SCALE_ONE, SM12X_SCALE_VALUE, SM12X_SCALE_VECTOR
from ..arrays import Array
from .validate import ALIGNMENT, INT32_MAX, Matrix, Scale, dense, float32


def _integers(array: Array, argument: str, shape: tuple[int, ...], what: str) -> bool:
    """Whether contiguous integers of `shape` are int64; `what` explains the shape."""
    if array.dtype not in ("int32", "int64"):
        raise TypeError(f"{argument}: expected int32 or int64, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{argument}: expected shape {shape}, {what}, got {array.shape}")
    if shape[0] > 1 and array.strides != (1,):
        raise ValueError(f"{argument}: expected contiguous values, got stride {array.strides[0]}")
    return array.dtype == "int64"


def offsets(array: Array, groups: int) -> bool:
    """Whether `offsets` are int64; they must be (E + 1,) int32 or int64, contiguous."""
    return _integers(array, "offsets", (groups + 1,), "one more than the experts of b")


def counts(array: Array, groups: int) -> bool:
    """Whether `rows` are int64; they must be (E,) int32 or int64, contiguous."""
    return _integers(array, "rows", (groups,), "one for each expert of b")


def row_index(array: Array) -> bool:
    """Whether `row_index` is int64; it must be (M,) int32 or int64, contiguous."""
    if len(array.shape) != 1:
        raise ValueError(f"row_index: expected shape (M,), got {array.shape}")
    if array.shape[0] > INT32_MAX:
        raise ValueError(f"row_index: expected at most {INT32_MAX} rows, got {array.shape[0]}")
    return _integers(array, "row_index", array.shape, "a row of a for each row of the result")


def expected_m(value: Any) -> int:
    """`expected_m=` as a number, 0 for None."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected_m: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"expected_m: expected at least 1, got {value}")
    return value


def row_weight(array: Array, rows: tuple[int, ...]) -> None:
    """Checks `row_weight`: float32, contiguous, one value for each row. `rows`: (M,), masked (E, max_m)."""
    float32(array, "row_weight")
    if array.shape not in (rows, (*rows, 1)):
        raise ValueError(f"row_weight: expected shape {rows} or {(*rows, 1)}, got {array.shape}")
    dense_rows(array, "row_weight", len(rows))


def masked_a_scale(scale: Scale, groups: int, most: int) -> int:
    """The SM12X_SCALE_* mode of a masked call's a_scale; `most` is max_m."""
    if not isinstance(scale, Array):
        return SM12X_SCALE_VALUE
    float32(scale, "a_scale")
    if math.prod(scale.shape) == 1:
        return SM12X_SCALE_ONE
    if scale.shape in ((groups, most), (groups, most, 1)):
        dense_rows(scale, "a_scale", 2)
        return SM12X_SCALE_VECTOR
    if scale.shape == (groups, 1, 1):
        dense(scale, "a_scale", 0)
        return SM12X_SCALE_GROUP
    raise ValueError(
        f"a_scale: expected one value, per token ({groups}, {most}) or ({groups}, {most}, 1), or per expert "
        f"({groups}, 1, 1), got shape {scale.shape}"
    )


def dense_rows(array: Array, argument: str, axes: int) -> None:
    """Raises ValueError where the first `axes` axes are not one contiguous run of values."""
    expected = 1
    for extent, stride in reversed(list(zip(array.shape[:axes], array.strides[:axes], strict=True))):
        if extent > 1 and stride != expected and 0 not in array.shape:
            raise ValueError(
                f"{argument}: expected contiguous values, got strides {array.strides} of shape {array.shape}"
            )
        expected *= extent


def group_stride(array: Array, argument: str, inner: Matrix) -> int:
    """Elements between the groups of `array` (E, rows, length), whose groups are `inner`."""
    if array.shape[0] <= 1 or 0 in array.shape:
        return inner.rows * inner.stride
    stride, multiple = array.strides[0], ALIGNMENT // inner.element_bytes
    if stride < 0 or stride % multiple:
        raise ValueError(
            f"{argument}: expected the stride between experts to be a multiple of {multiple} and not "
            f"negative, got strides {array.strides}"
        )
    return stride


def disjoint(array: Array, argument: str, inner: Matrix, between: int) -> None:
    """Raises ValueError where groups of an output share elements."""
    groups = array.shape[0]
    if groups <= 1 or 0 in array.shape:
        return
    behind = (inner.rows - 1) * inner.stride + inner.length
    interleaved = between >= inner.length and (
        inner.rows == 1 or inner.stride >= (groups - 1) * between + inner.length
    )
    if between < behind and not interleaved:
        raise ValueError(
            f"{argument}: expected experts that lie apart, got strides {array.strides} of shape {array.shape}"
        )


def whole(inner: Matrix, groups: int, between: int) -> Matrix:
    """All groups as one matrix: row by row where they follow each other evenly, else one run of bytes."""
    if groups <= 1:
        return inner
    if inner.rows == 1 and between >= inner.length:
        return Matrix(groups, inner.length, between, inner.element_bytes)
    if between == inner.rows * inner.stride:
        return Matrix(groups * inner.rows, inner.length, inner.stride, inner.element_bytes)
    span = (groups - 1) * between * inner.element_bytes + inner.span
    return Matrix(1, span, span, 1)

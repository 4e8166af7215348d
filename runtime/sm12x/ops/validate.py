"""Checks of what a caller passes: every failure is a ValueError or TypeError that names the argument.

Nothing here looks at addresses, which change from call to call: those checks are in `memory`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..abi import SM12X_SCALE_GROUP, SM12X_SCALE_ONE, SM12X_SCALE_VALUE, SM12X_SCALE_VECTOR
from ..arrays import HOST, Array

FP8 = ("float8_e4m3fn", "float8_e5m2")
OUT_DTYPES = ("bfloat16", "float16", "float32")
BIAS_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_GROUPS = 1024
INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4028234663852886e38
ALIGNMENT = 16  # of addresses and row strides of a, b and out, in bytes: TMA needs it
Scale = float | Array


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of `length` elements, `stride` elements apart; `span` is bytes from first to behind last."""

    rows: int
    length: int
    stride: int
    element_bytes: int

    @property
    def span(self) -> int:
        return (
            ((self.rows - 1) * self.stride + self.length) * self.element_bytes
            if self.rows and self.length
            else 0
        )


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype by its name."""
    if dtype == "bool" or dtype.startswith("float8"):
        return 1
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


def dtype_name(dtype: Any, argument: str) -> str:
    """The name of a dtype given as a string, a NumPy, ml_dtypes or CuPy type, or a torch or JAX dtype."""
    if isinstance(dtype, str):
        return dtype
    for name in (getattr(dtype, "name", None), getattr(dtype, "__name__", None)):
        if isinstance(name, str):
            return name
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    raise TypeError(f"{argument}: expected the name of a dtype, got {dtype!r}")


def fp8_names(dtype: Any) -> tuple[str | None, str | None]:
    """`dtype=` as names for a and for b, from None, one dtype, or a pair."""
    pair = tuple(dtype) if isinstance(dtype, (tuple, list)) else (dtype, dtype)
    names = tuple(None if each is None else dtype_name(each, "dtype") for each in pair)
    if len(names) != 2 or any(name is not None and name not in FP8 for name in names):
        raise ValueError(
            f"dtype: expected one of {', '.join(FP8)} or a pair of them (for a, for b), got {dtype!r}"
        )
    return names[0], names[1]


def out_dtype_name(out_dtype: Any) -> str:
    """`out_dtype=` as a name. Raises ValueError where sm12x has no such result."""
    name = dtype_name(out_dtype, "out_dtype")
    if name not in OUT_DTYPES:
        raise ValueError(f"out_dtype: expected one of {', '.join(OUT_DTYPES)}, got {out_dtype!r}")
    return name


def stream_handle(stream: Any) -> int:
    """`stream=` as an integer handle: an int, an object with `__cuda_stream__`, `cuda_stream` (torch), `ptr`
    (CuPy) or `value` (ctypes), or a CUstream."""
    handle: Any = stream
    if type(stream) is int and 0 <= stream < 2**64:
        return stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        handle = (protocol() if callable(protocol) else protocol)[1]
    elif not isinstance(stream, int):
        for attribute in ("cuda_stream", "ptr", "value"):
            if hasattr(stream, attribute):
                handle = getattr(stream, attribute)
                break
        else:
            if type(stream).__module__.partition(".")[0] == "cuda":
                handle = int(stream)
        if handle is None and type(stream).__module__ == "ctypes":
            handle = 0  # how ctypes spells a null pointer
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise TypeError(
            "stream: expected an integer handle or an object with __cuda_stream__, cuda_stream, ptr or "
            "value, "
            f"got {type(stream).__name__}"
        )
    if not 0 <= handle < 2**64:
        raise ValueError(f"stream: expected a handle of at most 64 bits, got {handle}")
    return handle


def scale_value(scale: Any, argument: str) -> float | None:
    """The float of a scale that is None (1.0) or a Python or NumPy number; else None."""
    if scale is None:
        return 1.0
    if isinstance(scale, bool) or type(scale).__name__ in ("bool_", "bool"):
        raise TypeError(f"{argument}: expected a float or a float32 array, got a bool")
    if not isinstance(scale, numbers.Real):
        return None
    try:
        value = float(scale)
    except OverflowError:
        raise ValueError(f"{argument}: expected a value that float32 holds, got one past float64") from None
    if math.isfinite(value) and abs(value) > FLOAT32_MAX:
        raise ValueError(f"{argument}: expected a value that float32 holds, got {value!r}")
    return value


def same_device(arrays: Sequence[tuple[str, Array | None]]) -> int:
    """The CUDA device that all `arrays` lie on."""
    first, device = "", HOST
    for name, array in arrays:
        if array is None:
            continue
        if array.device == HOST:
            where = f"host memory ({array.framework})"
            like = f" {device} like {first}" if first else ""
            raise ValueError(f"{name}: expected memory of CUDA device{like}, got {where}")
        if not first:
            first, device = name, array.device
        elif array.device != device:
            raise ValueError(
                f"{name}: expected memory of CUDA device {device} like {first}, got device {array.device}"
            )
    return device


def fp8_dtype(array: Array, argument: str, named: str | None) -> str:
    """The FP8 type of an operand: its own, or for uint8 what `dtype=` says."""
    if array.dtype == "uint8":
        if named is None:
            raise TypeError(f"{argument}: uint8 data needs dtype=, one of {', '.join(FP8)}")
        return named
    if array.dtype not in FP8:
        raise TypeError(f"{argument}: expected {' or '.join(FP8)}, or uint8 with dtype=, got {array.dtype}")
    if named is not None and named != array.dtype:
        raise TypeError(f"{argument}: expected {named} as dtype= says, got {array.dtype}")
    return array.dtype


def rank(array: Array, argument: str, expected: str, dimensions: int) -> None:
    """Raises ValueError where an array has not `dimensions` axes; `expected` spells its shape."""
    if len(array.shape) != dimensions:
        raise ValueError(f"{argument}: expected shape {expected}, got {array.shape}")


def sizes(m: int, n: int, k: int, k_of_b: int, a: str, b: str) -> None:
    """Checks of M, N and K of one GEMM; `a` and `b` are the operands' names."""
    if k_of_b != k:
        raise ValueError(f"{b}: expected K = {k}, the last axis of {a}, got {k_of_b}")
    if k <= 0 or k % 16:
        raise ValueError(f"{a}: expected K to be a positive multiple of 16, got {k}")
    if n <= 0 or n % 8:
        raise ValueError(f"{b}: expected N to be a positive multiple of 8, got {n}")
    for argument, letter, value in ((a, "M", m), (b, "N", n), (a, "K", k)):
        if value > INT32_MAX:
            raise ValueError(f"{argument}: expected {letter} of at most {INT32_MAX}, got {value}")


def matrix(array: Array, argument: str, element_bytes: int, axes: tuple[int, int] = (0, 1)) -> Matrix:
    """Two axes of an array as rows. Raises ValueError where they are not contiguous, apart and aligned."""
    (rows, length), (row_stride, step) = (
        (each[axes[0]], each[axes[1]]) for each in (array.shape, array.strides)
    )
    if 0 in array.shape:  # no elements, so that frameworks put anything into the strides (NumPy: 0)
        return Matrix(rows, length, length, element_bytes)
    if length > 1 and step != 1:
        raise ValueError(
            f"{argument}: expected its last axis to be contiguous (stride 1), got strides {array.strides}"
        )
    if rows <= 1:
        return Matrix(
            rows, length, length, element_bytes
        )  # frameworks put anything into the stride of one row
    multiple = ALIGNMENT // element_bytes
    if row_stride < length or row_stride % multiple:
        raise ValueError(
            f"{argument}: expected a row stride of at least {length} elements and a multiple of {multiple}, "
            f"got strides {array.strides}"
        )
    return Matrix(rows, length, row_stride, element_bytes)


def float32(scale: Array, argument: str) -> None:
    if scale.dtype != "float32":
        raise TypeError(f"{argument}: expected float32, got {scale.dtype}")


def dense(scale: Array, argument: str, axis: int) -> None:
    if scale.shape[axis] > 1 and scale.strides[axis] != 1 and 0 not in scale.shape:
        raise ValueError(
            f"{argument}: expected contiguous values, got strides {scale.strides} of shape {scale.shape}"
        )


def packed_a_scale(scale: Scale, rows: int, groups: int) -> int:
    """The SM12X_SCALE_* mode of a packed call's a_scale; `rows` are a's. One axis of more than one element is
    per token also where M = E; per expert takes (E, 1, 1)."""
    if not isinstance(scale, Array):
        return SM12X_SCALE_VALUE
    float32(scale, "a_scale")
    if math.prod(scale.shape) == 1:
        return SM12X_SCALE_ONE
    if scale.shape in ((rows,), (rows, 1)):
        dense(scale, "a_scale", 0)
        return SM12X_SCALE_VECTOR
    if scale.shape == (groups, 1, 1):
        dense(scale, "a_scale", 0)
        return SM12X_SCALE_GROUP
    raise ValueError(
        f"a_scale: expected one value, per token ({rows},) or ({rows}, 1), or per expert ({groups}, 1, 1), "
        f"got shape {scale.shape}"
    )


def packed_b_scale(scale: Scale, groups: int, n: int, argument: str = "b_scale") -> tuple[int, int]:
    """The SM12X_SCALE_* mode of a packed call's scale of weights; per channel, elements between experts."""
    if not isinstance(scale, Array):
        return SM12X_SCALE_VALUE, 0
    float32(scale, argument)
    if math.prod(scale.shape) == 1:
        return SM12X_SCALE_ONE, 0
    if scale.shape in ((groups,), (groups, 1)):
        dense(scale, argument, 0)
        return SM12X_SCALE_GROUP, 0
    if scale.shape in ((groups, n), (groups, n, 1)):
        dense(scale, argument, 1)
        return SM12X_SCALE_VECTOR, between(scale, argument, n)
    raise ValueError(
        f"{argument}: expected one value, per expert ({groups},) or ({groups}, 1), or per channel "
        f"({groups}, {n}) or "
        f"({groups}, {n}, 1), got shape {scale.shape}"
    )


def between(array: Array, argument: str, length: int) -> int:
    """Elements between the first axis's neighbours of a per-channel scale or a bias."""
    if array.shape[0] <= 1:
        return length
    if array.strides[0] < 0:
        raise ValueError(f"{argument}: expected strides that are not negative, got {array.strides}")
    return array.strides[0]


def list_scale(scale: Scale, length: int, argument: str, per: str) -> int:
    """The SM12X_SCALE_* mode of one group's scale in a list call; `length` is its M or N."""
    if not isinstance(scale, Array):
        return SM12X_SCALE_VALUE
    float32(scale, argument)
    if math.prod(scale.shape) == 1:
        return SM12X_SCALE_ONE
    if scale.shape not in ((length,), (length, 1)):
        raise ValueError(
            f"{argument}: expected one value, or per {per} ({length},) or ({length}, 1), got shape "
            f"{scale.shape}"
        )
    dense(scale, argument, 0)
    return SM12X_SCALE_VECTOR


def bias(array: Array, shape: tuple[int, ...], argument: str) -> None:
    """Checks dtype, shape and contiguity of a bias."""
    if array.dtype not in BIAS_BYTES:
        raise TypeError(f"{argument}: expected float32, bfloat16 or float16, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{argument}: expected shape {shape}, got {array.shape}")
    dense(array, argument, len(shape) - 1)


def writable(array: Array, argument: str) -> None:
    """Raises ValueError for a read-only array; JAX's always are."""
    if array.readonly:
        raise ValueError(
            f"{argument}: expected an array that can be written, got a read-only one ({array.framework})"
        )


def output(array: Array, shape: tuple[int, ...], out_dtype: str, argument: str) -> Matrix:
    """Checks `out` against what the call produces; its last two axes as rows."""
    if array.dtype != out_dtype:
        raise TypeError(f"{argument}: expected {out_dtype}, as out_dtype says, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{argument}: expected shape {shape}, got {array.shape}")
    writable(array, argument)
    return matrix(array, argument, itemsize(out_dtype), (len(shape) - 2, len(shape) - 1))


def workspace_bytes(array: Array) -> int:
    """Bytes of `workspace`, which must be contiguous and writable."""
    expected = 1
    for extent, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if extent > 1 and stride != expected:
            raise ValueError(
                f"workspace: expected a contiguous array, got strides {array.strides} of shape {array.shape}"
            )
        expected *= extent
    writable(array, "workspace")
    return math.prod(array.shape) * itemsize(array.dtype)

"""What an ingested array is, and what ingest needs from the CUDA driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

HOST = -1
"""Device number of host memory."""

DTYPES = frozenset(
    [
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64"),
        *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
        *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    ]
)
"""Every dtype name that ingest gives: NumPy's and ml_dtypes' names for elements of whole bytes."""


class Array(NamedTuple):
    """Memory of one array, described without its framework.

    ptr: address of element [0, ..., 0], its byte offset included; 0 only where the array has no elements.
    shape: elements per dimension, outermost first.
    strides: elements (not bytes) between neighbours in each dimension.
    dtype: a name in `DTYPES`.
    device: CUDA ordinal, or -1 for host memory.
    framework: "torch", "cupy", "jax", "numpy", "dlpack" or "cuda_array_interface".
    owner: keeps the memory alive; hold it until the launch is enqueued.
    readonly: the producer forbids writes, or they would land in a copy that the caller never sees.
    """

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    framework: str
    owner: object
    readonly: bool = False


# NamedTuple's own constructor is a Python-level function that costs twice as much as this; ingest is on the
# hot path.
make_array = cast(Callable[[tuple[Any, ...]], Array], partial(tuple.__new__, Array))


class Ordering(Protocol):
    """The driver calls that keep streams in order; the module `sm12x.ordering` has them.

    Streams and events are integer handles; stream 0 or 1 is the legacy default stream, 2 the per-thread
    default stream. `device` is the CUDA ordinal that a stream belongs to. Failures raise `sm12x.CudaError`.
    """

    def stream_create(self, device: int) -> int: ...

    def stream_wait_event(self, stream: int, event: int, device: int) -> None: ...

    def event_create(self, device: int) -> int: ...

    def event_record(self, event: int, stream: int, device: int) -> None: ...

    def event_query(self, event: int) -> bool: ...

    def event_synchronize(self, event: int) -> None: ...

    def event_destroy(self, event: int) -> None: ...

    def pointer_device(self, ptr: int) -> int: ...


def numpy_dtype(dtype: str) -> Any:
    """The NumPy dtype of a name; bfloat16 and the 8-bit floats are those of ml_dtypes."""
    import ml_dtypes  # not above: callers with arrays on a GPU need neither
    import numpy

    return numpy.dtype(getattr(ml_dtypes, dtype, dtype))


def stream_handle(stream: int) -> int:
    """`stream`, the legacy default stream always written as 1: array protocols forbid the ambiguous 0."""
    return stream or 1


def compact_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a row-major array of `shape` without gaps."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))

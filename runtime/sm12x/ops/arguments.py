"""From the caller's objects to arrays and a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import ordering
from ..arrays import HOST
from ..tensors import ingest
from . import validate


def device_of(obj: Any, framework: str, argument: str) -> int:
    """The CUDA device that `obj` lies on, asked before it is taken in, because its stream depends on it."""
    if framework in ("torch", "cupy", "numpy"):
        device = ingest(obj, argument, 0).device
    elif framework == "cuda_array_interface":
        pointer = int(obj.__cuda_array_interface__["data"][0])
        # Taking an empty one in says what is wrong with it.
        device = ordering.pointer_device(pointer) if pointer else ingest(obj, argument, 0).device
    elif hasattr(obj, "__dlpack_device__"):
        try:
            kind, ordinal = obj.__dlpack_device__()
        except Exception:  # deleted or sharded JAX arrays: taking it in names the argument
            device = ingest(obj, argument, 0).device
        else:
            device = int(ordinal) if int(kind) in (2, 13) else HOST  # kDLCUDA, kDLCUDAManaged
    else:
        device = ingest(obj, argument, 0).device
    if device < 0:
        raise ValueError(f"{argument}: expected memory of a CUDA device, got host memory ({framework})")
    return device


def scale(value: Any, argument: str, stream: int) -> validate.Scale:
    """A scale as a float (None is 1.0) or as an array."""
    number = validate.scale_value(value, argument)
    return ingest(value, argument, stream) if number is None else number


def is_sequence(value: Any) -> bool:
    """Whether an argument is a sequence of arrays, not an array."""
    return isinstance(value, (list, tuple)) or (
        isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    )


def refuse_layouts(
    a: Any,
    offsets: Any,
    row_index: Any,
    rows: Any,
    expected_m: Any,
    row_weight: Any,
    early_weights: Any = False,
) -> None:
    """Raises ValueError or TypeError for arguments that belong to another layout of the call."""
    if not isinstance(early_weights, bool):
        raise TypeError(f"early_weights: expected a bool, got {type(early_weights).__name__}")
    if rows is not None:
        for argument, value in (("offsets", offsets), ("row_index", row_index)):
            if value is not None:
                raise ValueError(
                    f"{argument}: expected None where rows is given (a masked call), got "
                    f"{type(value).__name__}"
                )
    elif expected_m is not None:
        raise ValueError(f"expected_m: expected None where rows is not given, got {expected_m!r}")
    if offsets is None and rows is None:
        if early_weights:
            raise ValueError(
                "early_weights: expected False where neither offsets nor rows is given (a list call), got "
                "True"
            )
        for argument, value in (("row_index", row_index), ("row_weight", row_weight)):
            if value is not None:
                raise ValueError(
                    f"{argument}: expected None where neither offsets nor rows is given (a list call), got "
                    f"{type(value).__name__}"
                )
    if isinstance(a, (list, tuple)) and (offsets is not None or rows is not None):
        shape, given = ("(M, K)", "offsets") if rows is None else ("(E, max_m, K)", "rows")
        raise TypeError(f"a: expected one {shape} array where {given} is given, got {type(a).__name__}")


def refuse_for_numpy(**arguments: Any) -> None:
    """Raises ValueError for arguments that are given though they mean nothing with NumPy arrays."""
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{argument}: expected None with NumPy arrays, which run on the CPU, got {value!r}"
            )


def numpy_backend(a: Any, b: Any, *, workspace: Any, stream: Any, variant: Any, **arguments: Any) -> Any:
    """The same call on NumPy arrays. Raises ValueError for arguments that mean nothing there."""
    refuse_for_numpy(workspace=workspace, stream=stream, variant=variant)
    from ..reference import grouped_gemm_numpy  # not above: GPU callers need no NumPy code

    return grouped_gemm_numpy(a, b, **arguments)

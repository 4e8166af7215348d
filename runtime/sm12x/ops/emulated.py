"""The backend for host arrays that runs the shipped kernels in the emulator.

The arrays are mirrored in emulated memory, and the call is made again with what stands for them there: arrays
of a device, like those of any other DLPack producer. Everything behind that is the GPU's own path.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Callable
from typing import Any

from .. import driver
from ..arrays import HOST, Array, numpy_dtype
from ..tensors import allocate_like, framework_of, ingest
from . import validate
from .arguments import is_sequence

BACKENDS = ("auto", "emulator")
BACKEND = os.environ.get("SM12X_BACKEND") or None


def wanted(backend: Any) -> bool:
    """Whether a call with this `backend=` runs in the emulator; None is what SM12X_BACKEND says, or "auto".

    Raises ValueError where there is no backend of that name.
    """
    argument, value = ("SM12X_BACKEND", BACKEND or "auto") if backend is None else ("backend", backend)
    if not isinstance(value, str) or value not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKENDS)}, got {value!r}")
    return value == "emulator"


def device() -> driver.Device:
    """The emulated device that is in force. Raises ValueError for bad options in the environment."""
    from ..emulator.driver import open_device  # not above: nobody else needs the emulator

    return open_device()


def emulated_call(
    call: Callable[..., Any],
    a: Any,
    b: Any,
    *,
    out: Any,
    out_dtype: Any,
    workspace: Any,
    stream: Any,
    dtype: Any,
    variant: Any,
    expected_m: Any,
    early_weights: Any,
    **inputs: Any,
) -> Any:
    """`call`, which is `grouped_gemm`, on host arrays in emulated memory; `inputs` are its other arrays.

    Raises as `sm12x.grouped_gemm` does, and EmulatorError where a kernel does what it must not.
    """
    from ..emulator import host_arrays as mirrors

    refuse_stream(stream)
    finish: Callable[[Any], Any] = list if is_sequence(out) else _same
    results = out
    if out is None:
        results, finish = _outputs(a, b, inputs["row_index"], out_dtype)

    def take(value: Any, name: str, role: int = mirrors.INPUT) -> Any:
        return _mirrored(mirror, value, name, role)

    with mirrors.Mirror(device()) as mirror:
        arguments = {name: take(value, name) for name, value in inputs.items()}
        arguments["out"] = take(results, "out", mirrors.OUTPUT)
        arguments["workspace"] = take(workspace, "workspace", mirrors.SCRATCH)
        operands = take(a, "a"), take(b, "b")
        mirror.upload()
        returned = call(
            *operands,
            **arguments,
            expected_m=expected_m,
            out_dtype=out_dtype,
            dtype=dtype,
            variant=variant,
            early_weights=early_weights,
            backend="auto",
        )
        mirror.collect()
    # Without outputs of ours there was nothing to compute, as in a list call without groups.
    return returned if results is None else finish(results)


def _mirrored(mirror: Any, value: Any, name: str, role: int) -> Any:
    """What stands for `value`; what is no array stays as it is, and the call says what it thinks of it."""
    from ..emulator.host_arrays import INPUT

    if value is None or isinstance(value, (numbers.Number, str)):
        return value
    if is_sequence(value):
        return [_mirrored(mirror, entry, f"{name}[{i}]", role) for i, entry in enumerate(value)]
    array = _ingest(value, name)
    if array is None:
        return value
    if role != INPUT:
        validate.writable(array, name)
    return mirror.add(array, name, role)


def refuse_stream(stream: Any) -> None:
    """Raises ValueError for a stream."""
    if stream is not None:
        raise ValueError(f"stream: expected None with the emulator, which has no streams, got {stream!r}")


def mirrored_call(
    call: Callable[..., Any], inputs: dict[str, Any], outputs: dict[str, Any], scratch: dict[str, Any]
) -> None:
    """Make `call`, by keyword, with what stands for host arrays in emulated memory, and bring `outputs` and
    `scratch` back. What is no array is passed as it is."""
    from ..emulator import host_arrays as mirrors

    with mirrors.Mirror(device()) as mirror:
        roles = (inputs, mirrors.INPUT), (outputs, mirrors.OUTPUT), (scratch, mirrors.SCRATCH)
        taken = {
            name: _mirrored(mirror, value, name, role)
            for arguments, role in roles
            for name, value in arguments.items()
        }
        mirror.upload()
        call(**taken)
        mirror.collect()


def new_output(framework: str, shape: tuple[int, ...], dtype: str) -> tuple[Any, Callable[[Any], Any]]:
    """A new array of zeros in host memory, and what makes of it what the caller gets. JAX's own arrays cannot
    be written: it gets a copy."""
    if framework != "jax":
        made = allocate_like(framework, shape, dtype, HOST, 0)
        made[...] = 0
        return made, _same
    import numpy

    return numpy.zeros(shape, numpy_dtype(dtype)), sys.modules["jax"].numpy.asarray


def _same(results: Any) -> Any:
    return results


def _ingest(value: Any, name: str) -> Array | None:
    """A host array, taken in; None where `value` is no array. Raises ValueError for memory elsewhere."""
    try:
        framework_of(value, name)
    except TypeError:
        return None
    array = ingest(value, name, 0)
    if array.device != HOST:
        raise ValueError(
            f"{name}: expected host memory, which the emulator runs on, got memory of CUDA device "
            f"{array.device}"
        )
    return array


def _outputs(a: Any, b: Any, row_index: Any, out_dtype: Any) -> tuple[Any, Callable[[Any], Any]]:
    """New outputs, zero, like `a`'s arrays, and what makes of them what the caller gets. None where `a`, `b`
    and `row_index` cannot have any: the call will say why."""
    kind = validate.out_dtype_name(out_dtype)
    if is_sequence(a) or is_sequence(b):
        if not (is_sequence(a) and is_sequence(b)) or len(a) != len(b) or not len(a):
            return None, _same
        pairs = [_outputs(x, y, None, out_dtype) for x, y in zip(a, b, strict=True)]
        if any(made is None for made, _ in pairs):
            return None, _same
        return [made for made, _ in pairs], lambda outs: [
            finish(each) for each, (_, finish) in zip(outs, pairs, strict=True)
        ]
    x, w = _ingest(a, "a"), _ingest(b, "b")
    if x is None or w is None or len(x.shape) not in (2, 3) or len(w.shape) not in (2, 3):
        return None, _same
    rows = x.shape[:-1]
    if row_index is not None:
        index = _ingest(row_index, "row_index")
        if index is None or len(index.shape) != 1:
            return None, _same
        rows = index.shape
    return new_output(x.framework, (*rows, w.shape[-2]), kind)

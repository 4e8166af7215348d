"""Arrays for results, made by the caller's own framework, and their hand-over after the launch.

JAX needs care, because it dispatches to streams of its own that nobody else can name:
- Memory for its outputs comes from JAX. Memory of ours could not be freed safely: XLA returns imported memory
  as soon as the last reference to it goes, while kernels that read it may still be queued on its compute
  stream. JAX's own allocator reuses memory in the order of that stream, and needs no callback into Python
  from XLA's threads.
- The array given to the caller is a second view of that memory, imported through DLPack after the launch, so
  that whatever JAX does with it waits for an event recorded behind the launch. The first view is never seen
  by anybody.
- JAX may reuse memory once it is dropped, without knowing of our stream. So inputs and outputs are held until
  that event has passed; `deliver` lets go of them at later calls.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import ordering
from .arrays import HOST, Array, Ordering, numpy_dtype, stream_handle
from .streams import current_stream


@dataclass(frozen=True, slots=True)
class JaxOutput:
    """Memory of JAX's that a launch writes; `deliver` turns it into the array for the caller."""

    array: Any


def allocate_like(framework: str, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
    """A new row-major array of `framework`, uninitialised, for a result that is written on `stream`.

    `device` is a CUDA ordinal, or -1 for host memory (torch, JAX, NumPy). torch and CuPy take memory that
    `stream` may write at once, also where it is not their current stream. JAX: a `JaxOutput`, for `ingest`
    and `deliver`.

    Raises ValueError naming `out` where that framework has no such dtype, and TypeError where it has no
    allocator.
    """
    if framework == "torch":
        return _empty_torch(shape, dtype, device, stream)
    if framework == "cupy":
        return _empty_cupy(shape, dtype, device, stream)
    if framework == "jax":
        return _empty_jax(shape, dtype, device)
    if framework == "numpy":
        import numpy

        return numpy.empty(shape, numpy_dtype(dtype))
    raise TypeError(f"out: expected an array, {framework} arrays bring no allocator, got None")


def deliver(
    outs: Sequence[Any], inputs: Iterable[Array], stream: int, device: int, order: Ordering = ordering
) -> list[Any]:
    """Hand `outs`, from `allocate_like` or the caller, to the caller. Call it once, behind the last launch.

    Everything but a `JaxOutput` is returned as it is. Where an output or an input is JAX's, an event is
    recorded on `stream`, JAX's outputs become arrays that wait for it, and their memory and that of the JAX
    inputs is held until it passed.
    """
    held = [array.owner for array in inputs if array.framework == "jax"]
    pending = [out for out in outs if type(out) is JaxOutput]
    if not held and not pending:
        return list(outs)
    event = order.event_create(device)
    try:
        order.event_record(event, stream, device)
        return [
            sys.modules["jax"].dlpack.from_dlpack(_Export(out.array, event, device, order))
            if type(out) is JaxOutput
            else out
            for out in outs
        ]
    finally:
        _hold(_Held(event, (held, pending), order))


@dataclass(frozen=True, slots=True)
class _Export:
    """Exports JAX's own array again, to consumers that first wait for `event` on `device`."""

    array: Any
    event: int
    device: int
    order: Ordering

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        # JAX names the stream on which it will record that the array is ready (None on the CPU, or where its
        # plugin has none: it then takes the array to be ready at once). -1 asks for no order at all.
        if stream is None:
            self.order.event_synchronize(self.event)
        elif stream != -1:
            self.order.stream_wait_event(stream_handle(stream), self.event, self.device)
        return self.array.__dlpack__(stream=stream, **options)


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    event: int
    owners: object
    order: Ordering


_held: list[_Held] = []
_held_lock = threading.Lock()


def _hold(new: _Held) -> None:
    """Keep the owners of `new` alive until its event has passed, and let go of all whose event has."""
    with _held_lock:
        _held.append(new)
        passed = [entry for entry in _held if entry.order.event_query(entry.event)]
        _held[:] = [entry for entry in _held if entry not in passed]
    # Out of the lock: letting go runs JAX's deleters.
    for entry in passed:
        entry.order.event_destroy(entry.event)


def _empty_torch(shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
    torch: Any = sys.modules["torch"]
    kind = getattr(torch, dtype, None)
    if kind is None:
        raise ValueError(f"out: torch {torch.__version__} has no dtype {dtype}; ask for another out_dtype")
    if device == HOST:
        return torch.empty(shape, dtype=kind, device="cpu")
    # Freed memory is reused in the order of the stream that allocated it: taken from another stream than the
    # one that will write it, it may still be in use.
    if stream_handle(current_stream("torch", device)) == stream_handle(stream):
        return torch.empty(shape, dtype=kind, device=device)
    cuda = torch.cuda
    other = cuda.default_stream(device) if stream in (0, 1) else cuda.ExternalStream(stream, device=device)
    with cuda.stream(other):
        return torch.empty(shape, dtype=kind, device=device)


def _empty_cupy(shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
    cupy: Any = sys.modules["cupy"]
    try:
        with cupy.cuda.Device(device):
            if stream_handle(current_stream("cupy", device)) == stream_handle(stream):
                return cupy.empty(shape, dtype=numpy_dtype(dtype))
            with _borrow_for_cupy(stream, device):
                return cupy.empty(shape, dtype=numpy_dtype(dtype))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"out: CuPy {cupy.__version__} has no {dtype} ({error}); bfloat16 needs CuPy 14 and NumPy 2.1.2; "
            "ask for another out_dtype, or pass out= from another framework"
        ) from error


def _borrow_for_cupy(stream: int, device: int) -> Any:
    # CuPy 14 warns that Stream.from_external replaces this class, but what that one makes destroys the stream
    # that it was lent as soon as it goes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return sys.modules["cupy"].cuda.ExternalStream(stream, device)


def _empty_jax(shape: tuple[int, ...], dtype: str, device: int) -> JaxOutput:
    jax: Any = sys.modules["jax"]
    platform = "cpu" if device == HOST else "cuda"
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError as error:  # this JAX has no such backend
        raise ValueError(
            f"out: JAX has no {platform} devices in this process ({error}); pass out="
        ) from error
    found = [each for each in devices if device in (HOST, each.local_hardware_id)]
    if not found:
        raise ValueError(f"out: JAX has no CUDA device {device} in this process; pass out=")
    # default_device and not device=: with a device, jax.numpy.empty of 0.11 and 0.12 copies.
    with jax.default_device(found[0]):
        return JaxOutput(jax.numpy.empty(shape, dtype=numpy_dtype(dtype)))

"""Events and streams of the CUDA driver, for order between streams: what `arrays.Ordering` asks for.

Not on the hot path: only JAX arrays and arrays with nothing but `__cuda_array_interface__` need it.
"""

from __future__ import annotations

from . import driver

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_NOT_READY = 600  # CUDA_ERROR_NOT_READY


def stream_create(device: int) -> int:
    """A new stream on `device` that does not synchronise with the legacy default stream. Raises CudaError."""
    with driver.current(driver.get_device(device)):
        return int(driver.call("cuStreamCreate", driver.NON_BLOCKING))


def event_create(device: int) -> int:
    """A new event on `device`, without timing. Raises CudaError."""
    with driver.current(driver.get_device(device)):
        return int(driver.call("cuEventCreate", _DISABLE_TIMING))


def event_record(event: int, stream: int, device: int) -> None:
    """Record `event` behind all work on `stream` of `device`. Raises CudaError."""
    with driver.current(driver.get_device(device)):  # the default streams are those of the current context
        driver.call("cuEventRecord", event, stream)


def stream_wait_event(stream: int, event: int, device: int) -> None:
    """Have all later work on `stream` of `device` wait for `event`. Raises CudaError."""
    with driver.current(driver.get_device(device)):
        driver.call("cuStreamWaitEvent", stream, event, 0)


def event_query(event: int) -> bool:
    """Whether all work before `event` is done. Raises CudaError."""
    status = int(driver.get_driver().bindings.cuEventQuery(event)[0])
    if status not in (0, _NOT_READY):
        raise driver.cuda_error("cuEventQuery", status)
    return status == 0


def event_synchronize(event: int) -> None:
    """Wait on the host for all work before `event`. Raises CudaError."""
    driver.call("cuEventSynchronize", event)


def event_destroy(event: int) -> None:
    """Free `event`; streams told to wait for it still do. Raises CudaError."""
    driver.call("cuEventDestroy", event)


def pointer_device(ptr: int) -> int:
    """CUDA ordinal of the device that `ptr` belongs to. Raises CudaError where CUDA does not know it."""
    attributes = driver.get_driver().bindings.CUpointer_attribute
    return int(driver.call("cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, ptr))

"""One GPU with one stream: memory, copies, launches and times straight from the driver, so that the kit needs
no framework.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from .. import device_memory, driver, manifest
from ..arrays import numpy_dtype
from ..device_memory import DeviceArray

__all__ = ["DeviceArray", "Gpu", "device_attribute", "numpy_dtype"]


def device_attribute(device: driver.Device, name: str) -> int:
    """A CU_DEVICE_ATTRIBUTE of a device, by its full name."""
    attribute = getattr(driver.get_driver().bindings.CUdevice_attribute, name)
    return int(driver.call("cuDeviceGetAttribute", attribute, driver.call("cuDeviceGet", device.ordinal)))


@dataclass
class Gpu:
    """An opened device whose primary context is current in this thread, and one stream on it."""

    device: driver.Device
    stream: int

    @classmethod
    def open(cls, ordinal: int) -> Gpu:
        """Raises what `driver.get_device` raises: DriverError, UnsupportedDeviceError, CubinError,
        CudaError.
        """
        device = driver.get_device(ordinal)
        bindings = driver.get_driver().bindings
        driver.call("cuCtxSetCurrent", bindings.CUcontext(device.context))
        flags = int(bindings.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return cls(device, int(driver.call("cuStreamCreate", flags)))

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Uninitialised memory."""
        return device_memory.empty(self.device, shape, dtype, self.stream)

    def upload(self, values: NDArray[Any], dtype: str | None = None) -> DeviceArray:
        """A copy of a host array; `dtype` renames its bits, as in uint8 that means float8_e4m3fn."""
        return device_memory.upload(self.device, values, self.stream, dtype)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A compact array back on the host, after everything enqueued before."""
        return device_memory.download(self.device, array, self.stream)

    def fill(self, array: DeviceArray, byte: int) -> None:
        """Sets every byte of a compact array, in stream order."""
        if array.nbytes:
            driver.call("cuMemsetD8Async", array.ptr, byte, array.nbytes, self._stream())

    def view(
        self,
        array: DeviceArray,
        first: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str | None = None,
    ) -> DeviceArray:
        """Part of an array: `first` and `strides` in elements of `dtype` (default: its own)."""
        dtype = dtype or array.dtype
        ptr = array.ptr + first * numpy_dtype(dtype).itemsize
        return DeviceArray(ptr, shape, dtype, array.ordinal, array.owner, strides, array.stream)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Device to device, `source.nbytes` bytes, in stream order."""
        driver.call("cuMemcpyDtoDAsync", target.ptr, source.ptr, source.nbytes, self._stream())

    def synchronize(self) -> None:
        """Waits for the stream. Raises CudaError where something enqueued on it failed."""
        driver.call("cuStreamSynchronize", self._stream())

    def load(self, variant: manifest.Variant) -> int:
        """The CUfunction of any kernel of the manifest."""
        return driver.get_function(self.device, variant)

    def launch(
        self, function: int, grid: int, threads: int, params: ctypes.Structure, shared_memory: int = 0
    ) -> None:
        """One launch of a kernel with one struct as its parameter."""
        bindings = driver.get_driver().bindings
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        driver.call(
            "cuLaunchKernel",
            bindings.CUfunction(function),
            grid,
            1,
            1,
            threads,
            1,
            1,
            shared_memory,
            self._stream(),
            ctypes.addressof(arguments),
            0,
        )

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Time on the device between an event before and one after what `work` enqueues on the stream."""
        events = [driver.call("cuEventCreate", 0) for _ in range(2)]
        try:
            driver.call("cuEventRecord", events[0], self._stream())
            work()
            driver.call("cuEventRecord", events[1], self._stream())
            driver.call("cuEventSynchronize", events[1])
            return float(driver.call("cuEventElapsedTime", *events))
        finally:
            for event in events:
                driver.call("cuEventDestroy", event)

    def _stream(self) -> Any:
        return driver.get_driver().bindings.CUstream(self.stream)

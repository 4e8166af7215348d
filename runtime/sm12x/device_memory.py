"""Arrays in device memory without any framework, for the command line: they are exported through DLPack, like
those of any other producer.
"""

from __future__ import annotations

import math
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import dlpack, driver
from .arrays import compact_strides, numpy_dtype
from .errors import CudaError


@dataclass
class DeviceArray:
    """Memory on the CUDA device of number `ordinal`; `strides` in elements, by default row-major.

    `owner` keeps the memory alive: views of one allocation share it, and so does everybody who took the array
    through DLPack, for as long as they hold what they took. `stream` is the one that writes the array; None
    where nothing does any more.
    """

    ptr: int
    shape: tuple[int, ...]
    dtype: str
    ordinal: int
    owner: object
    strides: tuple[int, ...] = ()
    stream: int | None = None

    def __post_init__(self) -> None:
        self.strides = self.strides or compact_strides(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements of a compact array of this shape."""
        return math.prod(self.shape) * int(numpy_dtype(self.dtype).itemsize)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.ordinal

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> object:
        """A new unversioned capsule; work on `stream` (None: the legacy default stream) may use it at
        once.
        """
        if self.stream is not None and stream not in (-1, self.stream):
            with driver.current(driver.get_device(self.ordinal)):
                driver.call("cuStreamSynchronize", self.stream)
        return dlpack.make_capsule(self.ptr, self.shape, self.strides, self.dtype, self.ordinal, self.owner)


class _Allocation:
    """One cuMemAlloc on a device, freed with its last user. Freeing waits for the device, so nothing that
    still runs loses it.
    """

    def __init__(self, device: driver.Device, nbytes: int) -> None:
        with driver.current(device):
            self.ptr = int(driver.call("cuMemAlloc", max(1, nbytes)))
        # The end of the process frees what is left, and it may be too late for calls by then.
        weakref.finalize(self, _free, device, self.ptr).atexit = False


def _free(device: driver.Device, ptr: int) -> None:
    # Fails only where the context is lost or not ours (after a fork), and then every other call says so.
    with suppress(CudaError), driver.current(device):
        driver.call("cuMemFree", ptr)


def empty(device: driver.Device, shape: tuple[int, ...], dtype: str, stream: int | None) -> DeviceArray:
    """Uninitialised memory that `stream` will write; None: the host alone, and waits for it. Raises CudaError
    where there is not enough.
    """
    allocation = _Allocation(device, math.prod(shape) * numpy_dtype(dtype).itemsize)
    return DeviceArray(allocation.ptr, shape, dtype, device.ordinal, allocation, stream=stream)


def upload(device: driver.Device, values: NDArray[Any], stream: int, dtype: str | None = None) -> DeviceArray:
    """A copy of a host array, done when this returns; `dtype` renames its bits, as in uint8 that means
    float8_e4m3fn.
    """
    values = np.ascontiguousarray(values)
    array = empty(device, values.shape, dtype or values.dtype.name, stream)
    if values.nbytes:
        with driver.current(device):
            driver.call("cuMemcpyHtoDAsync", array.ptr, values.ctypes.data, values.nbytes, stream)
            driver.call("cuStreamSynchronize", stream)  # `values` may go away
    return array


def write(device: driver.Device, array: DeviceArray, first: int, values: NDArray[Any]) -> None:
    """Copy a compact host array into the elements of a compact array from number `first` on, done when this
    returns.
    """
    if values.nbytes:
        start = array.ptr + first * numpy_dtype(array.dtype).itemsize
        with driver.current(device):
            driver.call("cuMemcpyHtoDAsync", start, values.ctypes.data, values.nbytes, 0)
            driver.call("cuStreamSynchronize", 0)


def download(device: driver.Device, array: DeviceArray, stream: int) -> NDArray[Any]:
    """A compact array back on the host, after everything enqueued on `stream` before."""
    values = np.empty(array.shape, numpy_dtype(array.dtype))
    with driver.current(device):
        if values.nbytes:
            driver.call("cuMemcpyDtoHAsync", values.ctypes.data, array.ptr, values.nbytes, stream)
        driver.call("cuStreamSynchronize", stream)
    return values

"""The driver API as far as generated PTX needs it: PTX text in, memory, launches, and its own messages out.

Through ctypes, so that nothing stands between what a case says and what the driver is given.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np

U64 = ctypes.c_uint64
_LOG_BYTES = 1 << 16
# CUjit_option: error log buffer and its size
_ERROR_LOG, _ERROR_LOG_SIZE = 5, 6


class CudaFailure(RuntimeError):
    """A driver call that failed."""


class Cuda:
    """Device 0 and its primary context, current in this thread."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = c_int(), c_void_p()
        self.call("cuDeviceGet", byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", byref(context), device)
        self.call("cuCtxSetCurrent", context)
        self._kept: list[Any] = []

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CudaFailure with the driver's name for the status."""
        status = getattr(self.library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(status, byref(text))
            raise CudaFailure(f"{name}: {(text.value or b'?').decode()} ({status})")

    def module(self, text: str) -> c_void_p:
        """Raises CudaFailure with what the assembler says about the PTX."""
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (c_int * 2)(_ERROR_LOG, _ERROR_LOG_SIZE)
        values = (c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        found = c_void_p()
        try:
            self.call("cuModuleLoadDataEx", byref(found), text.encode() + b"\0", 2, options, values)
        except CudaFailure as error:
            raise CudaFailure(f"{error}: {log.value.decode(errors='replace')[:1500]}") from None
        return found

    def function(self, module: c_void_p, name: str) -> c_void_p:
        found = c_void_p()
        self.call("cuModuleGetFunction", byref(found), module, name.encode())
        return found

    def allocate(self, size: int) -> int:
        found = U64()
        self.call("cuMemAlloc_v2", byref(found), c_size_t(size))
        return int(found.value)

    def upload(self, address: int, content: np.ndarray) -> None:
        data = np.ascontiguousarray(content)
        self.call("cuMemcpyHtoD_v2", U64(address), c_void_p(data.ctypes.data), c_size_t(data.nbytes))

    def download(self, address: int, size: int) -> np.ndarray:
        found = np.empty(size, np.uint8)
        self.call("cuMemcpyDtoH_v2", c_void_p(found.ctypes.data), U64(address), c_size_t(size))
        return found

    def launch(self, function: c_void_p, ctas: int, threads: int, table: int, first: int) -> None:
        """A kernel of `emulated.copies.ptx`, run to its end. Raises CudaFailure."""
        values = U64(table), c_uint(first)
        arguments = (c_void_p * 2)(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernel", function, ctas, 1, 1, threads, 1, 1, 0, None, arguments, None)
        self.call("cuCtxSynchronize")

    def encode_status(
        self, address: int, arguments: dict[str, Any], content: Any = None, *, at: int | None = None
    ) -> int:
        """The status of cuTensorMapEncodeTiled; the map goes to `at`, by default to `content`'s address."""
        rank = max(len(arguments["dims"]), 5)
        dims = (U64 * rank)(*arguments["dims"])
        strides = (U64 * rank)(*arguments["strides"])
        box, steps = (c_uint * rank)(*arguments["box"]), (c_uint * rank)(*arguments["steps"])
        where = at if at is not None else ctypes.addressof(content)
        modes = [arguments[name] for name in ("interleave", "swizzle", "l2", "fill")]
        return int(
            self.library.cuTensorMapEncodeTiled(
                c_void_p(where),
                c_int(arguments["kind"]),
                c_uint(arguments["rank"]),
                c_void_p(address),
                dims,
                strides,
                box,
                steps,
                *(c_int(mode) for mode in modes),
            )
        )

    def encode(self, address: int, arguments: dict[str, Any]) -> bytes:
        """128 bytes of a tensor map. Raises CudaFailure."""
        memory = ctypes.create_string_buffer(128 + 64)
        at = -(-ctypes.addressof(memory) // 64) * 64
        status = self.encode_status(address, arguments, at=at)
        if status:
            raise CudaFailure(f"cuTensorMapEncodeTiled: status {status}")
        return ctypes.string_at(at, 128)

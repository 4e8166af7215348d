"""Runs forms on a GPU: PTX through the driver's own compiler, by ctypes, with nothing else of CUDA
installed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .forms import Form
from .kernels import THREADS, module, result_bytes
from .on_emulator import joined, split

_JIT_ERROR_LOG_BUFFER, _JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6
_LOG_BYTES = 16384


class DeviceError(RuntimeError):
    """A driver function failed; for PTX that is refused, with what the compiler said."""


class Device:
    """The first CUDA device, with its primary context current in the calling thread.

    Raises OSError where there is no driver, and DeviceError.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", ctypes.c_uint(0))
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(256), device)
        self.name = name.value.decode()
        major, minor = ctypes.c_int(), ctypes.c_int()
        for number, value in ((75, major), (76, minor)):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), device)
        self.capability = (major.value, minor.value)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
            raise DeviceError(f"{name} failed with {(text.value or b'?').decode()} ({status})")

    def load(self, text: str) -> ctypes.c_void_p:
        """A module from PTX. Raises DeviceError with the compiler's log."""
        found = ctypes.c_void_p()
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG_BUFFER, _JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        content = ctypes.create_string_buffer(text.encode())
        try:
            self._call("cuModuleLoadDataEx", ctypes.byref(found), content, ctypes.c_uint(2), options, values)
        except DeviceError as error:
            error.args = (f"{error}: {log.value.decode(errors='replace')}",)
            raise
        return found

    def run(
        self, forms: Sequence[Form], operands: Sequence[Sequence[Any]], count: int
    ) -> list[list[Any] | DeviceError]:
        """The results of each form, or why the driver refuses its PTX.

        Raises DeviceError where a kernel fails: nothing runs on a device after that.
        """
        try:
            loaded = self.load(module(forms, count))
        except DeviceError as error:
            if len(forms) == 1:
                return [error]
            middle = len(forms) // 2
            return [
                *self.run(forms[:middle], operands[:middle], count),
                *self.run(forms[middle:], operands[middle:], count),
            ]
        found: list[list[Any] | DeviceError] = []
        for at, (form, columns) in enumerate(zip(forms, operands, strict=True)):
            found.append(self._run_one(loaded, f"form{at}", form, columns, count))
        self._call("cuModuleUnload", loaded)
        return found

    def _run_one(
        self, loaded: ctypes.c_void_p, name: str, form: Form, columns: Sequence[Any], count: int
    ) -> list[Any]:
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), loaded, name.encode())
        content = joined(form, columns, count)
        _, size = result_bytes(form, count)
        result = np.zeros(size, np.uint8)
        source, target = ctypes.c_uint64(), ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(source), ctypes.c_size_t(len(content)))
        self._call("cuMemAlloc_v2", ctypes.byref(target), ctypes.c_size_t(size))
        pointer = ctypes.c_void_p(content.ctypes.data)
        self._call("cuMemcpyHtoD_v2", source, pointer, ctypes.c_size_t(len(content)))
        self._call("cuMemsetD8_v2", target, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        parameters = (ctypes.c_void_p * 2)(ctypes.addressof(source), ctypes.addressof(target))
        sizes = [ctypes.c_uint(n) for n in (count // THREADS, 1, 1, THREADS, 1, 1, 0)]
        none = ctypes.c_void_p(0)
        self._call("cuLaunchKernel", function, *sizes, none, parameters, none)
        self._call("cuCtxSynchronize")
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(result.ctypes.data), target, ctypes.c_size_t(size))
        self._call("cuMemFree_v2", source)
        self._call("cuMemFree_v2", target)
        return split(form, result, count)

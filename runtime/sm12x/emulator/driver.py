"""The CUDA driver of a device that is not there: what `sm12x.driver` calls, on emulated memory and kernels.

`get_driver` gives a `sm12x.driver.Driver` whose `bindings` and `hot` have the functions of cuda.bindings and
of libcuda that sm12x uses, with their arguments and statuses. Set-up, validation, selection and launch
structs are therefore the runtime's own. A cubin is known by its hash, and the PTX that it was assembled from
runs.

Everything is done when a function returns, so that streams and events have nothing to order, but for launches
that the next one may overlap: see `launches`. What a kernel does wrong is raised out of its launch, or out of
the call that makes a held launch run, as an EmulatorError that says what and where.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

from .. import driver as runtime
from .. import manifest
from . import devices, launches, session, shipped, tensor_map
from .chain import Link
from .compiler import Program
from .counting.collector import Collector
from .errors import Fault
from .launch import LoadedModule, launch, load
from .memory import GlobalMemory

VERSION = 13000  # cuDriverGetVersion: the oldest that takes all cubins
OK = 0
INVALID_VALUE, OUT_OF_MEMORY = 1, 2
NO_BINARY, INVALID_CONTEXT, INVALID_DEVICE = 209, 201, 101
INVALID_HANDLE, NOT_FOUND, NOT_SUPPORTED = 400, 500, 801
_STATUSES = {
    OK: ("CUDA_SUCCESS", "no error"),
    INVALID_VALUE: ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
    OUT_OF_MEMORY: ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
    INVALID_DEVICE: ("CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"),
    INVALID_CONTEXT: ("CUDA_ERROR_INVALID_CONTEXT", "invalid device context"),
    NO_BINARY: ("CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"),
    INVALID_HANDLE: ("CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"),
    NOT_FOUND: ("CUDA_ERROR_NOT_FOUND", "named symbol not found"),
    NOT_SUPPORTED: ("CUDA_ERROR_NOT_SUPPORTED", "operation not supported"),
}
# Handles are made-up numbers past 32 bits, like addresses: whoever cuts one gets caught.
_HANDLES = 0x0004_0000_0000_0000
_DEFAULT_SHARED = 48 * 1024  # dynamic shared memory without CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SPECIAL_STREAMS = (0, 1, 2)  # default, legacy, per thread


@dataclass(frozen=True, slots=True)
class _Context:
    gpu: devices.Gpu
    truncate_bits: int | None


@dataclass(frozen=True, slots=True)
class _Stream:
    flags: int


@dataclass(slots=True)
class _Library:
    module: LoadedModule
    variant: str
    arch: str


@dataclass(slots=True)
class _Function:
    library: _Library
    program: Program
    symbol: str
    dynamic_shared: int = _DEFAULT_SHARED


class _Names:
    """An enumeration of the driver API, of which only the names are looked at."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("CU_"):
            return name
        raise AttributeError(name)


class Emulator:
    """The emulated driver. `memory` is the global memory of all its devices."""

    def __init__(self) -> None:
        self.memory = GlobalMemory()
        self.lock = threading.RLock()
        self.queue = launches.Queue(self.memory)
        self._devices: list[tuple[devices.Gpu, int, int | None]] = []
        self._current = threading.local()
        self._handles = count(_HANDLES, 0x100)
        self._objects: dict[int, Any] = {}
        self._modules: dict[tuple[str, int | None], LoadedModule] = {}

    def ordinal(self, options: session.Options) -> int:
        """The ordinal, for `sm12x.driver.get_device`, of the device that `options` describe. Those that
        differ in what a loaded kernel is, or in how many CTAs it gets, are devices of their own."""
        gpu = devices.find(options.device)
        wanted = (gpu, options.sms or gpu.sm_count, options.truncate_bits)
        with self.lock:
            if wanted not in self._devices:
                self._devices.append(wanted)
            return runtime.EMULATED + self._devices.index(wanted)

    def _new(self, thing: Any) -> int:
        with self.lock:
            handle = next(self._handles)
            self._objects[handle] = thing
        return handle

    def _find(self, handle: Any, kind: type) -> Any:
        found = self._objects.get(_integer(handle))
        return found if isinstance(found, kind) else None

    def _context(self) -> _Context | None:
        """The current context of this thread."""
        context: _Context | None = self._find(getattr(self._current, "context", 0), _Context)
        return context

    def _gpu(self) -> devices.Gpu | None:
        """The device of the current context."""
        context = self._context()
        return None if context is None else context.gpu

    # cuda.bindings.driver: a status first, then the result. Names and arguments are the driver API's.

    def cuInit(self, flags: int) -> tuple[int]:
        return (OK,)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return OK, VERSION

    def cuGetErrorName(self, status: int) -> tuple[int, bytes]:
        return OK, _STATUSES[status][0].encode()

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return OK, _STATUSES[status][1].encode()

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return OK, len(self._devices)

    def cuDeviceGet(self, ordinal: int) -> tuple[int, int]:
        return (OK, ordinal) if 0 <= ordinal < len(self._devices) else (INVALID_DEVICE, 0)

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return OK, f"{self._devices[device][0].name} (emulated)".encode()[: length - 1] + b"\0"

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[int, int]:
        gpu, sms, _ = self._devices[device]
        known = {
            "COMPUTE_CAPABILITY_MAJOR": gpu.capability[0],
            "COMPUTE_CAPABILITY_MINOR": gpu.capability[1],
            "MULTIPROCESSOR_COUNT": sms,
            "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": gpu.shared_memory,
            "WARP_SIZE": 32,
        }
        value = known.get(attribute.removeprefix("CU_DEVICE_ATTRIBUTE_"))
        return (NOT_SUPPORTED, 0) if value is None else (OK, value)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        gpu, _, truncate_bits = self._devices[device]
        return OK, self._new(_Context(gpu, truncate_bits))

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return OK, getattr(self._current, "context", 0)

    def cuCtxSetCurrent(self, context: Any) -> tuple[int]:
        handle = _integer(context)
        if handle and not self._find(handle, _Context):
            return (INVALID_CONTEXT,)
        self._current.context = handle
        return (OK,)

    def cuLibraryLoadData(self, image: bytes, *options: Any) -> tuple[int, int]:
        context = self._context()
        if context is None:
            return INVALID_CONTEXT, 0
        variant, arch = shipped.origin(image)
        if arch != runtime.ARCHITECTURES[context.gpu.capability]:
            return NO_BINARY, 0
        bits = context.truncate_bits
        key = variant.targets[arch].ptx["sha256"], bits
        with self.lock:
            module = self._modules.get(key)
            if module is None:
                text = shipped.read_ptx(variant, arch)
                module = self._modules[key] = load(text, self.memory, truncate_bits=bits)
        return OK, self._new(_Library(module, variant.key, arch))

    def cuLibraryGetKernel(self, library: Any, symbol: bytes) -> tuple[int, int]:
        found: _Library | None = self._find(library, _Library)
        if found is None:
            return INVALID_HANDLE, 0
        name = symbol.decode()
        if name not in found.module.ir.kernels:
            return NOT_FOUND, 0
        with self.lock:
            program = found.module.kernel(name)
        return OK, self._new(_Function(found, program, name))

    def cuKernelGetFunction(self, kernel: Any) -> tuple[int, int]:
        return (OK, _integer(kernel)) if self._find(kernel, _Function) else (INVALID_HANDLE, 0)

    def cuFuncSetAttribute(self, function: Any, attribute: str, value: int) -> tuple[int]:
        found: _Function | None = self._find(function, _Function)
        gpu = self._gpu()
        if found is None or gpu is None:
            return (INVALID_HANDLE,)
        if attribute != "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES":
            return (NOT_SUPPORTED,)
        if not 0 <= value <= gpu.shared_memory - found.program.layout.static_shared:
            return (INVALID_VALUE,)
        found.dynamic_shared = value
        return (OK,)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        gpu = self._gpu()
        if gpu is None:
            return INVALID_CONTEXT, 0
        if size < 1:
            return INVALID_VALUE, 0
        with self.lock:
            if self.memory.used + size > gpu.memory_bytes:
                return OUT_OF_MEMORY, 0
            return OK, self.memory.allocate(size)

    def cuMemFree(self, address: int) -> tuple[int]:
        with self.lock:
            self.queue.finish()
            try:
                self.memory.free(int(address))
            except ValueError:
                return (INVALID_VALUE,)
        return (OK,)

    def cuMemAllocAsync(self, size: int, stream: Any) -> tuple[int, int]:
        return self.cuMemAlloc(size) if self._is_stream(stream) else (INVALID_HANDLE, 0)

    def cuMemFreeAsync(self, address: int, stream: Any) -> tuple[int]:
        return self.cuMemFree(address) if self._is_stream(stream) else (INVALID_HANDLE,)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[int]:
        return self._copy(stream, lambda: self.memory.write(int(to), ctypes.string_at(source, size)))

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: Any) -> tuple[int]:
        return self._copy(stream, lambda: ctypes.memmove(to, self.memory.read(int(source), size), size))

    def cuMemsetD8Async(self, to: int, value: int, size: int, stream: Any) -> tuple[int]:
        return self._copy(stream, lambda: self.memory.fill(int(to), size, value))

    def _copy(self, stream: Any, copy: Callable[[], object]) -> tuple[int]:
        if not self._is_stream(stream):
            return (INVALID_HANDLE,)
        with self.lock:
            self.queue.finish()
            try:
                copy()
            except Fault:  # not in an allocation
                return (INVALID_VALUE,)
        return (OK,)

    def _is_stream(self, stream: Any) -> bool:
        handle = _integer(stream)
        return handle in _SPECIAL_STREAMS or self._find(handle, _Stream) is not None

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        return OK, self._new(_Stream(flags))

    def cuStreamDestroy(self, stream: Any) -> tuple[int]:
        if self._find(stream, _Stream) is None:
            return (INVALID_HANDLE,)
        with self.lock:
            self.queue.finish()
            del self._objects[_integer(stream)]
        return (OK,)

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[int, Any]:
        return OK, mode  # nothing is ever captured

    def cuStreamSynchronize(self, stream: Any) -> tuple[int]:
        if not self._is_stream(stream):
            return (INVALID_HANDLE,)
        with self.lock:
            self.queue.finish()
        return (OK,)

    # libcuda.so.1: ctypes arguments, a status.

    def launch_kernel(
        self,
        function: ctypes.c_void_p,
        gx: ctypes.c_uint,
        gy: ctypes.c_uint,
        gz: ctypes.c_uint,
        bx: ctypes.c_uint,
        by: ctypes.c_uint,
        bz: ctypes.c_uint,
        shared: ctypes.c_uint,
        stream: ctypes.c_void_p,
        arguments: Any,
        extra: Any,
    ) -> int:
        """cuLaunchKernel of a kernel with one parameter, run to its end unless it is held. Raises
        EmulatorError.
        """
        grid = _integer(gx), _integer(gy), _integer(gz)
        block = _integer(bx), _integer(by), _integer(bz)
        return self._launch(function, grid, block, _integer(shared), stream, arguments, extra, None)

    def launch_kernel_ex(self, config: Any, function: ctypes.c_void_p, arguments: Any, extra: Any) -> int:
        """cuLaunchKernelEx, as `launch_kernel`; always held."""
        try:
            given = launches.read_config(config)
        except ValueError:
            return INVALID_VALUE
        attributes = launches.read_attributes(given)
        if attributes is None:
            return NOT_SUPPORTED
        grid, block = (given.gx, given.gy, given.gz), (given.bx, given.by, given.bz)
        return self._launch(function, grid, block, given.shared, given.stream, arguments, extra, attributes)

    def _launch(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic: int,
        stream: Any,
        arguments: Any,
        extra: Any,
        attributes: launches.Attributes | None,
    ) -> int:
        """A launch; without `attributes` by cuLaunchKernel."""
        found: _Function | None = self._find(function, _Function)
        if found is None or not self._is_stream(stream):
            return INVALID_HANDLE
        gpu = self._gpu()
        if gpu is None:
            return INVALID_CONTEXT
        threads = block[0] * block[1] * block[2]
        if min(*grid, *block) < 1 or threads > 1024 or dynamic > found.dynamic_shared or extra is not None:
            return INVALID_VALUE
        first = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        params = ctypes.string_at(first, found.program.layout.parameter_bytes)
        library, running, options = found.library, session.active(), session.options()
        watched = None if running is None else running.progress
        counts = Collector(running.touched) if running is not None and options.counters else None
        asked = attributes or launches.Attributes()
        with self.lock:
            if not self.queue.continues(_integer(stream), asked):
                self.queue.finish()
            if attributes is not None or launches.triggers(found.program):
                link = Link(
                    *(found.program, grid, block, dynamic, params, asked.programmatic, asked.cooperative),
                    *(options.resident, options.seed, options.races, counts),
                    launches.progress_of(running, library.variant),
                    launches.failure_of(running, library.variant),
                )
                self.queue.held.append(
                    launches.Held(
                        link, _integer(stream), library.variant, found.symbol, library.arch, running
                    )
                )
                return OK
            start = time.perf_counter()
            try:
                result = launch(
                    found.program,
                    grid,
                    block,
                    dynamic,
                    params,
                    memory=self.memory,
                    seed=options.seed,
                    resident=options.resident,
                    races=options.races,
                    progress=None if watched is None else partial(watched, library.variant),
                    counts=counts,
                )
            except BaseException:
                if running is not None:
                    running.failed = library.variant
                raise
            seconds = time.perf_counter() - start
        if running is not None:
            running.launches.append(
                session.Launch(
                    library.variant, found.symbol, library.arch, grid, block, dynamic, seconds, result
                )
            )
        return OK

    def get_current(self, target: Any) -> int:
        """cuCtxGetCurrent; `target` is a byref of a c_void_p."""
        target._obj.value = getattr(self._current, "context", 0)
        return OK

    def is_capturing(self, stream: Any, target: Any) -> int:
        """cuStreamIsCapturing, which no stream here is; `target` is a byref of a c_int."""
        if not self._is_stream(_integer(stream)):
            return INVALID_HANDLE
        target._obj.value = 0
        return OK

    def encode_tiled(
        self,
        target: ctypes.c_void_p,
        data_type: int,
        rank: int,
        address: ctypes.c_void_p,
        dims: Any,
        strides: Any,
        box: Any,
        steps: Any,
        *modes: int,
    ) -> int:
        """cuTensorMapEncodeTiled; `modes` are interleave, swizzle, L2 promotion and fill."""
        to = _integer(target)
        if not to or to % tensor_map.ALIGNMENT:
            return INVALID_VALUE
        try:
            encoded = tensor_map.encode_tiled(
                data_type, rank, _integer(address), list(dims), list(strides), list(box), list(steps), *modes
            )
        except ValueError:
            return INVALID_VALUE
        ctypes.memmove(to, encoded, len(encoded))
        return OK

    def replace_address(self, target: ctypes.c_void_p, address: ctypes.c_void_p) -> int:
        """cuTensorMapReplaceAddress."""
        to = _integer(target)
        if not to or to % tensor_map.ALIGNMENT:
            return INVALID_VALUE
        try:
            changed = tensor_map.replace(
                ctypes.string_at(to, tensor_map.SIZE), "global_address", None, _integer(address)
            )
            tensor_map.decode(changed)
        except ValueError:
            return INVALID_VALUE
        ctypes.memmove(to, changed, len(changed))
        return OK


_emulator = Emulator()


def get_driver() -> runtime.Driver:
    """The emulated driver as `sm12x.driver` takes it."""
    made = _emulator
    functions = {name: getattr(made, name) for name in dir(made) if name.startswith("cu")}
    enumerations = {
        name: _Names() for name in ("CUdevice_attribute", "CUfunction_attribute", "CUstreamCaptureMode")
    }
    bindings = SimpleNamespace(**functions, **enumerations, CUcontext=int, CUstream=int, CUresult=_status)
    hot = SimpleNamespace(
        cuLaunchKernel=made.launch_kernel,
        cuLaunchKernelEx=made.launch_kernel_ex,
        cuCtxGetCurrent=made.get_current,
        cuCtxSetCurrent=lambda context: made.cuCtxSetCurrent(context)[0],
        cuTensorMapEncodeTiled=made.encode_tiled,
        cuTensorMapReplaceAddress=made.replace_address,
        cuStreamIsCapturing=made.is_capturing,
    )
    # The PTX is the same whatever CUDA the cubins are for: those that are here will do.
    major = manifest.wheel_major() or manifest.MAJORS[-1]
    return runtime.Driver(bindings, VERSION, hot, major, ctypes.c_void_p)


def lock() -> threading.RLock:
    """Held by whoever uses the emulated driver or its memory."""
    return _emulator.lock


def finish() -> None:
    """Run the launches that are held back. Raises EmulatorError."""
    with _emulator.lock:
        _emulator.queue.finish()


def abandon() -> None:
    """Forget the launches that are held back: whoever made them has failed."""
    with _emulator.lock:
        _emulator.queue.held.clear()


def memory() -> GlobalMemory:
    """The global memory of all emulated devices."""
    return _emulator.memory


def open_device() -> runtime.Device:
    """The device that `session.options` name, as the runtime opens it."""
    return runtime.get_device(_emulator.ordinal(session.options()))


def _status(code: int) -> int:
    if code not in _STATUSES:
        raise ValueError(code)
    return code


def _integer(value: Any) -> int:
    """The number in an int, a ctypes integer or a ctypes pointer."""
    return int(getattr(value, "value", value) or 0)

"""A CUDA driver, a family of kernels and a torch without any of them: the launch path runs on a laptop.

`install` puts them in place and returns the `FakeDriver`, which records every call, the parameters of every
launch, allocations and frees, and fails any call it is told to. The functions of the hot path are real C
function pointers called without argument types, so that a handle passed as a bare int is cut to 32 bits here
as it is there.
"""

from __future__ import annotations

import ctypes
import sys
import types
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as real_bindings

from sm12x import abi, driver, manifest
from sm12x.launch_config import PROGRAMMATIC_STREAM_SERIALIZATION, LaunchConfig
from sm12x.ops import grouped_gemm as grouped_gemm_module
from sm12x.ops import launch
from unit.fake_family import write_family
from unit.fake_torch import Memory, Tensor, fake_torch

__all__ = ["CONTEXT", "FakeDriver", "FakeGpu", "Tensor", "install"]

# Handles and addresses beyond 32 bits, as real ones are.
HIGH = 0x7F00_0000_0000
CONTEXT, FUNCTION, LIBRARY, KERNEL = HIGH + 0x1000, HIGH + 0x20000, HIGH + 0x40000, HIGH + 0x60000


@dataclass
class FakeGpu:
    name: str = "NVIDIA GeForce RTX 5090"
    capability: tuple[int, int] = (12, 0)
    sm_count: int = 170


@dataclass
class Launch:
    """One recorded launch; `params` is the struct that the kernel would have got. `programmatic`: launched by
    cuLaunchKernelEx with that attribute."""

    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    stream: int
    params: Any
    context: int
    programmatic: bool = False


@dataclass
class FakeDriver:
    """See the module. `fail[name]` is a status, or a list with one status for each call of `name`."""

    gpus: list[FakeGpu] = field(default_factory=lambda: [FakeGpu(), FakeGpu()])
    version: int = 13020
    fail: dict[str, Any] = field(default_factory=dict)
    status_word: int = 0  # what the preparation kernel would have left behind
    content: dict[int, bytes] = field(default_factory=dict)  # of device memory, by address
    capturing: bool = False
    calls: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    allocated: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)  # from cuMemAlloc
    capture_mode: Any = real_bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    freed: list[int] = field(default_factory=list)
    attributes: list[tuple[str, str, int]] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    context: int = 0
    log: list[tuple[Any, ...]] = field(default_factory=list)
    symbols: list[str] = field(default_factory=list)

    # What cuda.bindings.driver is replaced by: enumerations are the real ones.

    def __post_init__(self) -> None:
        self.bindings = types.SimpleNamespace(
            **{
                name: getattr(real_bindings, name)
                for name in dir(real_bindings)
                if name.startswith("CU") and not name.startswith("CUDA_VERSION")
            }
        )
        for name in dir(self):
            if name.startswith("do_cu"):
                setattr(self.bindings, name[3:], self._recorded(name[3:], getattr(self, name)))
        prototypes = {
            "cuLaunchKernel": [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3],
            "cuLaunchKernelEx": [ctypes.c_void_p] * 4,
            "cuTensorMapReplaceAddress": [ctypes.c_void_p] * 2,
            "cuCtxGetCurrent": [ctypes.c_void_p],
            "cuStreamIsCapturing": [ctypes.c_void_p] * 2,
            "cuCtxSetCurrent": [ctypes.c_void_p],
            "cuTensorMapEncodeTiled": [
                *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint),
                *[ctypes.c_void_p] * 5,
                *[ctypes.c_int] * 4,
            ],
        }
        self._callbacks = []
        self.library = types.SimpleNamespace()
        for name, arguments in prototypes.items():
            callback = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, f"c_{name}"))
            self._callbacks.append(callback)
            # Called like a function of a ctypes.CDLL, which has no argument types either.
            address = ctypes.cast(callback, ctypes.c_void_p).value
            setattr(self.library, name, ctypes.CFUNCTYPE(ctypes.c_int)(address))

    def _status(self, name):
        self.calls.append(name)
        planned = self.fail.get(name, 0)
        if isinstance(planned, list):
            return planned.pop(0) if planned else 0
        return planned

    def _recorded(self, name, function):
        def run(*arguments):
            status = self._status(name)
            result = self.bindings.CUresult(status)
            if status:
                return (result, None)
            value = function(*arguments)
            return (result,) if value is None else (result, value)

        return run

    def do_cuInit(self, flags):
        return None

    def do_cuDriverGetVersion(self):
        return self.version

    def do_cuDeviceGetCount(self):
        return len(self.gpus)

    def do_cuDeviceGet(self, ordinal):
        return ordinal

    def do_cuDeviceGetName(self, length, device):
        return self.gpus[device].name.encode().ljust(length, b"\0")

    def do_cuDeviceGetAttribute(self, attribute, device):
        gpu = self.gpus[device]
        return {
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": gpu.capability[0],
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": gpu.capability[1],
            "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": gpu.sm_count,
        }[attribute.name]

    def do_cuDevicePrimaryCtxRetain(self, device):
        return real_bindings.CUcontext(CONTEXT + device)

    def do_cuCtxGetCurrent(self):
        return real_bindings.CUcontext(self.context)

    def do_cuCtxSetCurrent(self, context):
        self.context = int(context)

    def do_cuLibraryLoadData(self, image, *rest):
        assert self.context, "no current context"
        self.loaded.append(image)
        return real_bindings.CUlibrary(LIBRARY + len(self.loaded))

    def do_cuLibraryGetKernel(self, library, symbol):
        self.symbols.append(symbol.decode())
        return real_bindings.CUkernel(KERNEL + len(self.symbols) - 1)

    def do_cuKernelGetFunction(self, kernel):
        return real_bindings.CUfunction(int(kernel) - KERNEL + FUNCTION)

    def do_cuFuncSetAttribute(self, function, attribute, value):
        self.attributes.append((self.symbols[int(function) - FUNCTION], attribute.name, value))

    def do_cuMemAllocAsync(self, size, stream):
        address = HIGH + 0x1000_0000 + 0x100_0000 * len(self.allocated)
        self.allocated[address] = size
        self.log.append(("alloc", address, int(stream)))
        return real_bindings.CUdeviceptr(address)

    def do_cuMemFreeAsync(self, address, stream):
        self.freed.append(int(address))
        self.log.append(("free", int(address), int(stream)))

    def do_cuMemAlloc(self, size):
        address = HIGH + 0x8000_0000 + 0x100_0000 * len(self.kept)
        self.kept[address] = size
        return real_bindings.CUdeviceptr(address)

    def do_cuMemsetD8Async(self, address, value, size, stream):
        self.log.append(("memset", int(address), value, size))

    def do_cuStreamDestroy(self, stream):
        return None

    def do_cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.capture_mode = self.capture_mode, mode
        return before

    def do_cuMemcpyDtoHAsync(self, target, source, size, stream):
        self.log.append(("copy", int(source), int(stream)))
        content = self.content.get(int(source), self.status_word.to_bytes(4, "little"))
        assert len(content) == size
        ctypes.memmove(target, content, size)

    def do_cuStreamSynchronize(self, stream):
        self.log.append(("synchronize", int(stream)))

    def do_cuStreamCreate(self, flags):
        return real_bindings.CUstream(HIGH + 0x5000)

    def do_cuEventCreate(self, flags):
        self.log.append(("event", flags))
        return real_bindings.CUevent(HIGH + 0x6000)

    def do_cuEventRecord(self, event, stream):
        self.log.append(("record", int(stream)))

    def do_cuStreamWaitEvent(self, stream, event, flags):
        self.log.append(("wait", int(stream)))

    def do_cuEventQuery(self, event):
        return None

    def do_cuEventDestroy(self, event):
        return None

    def do_cuPointerGetAttribute(self, attribute, address):
        return 0

    def do_cuGetErrorName(self, status):
        return real_bindings.CUresult(int(status)).name.encode()

    def do_cuGetErrorString(self, status):
        return f"text of {int(status)}".encode()

    # What libcuda.so.1 is replaced by.

    def c_cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, arguments, extra):
        status = self._status("cuLaunchKernel")
        if not status:
            self._launched(function, (gx, gy, gz), (bx, by, bz), shared, stream, arguments, False)
        return status

    def c_cuLaunchKernelEx(self, config, function, arguments, extra):
        status = self._status("cuLaunchKernelEx")
        if not status:
            given = LaunchConfig.from_address(config)
            attributes = {each.id: each.value[0] for each in given.attributes[: given.count]}
            self._launched(
                function,
                (given.gx, given.gy, given.gz),
                (given.bx, given.by, given.bz),
                given.shared,
                given.stream,
                arguments,
                attributes == {PROGRAMMATIC_STREAM_SERIALIZATION: 1},
            )
        return status

    def _launched(self, function, grid, block, shared, stream, arguments, programmatic):
        symbol = self.symbols[function - FUNCTION]
        (params,) = {v.params for v in manifest.default().variants.values() if v.symbol == symbol}
        struct = abi.STRUCTS[params]
        address = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[0]
        params = struct.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(struct)))
        self.launches.append(
            Launch(symbol, grid, block, shared, stream or 0, params, self.context, programmatic)
        )
        self.log.append(("launch", symbol, stream or 0))

    def c_cuCtxGetCurrent(self, target):
        status = self._status("cuCtxGetCurrent")
        ctypes.c_void_p.from_address(target).value = self.context
        return status

    def c_cuStreamIsCapturing(self, stream, target):
        status = self._status("cuStreamIsCapturing")
        self.asked_stream = stream or 0
        ctypes.c_int.from_address(target).value = int(self.capturing)
        return status

    def c_cuCtxSetCurrent(self, context):
        self.context = context or 0
        return self._status("cuCtxSetCurrent")

    def c_cuTensorMapEncodeTiled(
        self, target, kind, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill
    ):
        status = self._status("cuTensorMapEncodeTiled")
        if status:
            return status
        assert target % 64 == 0, "a CUtensorMap lies at a multiple of 64"
        address = address or 0
        assert address % 16 == 0
        dims = ctypes.cast(dims, ctypes.POINTER(ctypes.c_uint64))[:rank]
        strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_uint64))[: rank - 1]
        box = ctypes.cast(box, ctypes.POINTER(ctypes.c_uint32))[:rank]
        steps = ctypes.cast(steps, ctypes.POINTER(ctypes.c_uint32))[:rank]
        assert all(stride % 16 == 0 and stride for stride in strides)
        assert (interleave, fill, steps) == (0, 0, [1] * rank)
        text = f"{kind} {rank} {dims} {strides} {box} {swizzle} {promotion}".encode()
        ctypes.memmove(target, text.ljust(120, b"\0") + address.to_bytes(8, "little"), 128)
        return 0

    def c_cuTensorMapReplaceAddress(self, target, address):
        status = self._status("cuTensorMapReplaceAddress")
        if not status:
            ctypes.memmove(target + 120, address.to_bytes(8, "little"), 8)
        return status


def reset():
    """Forget what the runtime cached of an earlier driver."""
    driver._driver = None
    driver._owner_pid = None
    driver._devices.clear()
    for cache in driver._process_caches:
        cache.clear()
    manifest.default.cache_clear()
    launch._logged.clear()
    launch._ranked.cache_clear()
    grouped_gemm_module._plans.clear()


def install(monkeypatch, root, *, major="13", packed=False, layer=False, **options):
    """Put a fake driver and torch in place for one test, with the cubins of `root`; returns the driver.

    A `root` without a manifest gets the made-up family fp8_ptr_array, with `packed` fp8_packed too,
    with `layer` all that an expert layer needs.
    """
    fake = FakeDriver(**options)
    if not (root / "manifest.json").exists():
        root = root / "cubins"
        write_family(root, packed=packed, layer=layer)
    monkeypatch.setattr(driver, "_import_bindings", lambda: fake.bindings)
    monkeypatch.setattr(driver, "_load_library", lambda: fake.library)
    monkeypatch.setattr(manifest, "find_root", lambda: root)
    # As in a checkout, also where a wheel is tested.
    monkeypatch.setattr(manifest, "wheel_major", lambda: None)
    monkeypatch.setenv("SM12X_CUDA_MAJOR", major)
    fake.memory, fake.streams, fake.root = Memory(), {}, root
    fake.tensor = fake.memory.tensor
    monkeypatch.setitem(sys.modules, "torch", fake_torch(fake.memory, fake.streams))
    reset()
    return fake

"""The CUDA driver: devices, kernels out of cubins, tensor maps, and the calls of the hot path.

Set-up goes through `cuda.bindings`, imported at the first call that needs a GPU. What runs on every launch
goes through ctypes, which takes a third of the time. Everything lives in the primary context of a device,
which is made current only for the length of our own call. Nothing here is ever released: the cubins and
contexts live as long as the process, like those of every framework.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from . import abi, manifest
from .errors import CubinError, CudaError, DriverError, UnsupportedDeviceError

ARCHITECTURES = {(12, 0): "sm_120a", (12, 1): "sm_121a", (9, 0): "sm_90a"}
# Oldest driver that loads the cubins of a CUDA major: cuDriverGetVersion and the release that has it.
OLDEST_DRIVER = {"cu12": (12080, "12.8", "570"), "cu13": (13000, "13.0", "580")}
NOT_INITIALIZED = 3
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
# Ordinals from here on are devices of the emulator, none of them CUDA's.
EMULATED = 1 << 16
# Statuses of work that was launched earlier, by anybody, and failed since.
STICKY = {700, 702, 709, 714, 715, 716, 717, 718, 719}

_HOT = (
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuTensorMapEncodeTiled",
    "cuTensorMapReplaceAddress",
    "cuStreamIsCapturing",
)
# Of these, what neither waits for anything nor calls back. A launch waits where the device's queue is full.
_BRIEF = ("cuCtxGetCurrent", "cuTensorMapReplaceAddress")


@dataclass(frozen=True, slots=True)
class Driver:
    """An initialised driver. `bindings` is cuda.bindings.driver; `version` is cuDriverGetVersion's. `major`
    names the cubins that it takes, None for those of this installation's CUDA.

    The functions in `hot` are called without argument types, which halves their cost: addresses and handles
    must be passed as `pointer` makes them or as c_void_p, or they are cut to 32 bits. Those in _BRIEF keep
    Python's lock, which takes longer to give up and get back than they run.

    The emulator is another one of these: `sm12x.emulator.driver`.
    """

    bindings: Any
    version: int
    hot: Any
    major: str | None = None
    pointer: Callable[[int], Any] = ctypes.c_void_p.from_param  # as ctypes wants it: c_void_p takes longer

    def call(self, name: str, *arguments: Any, variant: str | None = None) -> Any:
        """Call `bindings.<name>` and return its result: None for none, a tuple for several.

        Raises CudaError, which names `variant`.
        """
        status, *values = getattr(self.bindings, name)(*arguments)
        if int(status):
            raise self.error(name, int(status), variant=variant)
        return values[0] if len(values) == 1 else tuple(values) if values else None

    def error(
        self, call: str, code: int, *, variant: str | None = None, shapes: str | None = None
    ) -> CudaError:
        """The error for a status other than 0 that driver function `call` returned."""
        name, text = _describe(self.bindings, code)
        message = f"{call} failed with {name} ({code}): {text}"
        if variant is not None:
            message += f"; variant {variant}"
        if shapes is not None:
            message += f"; {shapes}"
        if code in STICKY:
            message += "; work launched earlier in this process, by sm12x or not, may be what failed"
        return CudaError(message, call=call, name=name, code=code, text=text, variant=variant, shapes=shapes)


@dataclass(slots=True)
class Device:
    """A device that sm12x has cubins for, with its retained primary context.

    functions: CUfunction by variant. prototypes: tensor maps without address and shape, by variant. counters:
    zeroed memory by the address of the workspace that it belongs to; `spare_counters` belongs to none yet.
    """

    ordinal: int
    name: str
    capability: tuple[int, int]
    arch: str
    major: str
    sm_count: int
    context: int
    driver: Driver
    functions: dict[str, int] = field(default_factory=dict)
    prototypes: dict[str, bytes] = field(default_factory=dict)
    counters: dict[int, int] = field(default_factory=dict)
    spare_counters: list[int] = field(default_factory=list)


_lock = threading.RLock()
_driver: Driver | None = None
_devices: dict[int, Device] = {}
_libraries: list[Any] = []  # keeps modules loaded
_owner_pid: int | None = None
_process_caches: list[MutableMapping[Any, Any]] = []


def _import_bindings() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _load_library() -> Any:
    if sys.platform == "win32":
        return ctypes.WinDLL("nvcuda.dll")
    return ctypes.CDLL("libcuda.so.1")


def _keeping_lock(function: Any) -> Any:
    return ctypes.PYFUNCTYPE(ctypes.c_int)(ctypes.cast(function, ctypes.c_void_p).value or 0)


def clear_after_fork(cache: MutableMapping[Any, Any]) -> None:
    """Have `cache`, which holds driver handles, emptied in a forked child, where they mean nothing."""
    _process_caches.append(cache)


def _after_fork_in_child() -> None:
    # Handles of the parent would crash or hang here; the caches go, so that every call comes by `get_driver`
    # again.
    _devices.clear()
    for cache in _process_caches:
        cache.clear()


def get_driver() -> Driver:
    """The driver, opened once per process.

    Raises DriverError where there is none, and CudaError in a process forked after CUDA was initialised here.
    """
    global _driver, _owner_pid
    if _owner_pid is not None and _owner_pid != os.getpid():
        raise CudaError(
            f"CUDA was initialised by sm12x in process {_owner_pid} before it forked this one, where it "
            "cannot be used: "
            "start workers with the 'spawn' or 'forkserver' method, or call sm12x first in the child"
        )
    if _driver is not None:
        return _driver
    with _lock:
        if _driver is None:
            opened = _open()
            _owner_pid = os.getpid()
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork_in_child)
            _driver = opened
    return _driver


def _open() -> Driver:
    advice = "install the NVIDIA driver (`nvidia-smi` must work); NumPy arrays need none"
    try:
        library = _load_library()
        bindings = _import_bindings()
        code = bindings.cuInit(0)[0]
    except (OSError, RuntimeError) as error:
        raise DriverError(f"no NVIDIA driver was found ({error}): {advice}") from error
    except ImportError as error:
        raise DriverError(f"cuda.bindings cannot be imported ({error}): reinstall sm12x") from error
    if int(code):
        hint = (
            "; a parent process may have initialised CUDA before it forked this one"
            if code == NOT_INITIALIZED
            else ""
        )
        name, text = _describe(bindings, int(code))
        raise DriverError(
            f"cuInit failed with {name} ({int(code)}): {text}{hint}",
            call="cuInit",
            name=name,
            code=int(code),
            text=text,
        )
    code, version = bindings.cuDriverGetVersion()
    if int(code):
        raise DriverError(
            f"cuDriverGetVersion failed with code {int(code)}", call="cuDriverGetVersion", code=int(code)
        )
    try:
        hot = SimpleNamespace(**{name: getattr(library, name) for name in _HOT})
        for name in _BRIEF:
            setattr(hot, name, _keeping_lock(getattr(hot, name)))
    except AttributeError as error:
        raise DriverError(f"the NVIDIA driver is too old ({error}): {advice}") from error
    return Driver(bindings, int(version), hot)


def _describe(bindings: Any, code: int) -> tuple[str, str]:
    try:
        status = bindings.CUresult(code)
    except ValueError:
        return "CUDA_ERROR_UNKNOWN", "a status this cuda.bindings does not know"
    words = (bindings.cuGetErrorName(status)[1], bindings.cuGetErrorString(status)[1])
    name, text = (w.decode() if isinstance(w, bytes) else str(w) for w in words)
    return name, text


def cuda_error(call: str, code: int) -> CudaError:
    """The error for a status other than 0 that driver function `call` returned."""
    return get_driver().error(call, code)


def call(name: str, *arguments: Any) -> Any:
    """Call `cuda.bindings.driver.<name>`; see `Driver.call`."""
    return get_driver().call(name, *arguments)


def check_driver_version(version: int, major: str) -> None:
    """Raises DriverError where a driver of `version`, cuDriverGetVersion's, cannot load cubins of `major`."""
    oldest, cuda, release = OLDEST_DRIVER[major]
    if version >= oldest:
        return
    have = f"{version // 1000}.{version % 1000 // 10}"
    instead = (
        ""
        if version < OLDEST_DRIVER["cu12"][0] or major == "cu12"
        else ", or install sm12x-cu12 instead of sm12x-cu13"
    )
    raise DriverError(
        f"the NVIDIA driver is too old: it supports CUDA {have}, and the {major} cubins need {cuda}: "
        f"update it to release {release} or newer{instead}"
    )


def get_device(ordinal: int) -> Device:
    """The device of a CUDA ordinal, opened once.

    Raises DriverError (none, or too old), UnsupportedDeviceError, CubinError (manifest), CudaError.
    """
    device = _devices.get(ordinal)
    if device is not None:
        return device
    driver = get_driver() if ordinal < EMULATED else _emulator()
    with _lock:
        if ordinal not in _devices:
            _devices[ordinal] = _open_device(driver, ordinal)
        return _devices[ordinal]


def _emulator() -> Driver:
    from .emulator.driver import get_driver as get_emulator  # not above: GPU callers need no emulator

    return get_emulator()


def _open_device(driver: Driver, ordinal: int) -> Device:
    held = manifest.default()
    wrong = abi.mismatches(held.abi)
    if wrong:
        raise CubinError(f"the cubins in {held.root} were built against another abi.h: {'; '.join(wrong)}")
    major = driver.major or manifest.cuda_major()
    check_driver_version(driver.version, major)
    first = 0 if ordinal < EMULATED else EMULATED
    count = int(driver.call("cuDeviceGetCount"))
    if not 0 <= ordinal - first < count:
        raise ValueError(f"device: expected one of the {count} CUDA devices of this process, got {ordinal}")
    handle = driver.call("cuDeviceGet", ordinal - first)
    attributes = driver.bindings.CUdevice_attribute

    def attribute(name: str) -> int:
        return int(driver.call("cuDeviceGetAttribute", getattr(attributes, name), handle))

    capability = (
        attribute("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"),
        attribute("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"),
    )
    raw = driver.call("cuDeviceGetName", 256, handle)
    name = raw.split(b"\0")[0].decode() if isinstance(raw, bytes) else str(raw)
    arch = ARCHITECTURES.get(capability)
    have = held.architectures(major)
    if arch is None or arch not in have:
        raise UnsupportedDeviceError(_unsupported(held, ordinal, name, capability, major))
    sm_count = attribute("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT")
    context = int(driver.call("cuDevicePrimaryCtxRetain", handle))
    return Device(ordinal, name, capability, arch, major, sm_count, context, driver)


def _unsupported(
    held: manifest.Manifest, ordinal: int, name: str, capability: tuple[int, int], major: str
) -> str:
    arch = ARCHITECTURES.get(capability)
    have = held.architectures(major)
    existing = [f"{a} (compute capability {c[0]}.{c[1]})" for c, a in ARCHITECTURES.items() if a in have]
    others = [m for m in manifest.MAJORS if m != major and arch in held.architectures(m)]
    wheel = f"install sm12x-{others[0]}, which has one" if others else "no sm12x wheel has one"
    return (
        f"device {ordinal} ({name}) has compute capability {capability[0]}.{capability[1]}, for which "
        "there is "
        f"no {major} cubin: {wheel}. The {major} cubins here are for {', '.join(existing) or 'nothing'}"
    )


@contextmanager
def current(device: Device) -> Iterator[None]:
    """The device's primary context is current inside, what was current is restored after."""
    driver = device.driver
    before = int(driver.call("cuCtxGetCurrent"))
    if before == device.context:
        yield
        return
    bindings = driver.bindings
    driver.call("cuCtxSetCurrent", bindings.CUcontext(device.context))
    try:
        yield
    finally:
        driver.call("cuCtxSetCurrent", bindings.CUcontext(before))


def get_function(device: Device, variant: manifest.Variant) -> int:
    """The CUfunction of a variant, its cubin verified and loaded once per device, its shared memory allowed.

    Raises CubinError (missing, truncated, altered) and CudaError.
    """
    function = device.functions.get(variant.key)
    if function is not None:
        return function
    with _lock, current(device):
        if variant.key not in device.functions:
            device.functions[variant.key] = _load_function(device, variant)
        return device.functions[variant.key]


def _load_function(device: Device, variant: manifest.Variant) -> int:
    image = manifest.read_cubin(manifest.default(), variant, device.arch, device.major)
    key = variant.key
    driver = device.driver
    library = driver.call("cuLibraryLoadData", image, [], [], 0, [], [], 0, variant=key)
    kernel = driver.call("cuLibraryGetKernel", library, variant.symbol.encode(), variant=key)
    function = driver.call("cuKernelGetFunction", kernel, variant=key)
    if variant.shared_memory:
        attribute = driver.bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver.call("cuFuncSetAttribute", function, attribute, variant.shared_memory, variant=key)
    _libraries.append(library)
    return int(function)


# Memory and status of our own calls. Streams and addresses are integers, and the device's context is current.


def stream_is_capturing(device: Device, stream: int) -> bool:
    """Whether `stream` is being captured into a graph. Raises CudaError."""
    found = ctypes.c_int()
    status = device.driver.hot.cuStreamIsCapturing(device.driver.pointer(stream), ctypes.byref(found))
    if status:
        raise device.driver.error("cuStreamIsCapturing", status)
    return found.value != 0


@contextmanager
def temporary(device: Device, size: int, stream: int) -> Iterator[int]:
    """Address of `size` bytes, 256-byte aligned, that live as long as the block, in the order of `stream`."""
    driver = device.driver
    ptr = int(driver.call("cuMemAllocAsync", size, stream))
    try:
        yield ptr
    except BaseException:
        with suppress(CudaError):  # once a kernel has failed every call does; the first error says more
            driver.call("cuMemFreeAsync", ptr, stream)
        raise
    driver.call("cuMemFreeAsync", ptr, stream)


def read_bytes(device: Device, ptr: int, size: int, stream: int) -> bytes:
    """`size` bytes at device address `ptr` once all work on `stream` is done; waits for it."""
    content = (ctypes.c_char * size)()
    device.driver.call("cuMemcpyDtoHAsync", ctypes.addressof(content), ptr, size, stream)
    device.driver.call("cuStreamSynchronize", stream)
    return content.raw


@contextmanager
def _unordered(device: Device) -> Iterator[None]:
    # Inside, calls that no graph can hold are allowed though some stream may be being captured.
    call = device.driver.call
    relaxed = device.driver.bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = call("cuThreadExchangeStreamCaptureMode", relaxed)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", before)


def allocate(device: Device, size: int) -> int:
    """Address of `size` bytes that are never freed. Safe while any stream is being captured."""
    with _unordered(device):
        return int(device.driver.call("cuMemAlloc", size))


def allocate_zeroed(device: Device, size: int) -> int:
    """The same, of zeros."""
    call = device.driver.call
    with _unordered(device):
        ptr = int(call("cuMemAlloc", size))
        stream = call("cuStreamCreate", NON_BLOCKING)
        try:
            call("cuMemsetD8Async", ptr, 0, size, stream)
            call("cuStreamSynchronize", stream)
        finally:
            call("cuStreamDestroy", stream)
    return ptr

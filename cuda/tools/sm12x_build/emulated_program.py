"""Runs a CUDA program on the emulator: a shared object with a main(), linked with the stand-in for the CUDA
runtime (tests/cuda/emulated/runtime_stand_in.cpp), and the PTX of its kernels.

The program's own host code runs natively, so that CUTLASS itself fills the parameters of its kernels and
encodes their tensor maps; memory and launches are the emulator's.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sm12x.emulator import tensor_map
from sm12x.emulator.errors import Fault
from sm12x.emulator.launch import SHARED_LIMIT, LoadedModule, launch, load
from sm12x.emulator.memory import GlobalMemory

INVALID_VALUE, LAUNCH_FAILURE = 1, 719  # cudaError_t
_FIRST_ADDRESS = 1 << 48  # what GlobalMemory allocates lies beyond
_U64, _U32, _POINTER = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "allocate": (_U64, _U64),
    "release": (ctypes.c_int, _U64),
    "write": (ctypes.c_int, _U64, _POINTER, _U64),
    "read": (ctypes.c_int, _POINTER, _U64, _U64),
    "fill": (ctypes.c_int, _U64, ctypes.c_int, _U64),
    "launch": (ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_U32), ctypes.POINTER(_POINTER)),
    "encode_tiled": (
        *(ctypes.c_int, _POINTER, ctypes.c_int, _U32, _U64, ctypes.POINTER(_U64), ctypes.POINTER(_U64)),
        *(ctypes.POINTER(_U32), ctypes.POINTER(_U32), ctypes.POINTER(ctypes.c_int)),
    ),
}
_TYPES = {name: ctypes.CFUNCTYPE(*signature) for name, signature in _FUNCTIONS.items()}


class _Device(ctypes.Structure):
    """Sm12xDevice of runtime_stand_in.cpp."""

    _fields_ = [
        *_TYPES.items(),
        ("first_address", _U64),
        ("sm_count", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Launched:
    """One launch that ran to its end."""

    kernel: str
    grid: tuple[int, int, int]
    segments: int
    seconds: float


@dataclass
class Emulation:
    """The device that a program sees. `error` is what its first kernel that failed did wrong."""

    module: LoadedModule
    memory: GlobalMemory
    seed: int
    early_maps: bool = False
    launches: list[Launched] = field(default_factory=list)
    error: BaseException | None = None

    def allocate(self, size: int) -> int:
        return self.memory.allocate(size)

    def release(self, address: int) -> int:
        return self._status(lambda: self.memory.free(address))

    def write(self, to: int, source: int, size: int) -> int:
        return self._status(lambda: self.memory.write(to, ctypes.string_at(source, size)))

    def read(self, to: int, source: int, size: int) -> int:
        return self._status(lambda: ctypes.memmove(to, self.memory.read(source, size), size))

    def fill(self, to: int, value: int, size: int) -> int:
        return self._status(lambda: self.memory.fill(to, size, value))

    @staticmethod
    def _status(action: Callable[[], object]) -> int:
        try:
            action()
        except (Fault, ValueError):  # not in an allocation
            return INVALID_VALUE
        return 0

    def launch(self, name: bytes, sizes: Any, arguments: Any) -> int:
        grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
        started = time.perf_counter()
        try:
            program = self.module.kernel(name.decode())
            layout = program.layout
            parameters = bytearray(layout.parameter_bytes)
            for at, variable in enumerate(program.kernel.parameters):
                start = layout.address(variable.name)
                parameters[start : start + variable.size] = ctypes.string_at(arguments[at], variable.size)
            result = launch(
                program,
                grid,
                block,
                sizes[6],
                bytes(parameters),
                memory=self.memory,
                seed=self.seed,
                early_maps=self.early_maps,
            )
        except ValueError as error:
            print(error, file=sys.stderr)
            return INVALID_VALUE
        except BaseException as error:  # nothing may be raised through the program's own frames
            self.error = self.error or error
            print(f"the emulator: {error}", file=sys.stderr)  # the program may end with exit()
            return LAUNCH_FAILURE
        seconds = time.perf_counter() - started
        self.launches.append(Launched(name.decode(), grid, result.segments, seconds))
        return 0

    def encode_tiled(
        self,
        target: int,
        kind: int,
        rank: int,
        address: int,
        dims: Any,
        strides: Any,
        box: Any,
        steps: Any,
        modes: Any,
    ) -> int:
        try:
            encoded = tensor_map.encode_tiled(
                *(kind, rank, address, dims[:rank], strides[: rank - 1], box[:rank], steps[:rank]), *modes[:4]
            )
        except ValueError as error:
            print(f"cuTensorMapEncodeTiled: {error}", file=sys.stderr)
            return INVALID_VALUE
        ctypes.memmove(target, encoded, len(encoded))
        return 0


def run(
    library: Path,
    ptx: Path,
    arguments: Sequence[str] = (),
    *,
    seed: int = 0,
    sms: int = 4,
    early_maps: bool = False,
) -> tuple[int, Emulation]:
    """Run main() of `library` with the kernels of `ptx`; its exit status, and what ran.

    `seed` chooses the emulator's schedule, `sms` is the device's number of SMs, `early_maps` is what
    `sm12x.emulator.launch.launch` has under that name. A program that calls exit() ends this process with it.
    Raises EmulatorError where the PTX cannot be read or a kernel broke a rule, OSError where the library
    needs a function that the stand-in does not have.
    """
    memory = GlobalMemory()
    emulation = Emulation(load(ptx.read_text(), memory), memory, seed, early_maps)
    functions = {name: kind(getattr(emulation, name)) for name, kind in _TYPES.items()}
    device = _Device(**functions, first_address=_FIRST_ADDRESS, sm_count=sms, shared_bytes=SHARED_LIMIT)
    program = ctypes.CDLL(str(library.resolve()))
    program.sm12x_set_device(ctypes.byref(device))
    words = [library.name, *arguments]
    argv = (ctypes.c_char_p * (len(words) + 1))(*(word.encode() for word in words), None)
    status = int(program.main(len(words), argv))
    ctypes.CDLL(None).fflush(None)  # the program's stdout is not Python's
    if emulation.error is not None:
        raise emulation.error
    return status, emulation

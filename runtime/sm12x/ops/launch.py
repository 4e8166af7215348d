"""Choosing a variant for a problem, and launching its kernels with prepared parameters.

A `Launch` has everything fixed but stream and parameters. Parameters live in a `Block`: host
memory of one struct and the pointer to it, so that a launch is one ctypes call with prebuilt arguments.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from .. import abi, driver, manifest
from ..errors import CudaError
from ..select import Choice, Problem, describe, fits, select, tiles_upper_bound
from ..tensor_maps import get_tensor_maps
from . import emulated

FAMILY = "fp8_ptr_array"
WORKSPACE_UNIT = 128  # tensor maps are 128 bytes, and the group arrays behind them begin at a multiple
LOG_SELECT = "select" in os.environ.get("SM12X_LOG", "").split(",")
CHECK = os.environ.get("SM12X_CHECK", "") not in ("", "0")

# Writes the two workspace addresses, group arrays and tensor maps, into sm12x_ptr_array_params.
PACK_WORKSPACE = struct.Struct("=2Q").pack_into
WORKSPACE_AT = abi.sm12x_ptr_array_params.group_arrays.offset

Launch = Callable[[ctypes.c_void_p, Any, None], int]


class Block:
    """Host memory of one launch struct: `memory` to write into, `arguments` for cuLaunchKernel."""

    __slots__ = ("_view", "arguments", "memory")

    def __init__(self, content: bytes | bytearray) -> None:
        self.memory = bytearray(content)
        self._view = (ctypes.c_char * len(content)).from_buffer(self.memory)
        self.arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._view))


def kernel_launch(device: driver.Device, variant: manifest.Variant, ctas: int) -> Launch:
    """cuLaunchKernel of `variant`, loaded if it is not, with `ctas` CTAs along its grid axis; takes stream,
    arguments, None."""
    function = driver.get_function(device, variant)
    grid = (ctas, 1) if variant.grid_axis == "x" else (1, ctas)
    sizes = (*grid, 1, variant.threads, 1, 1, variant.shared_memory)
    # As C integers: ctypes takes Python's one by one, 1.5 us a launch.
    return partial(device.driver.hot.cuLaunchKernel, ctypes.c_void_p(function), *map(ctypes.c_uint, sizes))


def launch_error(device: driver.Device, status: int, variant: str, shapes: str) -> CudaError:
    """The error for a launch of the kernel `variant` that returned `status`."""
    return device.driver.error("cuLaunchKernel", status, variant=variant, shapes=shapes)


_logged: set[Problem] = set()


@lru_cache(maxsize=256)
def _ranked(problem: Problem, sm_count: int) -> tuple[Choice, ...]:
    # Packed calls keep their plan; this is for list calls, which come again with the same shapes.
    return tuple(select(problem, manifest.default().gemms(FAMILY), sm_count))


def choose(problem: Problem, forced: Any, device: driver.Device) -> manifest.Variant:
    """The variant that runs `problem`: the first that `select` ranks, or the one that `variant=` forces.

    Raises ValueError listing what exists where nothing fits or the forced one does not.
    """
    gemms = manifest.default().gemms(FAMILY)
    fitting = [v for v in gemms if fits(problem, v) is None]
    if not fitting:
        have = sorted({f"{v.a} x {v.b} -> {v.out}" for v in gemms if problem.arch in v.targets})
        raise ValueError(
            f"a, b, out_dtype: no kernel for {problem.a} x {problem.b} -> {problem.out} on {problem.arch}; "
            f"there are {', '.join(have) or 'none'} (`sm12x.reference` takes every combination)"
        )
    if forced is not None:
        if not isinstance(forced, str):
            raise TypeError(f"variant: expected the key of a variant, got {type(forced).__name__}")
        for variant in fitting:
            if variant.key == forced:
                return variant
        known = manifest.default().variants.get(forced)
        why = (
            "there is none of that name"
            if known is None
            else f"it {fits(problem, known) or 'is of another family'}"
        )
        keys = ", ".join(v.key for v in fitting)
        raise ValueError(f"variant: expected one of {keys} for this call, got {forced!r}: {why}")
    choices = _ranked(problem, device.sm_count)
    if LOG_SELECT and problem not in _logged:
        _logged.add(problem)
        print(describe(problem, choices), file=sys.stderr)
    return choices[0].variant


def grid_size(problem: Problem, variant: manifest.Variant, device: driver.Device) -> int:
    """CTAs of the GEMM: one for each SM, or for each tile where that is fewer."""
    return max(1, min(device.sm_count, tiles_upper_bound(problem, variant)))


def maps_bytes(variant: manifest.Variant, ctas: int) -> int:
    """Bytes of tensor maps at the front of the workspace."""
    return -(-ctas * variant.workspace_per_cta // WORKSPACE_UNIT) * WORKSPACE_UNIT


def gemm_params(
    device: driver.Device, variant: manifest.Variant, groups: int, ctas: int, bias_type: int, address: int
) -> bytes:
    """sm12x_ptr_array_params with all but the two workspace addresses."""
    params = abi.sm12x_ptr_array_params(num_groups=groups, ctas=ctas, bias_type=bias_type)
    maps = get_tensor_maps(device, variant, address)
    ctypes.memmove(ctypes.addressof(params), maps, len(maps))
    return bytes(params)


def workspace_size(num_groups: int, *, device: int = 0, backend: str | None = None) -> int:
    """Bytes of `workspace=` that are enough for `num_groups` groups on a device, whatever variant runs.
    `backend` as `grouped_gemm` has it: with the emulator, the device is the emulated one.

    A workspace is for one stream at a time and needs no initialisation. Its first byte used is at a multiple
    of 256: arrays of every framework begin there; for a slice that does not, add 256.

    Raises ValueError, and CudaError and its kin where the device cannot be used.
    """
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups: expected an int, got {type(num_groups).__name__}")
    if num_groups < 0:
        raise ValueError(f"num_groups: expected at least 0, got {num_groups}")
    if isinstance(device, bool) or not isinstance(device, int):
        raise TypeError(f"device: expected the ordinal of a CUDA device, got {type(device).__name__}")
    opened = emulated.device() if emulated.wanted(backend) else driver.get_device(device)
    maps = max(
        (maps_bytes(v, opened.sm_count) for v in manifest.default().gemms() if opened.arch in v.targets),
        default=0,
    )
    return -(-(maps + abi.group_arrays_bytes(num_groups)) // 256) * 256

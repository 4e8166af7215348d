"""Choosing a variant for a problem, and what launches of every family have in common.

Parameters live in a `Block`: host memory of one struct and the pointer to it, so that a launch is one ctypes
call with prebuilt arguments.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

from .. import abi, driver, manifest
from ..errors import CudaError
from ..select import Choice, Problem, describe, fits, select, units_upper_bound
from ..select.ranking import can_count
from ..select.rates import FAMILIES
from ..tensor_maps import ALIGNMENT
from . import emulated

# What SM12X_CHECK=1 says of offsets.
DECREASE, OUT_OF_RANGE = "some that decrease", "some below 0 or above M"
LOG_SELECT = "select" in os.environ.get("SM12X_LOG", "").split(",")
CHECK = os.environ.get("SM12X_CHECK", "") not in ("", "0")


class Block:
    """Host memory of one launch struct, aligned for its tensor maps: `memory` to write into, its `address`,
    `arguments` for cuLaunchKernel."""

    __slots__ = ("_view", "address", "arguments", "memory")

    def __init__(self, content: bytes | bytearray) -> None:
        size = len(content)
        storage = bytearray(size + ALIGNMENT - 1)
        self._view = (ctypes.c_char * len(storage)).from_buffer(storage)
        start = -ctypes.addressof(self._view) % ALIGNMENT
        self.address = ctypes.addressof(self._view) + start
        self.memory = memoryview(storage)[start : start + size]
        self.memory[:] = content
        self.arguments = (ctypes.c_void_p * 1)(self.address)


def launch_error(device: driver.Device, status: int, variant: str, shapes: str) -> CudaError:
    """The error for a launch of the kernel `variant` that returned `status`."""
    return device.driver.error("cuLaunchKernel", status, variant=variant, shapes=shapes)


_logged: set[Problem] = set()


@lru_cache(maxsize=256)
def _ranked(problem: Problem, sm_count: int) -> tuple[Choice, ...]:
    # Packed calls keep their plan; this is for list calls, which come again with the same shapes.
    return tuple(select(problem, manifest.default().gemms(), sm_count))


def choose(problem: Problem, forced: Any, device: driver.Device) -> Choice:
    """How `problem` runs: what `select` ranks first, or what `variant=` forces, the key of a variant, with
    ":split" or ":whole" behind it for its mode.

    Raises ValueError listing what exists where nothing fits or the forced one does not.
    """
    gemms = manifest.default().gemms()
    fitting = [v for v in gemms if fits(problem, v) is None]
    if not fitting:
        have = sorted(
            {
                f"{v.a} x {v.b} -> {out}"
                for v in gemms
                for out in v.outs
                if fits(replace(problem, a=v.a, b=v.b, out=out), v) is None
            }
        )
        raise ValueError(
            f"a, b, out_dtype: no kernel for {problem.a} x {problem.b} -> {problem.out} on {problem.arch}, "
            f"for a {problem.kind} call; there are {', '.join(have) or 'none'} (`sm12x.reference` takes "
            "every combination)"
        )
    choices = _ranked(problem, device.sm_count)
    if forced is not None:
        return _forced(problem, forced, choices, fitting, device)
    if LOG_SELECT and problem not in _logged:
        _logged.add(problem)
        print(describe(problem, choices), file=sys.stderr)
    return choices[0]


def _forced(
    problem: Problem,
    forced: Any,
    choices: tuple[Choice, ...],
    fitting: list[manifest.Variant],
    device: driver.Device,
) -> Choice:
    if not isinstance(forced, str):
        raise TypeError(f"variant: expected the key of a variant, got {type(forced).__name__}")
    key, colon, mode = forced.partition(":")
    variant = next((v for v in fitting if v.key == key), None)
    if variant is None:
        known = manifest.default().variants.get(key)
        why = "there is none of that name" if known is None else f"it {fits(problem, known)}"
        keys = ", ".join(v.key for v in fitting)
        raise ValueError(f"variant: expected one of {keys} for this call, got {forced!r}: {why}")
    if colon and mode not in ("split", "whole"):
        raise ValueError(f"variant: expected split or whole behind the key, got {forced!r}")
    ranked = [choice for choice in choices if choice.variant is variant]
    for choice in ranked:
        if not colon or (choice.least_units > 0) == (mode == "split"):
            return choice
    if ranked and mode == "split" and FAMILIES[variant.family].splits:
        if can_count(problem, variant, 1, device.sm_count):
            return replace(ranked[0], least_units=1)  # one k-tile: there is nothing to split, but it runs
    elif ranked and mode == "split":
        raise ValueError(f"variant: expected a kernel that splits K, got {forced!r}")
    raise ValueError(
        f"variant: expected a kernel whose 32-bit counts hold this call's units times "
        f"{device.sm_count} SMs, got {forced!r}"
    )


def grid_size(problem: Problem, choice: Choice, device: driver.Device) -> int:
    """CTAs of a GEMM: one for each SM, or for each unit of work where those are fewer."""
    return max(1, min(device.sm_count, units_upper_bound(problem, choice.variant, choice.least_units)))


def scratch_bytes(variant: manifest.Variant, ctas: int) -> int:
    """Bytes at the front of the workspace that the CTAs share out among them: tensor maps, or partials."""
    unit = 128  # tensor maps are 128 bytes, and what lies behind them begins at a multiple
    return -(-ctas * variant.workspace_per_cta // unit) * unit


def bad_offsets(faults: list[str], shapes: str) -> ValueError:
    """The error for offsets with `faults`, which SM12X_CHECK=1 found before anything was written."""
    return ValueError(
        f"offsets: expected values from 0 to M that never decrease, got {' and '.join(faults)} ({shapes}); "
        "out was not written"
    )


def refuse_capture(device: driver.Device, stream: int) -> None:
    """Raises ValueError where SM12X_CHECK=1 cannot read anything back."""
    if driver.stream_is_capturing(device, stream):
        raise ValueError(
            "stream: SM12X_CHECK=1 reads offsets or their status back, which a stream that is being "
            "captured into a graph cannot do; unset SM12X_CHECK or capture without it"
        )


def workspace_size(num_groups: int, *, device: int = 0, backend: str | None = None) -> int:
    """Bytes of `workspace=` that are enough for `num_groups` groups on a device, whatever variant runs,
    split-K included.
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
    scratch = max(
        (scratch_bytes(v, opened.sm_count) for v in manifest.default().gemms() if opened.arch in v.targets),
        default=0,
    )
    return -(-(scratch + abi.group_arrays_bytes(num_groups)) // 256) * 256

"""Launches of the small kernels on their own: parameters made, launched and forgotten."""

from __future__ import annotations

import ctypes
from typing import Any

from .. import driver, manifest
from ..launch_config import make_config
from . import launch


def run(
    device: driver.Device,
    family: str,
    role: str,
    params: ctypes.Structure,
    grid: tuple[int, int, int],
    stream: int,
    shapes: str,
) -> None:
    """Launch the one kernel of `role` in `family`. The device's context is current. Raises CubinError and
    CudaError."""
    variant = manifest.default().only(family, role)
    block = launch.Block(bytes(params))
    config: Any = make_config(grid, variant.threads, variant.shared_memory, programmatic=variant.pdl)
    config.stream = stream
    hot, pointer = device.driver.hot, device.driver.pointer
    status = hot.cuLaunchKernelEx(
        pointer(ctypes.addressof(config)),
        pointer(driver.get_function(device, variant)),
        pointer(ctypes.addressof(block.arguments)),
        None,
    )
    if status:
        raise device.driver.error("cuLaunchKernelEx", status, variant=variant.key, shapes=shapes)

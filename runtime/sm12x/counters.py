"""Counters of split-K and whole-layer launches: zeroed device memory that belongs to a workspace.

A launch finds its counters zero and leaves them so. They are kept by the workspace's address: calls that
share a workspace follow each other on one stream, and so do calls that get the same temporary memory, so that
no two launches ever use one block at a time. A caller's workspace therefore needs no initialisation.

Blocks are cut from chunks, so that a new workspace, as every captured graph brings, seldom costs a call of
the driver. They are never given back: a few KB for every address that a workspace ever had.
"""

from __future__ import annotations

import threading

from . import abi, driver, manifest

BLOCKS_PER_CHUNK = 64
_ALIGNMENT = 256
_lock = threading.Lock()


def block_bytes(device: driver.Device) -> int:
    """Bytes of counters that are enough for every launch on a device: split-K has one for each MMA warp, a
    whole layer its state and one for each strip of features."""
    warps = max((v.mma_warps for v in manifest.default().gemms()), default=0)
    words = max(device.sm_count * warps, abi.SM12X_LAYER_STATE + abi.SM12X_LAYER_STRIPS)
    return -(-4 * words // _ALIGNMENT) * _ALIGNMENT


def counters_of(device: driver.Device, workspace: int) -> int:
    """Address of the counters that belong to the workspace at an address. Raises CudaError.

    Where they are new, the device's context is made current for a moment.
    """
    found = device.counters.get(workspace)
    if found is not None:
        return found
    with _lock:
        if workspace not in device.counters:
            if not device.spare_counters:
                size = block_bytes(device)
                with driver.current(device):
                    chunk = driver.allocate_zeroed(device, size * BLOCKS_PER_CHUNK)
                device.spare_counters.extend(chunk + i * size for i in reversed(range(BLOCKS_PER_CHUNK)))
            device.counters[workspace] = device.spare_counters.pop()
        return device.counters[workspace]

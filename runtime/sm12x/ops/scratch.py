"""Device memory that expert layers without a workspace of the caller's use: one block for each stream.

Layers on one stream follow each other, so they share a block. It grows where a call needs more, to twice what
it was at least, and is never given back, because a captured graph may hold its address: together at most
twice what the largest call needed.
"""

from __future__ import annotations

import threading

from .. import driver

_lock = threading.Lock()
_blocks: dict[tuple[int, int], tuple[int, int]] = {}
driver.clear_after_fork(_blocks)


def block_of(device: driver.Device, stream: int, size: int) -> int:
    """Address of at least `size` bytes for calls on `stream`; 0 where they would have to be allocated while
    the stream is being captured, which a graph cannot hold. The device's context is current. Raises
    CudaError."""
    found = _blocks.get((device.ordinal, stream))
    if found is not None and found[1] >= size:
        return found[0]
    if driver.stream_is_capturing(device, stream):
        return 0
    with _lock:
        address, held = _blocks.get((device.ordinal, stream), (0, 0))
        if held < size:
            held = max(size, 2 * held)
            address = int(device.driver.call("cuMemAlloc", held))
            _blocks[device.ordinal, stream] = address, held
        return address

"""Device memory that expert layers without a workspace of the caller's use: one block for each thread and
stream.

Layers that one thread calls on one stream follow each other, so they share a block. No other thread uses it:
its launches could come in between. It grows where a call needs more, and what it was is never given back,
because work that is still queued may use it.
"""

from __future__ import annotations

import threading

from .. import driver

_GROWTH = 1 << 21  # bytes: blocks are multiples of it, so that calls of a few tokens more fit
_blocks: dict[tuple[int, int, int], tuple[int, int]] = {}
driver.clear_after_fork(_blocks)


def block_of(device: driver.Device, stream: int, size: int) -> int:
    """Address of at least `size` bytes for calls of this thread on `stream`; 0 while the stream is being
    captured: a graph may run on any stream, beside others. The device's context is current. Raises CudaError.
    """
    if driver.stream_is_capturing(device, stream):
        return 0
    key = (device.ordinal, stream, threading.get_ident())
    address, held = _blocks.get(key, (0, 0))
    if held < size:
        held = -(-size // _GROWTH) * _GROWTH
        address = driver.allocate(device, held)
        _blocks[key] = address, held
    return address

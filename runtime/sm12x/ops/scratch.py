"""Device memory that expert layers without a workspace of the caller's use: one block for each thread and
stream.

Layers on one stream follow each other, so they share a block: each call holds its lock while it launches, or
the kernels of two threads would come in turns. It grows where a call needs more, to twice what it was at
least, and is never given back, because work that is queued may still use it: together less than four times
what the largest call needed. A stream is to be synchronised before it is destroyed: another one may get its
handle, and with it the block that a call is still using.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .. import driver

PER_THREAD_STREAM = 2  # this handle names another stream in every thread


@dataclass(frozen=True, slots=True)
class Block:
    """`size` bytes at a device address. Hold `lock` from a call's first launch to its last."""

    address: int
    size: int
    lock: threading.Lock = field(default_factory=threading.Lock)


_lock = threading.Lock()
_blocks: dict[tuple[int, int], Block] = {}
driver.clear_after_fork(_blocks)


def block_of(device: driver.Device, stream: int, size: int) -> Block | None:
    """At least `size` bytes for calls on `stream`, which is not being captured: a graph may run on any
    stream, beside others. None for the per-thread default stream, of which there are many. The device's
    context is current. Raises CudaError."""
    if stream == PER_THREAD_STREAM:
        return None
    found = _blocks.get((device.ordinal, stream))
    if found is not None and found.size >= size:
        return found
    with _lock:
        found = _blocks.get((device.ordinal, stream))
        if found is None or found.size < size:
            held = size if found is None else max(size, 2 * found.size)
            found = Block(driver.allocate(device, held), held)
            _blocks[device.ordinal, stream] = found
        return found

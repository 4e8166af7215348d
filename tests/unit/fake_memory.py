"""The fake driver with memory that holds what is copied to it."""

from __future__ import annotations

import ctypes

from unit.fake_driver import FakeDriver, real_bindings


class DriverWithMemory(FakeDriver):
    """Device memory is the host's: `blocks` by address, of whatever is not freed yet."""

    def __post_init__(self):
        super().__post_init__()
        self.blocks = {}

    def do_cuMemAlloc(self, size):
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return real_bindings.CUdeviceptr(ctypes.addressof(block))

    def do_cuMemFree(self, address):
        del self.blocks[int(address)]

    def do_cuMemcpyHtoDAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)

    def do_cuMemcpyDtoHAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)

"""Host arrays in emulated memory, for the length of one call.

What a call is given is copied there byte by byte, and lies as it lay: arrays that share memory share it there
too, strides stay, and an address off a multiple of 16 stays off it. Bytes between rows, outputs and the
workspace count as never written, so that a kernel which reads them is caught; both come back only where a
kernel wrote them. What it wrote anywhere else is an EmulatorError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import driver as runtime
from ..arrays import Array, numpy_dtype
from ..device_memory import DeviceArray
from . import driver
from .errors import EmulatorError
from .memory import UNWRITTEN

INPUT, OUTPUT, SCRATCH = 1, 2, 3
_UNIT = 16  # what allocators of host memory align to at least, and the most that a kernel wants of an operand

Bytes = NDArray[np.uint8]


class _Interface:
    """Host memory as NumPy takes it: bytes, the last axis those of one element."""

    def __init__(self, array: Array, size: int) -> None:
        self.owner = array.owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (*array.shape, size),
            "strides": (*(step * size for step in array.strides), 1),
            "data": (array.ptr, array.readonly),
        }


def host_bytes(array: Array) -> Bytes:
    """The bytes of a host array, (*shape, bytes of an element), where they lie."""
    return np.asarray(_Interface(array, numpy_dtype(array.dtype).itemsize))


@dataclass(slots=True)
class _Piece:
    name: str
    host: Bytes
    role: int
    low: int
    high: int
    mirrored: DeviceArray
    pointer: int


class _Region:
    """Host memory from `low` to `high`, and its copy at `address` of the device."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self.pieces = pieces
        self.low, self.high = pieces[0].low, max(piece.high for piece in pieces)
        pad = self.low % _UNIT
        size = pad + self.high - self.low
        memory = driver.memory()
        self.base = memory.allocate(size, " and ".join(dict.fromkeys(piece.name for piece in pieces)))
        self.address = self.base + pad
        self._memory = memory.region(self.base)
        self._shift = self.address - self.low
        self._roles = np.zeros(size, np.uint8)
        self._content = np.zeros(size, np.uint8)
        for piece in pieces:
            piece.mirrored.ptr = piece.pointer + self._shift
            self._view(self._roles, piece)[...] = piece.role
        for piece in pieces:
            if piece.role == INPUT:
                self._view(self._content, piece)[...] = piece.host
        given = self._roles == INPUT
        self._memory.data[given] = self._content[given]
        self._memory.shadow[given] = 0

    def _view(self, whole: NDArray[Any], piece: _Piece) -> NDArray[Any]:
        """The bytes of `piece` within an array that has one entry for each byte of the region."""
        host = piece.host
        start = piece.pointer + self._shift - self.base
        return np.lib.stride_tricks.as_strided(whole[start:], host.shape, host.strides)

    def check(self) -> None:
        """Raises EmulatorError where kernels wrote anything but outputs and the workspace."""
        wrong = (self._written() & (self._roles == 0)) | (
            (self._roles == INPUT) & (self._memory.data != self._content)
        )
        if wrong.any():
            first = int(np.argmax(wrong)) - (self.address - self.base)
            raise EmulatorError(
                f"kernels wrote {np.count_nonzero(wrong)} bytes that are no part of any output, the first of "
                f"them {first} bytes behind the beginning of {self._memory.label}"
            )

    def collect(self) -> None:
        """Copy back what kernels wrote to outputs and the workspace."""
        for piece in self.pieces:
            if piece.role != INPUT:
                written = self._view(self._written(), piece)
                np.copyto(piece.host, self._view(self._memory.data, piece), where=written)

    def _written(self) -> NDArray[np.bool_]:
        written: NDArray[np.bool_] = self._memory.shadow != UNWRITTEN
        return written


class Mirror:
    """The arrays of one call: within the block, `add` them all, then `upload`, call and `collect`. Blocks run
    one at a time, and give their device memory back at the end."""

    def __init__(self, device: runtime.Device) -> None:
        self._device = device
        self._pieces: list[_Piece] = []
        self._regions: list[_Region] = []

    def __enter__(self) -> Mirror:
        driver.lock().acquire()
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            driver.abandon()
        for region in self._regions:
            driver.memory().free(region.base)
        self._regions.clear()
        driver.lock().release()

    def add(self, array: Array, name: str, role: int) -> DeviceArray:
        """What stands for a host array on the device; its address is known after `upload`."""
        mirrored = DeviceArray(0, array.shape, array.dtype, self._device.ordinal, None, array.strides)
        host = host_bytes(array)
        if host.size:
            reach = [(n - 1) * step for n, step in zip(host.shape, host.strides, strict=True)]
            low = array.ptr + sum(each for each in reach if each < 0)
            high = array.ptr + sum(each for each in reach if each > 0) + 1
            self._pieces.append(_Piece(name, host, role, low, high, mirrored, array.ptr))
        return mirrored

    def upload(self) -> None:
        """Allocate and fill device memory for every array."""
        group: list[_Piece] = []
        end = 0
        for piece in sorted(self._pieces, key=lambda each: each.low):
            if group and piece.low >= end:
                self._regions.append(_Region(group))
                group = []
            group.append(piece)
            end = max(end, piece.high)
        if group:
            self._regions.append(_Region(group))

    def collect(self) -> None:
        """Bring outputs back. Raises EmulatorError, and brings none, where kernels wrote anything else, or
        one that was held back fails.
        """
        driver.finish()
        for region in self._regions:
            region.check()
        for region in self._regions:
            region.collect()

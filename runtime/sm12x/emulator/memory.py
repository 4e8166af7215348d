"""State spaces as NumPy bytes with bounds, alignment and initialised-bits.

A `Region` is one run of bytes: an allocation of global memory, the shared memory of a CTA, the parameters of
a launch. `GlobalMemory` hands out regions at made-up addresses above 2^48, which no process can dereference
by mistake, with gaps between them that belong to nobody. Addresses are uint32 or uint64 arrays, one element
for each lane that takes part.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import Fault

if TYPE_CHECKING:
    from .checkers.observer import Observer

Array = npt.NDArray[Any]

# Generic address windows. Global memory is its own window, as on hardware.
GLOBAL_BASE = 0x0001_0000_0000_0000
SHARED_WINDOW = 0x0002_0000_0000_0000
LOCAL_WINDOW = 0x0002_0001_0000_0000
PARAM_WINDOW = 0x0002_0002_0000_0000
CONST_WINDOW = 0x0002_0003_0000_0000
WINDOW_BYTES = 0x1_0000_0000

# Where shared memory begins in its window: 0 stays an address that nothing has, and the first byte is as
# aligned as any swizzle atom wants it.
SHARED_BASE = 1024
_GUARD = 1 << 16

# A shadow byte for each byte of a region: 0 for initialised, else why a generic access must not touch it.
UNWRITTEN = 1
OPAQUE = 2  # part of an mbarrier

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_POSITIVE = np.int64(0x7FFF_FFFF_FFFF_FFFF)


class _View:
    """A region seen as aligned items of `width` * `count` bytes."""

    __slots__ = ("data", "misaligned", "opaque", "shadow", "shift")

    def __init__(self, region: Region, width: int, count: int) -> None:
        total = width * count
        items = region.size // total
        self.data: Array = region.data[: items * total].view(_WORDS[width])
        word = min(total, 8)
        self.shadow: Array = region.shadow[: items * total].view(_WORDS[word])
        self.opaque = _WORDS[word](int.from_bytes(bytes([OPAQUE]) * word, "little"))
        if count > 1:
            self.data = self.data.reshape(items, count)
        if total > 8:
            self.shadow = self.shadow.reshape(items, total // 8)
        self.shift = total.bit_length() - 1
        self.misaligned = total - 1


class Region:
    """`size` bytes from address `base` on (`base` is a multiple of 256).

    `data` and `shadow` are uint8 arrays of `size` bytes; `label` names the region in messages.
    """

    __slots__ = (
        *("_base", "_views", "base", "data", "has_opaque", "label", "observers", "read_only", "shadow"),
        "size",
    )

    def __init__(self, base: int, size: int, label: str, *, read_only: bool = False) -> None:
        self.base, self.size, self.label, self.read_only = base, size, label, read_only
        # Whole 32-byte items exist behind the data, so that views begin where NumPy likes them.
        padded = -(-size // 32) * 32
        self.data: Array = np.zeros(padded, np.uint8)[:size]
        self.shadow: Array = np.full(padded, UNWRITTEN, np.uint8)[:size]
        self.has_opaque = False
        self.observers: tuple[Observer, ...] = ()
        self._views: dict[tuple[int, int], _View] = {}
        self._base: dict[Any, Any] = {np.dtype(np.uint64): np.uint64(base)}
        if base < 1 << 32:
            self._base[np.dtype(np.uint32)] = np.uint32(base)

    def _view(self, width: int, count: int) -> _View:
        view = self._views.get((width, count))
        if view is None:
            view = self._views[width, count] = _View(self, width, count)
        return view

    def _index(self, view: _View, address: Array) -> Array:
        """Item index of each address; one outside the region becomes an index no array has."""
        offset = address - self._base[address.dtype]
        if view.misaligned:
            if np.count_nonzero(offset & offset.dtype.type(view.misaligned)):
                raise self._misaligned(view, address)
            offset = offset >> offset.dtype.type(view.shift)
        index: Array = (
            offset.astype(np.int64) if offset.dtype == np.uint32 else offset.view(np.int64) & _POSITIVE
        )
        return index

    def load(self, address: Array, width: int, count: int = 1) -> Array:
        """What lies at each address: (n,) words of `width` bytes, or (count, n) for a vector access.

        Raises Fault for an access that is misaligned, out of bounds, or reads bytes that nobody has written.
        """
        view = self._view(width, count)
        index = self._index(view, address)
        try:
            unwritten = np.count_nonzero(view.shadow[index])
            found: Array = view.data[index]
        except IndexError:
            raise self._outside("read", address, width * count) from None
        for observer in self.observers:
            observer.read(self, address, width * count)
        if unwritten:
            raise self._unwritten(address, width * count)
        return found if count == 1 else np.ascontiguousarray(found.T)

    def store(self, address: Array, value: Array, width: int, count: int = 1) -> None:
        """Put (n,) words, or (count, n) for a vector access, at each address; of lanes at one address the
        last wins.

        Raises Fault for an access that is misaligned, out of bounds, read-only, or overwrites an mbarrier.
        """
        view = self._view(width, count)
        index = self._index(view, address)
        if self.read_only:
            raise Fault("read-only", f"write to {self.label}")
        try:
            if self.has_opaque and np.count_nonzero(view.shadow[index] & view.opaque):
                raise self._overwrites(address, width * count)
            items = value if count == 1 else value.T
            if self.observers:
                self._observed(view, index, address, width * count, items)
            view.data[index] = items
        except IndexError:
            raise self._outside("write", address, width * count) from None
        view.shadow[index] = 0

    def load_rows(self, address: Array, size: int) -> Array:
        """`size` bytes, at most 16, at each address, a multiple of 16: uint8 (n, size). Raises Fault as
        `load` does.
        """
        view = self._view(8, 2)
        index = self._index(view, address)
        try:
            shadow, found = view.shadow[index], view.data[index]
        except IndexError:
            raise self._outside("read", address, size) from None
        if size < 16:
            shadow = shadow.view(np.uint8)[:, :size]
        if np.count_nonzero(shadow):
            raise self._unwritten(address, size)
        rows: Array = found.view(np.uint8)
        return rows if size == 16 else rows[:, :size]

    def store_rows(self, address: Array, rows: Array) -> None:
        """Put uint8 (n, 16) at each address, a multiple of 16. Raises Fault as `store` does."""
        self.store(address, np.ascontiguousarray(rows).view(np.uint64).T, 8, 2)

    def gather(self, address: Array, unit: int) -> Array:
        """The items of `unit` bytes, a power of two up to 16, at int64 addresses that are multiples of it,
        for bulk copies: (n,) words, or (n, 2) of 8 bytes for 16. Raises Fault as `load` does.
        """
        view = self._view(*((8, 2) if unit == 16 else (unit, 1)))
        index = (address - self.base) >> view.shift
        if index.size and int(index.min()) < 0:
            raise self._outside("read", address.astype(np.uint64), unit)
        try:
            unwritten = np.count_nonzero(view.shadow[index])
            found: Array = view.data[index]
        except IndexError:
            raise self._outside("read", address.astype(np.uint64), unit) from None
        for observer in self.observers:
            observer.read(self, address, unit)
        if unwritten:
            raise self._unwritten(address.astype(np.uint64), unit)
        return found

    def scatter(self, address: Array, value: Array, unit: int) -> None:
        """Put what `gather` gave at int64 addresses. Raises Fault as `store` does."""
        view = self._view(*((8, 2) if unit == 16 else (unit, 1)))
        index = (address - self.base) >> view.shift
        if index.size and int(index.min()) < 0:
            raise self._outside("write", address.astype(np.uint64), unit)
        if self.read_only:
            raise Fault("read-only", f"write to {self.label}")
        try:
            if self.has_opaque and np.count_nonzero(view.shadow[index] & view.opaque):
                raise self._overwrites(address.astype(np.uint64), unit)
            if self.observers:
                self._observed(view, index, address, unit, value)
            view.data[index] = value
        except IndexError:
            raise self._outside("write", address.astype(np.uint64), unit) from None
        view.shadow[index] = 0

    def span(self, address: int, size: int, what: str) -> slice:
        """The slice of `data` that holds `size` bytes from `address` on. Raises Fault where they are not all
        in it.
        """
        start = address - self.base
        if start < 0 or start + size > self.size:
            raise self._outside(what, np.array([address], np.uint64), size)
        return slice(start, start + size)

    # Observers

    def _observed(self, view: _View, index: Array, address: Array, size: int, value: Array) -> None:
        """Tell observers of a write that is to come. Raises IndexError where it is outside of the region."""
        old = view.data[index]
        for observer in self.observers:
            observer.write(self, address, size, partial(_differ, old, value))

    def tell(self, address: int, size: int, content: Array | None) -> None:
        """Tell observers that `size` bytes from `address` on, of this region, are read by some other way than
        the functions above, or that their `content` (uint8) is to be written.
        """
        for observer in self.observers:
            at = np.arange(address, address + size)
            if content is None:
                observer.read(self, at, 1)
            else:
                start = address - self.base
                old = self.data[start : start + size]
                observer.write(self, at, 1, partial(_differ, old, content))

    # Reasons, found again lane by lane once something is wrong.

    def _misaligned(self, view: _View, address: Array) -> Fault:
        lanes = np.flatnonzero(address & address.dtype.type(view.misaligned))
        return Fault(
            "alignment",
            f"{view.misaligned + 1}-byte access to {self.label} at {int(address[lanes[0]]):#x}, which is no "
            f"multiple of {view.misaligned + 1}",
            tuple(lanes.tolist()),
        )

    def _outside(self, what: str, address: Array, size: int) -> Fault:
        start = address.astype(np.uint64)
        bad = (start < np.uint64(self.base)) | (start + np.uint64(size) > np.uint64(self.base + self.size))
        lanes = np.flatnonzero(bad)
        first = int(start[lanes[0]]) if len(lanes) else int(start[0])
        where = (
            f"{self.base - first} bytes before its beginning"
            if first < self.base
            else f"{first + size - self.base - self.size} bytes past its end"
        )
        return Fault(
            "bounds",
            f"{size}-byte {what} at {first:#x}, {where}: {self.label} has {self.size} bytes from "
            f"{self.base:#x} on",
            tuple(lanes.tolist()),
        )

    def _touching(self, address: Array, size: int, flag: int) -> tuple[int, list[int]]:
        """First byte with a shadow flag that the accesses touch, and the lanes that touch one."""
        first, lanes = -1, []
        for lane, start in enumerate(address.tolist()):
            found = np.flatnonzero(self.shadow[start - self.base : start - self.base + size] & flag)
            if len(found):
                first = start + int(found[0]) if first < 0 else first
                lanes.append(lane)
        return first, lanes

    def _unwritten(self, address: Array, size: int) -> Fault:
        first, lanes = self._touching(address, size, OPAQUE)
        if lanes:
            return Fault("barrier", f"read of {self.label} at {first:#x}, which is an mbarrier", tuple(lanes))
        first, lanes = self._touching(address, size, UNWRITTEN)
        return Fault(
            "uninitialised",
            f"{size}-byte read of {self.label}: the byte at {first:#x} (offset {first - self.base}) was "
            "never written",
            tuple(lanes),
        )

    def _overwrites(self, address: Array, size: int) -> Fault:
        first, lanes = self._touching(address, size, OPAQUE)
        return Fault("barrier", f"write to {self.label} at {first:#x}, which is an mbarrier", tuple(lanes))


class GlobalMemory:
    """Global memory of the emulated device: allocations at made-up addresses.

    Host access (`read`, `write`, `fill`) takes no part in the checks of kernels but for bounds: what the host
    wrote is initialised, and it may read what nobody wrote.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.used = 0
        self.acting: Any = None  # the Split or the Issuer of an operation that runs now: for observers
        self._observers: tuple[Observer, ...] = ()
        self._next = GLOBAL_BASE
        self._bases: list[int] = []
        self._regions: dict[int, Region] = {}
        self._freed: list[tuple[int, int, str]] = []

    def allocate(self, size: int, label: str | None = None) -> int:
        """Address, a multiple of 256, of `size` new bytes that count as never written.

        Raises ValueError for a size below 1 and MemoryError past `capacity`.
        """
        if size < 1:
            raise ValueError(f"size: expected at least 1 byte, got {size}")
        if self.capacity is not None and self.used + size > self.capacity:
            raise MemoryError(
                f"{size} bytes of emulated memory do not fit: {self.used} of {self.capacity} are in use"
            )
        base = self._next
        self._next = -(-(base + size + _GUARD) // 256) * 256
        self._regions[base] = Region(base, size, label or f"the allocation at {base:#x}")
        self._regions[base].observers = self._observers
        insort(self._bases, base)
        self.used += size
        return base

    def free(self, address: int) -> None:
        """Give an allocation back; its address is not used again. Raises ValueError for any other address."""
        region = self._regions.pop(address, None)
        if region is None:
            raise ValueError(f"{address:#x} is not the beginning of an allocation")
        self._bases.remove(address)
        self._freed.append((region.base, region.size, region.label))
        self.used -= region.size

    def __contains__(self, address: int) -> bool:
        """Whether an address is one of global memory, allocated or not: no other window has it."""
        return not SHARED_WINDOW <= address < CONST_WINDOW + WINDOW_BYTES

    def observe(self, observer: Observer) -> None:
        """Have `observer` told of accesses by kernels to all of global memory."""
        self._set_observers((*self._observers, observer))

    def forget(self, observer: Observer) -> None:
        """The end of `observe`, if it was called."""
        self._set_observers(tuple(each for each in self._observers if each is not observer))

    def _set_observers(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        for region in self._regions.values():
            region.observers = observers

    def region(self, address: int, what: str = "access") -> Region:
        """The allocation that holds the byte at `address`. Raises Fault where there is none."""
        at = bisect_right(self._bases, address) - 1
        if at >= 0:
            region = self._regions[self._bases[at]]
            if address < region.base + region.size:
                return region
        raise Fault("bounds", f"{what} at {address:#x}: {self._nearest(address)}")

    def _nearest(self, address: int) -> str:
        if address == 0:
            return "a null pointer"
        for base, size, label in self._freed:
            if base <= address < base + size:
                return f"{label} of {size} bytes has been freed"
        at = bisect_right(self._bases, address) - 1
        if at >= 0:
            region = self._regions[self._bases[at]]
            past = address - region.base - region.size
            if past < _GUARD:
                return f"{past} bytes past the end of {region.label}, which has {region.size} bytes"
        return "no allocation is there"

    # Kernels

    def load(self, address: Array, width: int, count: int = 1) -> Array:
        """As Region.load, for lanes that may be in different allocations."""
        region = self.region(int(address[0]), f"{width * count}-byte read")
        try:
            return region.load(address, width, count)
        except Fault as fault:
            if fault.kind != "bounds":
                raise
        shape = (len(address),) if count == 1 else (count, len(address))
        found = np.empty(shape, _WORDS[width])
        for region, lanes in self._split(address, f"{width * count}-byte read"):
            found[..., lanes] = region.load(address[lanes], width, count)
        return found

    def store(self, address: Array, value: Array, width: int, count: int = 1) -> None:
        """As Region.store, for lanes that may be in different allocations."""
        region = self.region(int(address[0]), f"{width * count}-byte write")
        last = int(address.max()) + width * count
        if int(address.min()) >= region.base and last <= region.base + region.size:
            return region.store(address, value, width, count)
        for region, lanes in self._split(address, f"{width * count}-byte write"):
            region.store(address[lanes], value[..., lanes], width, count)
        return None

    def _split(self, address: Array, what: str) -> list[tuple[Region, Array]]:
        """Lanes by the region that they are in; lane numbers of faults are the warp's when all lanes take
        part.
        """
        lanes: dict[int, list[int]] = {}
        for lane, at in enumerate(address.tolist()):
            try:
                lanes.setdefault(self.region(at, what).base, []).append(lane)
            except Fault as fault:
                raise Fault(fault.kind, fault.message, (lane,)) from None
        return [(self._regions[base], np.array(found)) for base, found in lanes.items()]

    # The host

    def _host(self, address: int, size: int, what: str) -> tuple[Region, slice]:
        region = self.region(address, what)
        return region, region.span(address, size, what)

    def write(self, address: int, data: bytes | bytearray | memoryview | Array) -> None:
        """Copy bytes, or the bytes of a C-contiguous array, to `address`."""
        content = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else _bytes_of(data)
        if content.size:
            region, span = self._host(address, content.size, "copy to the device")
            region.data[span] = content
            region.shadow[span] = 0

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`."""
        if size == 0:
            return b""
        region, span = self._host(address, size, "copy from the device")
        return region.data[span].tobytes()

    def fill(self, address: int, size: int, value: int) -> None:
        """Set `size` bytes to `value`."""
        if size:
            region, span = self._host(address, size, "memset")
            region.data[span] = value
            region.shadow[span] = 0

    def written(self, address: int, size: int) -> Array:
        """Which of `size` bytes at `address` somebody has written: bool (size,)."""
        region, span = self._host(address, size, "access")
        flags: Array = region.shadow[span] != UNWRITTEN
        return flags


def _differ(old: Array, new: Array) -> bool:
    return not np.array_equal(old, new)


def _bytes_of(array: Array) -> Array:
    if not array.flags.c_contiguous:
        raise ValueError("expected a C-contiguous array")
    return array.reshape(-1).view(np.uint8)

"""Which bytes of global memory have been loaded and stored, each counted once."""

from __future__ import annotations

import numpy as np

from ..memory import Array, GlobalMemory, Region

LOADED, STORED = "loaded", "stored"
_LONGEST = 32  # bytes of the longest item that is marked at once


class Touched:
    """A flag for each byte of every allocation that something touched."""

    def __init__(self) -> None:
        self._marks: dict[str, dict[int, Array]] = {LOADED: {}, STORED: {}}

    def mark(self, how: str, region: Region, address: Array, unit: int) -> None:
        """Items of `unit` bytes (a power of two up to 32) at int64 addresses in a region, which are multiples
        of it."""
        marks = self._marks[how].get(region.base)
        if marks is None:
            padded = -(-region.size // _LONGEST) * _LONGEST
            marks = self._marks[how][region.base] = np.zeros(padded, np.uint8)
        word = min(unit, 8)
        flags = marks.view(f"u{word}")
        if unit > word:
            flags = flags.reshape(-1, unit // word)
        flags[(address - region.base) // unit] = int.from_bytes(b"\1" * word, "little")

    def mark_run(self, how: str, region: Region, start: int, size: int) -> None:
        """`size` bytes from `start` on."""
        if size:
            self.mark(how, region, np.arange(start, start + size), 1)

    def mark_anywhere(self, how: str, memory: GlobalMemory, address: Array, unit: int) -> None:
        """As `mark`, of addresses in any allocations."""
        left = np.unique(address)
        while len(left):
            region = memory.region(int(left[0]))
            count = int(np.searchsorted(left, region.base + region.size))
            self.mark(how, region, left[:count], unit)
            left = left[count:]

    def count(self, how: str) -> int:
        """Bytes that have been touched so."""
        return sum(int(np.count_nonzero(marks)) for marks in self._marks[how].values())

    def follow(self, later: Touched) -> None:
        """Add what came later. Bytes stored before do not count as loaded: nothing says that they came from
        DRAM again.
        """
        for base, marks in later._marks[LOADED].items():
            stored = self._marks[STORED].get(base)
            self._add(LOADED, base, marks if stored is None else marks & ~stored & 1)
        for base, marks in later._marks[STORED].items():
            self._add(STORED, base, marks)

    def _add(self, how: str, base: int, marks: Array) -> None:
        have = self._marks[how].get(base)
        self._marks[how][base] = marks.copy() if have is None else have | marks

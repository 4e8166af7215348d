"""Who last wrote each piece of a CTA's shared memory, and who read it since: stamps of accesses.

A piece is 16 bytes at first, and as small as the smallest access needs from then on.
"""

from __future__ import annotations

import numpy as np

from ..memory import Array

# A stamp of reads: their time, and these. 0: none.
COLLECTIVE = 1  # the warp read it as one (ldmatrix): any of its lanes will do
STRONG = 2  # an atomic or otherwise ordered access
_TIME = 8

_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_NEVER = np.uint32(0xFFFFFFFF)


def stamp(time: int, flags: int) -> int:
    """The stamp of an access."""
    return time << _TIME | flags


def time_of(stamps: Array) -> Array:
    time: Array = stamps >> np.uint32(_TIME)
    return time


def bits_of(lanes: Array) -> Array:
    """Lanes as uint32 of one bit each."""
    bits: Array = _BITS[lanes]
    return bits


def known_of(rows: Array, masks: Array) -> Array:
    """The least that is known of the lanes in each mask: rows (n, 32) or (1, 32), masks (n, k) -> (n, k)."""
    named = (masks[..., None] & _BITS) != 0
    least: Array = np.where(named, rows[:, None, :], _NEVER).min(axis=-1)
    return least


def known_of_any(rows: Array, masks: Array) -> Array:
    """As `known_of`, the most."""
    named = (masks[..., None] & _BITS) != 0
    most: Array = np.where(named, rows[:, None, :], np.uint32(0)).max(axis=-1)
    return most


class Writes:
    """Of each piece the last write: its agent (-1 - w for the whole of warp w; -1 - warps - w for several
    of its lanes), time, instruction, and whether it was a strong one. Time 0: never written.
    """

    __slots__ = ("agent", "lanes", "line", "strong", "time")

    def __init__(self, pieces: int) -> None:
        self.lanes: Array = np.zeros(pieces, np.uint32)  # of several that wrote the same value at once
        self.agent: Array = np.zeros(pieces, np.int32)
        self.time: Array = np.zeros(pieces, np.uint32)
        self.line: Array = np.zeros(pieces, np.int32)
        self.strong: Array = np.zeros(pieces, bool)

    def refine(self, factor: int) -> None:
        for name in self.__slots__:
            setattr(self, name, np.repeat(getattr(self, name), factor))

    def put(self, pieces: Array, agent: Array | int, time: int, line: int, strong: bool) -> None:
        self.agent[pieces] = agent
        self.time[pieces] = time
        self.line[pieces] = line
        self.strong[pieces] = strong


class Reads:
    """Of each piece the last reads by one warp at one time, the lanes that did them as a mask, and the
    instruction of the last; or those of one other agent. `older` are reads that a later one of the same
    warp took the place of though nothing orders the two: (pieces, stamps, masks, lines).
    """

    __slots__ = ("by_lanes", "lanes", "line", "older", "stamp")

    def __init__(self, pieces: int) -> None:
        self.stamp: Array = np.zeros(pieces, np.uint32)
        self.lanes: Array = np.zeros(pieces, np.uint32)
        self.line: Array = np.zeros(pieces, np.int32)
        self.older: tuple[Array, Array, Array, Array] | None = None
        self.by_lanes = False  # whether there are any but collective reads

    def refine(self, factor: int) -> None:
        for name in ("stamp", "lanes", "line"):
            setattr(self, name, np.repeat(getattr(self, name), factor))
        if self.older is not None:
            pieces, *rest = self.older
            finer = (pieces[:, None] * factor + np.arange(factor)).ravel()
            self.older = finer, *(np.repeat(each, factor) for each in rest)  # type: ignore[assignment]

    def put(self, pieces: Array, bits: Array, time: int, flags: int, line: int) -> None:
        """Lanes, one for each row of pieces (n, k) and as a bit of bits (n, 1), read at a time. Reads at
        the same time stay.
        """
        self.by_lanes = True
        old = self.stamp[pieces]
        same = time_of(old) == time
        if flags & STRONG and np.count_nonzero(same & (old & np.uint32(STRONG) == 0)):
            flags &= ~STRONG
        self.lanes[pieces] = np.where(
            same & (old & np.uint32(COLLECTIVE) == 0), self.lanes[pieces], np.uint32(0)
        )
        np.bitwise_or.at(self.lanes, pieces, np.broadcast_to(bits, pieces.shape))
        self.stamp[pieces] = stamp(time, flags)
        self.line[pieces] = line

    def keep(self, pieces: Array) -> None:
        """Remember the reads of some pieces, whose place is going to be taken."""
        found = pieces, self.stamp[pieces], self.lanes[pieces], self.line[pieces]
        if self.older is not None:
            pairs = zip(self.older, found, strict=True)
            found = tuple(np.concatenate(pair) for pair in pairs)  # type: ignore[assignment]
        self.older = found

    def forget(self, pieces: Array) -> None:
        """A write that all these reads happened before has come: whoever is ordered behind it is behind
        them.
        """
        if self.older is not None:
            left = ~np.isin(self.older[0], pieces)
            self.older = tuple(each[left] for each in self.older) if left.any() else None  # type: ignore[assignment]

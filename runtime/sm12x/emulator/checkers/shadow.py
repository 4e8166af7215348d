"""Who last wrote each piece of a CTA's shared memory, and who read it since: stamps of accesses.

A piece is 16 bytes at first, and as small as the smallest access needs from then on.
"""

from __future__ import annotations

import numpy as np

from ..memory import Array

# A stamp of reads by a warp: time, lane and these. 0: none.
COLLECTIVE = 1  # the warp read it as one (ldmatrix): its lane does not matter
MANY = 2  # several lanes did: `Reads.masks` has them
STRONG = 4  # an atomic or otherwise ordered access
_LANE = 3
_TIME = 8


def stamp(time: int, flags: int) -> int:
    """The stamp of an access; add `lane_bits`."""
    return time << _TIME | flags


def lane_bits(lanes: Array) -> Array:
    """What the lanes of an access add to its stamp: uint32 of the same shape."""
    bits: Array = lanes.astype(np.uint32) << np.uint32(_LANE)
    return bits


def time_of(stamps: Array) -> Array:
    time: Array = stamps >> np.uint32(_TIME)
    return time


def lane_of(stamps: Array) -> Array:
    lane: Array = (stamps >> np.uint32(_LANE)) & np.uint32(31)
    return lane


class Writes:
    """Of each piece the last write: its agent (-1 - w for a whole warp w), time, instruction, and whether
    it was a strong one. Time 0: never written.
    """

    __slots__ = ("agent", "line", "strong", "time")

    def __init__(self, pieces: int) -> None:
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
    """Of each piece the last read by one warp, or one other agent, and its instruction. `older` are reads
    that a later one of the same warp took the place of though nothing orders the two: (pieces, stamps,
    lines).
    """

    __slots__ = ("line", "masks", "older", "stamp")

    def __init__(self, pieces: int) -> None:
        self.stamp: Array = np.zeros(pieces, np.uint32)
        self.line: Array = np.zeros(pieces, np.int32)
        self.masks: dict[int, Array] = {}  # by time
        self.older: tuple[Array, Array, Array] | None = None

    def refine(self, factor: int) -> None:
        self.stamp, self.line = np.repeat(self.stamp, factor), np.repeat(self.line, factor)
        if self.older is not None:
            pieces, stamps, lines = self.older
            finer = (pieces[:, None] * factor + np.arange(factor)).ravel()
            self.older = finer, np.repeat(stamps, factor), np.repeat(lines, factor)

    def keep(self, pieces: Array, stamps: Array, lines: Array) -> None:
        """Remember reads whose place is taken."""
        if self.older is not None:
            pieces = np.concatenate([self.older[0], pieces])
            stamps = np.concatenate([self.older[1], stamps])
            lines = np.concatenate([self.older[2], lines])
        self.older = pieces, stamps, lines

    def forget(self, pieces: Array) -> None:
        """A write that all these reads happened before has come: whoever is ordered behind it is behind
        them.
        """
        if self.older is not None:
            left = ~np.isin(self.older[0], pieces)
            self.older = tuple(each[left] for each in self.older) if left.any() else None  # type: ignore[assignment]

    def add_mask(self, time: int, lanes: Array) -> None:
        known = self.masks.get(time)
        self.masks[time] = lanes if known is None else np.union1d(known, lanes)

"""Livelock: a proof that a grid which still runs gets nowhere.

Every so often, when barriers, CTAs and asynchronous operations have stood still for a while, the threads
that exist are put on trial: their registers and places are noted, and writes to memory are watched. If
nothing is pending, no write has changed a byte, no barrier has moved, and every one of them has come back to
its place with the same registers, then each repeats what it did for ever, whatever the order. What counts or
reads a clock while it polls is never proven to be stuck; the limit on segments ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..grid import Grid
    from ..memory import Array, Region
    from ..warp import Warp

# Segments, for each split that is ready, between two looks: long enough for loops of a few hundred segments.
_WINDOW = 2000


@dataclass(slots=True)
class _Snapshot:
    """A split at the beginning of a trial. Lanes that part and meet are another Split each time."""

    warp: Warp
    pc: int
    lanes: Array
    registers: list[Array]

    def is_back(self) -> bool:
        lanes = self.lanes
        return any(
            split.pc == self.pc
            and np.array_equal(split.lanes, lanes)
            and all(
                new is old or np.array_equal(new[lanes], old[lanes])
                for new, old in zip(self.warp.registers, self.registers, strict=True)
            )
            for split in self.warp.splits
        )


class Livelock:
    """The trials of a grid; an Observer of all memory during one."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._next = 0
        self._state: Any = None  # of barriers and all, at the last look
        self._snapshots: list[_Snapshot] | None = None  # while a trial goes on
        self._changed = False
        self._patience = 1

    def proven(self, steps: int, ready: int, *, pending: bool) -> bool:
        """Now and then, after `steps` segments, with so many splits that can run: whether the grid is known
        to get nowhere. It is not while something is pending: an operation, or another grid.
        """
        self._changed = self._changed or pending
        if self._snapshots is None and steps < self._next:
            return False
        state = self._sum()
        if self._snapshots is not None:
            if self._changed or state != self._state:
                self._end()
                self._patience = min(2 * self._patience, 64)
            elif self._all_back():
                self._end()
                return True
            elif steps < self._next:
                return False
            else:
                self._end()
        elif state == self._state and ready:
            self._begin()
        self._state = state
        self._next = steps + _WINDOW * self._patience * (1 + ready)
        return False

    def _sum(self) -> Any:
        """Something that differs whenever a barrier, a CTA or an operation has moved."""
        grid = self._grid
        barriers = 0
        for cta in grid.ctas:
            if not cta.alive:
                continue
            for mbarrier in cta.mbarriers.values():
                barriers += (
                    (mbarrier.phase << 20) + mbarrier.expected - mbarrier.pending + (mbarrier.tx << 21)
                )
            for named in (*cta.barriers, cta.cluster_barrier):
                barriers += (named.generation << 20) + named.arrived
        return barriers, grid.scheduler.completed, grid.running, grid.outside, sum(c.alive for c in grid.ctas)

    def disturb(self) -> None:
        """Something happened that may be different next time: a clock was read."""
        self._changed = True

    def close(self) -> None:
        """The grid has run, or will not run on."""
        if self._snapshots is not None:
            self._end()

    # A trial

    def _begin(self) -> None:
        self._changed = False
        grid = self._grid
        self._snapshots = [
            _Snapshot(split.warp, split.pc, split.lanes, list(split.warp.registers))
            for split in grid.splits()
        ]
        grid.memory.observe(self)
        for region in self._own_regions():
            region.observers = (*region.observers, self)

    def _end(self) -> None:
        self._snapshots = None
        self._grid.memory.forget(self)
        for region in self._own_regions():
            region.observers = tuple(each for each in region.observers if each is not self)

    def _own_regions(self) -> list[Region]:
        return [region for cta in self._grid.ctas for region in (cta.shared, *cta.local.values())]

    def _all_back(self) -> bool:
        """Whether all lanes are where they were, with the registers that they had. They come back at
        different times, so that each split is crossed off when it is found to have.
        """
        self._snapshots = [each for each in self._snapshots or () if not each.is_back()]
        return not self._snapshots

    def read(self, region: Region, address: Array, size: int) -> None:
        """Reads change nothing."""

    def write(self, region: Region, address: Array, size: int, changes: Callable[[], bool]) -> None:
        self._changed = self._changed or changes()

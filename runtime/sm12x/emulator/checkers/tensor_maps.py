"""Tensor maps that are edited while they are used, or used before the edit is published.

The async proxy reads a tensor map through a cache of its own. A map that a grid has written has to be
released by the CTA that wrote it (fence.proxy.tensormap::generic.release, or tensormap.cp_fenceproxy, which
copies and releases) and then acquired (fence.proxy.tensormap::generic.acquire with its address) by the CTA
that uses it, and must not change while a copy that uses it is in flight: a load until it completes, a store
until it has read (PTX ISA, "membar, fence", "tensormap.cp_fenceproxy", "cp.async.bulk.wait_group").

An acquire by any thread of the CTA counts, and a release by any thread of the writer's: that the two
happened in this order in this run is what is checked, not that a barrier orders them. What an earlier grid
of the stream has written needs neither. Maps are watched in global memory, where the only ones are that can
change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..asynchronous import Issuer
from ..errors import Fault
from ..tensor_map import ALIGNMENT, SIZE
from . import actor

if TYPE_CHECKING:
    from ..cta import Cta
    from ..grid import Grid
    from ..memory import Array, Region
    from ..warp import Split, Warp

_SHIFT = ALIGNMENT.bit_length() - 1  # memory is watched in blocks of what maps are aligned to


@dataclass(slots=True)
class _Write:
    """A write to memory, or several by the same instruction of a warp; `released` (0: not yet) counts events
    of the grid.
    """

    who: actor.Actor
    released: int = 0


@dataclass(slots=True)
class MapWatch:
    """What a grid whose kernel uses tensor maps has written, and which maps are in use: an Observer."""

    grid: Grid
    time: int = 0
    in_flight: dict[int, list[Issuer]] = field(default_factory=dict)  # by block that a map lies in
    writes: list[_Write] = field(default_factory=list)
    acquired: dict[tuple[int, int], int] = field(default_factory=dict)  # by CTA and address
    _last: dict[int, Array] = field(default_factory=dict)  # by base of a region: 1 + index of a write, or 0
    unreleased: dict[int, list[_Write]] = field(default_factory=dict)  # by CTA
    # By CTA: the writes, by warp and instruction, that are not released: a loop of stores is one.
    _open: dict[int, dict[tuple[int, int], int]] = field(default_factory=dict)

    def read(self, region: Region, address: Array, size: int) -> None:
        """Reads change nothing."""

    def write(self, region: Region, address: Array, size: int, changes: Callable[[], bool]) -> None:
        """Raises Fault for a write to a map in use."""
        who = actor.now(self.grid.memory)
        if who.warp.cta.grid is not self.grid:  # that is a matter of `dependents`
            return
        first = address.astype(np.int64) >> _SHIFT  # an access of at most 16 bytes lies in one block
        if self.in_flight:
            for block in np.unique(first).tolist():
                if block in self.in_flight:
                    raise self._rewritten(block, self.in_flight[block][0])
        number = self._number(who)
        last = self._last.get(region.base)
        if last is None:
            last = self._last[region.base] = np.zeros((region.size >> _SHIFT) + 1, np.int32)
        last[first - (region.base >> _SHIFT)] = number

    def _number(self, who: actor.Actor) -> int:
        """1 + the index of the record of a write."""
        cta = who.warp.cta.index
        key = who.warp.index, -1 if who.instruction is None else who.instruction.index
        known = self._open.setdefault(cta, {})
        if key not in known:
            record = _Write(who)
            self.writes.append(record)
            self.unreleased.setdefault(cta, []).append(record)
            known[key] = len(self.writes)
        return known[key]

    def publish(self, cta: Cta) -> None:
        """The write just made is released, and nothing else: the instruction that makes it always does so."""
        self.time += 1
        record = self.unreleased[cta.index].pop()
        record.released = self.time
        known = self._open[cta.index]
        del known[next(key for key, number in known.items() if self.writes[number - 1] is record)]

    def release(self, cta: Cta) -> None:
        """All that a CTA has written so far is released."""
        self.time += 1
        self._open.pop(cta.index, None)
        for record in self.unreleased.pop(cta.index, ()):
            record.released = self.time

    def last_write(self, address: int) -> _Write | None:
        """The latest write to the map at an address, if this grid wrote it."""
        region = self.grid.memory.region(address, "read of a tensor map")
        last = self._last.get(region.base)
        if last is None:
            return None
        start = (address - region.base) >> _SHIFT
        latest = int(last[start : start + SIZE // ALIGNMENT].max(initial=0))
        return self.writes[latest - 1] if latest else None

    def _rewritten(self, block: int, issuer: Issuer) -> Fault:
        who = actor.Actor(issuer.warp, (issuer.lane,), issuer.instruction, issuer)
        return Fault(
            "tensor map",
            f"the tensor map at {block << _SHIFT:#x} is written while a copy that uses it is in flight, "
            f"issued by {who}",
        )


def _watch(cta: Cta, address: int) -> MapWatch | None:
    """The grid's watch, for a map that can change: kernel parameters cannot."""
    watch = cta.grid.map_watch
    return watch if watch is not None and address in cta.grid.memory else None


def _blocks(address: int) -> range:
    return range(address >> _SHIFT, (address + SIZE) >> _SHIFT)


def issue(issuer: Issuer, address: int) -> None:
    """A copy that uses the map at a generic address is issued. Raises Fault where the map was written in this
    grid and not released, or not acquired since.
    """
    cta = issuer.cta
    watch = _watch(cta, address)
    if watch is None:
        return
    last = watch.last_write(address)
    if last is not None:
        edit = f"the tensor map at {address:#x}, which {last.who} has written in this grid, is used "
        acquired = watch.acquired.get((cta.index, address), 0)
        if not last.released:
            raise Fault(
                "tensor map",
                f"{edit}by CTA {cta.index} without having been released: "
                "fence.proxy.tensormap::generic.release or tensormap.cp_fenceproxy is missing",
                (issuer.lane,),
            )
        if acquired < last.released:
            raise Fault(
                "tensor map",
                f"{edit}by CTA {cta.index} without fence.proxy.tensormap::generic.acquire since then",
                (issuer.lane,),
            )
    for block in _blocks(address):
        watch.in_flight.setdefault(block, []).append(issuer)


def done(issuer: Issuer, address: int) -> None:
    """A copy has read its map for the last time."""
    watch = _watch(issuer.cta, address)
    if watch is None:
        return
    for block in _blocks(address):
        users = watch.in_flight[block]
        users.remove(issuer)
        if not users:
            del watch.in_flight[block]


def acquire(cta: Cta, address: int) -> None:
    """A thread of a CTA executes the acquire fence for a map."""
    watch = cta.grid.map_watch
    if watch is not None:
        watch.time += 1
        watch.acquired[cta.index, address] = watch.time


def publish(cta: Cta) -> None:
    """tensormap.cp_fenceproxy: the write just made is released, and nothing else."""
    watch = cta.grid.map_watch
    if watch is not None:
        watch.publish(cta)


def release(w: Warp, _s: Split, _lanes: Array | None) -> None:
    """A thread executes the release fence."""
    watch = w.cta.grid.map_watch
    if watch is not None:
        watch.release(w.cta)

"""A warp: 32 lanes, their registers, and how they part and meet.

Lanes that run together are a `Split`. A branch on which they disagree makes the split wait at the branch's
immediate post-dominator for the two that it parts into. Each runs on its own (independent thread scheduling):
one that waits does not hold up the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .cta import Cta

LANES = np.arange(32, dtype=np.int64)
LANE_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
ALL = np.ones(32, bool)
ALL.flags.writeable = False
NONE = np.zeros(32, bool)
NONE.flags.writeable = False

# What a register holds that nobody has written: a pattern that is no likely value.
_POISON = {
    "pred": NONE,
    "u2": np.full(32, 0xDEAD, np.uint16),
    "u4": np.full(32, 0xDEADBEEF, np.uint32),
    "u8": np.full(32, 0xDEADBEEFDEADBEEF, np.uint64),
    "u16": np.full(32, 0xDEADBEEFDEADBEEF, [("low", "u8"), ("high", "u8")]),
}
for _array in _POISON.values():
    _array.flags.writeable = False


def lane_mask(flags: Array) -> int:
    """bool (32,) as the 32-bit integer that PTX uses."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


class Wait:
    """Why a split cannot go on. It is put into `queue` and runs its instruction again when somebody wakes the
    queue.

    `why` is asked when nothing moves any more, for the report.
    """

    __slots__ = ("kind", "queue", "why")

    def __init__(self, kind: str, queue: list[Split], why: Callable[[], str]) -> None:
        self.kind, self.queue, self.why = kind, queue, why


class Split:
    """Lanes of a warp that run together, at segment `pc`, to meet others at segment `meet` (-1: never).

    `memo` is what an instruction that waits leaves for the time when it runs again.
    """

    __slots__ = (
        "arrived",
        "count",
        "full",
        "lanes",
        "mask",
        "meet",
        "memo",
        "outstanding",
        "parent",
        "pc",
        "position",
        "wait",
        "warp",
    )

    def __init__(self, warp: Warp, mask: Array, pc: int, meet: int, parent: Split | None) -> None:
        self.warp, self.pc, self.meet, self.parent = warp, pc, meet, parent
        self.outstanding = 0  # splits that it waits for at pc
        self.arrived: Array = NONE
        self.wait: Wait | None = None
        self.memo: Any = None
        self.position = -1  # in the scheduler's ready list
        self.set_mask(mask)

    def set_mask(self, mask: Array) -> None:
        self.mask = mask
        self.lanes = np.flatnonzero(mask)
        self.count = len(self.lanes)
        self.full = self.count == 32

    def absorb(self, other: Split) -> None:
        """Go on together with a split that has the same parent and waits at the same place."""
        assert other.parent is self.parent is not None
        self.parent.outstanding -= 1
        self.warp.splits.remove(other)
        self.set_mask(self.mask | other.mask)


class Meeting:
    """Splits that have reached one place in the program and wait there for others; `lanes` execute it."""

    __slots__ = ("lanes", "queue", "splits")

    def __init__(self) -> None:
        self.lanes: Array = NONE
        self.queue: list[Split] = []
        self.splits: list[Split] = []

    def join(self, split: Split, lanes: Array) -> None:
        """Count a split in; those that can go on with it for good become part of it."""
        if split not in self.splits:
            self.splits.append(split)
        self.lanes = self.lanes | lanes
        if split.parent is None:
            return
        for other in [s for s in self.splits if s is not split and s.parent is split.parent]:
            split.absorb(other)
            self.splits.remove(other)
            self.queue.remove(other)


class Warp:
    """Warp `index` of a CTA. `registers` are (32,) arrays by register index; `special` the special registers
    by name.
    """

    __slots__ = (
        "alive",
        "alive_count",
        "carry",
        "cluster_phase",
        "convergence",
        "cta",
        "groups",
        "index",
        "registers",
        "special",
        "splits",
    )

    def __init__(
        self, cta: Cta, index: int, mask: Array, special: dict[str, Array], kinds: list[str]
    ) -> None:
        self.cta, self.index, self.special = cta, index, special
        self.registers: list[Array] = [_POISON[kind] for kind in kinds]
        self.alive = mask
        self.alive_count = int(np.count_nonzero(mask))
        self.splits: list[Split] = []  # those that run or wait, not those that wait for others to meet them
        self.convergence: dict[Any, Meeting] = {}  # where some lanes wait for others, by place
        self.carry: Array = NONE  # of extended-precision arithmetic
        self.cluster_phase: Array = LANES * 0 - 1  # of the cluster barrier, by lane, between arrival and wait
        self.groups: dict[tuple[int, str], Any] = {}  # of asynchronous copies, by lane and kind
        root = Split(self, mask, 0, -1, None)
        self.splits.append(root)

    def read_clock(self, name: str) -> Array:
        """%clock and its kin: steps of the scheduler so far, in no unit of time."""
        self.cta.grid.scheduler.disturb()
        steps = self.cta.grid.scheduler.steps
        if name in ("%clock", "%globaltimer_lo"):
            return np.full(32, steps & 0xFFFFFFFF, np.uint32)
        if name in ("%clock_hi", "%globaltimer_hi"):
            return np.full(32, steps >> 32, np.uint32)
        return np.full(32, steps, np.uint64)


def merge(old: Array, lanes: Array, new: Array) -> Array:
    """`old` with `new` in some lanes."""
    found: Array = old.copy()
    found[lanes] = new
    return found


def diverge(split: Split, taken: Array, taken_pc: int, other_pc: int, meet: int) -> int:
    """Part a split: lanes of `taken` go to one segment, the rest to another, to meet at segment `meet`.

    Gives -1, for the run loop to drop the split.
    """
    warp = split.warp
    warp.splits.remove(split)
    ended: Array | None = None  # lanes that have nothing to run any more
    if split.parent is not None and meet == split.meet:
        parent = split.parent
        parent.outstanding -= 1
    else:
        parent = split
        parent.pc, parent.arrived, parent.outstanding, parent.memo = meet, NONE, 0, None
    for mask, pc in ((taken, taken_pc), (split.mask & ~taken, other_pc)):
        if pc == meet:
            parent.arrived = parent.arrived | mask
            continue
        if pc == warp.cta.grid.program.end:
            ended = mask
            continue
        child = Split(warp, mask, pc, meet, parent)
        parent.outstanding += 1
        warp.splits.append(child)
        warp.cta.grid.scheduler.add(child)
    _settle(parent)
    if ended is not None:
        _end(warp, ended)
    return -1


def arrive(split: Split) -> None:
    """A split has come to where it meets others; it is dropped by the run loop."""
    parent = split.parent
    assert parent is not None
    split.warp.splits.remove(split)
    parent.arrived = parent.arrived | split.mask
    parent.outstanding -= 1
    _settle(parent)


def gather(split: Split, segment: int) -> Wait | None:
    """Before a segment with an instruction that is .aligned: lanes of the warp that have not ended come
    together.

    Gives a Wait while some are elsewhere. Lanes that part at a branch of which one way ends early have no
    place to meet by the rule of post-dominators; here they meet all the same, as they do on hardware.
    """
    warp = split.warp
    key = ("aligned", segment)
    meeting = warp.convergence.get(key)
    if split.count == warp.alive_count:
        if meeting is not None:
            del warp.convergence[key]
        return None
    if meeting is None:
        meeting = warp.convergence[key] = Meeting()
    meeting.join(split, split.mask)
    if split.count == warp.alive_count:
        del warp.convergence[key]
        return None
    missing = warp.alive_count - split.count
    return Wait(
        "aligned", meeting.queue, lambda: f"the {missing} other lanes of its warp, as it is .aligned,"
    )


def leave(split: Split) -> int:
    """The lanes of a split end. Gives -1, for the run loop to drop it."""
    split.warp.splits.remove(split)
    if split.parent is not None:
        split.parent.outstanding -= 1
        _settle(split.parent)
    _end(split.warp, split.mask)
    return -1


def _end(warp: Warp, lanes: Array) -> None:
    """Lanes have ended: whoever waits for them looks again."""
    warp.alive = warp.alive & ~lanes
    warp.alive_count = int(np.count_nonzero(warp.alive))
    meetings = list(warp.convergence.values())
    warp.convergence.clear()
    for meeting in meetings:
        warp.cta.grid.scheduler.wake(meeting.queue)
    warp.cta.lanes_ended(warp)


def _settle(parent: Split) -> None:
    """Go on with a split whose parts have all met or ended, or pass on that nothing is left of it."""
    while parent.outstanding == 0:
        if parent.arrived.any():
            parent.set_mask(parent.arrived)
            if parent.pc == parent.meet and parent.parent is not None:
                above = parent.parent
                above.arrived = above.arrived | parent.mask
                above.outstanding -= 1
                parent = above
                continue
            parent.warp.splits.append(parent)
            parent.warp.cta.grid.scheduler.add(parent)
            return
        if parent.parent is None:
            return
        parent = parent.parent
        parent.outstanding -= 1

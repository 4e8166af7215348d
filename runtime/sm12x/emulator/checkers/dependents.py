"""Programmatic dependent launch: grids that overlap, and what they must not both touch meanwhile.

A grid launched with the attribute may begin once every CTA of the grid before it has executed
griddepcontrol.launch_dependents or ended. Until a thread of it has come by griddepcontrol.wait, nothing that
the grid before it does is ordered before what the thread does (PTX ISA, "griddepcontrol"). What each grid
reads and writes is noted by byte, with an instruction for each, so that a conflict is found whatever the
order was.

Which grids may still run (`unfinished`): before its wait, a grid's predecessor P, and what was unfinished
when P let it begin: what P's own wait covers is finished only if a CTA of P triggered behind that wait.
Behind its wait, P has ended, and what P waited for; if no thread of P ever waited, P's own predecessors may
still run.

An access is behind the wait if its thread waited, or left a barrier (bar, barrier, mbarrier, bar.warp.sync)
at which a thread arrived for which that holds, in the same phase or a later one. Order made in any other
way, such as flags in global memory that another CTA sets behind its own wait, is not seen: such accesses
count as early. A strong load (ld.acquire, .relaxed, .volatile) may poll what a predecessor writes by strong
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EmulatorError, Violation
from ..warp import ALL, LANES, NONE, Split, Wait
from . import actor

if TYPE_CHECKING:
    from ..cta import Cta
    from ..grid import Grid
    from ..memory import Array, GlobalMemory, Region
    from ..ptx.ir import Instruction
    from ..warp import Warp

_STRONG = {"acquire", "release", "relaxed", "acq_rel", "volatile", "mmio"}


def is_strong(i: Instruction) -> bool:
    """Whether an access takes part in synchronisation (PTX ISA, "Operation types")."""
    return i.opcode[0] in ("atom", "red") or not _STRONG.isdisjoint(i.opcode)


class Accesses:
    """For each byte of global memory an instruction that touched it: 1 + its index, 0 for none. One that is
    not strong is kept rather than one that is.
    """

    def __init__(self, instructions: list[Instruction]) -> None:
        self._type: Any = np.uint16 if len(instructions) < 65535 else np.uint32
        self._instructions = instructions
        self.regions: dict[int, tuple[Region, Array]] = {}

    def note(self, region: Region, address: Array, size: int, instruction: Instruction) -> None:
        held = self.regions.get(region.base)
        if held is None:
            padded = -(-region.size // 16) * 16
            held = self.regions[region.base] = region, np.zeros(padded, self._type)
        items = held[1].reshape(-1, size)
        at = (address.astype(np.int64) - region.base) // size
        value = instruction.index + 1
        items[at] = np.where(items[at] == 0, value, items[at]) if is_strong(instruction) else value

    def instruction(self, number: int) -> Instruction:
        return self._instructions[number - 1]


@dataclass(slots=True)
class _Sides:
    """What a grid reads and writes before its wait, or behind it."""

    reads: Accesses
    writes: Accesses


class Dependency:
    """Where a grid of a stream stands with those before it (`previous`: None for one that begins when all
    have ended).
    """

    def __init__(self, name: str, instructions: list[Instruction], previous: Dependency | None) -> None:
        self.name, self.previous = name, previous
        self.early = _Sides(Accesses(instructions), Accesses(instructions))
        self.late = _Sides(Accesses(instructions), Accesses(instructions))
        self.running = False
        self.ended = False
        self.waited = False  # some thread came by griddepcontrol.wait
        self.triggered_behind_wait = False  # some CTA let successors begin only then
        self.company: list[Dependency] = []  # all grids that may run at the same time as this one
        self.queue: list[Split] = []
        self._triggered: set[int] = set()
        self._behind: dict[Warp, Array] = {}  # lanes behind the wait
        self._arrived: dict[object, int] = {}  # first phase of a barrier with an arrival from behind the wait

    # The order that a grid's threads are in

    def is_after(self, warp: Warp, lanes: Iterable[int]) -> bool:
        """Whether lanes of a warp are all behind the wait. A grid with no predecessor always is."""
        return bool(self.behind(warp)[list(lanes)].all())

    def behind(self, warp: Warp) -> Array:
        """Which lanes of a warp are behind the wait: bool (32,)."""
        return ALL if self.previous is None else self._behind.get(warp, NONE)

    def _follow(self, warp: Warp, lanes: Array | None) -> None:
        behind = self._behind.get(warp)
        if behind is None:
            behind = self._behind[warp] = np.zeros(32, bool)
        behind[LANES if lanes is None else lanes] = True

    def arrive(self, warp: Warp, lanes: Array | None, barrier: object, phase: int) -> None:
        """Lanes arrive at a barrier."""
        behind = self._behind.get(warp)
        if behind is not None and behind[LANES if lanes is None else lanes].any():
            self._arrived.setdefault(barrier, phase)

    def leave(self, warp: Warp, lanes: Array | None, barrier: object, phase: int) -> None:
        """Lanes have seen a phase of a barrier end."""
        first = self._arrived.get(barrier)
        if first is not None and first <= phase:
            self._follow(warp, lanes)

    def converge(self, warp: Warp, mask: Array) -> None:
        """Lanes of a warp have synchronised with each other."""
        behind = self._behind.get(warp)
        if behind is not None and behind[mask].any():
            behind[mask] = True

    # griddepcontrol

    def wait(self, warp: Warp, lanes: Array | None) -> Wait | None:
        """griddepcontrol.wait: a Wait until the grid before has ended."""
        if self.previous is not None and not self.previous.ended:
            name = self.previous.name
            return Wait("grid", self.queue, lambda: f"the end of the grid before, {name}")
        self.waited = True
        self._follow(warp, lanes)
        return None

    def trigger(self, cta: Cta, warp: Warp, lanes: Array | None) -> None:
        """griddepcontrol.launch_dependents by a thread of a CTA; the first one counts."""
        if cta.index not in self._triggered:
            self._triggered.add(cta.index)
            chosen: list[int] = (LANES if lanes is None else lanes).tolist()
            self.triggered_behind_wait |= any(self.is_after(warp, (lane,)) for lane in chosen)

    def cta_ended(self, cta: Cta) -> None:
        """The end of a CTA lets successors begin, too."""
        if cta.index not in self._triggered:
            self._triggered.add(cta.index)
            self.triggered_behind_wait |= any(self._behind[w].any() for w in cta.warps if w in self._behind)

    def lets_begin(self, grid: Grid) -> bool:
        """Whether the next grid of the stream may begin."""
        return not grid.outside and len(self._triggered) == len(grid.ctas)

    def has_company(self) -> bool:
        return any(other.running for other in self.company if other is not self)

    # Conflicts

    def unfinished(self, *, early: bool) -> list[Dependency]:
        """Grids that may still run before the wait of this one (`early`), or behind it."""
        before = self.previous
        if before is None:
            return []
        if early:
            return [before, *before.unfinished(early=not before.triggered_behind_wait)]
        return before.unfinished(early=not before.waited)

    def check(self) -> None:
        """Raises EmulatorError where this grid and one that may run at the same time conflict, as far as
        this one has run. Those before it have ended.
        """
        for early, sides in ((True, self.early), (False, self.late)):
            for other in self.unfinished(early=early):
                self._compare(sides, other, early)

    def forget(self) -> None:
        """No grid to come overlaps with this one: what it touched need not be known any more."""
        for sides in (self.early, self.late):
            sides.reads.regions.clear()
            sides.writes.regions.clear()

    def check_early(self) -> None:
        """As `check`, with the grid before only, as far as that one has run."""
        if self.previous is not None:
            self._compare(self.early, self.previous, True)

    def _compare(self, sides: _Sides, other: Dependency, early: bool) -> None:
        for mine, did in ((sides.reads, "reads"), (sides.writes, "writes")):
            for theirs, does in ((other.early, "reads"), (other.late, "reads"), (other.early, "writes"),
                                 (other.late, "writes")):  # fmt: skip
                if (did, does) != ("reads", "reads"):
                    touched = theirs.reads if does == "reads" else theirs.writes
                    self._overlap(mine, did, touched, does, other, early)

    def _overlap(
        self, mine: Accesses, did: str, theirs: Accesses, does: str, other: Dependency, early: bool
    ) -> None:
        for base in mine.regions.keys() & theirs.regions.keys():
            region, here = mine.regions[base]
            there = theirs.regions[base][1]
            both = np.flatnonzero((here != 0) & (there != 0))
            pairs = np.unique(np.stack([here[both], there[both]]), axis=1).T if both.size else ()
            for first, second in pairs:
                i, j = mine.instruction(int(first)), theirs.instruction(int(second))
                if did == "reads" and i.opcode[0] == "ld" and is_strong(i) and is_strong(j):
                    continue
                at = int(both[(here[both] == first) & (there[both] == second)][0])
                raise _conflict(self.name, i, did, region, at, other.name, j, does, early)


def _conflict(
    name: str, i: Instruction, did: str, region: Region, at: int, other: str, j: Instruction, does: str,
    early: bool,
) -> EmulatorError:  # fmt: skip
    when = (
        "before its griddepcontrol.wait"
        if early
        else f"behind its griddepcontrol.wait, which does not cover {other}: the grid in between never waited"
    )
    message = (
        f"{name} {did} {region.label} at offset {at} {when}, which {other} {does} at {actor.line(j)} and "
        "may still do then"
    )
    return EmulatorError(message, i.text, i.line, violation=Violation("dependency", message, i.line, i.text))


@dataclass(slots=True)
class Recorder:
    """Notes what the grids of a stream access: an Observer of global memory."""

    memory: GlobalMemory
    instructions: list[Instruction] = field(default_factory=list)

    def read(self, region: Region, address: Array, size: int) -> None:
        self._note(region, address, size, "reads")

    def write(self, region: Region, address: Array, size: int, changes: Callable[[], bool]) -> None:
        self._note(region, address, size, "writes")

    def _note(self, region: Region, address: Array, size: int, side: str) -> None:
        who = actor.now(self.memory)
        dependency = who.warp.cta.grid.dependency
        if dependency is None or who.instruction is None:
            return
        if who.issuer is not None:
            behind = np.full(len(address), not who.issuer.early)
        else:
            behind = dependency.behind(who.warp)[list(who.lanes)]
            if len(behind) != len(address):  # lanes that mean several allocations
                behind = np.full(len(address), behind.all())
        for sides, chosen in ((dependency.late, behind), (dependency.early, ~behind)):
            if chosen.any():
                getattr(sides, side).note(region, address[chosen], size, who.instruction)

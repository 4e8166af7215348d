"""Which warp runs next, and when asynchronous operations complete: both chosen by a seed.

Splits run in bursts of segments in random order. Asynchronous operations complete as late as possible: when
nothing else can run, or when what runs seems only to poll; some seeds let a few complete early. In some seeds
threads that the end of an mbarrier's phase wakes go on as late as that, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .checkers import barriers as checks
from .checkers.livelock import Livelock
from .errors import EmulatorError, Violation
from .warp import Split, Wait, arrive

if TYPE_CHECKING:
    from .asynchronous import Issuer
    from .cta import Cta
    from .grid import Grid

# Segments run while asynchronous operations are pending, for each split that is ready, before one completes
# although somebody could still run: it may be polling for just that.
_PATIENCE = 400
# Segments between two calls of whoever watches.
_WATCHED = 1000
# How a run of a scheduler ended: the grid has, nothing can run, or enough has run.
ENDED, STUCK, PAUSED = "ended", "stuck", "paused"


class Operation(Protocol):
    """Something asynchronous. `step` does a part of it and says whether more is left."""

    issuer: Issuer

    def step(self) -> bool: ...


def _oldest(_count: int) -> int:
    return 0


def _newest(count: int) -> int:
    return count - 1


class Scheduler:
    """Runs the splits of a grid. `limit`: the number of segments after which a grid counts as endless."""

    def __init__(self, grid: Grid, seed: int, limit: int) -> None:
        self.random = random.Random(seed)
        self.steps = 0
        self.completed = 0  # asynchronous operations
        self.limit = limit
        self._pause = min(limit, _WATCHED)  # segments after which `run` looks up
        self._watcher: Callable[[int], None] | None = None
        self._grid = grid
        self._ready: list[Split] = []
        self._operations: list[Operation] = []
        self._late: list[Split] = []  # woken, to go on when nothing else can
        self._livelock = Livelock(grid)
        self._restless = 0
        # What differs from seed to seed: how long a split runs before another gets its turn, which of the
        # pending operations completes, and how many do early. Any few seeds in a row cover them.
        self._burst = (32, 1, 256, 4)[seed % 4]
        self._choose: Callable[[int], int] = (_newest, _oldest, self.random.randrange)[seed % 3]
        self._eager = (0.0, 0.0, 0.02, 0.2)[seed // 3 % 4]
        self._sleepy = seed // 2 % 2 == 1

    def add(self, split: Split) -> None:
        """A split can run."""
        split.position = len(self._ready)
        self._ready.append(split)

    def _remove(self, split: Split) -> None:
        last = self._ready.pop()
        if last is not split:
            self._ready[split.position] = last
            last.position = split.position
        split.position = -1

    def wake(self, queue: list[Split], *, late: bool = False) -> None:
        """What the splits in `queue` wait for may have come: they run their instruction again; `late` allows
        that to be when nothing else can run.
        """
        for split in queue:
            split.wait = None
            if late and self._sleepy:
                self._late.append(split)
            else:
                self.add(split)
        queue.clear()

    def chance(self, of: int) -> bool:
        """True once in so many times, on average."""
        return self.random.randrange(of) == 0

    def pending(self, cta: Cta) -> list[Issuer]:
        """Who issued the operations of a CTA that have not completed."""
        return [each.issuer for each in self._operations if each.issuer.cta is cta]

    def submit(self, operation: Operation) -> None:
        """An asynchronous operation has been issued."""
        self._operations.append(operation)

    def run(self) -> None:
        """Run until every lane has ended and every operation has completed.

        Raises EmulatorError where a kernel breaks a rule, or nothing can run any more (deadlock), or too much
        ran.
        """
        if self.advance() == STUCK:
            raise self.deadlock()

    def deadlock(self) -> EmulatorError:
        """The error of a grid that is stuck."""
        return self._stuck("deadlock", "no warp can run and nothing is pending")

    def advance(self, segments: int | None = None) -> str:
        """As `run`, for about so many segments: whether the grid has ENDED, is STUCK or has PAUSED."""
        ready, randrange = self._ready, self.random.randrange
        until = None if segments is None else self.steps + segments
        while True:
            while ready:
                split = ready[randrange(len(ready))]
                self._burst_of(split)
                if self._operations or self._late:
                    self._restless += 1
                    if self._restless * self._burst > _PATIENCE * (len(ready) + 1) or (
                        self._eager and self.random.random() < self._eager
                    ):
                        self._go_on()
                if self.steps > self._pause:
                    self._look_up()
                if until is not None and self.steps > until:
                    return PAUSED
            if self._operations or self._late:
                self._go_on()
            else:
                return STUCK if self._grid.running else ENDED

    def disturb(self) -> None:
        """A clock was read."""
        self._livelock.disturb()

    def close(self) -> None:
        """The grid has run, or will not run on."""
        self._livelock.close()

    def watch(self, watcher: Callable[[int], None]) -> None:
        """Have `watcher` called now and then with the number of segments that have run."""
        self._watcher = watcher
        self._pause = min(self.limit, self.steps + _WATCHED)

    def _look_up(self) -> None:
        if self.steps > self.limit:
            raise self._stuck("livelock", f"{self.steps} segments have run, which is the limit")
        if self._watcher is not None:
            self._watcher(self.steps)
        pending = bool(self._operations or self._late) or self._grid.has_company()
        if self._livelock.proven(self.steps, len(self._ready), pending=pending):
            raise self._stuck(
                "livelock", "nothing changes any more: all that can run polls for what never comes"
            )
        self._pause = min(self.limit, self.steps + _WATCHED)

    def _go_on(self) -> None:
        """One of the things that were put off happens."""
        self._restless = 0
        if self._late and not (self._operations and self.random.random() < 0.5):
            self.add(self._late.pop(self.random.randrange(len(self._late))))
        else:
            self._complete_one()

    def _complete_one(self) -> None:
        at = self._choose(len(self._operations))
        self.completed += 1
        if not self._operations[at].step():
            del self._operations[at]

    def _burst_of(self, split: Split) -> None:
        program = self._grid.program
        full, masked = program.full, program.masked
        warp = split.warp
        self._grid.memory.acting = split
        registers = warp.registers
        left = self._burst
        visits, counts = warp.cta.visits, self._grid.counts
        try:
            while left:
                left -= 1
                self.steps += 1
                at = split.pc
                result = (full if split.full else masked)[at](warp, registers, split)
                if result.__class__ is int:
                    if counts is not None:
                        visits[at] += 1
                        counts.waiting.discard(split)
                    if result < 0:
                        self._remove(split)
                        return
                    split.pc = result
                    if result == split.meet:
                        self._remove(split)
                        arrive(split)
                        return
                else:
                    if counts is not None:
                        counts.waits(split, at)
                    split.wait = result
                    result.queue.append(split)
                    self._remove(split)
                    return
        except Exception as error:
            raise program.blame(error, split) from error

    def _stuck(self, kind: str, message: str) -> EmulatorError:
        """The report of who waits for what."""
        program = self._grid.program
        underflow = checks.underflow(self._grid)
        if underflow is not None:
            return underflow
        lines = []
        if any(split.wait is not None and split.wait.kind == "aligned" for split in self._grid.splits()):
            kind = "divergence"
        parked: set[Split] = set()
        for split in self._grid.splits():
            parked.update(_parents(split))
            instruction = program.instruction_at(split.pc)
            wait: Wait | None = split.wait
            doing = f"waits for {wait.why()}" if wait is not None else "runs"
            where = f"CTA {split.warp.cta.index} warp {split.warp.index} ({split.count} lanes)"
            if instruction is not None:
                lines.append(f"  {where} {doing} at PTX line {instruction.line}: {instruction.text}")
            else:
                lines.append(f"  {where} {doing}")
        for parent in parked:
            meeting = program.instruction_at(parent.pc) if parent.pc >= 0 else None
            count = int(parent.arrived.sum())
            if meeting is not None and count:
                where = f"CTA {parent.warp.cta.index} warp {parent.warp.index} ({count} lanes)"
                before = f"PTX line {meeting.line}: {meeting.text}"
                lines.append(f"  {where} waits for its other lanes before {before}")
        shown = lines[:64] + ([f"  and {len(lines) - 64} more"] if len(lines) > 64 else [])
        if self._grid.outside:
            shown.append(f"  and {self._grid.outside} CTAs have not been let in")
        text = "\n".join([message, *shown])
        return EmulatorError(text, violation=Violation(kind, text))


def _parents(split: Split) -> list[Split]:
    """The splits that wait, directly or not, for a split to meet them."""
    found = []
    parent = split.parent
    while parent is not None:
        found.append(parent)
        parent = parent.parent
    return found

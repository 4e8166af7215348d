"""Launches behind each other in one stream, of which some may begin before the one before them has ended.

Seeds that are odd run a grid with the attribute of programmatic launch as early as its predecessor allows,
taking turns with it; the others run one grid after the other. Conflicts are found in both (see
checkers.dependents).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .checkers.dependents import Dependency, Recorder
from .compiler import Program
from .counting.collector import Collector
from .errors import EmulatorError
from .grid import Grid
from .launch import SEGMENT_LIMIT, LaunchResult, check, prepare, result_of
from .memory import GlobalMemory
from .scheduler import ENDED, PAUSED, STUCK

_TURN = 200  # segments at most that a grid runs before another gets its turn


@dataclass(frozen=True, slots=True)
class Link:
    """One launch of a chain, as `launch` takes it. `programmatic`: with the attribute
    CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""

    program: Program
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: bytes
    programmatic: bool = False
    cooperative: bool = False
    resident: int | None = None
    seed: int = 0
    races: bool = True
    counts: Collector | None = None
    progress: Callable[[int], None] | None = None
    failed: Callable[[], None] | None = None  # called where it is this link's kernel that breaks a rule


def launch_chain(
    links: Sequence[Link], *, memory: GlobalMemory, segment_limit: int = SEGMENT_LIMIT
) -> list[LaunchResult]:
    """Run kernels of one stream in order, to their ends. The first link's attribute has no effect.

    Raises ValueError for a launch that CUDA would refuse, before anything runs; EmulatorError where a kernel
    breaks a rule, of kind "dependency" where grids that may overlap conflict.
    """
    results: list[LaunchResult] = []
    runs: list[list[Link]] = []
    for at, link in enumerate(links):
        check(link.program, link.grid, link.block, link.shared_bytes, link.parameters)
        if at == 0 or not link.programmatic:
            runs.append([])
        runs[-1].append(link)
    for run in runs:
        results += _Chain(run, memory, segment_limit).run()
    return results


class _Chain:
    """Links of which all but the first may overlap with the one before."""

    def __init__(self, links: Sequence[Link], memory: GlobalMemory, limit: int) -> None:
        self._links, self._memory, self._limit = links, memory, limit
        self._dependencies: list[Dependency] = []
        for link in links:
            previous = self._dependencies[-1] if self._dependencies else None
            kernel = link.program.kernel
            self._dependencies.append(Dependency(kernel.name, kernel.instructions, previous))
        for dependency in self._dependencies:
            dependency.company = self._dependencies
        self._grids: list[Grid] = []
        self._active: list[int] = []
        self._random = random.Random(links[0].seed)
        self._overlaps = links[0].seed % 2 == 1
        self._checked = 0  # grids that have ended, as have those before them, and conflict with none
        self._guilty = 0  # the link that an error is of

    def run(self) -> list[LaunchResult]:
        recorder = Recorder(self._memory)
        if len(self._links) > 1:
            self._memory.observe(recorder)
        try:
            with np.errstate(all="ignore"):
                self._run()
        except BaseException:
            failed = self._links[self._guilty].failed
            if failed is not None:
                failed()
            raise
        finally:
            self._memory.forget(recorder)
            for grid in self._grids:
                grid.close()
        return [result_of(grid) for grid in self._grids]

    def _run(self) -> None:
        self._begin()
        while self._active:
            at = self._guilty = self._random.choice(self._active)
            try:
                state = self._grids[at].scheduler.advance(self._random.randrange(1, _TURN))
                if state == STUCK and not self._waits_for_another(at):
                    raise self._grids[at].scheduler.deadlock()
            except EmulatorError as error:
                self._explain(at, error)
                raise
            if state == ENDED:
                self._end(at)
            newest = len(self._grids) - 1
            if newest + 1 < len(self._links) and (
                not self._active
                or (self._overlaps and self._dependencies[newest].lets_begin(self._grids[newest]))
            ):
                self._begin()

    def _begin(self) -> None:
        at = self._guilty = len(self._grids)
        link, dependency = self._links[at], self._dependencies[at]
        grid = prepare(
            link.program,
            link.grid,
            link.block,
            link.shared_bytes,
            link.parameters,
            memory=self._memory,
            seed=link.seed,
            segment_limit=self._limit,
            resident=link.resident,
            cooperative=link.cooperative,
            races=link.races,
            counts=link.counts,
            dependency=dependency,
        )
        if link.progress is not None:
            grid.scheduler.watch(link.progress)
        dependency.running = True
        self._grids.append(grid)
        self._active.append(at)

    def _end(self, at: int) -> None:
        dependency = self._dependencies[at]
        dependency.running, dependency.ended = False, True
        self._active.remove(at)
        if at + 1 < len(self._grids):
            self._grids[at + 1].scheduler.wake(self._dependencies[at + 1].queue)
        while self._checked < len(self._grids) and self._dependencies[self._checked].ended:
            self._settle(self._checked)
            self._checked += 1

    def _settle(self, at: int) -> None:
        """A grid and all before it have ended. Chains may be long: what none to come may overlap with is
        forgotten.
        """
        last = self._dependencies[at]
        self._guilty = at
        last.check()
        needed = [last, *last.unfinished(early=True), *last.unfinished(early=False)]
        for dependency in self._dependencies[:at]:
            if all(dependency is not each for each in needed):
                dependency.forget()

    def _waits_for_another(self, at: int) -> bool:
        """Whether a grid that is stuck waits for the one before it."""
        return bool(self._dependencies[at].queue)

    def _explain(self, at: int, error: EmulatorError) -> None:
        """A grid has failed, perhaps because of a conflict with another, which is then what is raised. Those
        before it do not depend on it and run on, so that what they do is known.
        """
        if error.violation is None:
            return
        try:
            for before in [each for each in self._active if each < at]:
                while (state := self._grids[before].scheduler.advance(_TURN)) == PAUSED:
                    pass
                if state == ENDED:
                    self._end(before)
        except EmulatorError:  # what it did before counts; the first error is the one to report
            pass
        for number, dependency in enumerate(self._dependencies[: len(self._grids)]):
            try:
                if all(before.ended for before in self._dependencies[:number]):
                    dependency.check()
                else:  # which grids before its predecessor may still run is not known
                    dependency.check_early()
            except EmulatorError as conflict:
                self._guilty = number
                raise conflict from error
        self._guilty = at

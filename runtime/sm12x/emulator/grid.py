"""A grid: the CTAs of one launch, alive at once, or a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .checkers.tensor_maps import MapWatch
from .cta import Cta
from .memory import GlobalMemory, Region
from .scheduler import Scheduler
from .warp import Split

if TYPE_CHECKING:
    from .checkers.dependents import Dependency
    from .compiler import Program
    from .counting.collector import Collector


class Grid:
    """`size` CTAs of `block` threads, with `shared_bytes` of dynamic shared memory and one block of
    parameters.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        size: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        parameters: bytes,
        *,
        seed: int,
        limit: int,
        number: int,
        resident: int,
        races: bool = True,
        early_maps: bool = False,
        counts: Collector | None = None,
        dependency: Dependency | None = None,
    ) -> None:
        self.races = races  # whether accesses of shared memory that nothing orders are looked for
        self.program, self.memory, self.size, self.block = program, memory, size, block
        self.shared_bytes, self.number, self.counts = shared_bytes, number, counts
        self.early_maps = early_maps
        self.parameters = Region(0, max(len(parameters), 1), "kernel parameters", read_only=True)
        self.parameters.data[: len(parameters)] = np.frombuffer(parameters, np.uint8)
        self.parameters.shadow[:] = 0
        self.constants: Region = program.constants
        self.dependency = dependency  # on the grids before it, where they may overlap
        self.map_watch = MapWatch(self) if program.uses_tensor_maps else None
        self.scheduler = Scheduler(self, seed, limit)
        x, y, z = size
        self._waiting = ((i, j, k) for k in range(z) for j in range(y) for i in range(x))
        self.outside = x * y * z  # CTAs that have not been let in
        self.running = 0
        self.ctas: list[Cta] = []
        for _ in range(min(resident, self.outside)):
            self._admit()
        if self.map_watch is not None:
            memory.observe(self.map_watch)

    def close(self) -> None:
        """The grid has run, or will not run on."""
        self.scheduler.close()
        if self.map_watch is not None:
            self.memory.forget(self.map_watch)

    def _admit(self) -> None:
        """Let in the next CTA."""
        cta = Cta(self, len(self.ctas), next(self._waiting))
        self.ctas.append(cta)
        self.outside -= 1
        self.running += 1
        for warp in cta.warps:
            for split in warp.splits:
                self.scheduler.add(split)

    def cancel_launch(self) -> tuple[int, int, int] | None:
        """Take the next CTA that has not been let in out of the launch: its position, None where all are
        in.
        """
        if not self.outside:
            return None
        self.outside -= 1
        return next(self._waiting)

    def cta_ended(self, cta: Cta) -> None:
        """A CTA has ended, which makes room for another."""
        if self.counts is not None:
            self.counts.cta_ended(cta.visits)  # the segment that ends a CTA has no instructions
        cta.release()
        self.running -= 1
        if self.dependency is not None:
            self.dependency.cta_ended(cta)
        if self.outside:
            self._admit()

    def has_company(self) -> bool:
        """Whether another grid may run at the same time."""
        return self.dependency is not None and self.dependency.has_company()

    def splits(self) -> Iterator[Split]:
        """Every split that runs or waits."""
        for cta in self.ctas:
            for warp in cta.warps:
                yield from warp.splits

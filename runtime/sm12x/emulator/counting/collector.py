"""Counting a launch while it runs.

Hooks cost little: an access notes the array of its addresses, which nobody changes, and every few hundred of
one instruction are looked at together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..families.matrix import rows_of
from ..memory import SHARED_WINDOW, WINDOW_BYTES, Array, GlobalMemory, Region
from ..ptx.ir import Instruction
from ..spaces import space_of
from ..warp import ALL, Split
from . import instruction_classes as classes
from .access_patterns import MATRIX_ROWS, phase_lanes, sectors, wavefronts
from .counters import Copies, Counters, GlobalAccess, LineCounts, SharedAccess, Waits, Work
from .touched import LOADED, STORED, Touched

if TYPE_CHECKING:
    from ..compiler import Program

_BATCH = 512  # accesses of one instruction that are looked at together
_SHARED = {"ldmatrix": "ldmatrix", "stmatrix": "stmatrix", "ld": "ld", "ldu": "ld", "st": "st"}
_GLOBAL = {"ld": "load", "ldu": "load", "st": "store", "atom": "atomic", "red": "atomic"}
_WAITS = {"mbarrier": "mbarrier", "barriers": "named_barrier", "bulk_copy": "copies", "copy": "copies"}


class Collector:
    """Counts one launch. `touched`: where what the launches of a session touch is summed up."""

    def __init__(self, touched: Touched | None = None) -> None:
        self.waiting: set[Split] = set()  # splits that wait, or have been woken and have not gone on
        self._session = touched
        self._touched = Touched()
        self._records: defaultdict[int, list[tuple[Array | None, Array]]] = defaultdict(list)
        self._lines: dict[int, LineCounts] = {}
        self._shared = {name: SharedAccess() for name in ("ldmatrix", "stmatrix", "ld", "st")}
        self._global = {name: GlobalAccess() for name in ("load", "store", "atomic")}
        self._copies: defaultdict[str, Copies] = defaultdict(Copies)
        self._waited: Counter[int] = Counter()  # by instruction
        self._gave_up: Counter[int] = Counter()
        self._both: Counter[int] = Counter()
        self._busiest = Work()

    def begin(self, program: Program, memory: GlobalMemory) -> None:
        """The launch that is to be counted. A collector counts one."""
        self._memory, self._code, self._profile = memory, program.kernel.instructions, program.profile
        self._visits = np.zeros(program.segments, np.int64)

    # Told while it runs.

    def visits(self) -> list[int]:
        """What a new CTA counts its segments in."""
        return [0] * len(self._profile.spans)

    def cta_ended(self, visits: list[int]) -> None:
        """A CTA has counted its last."""
        counted = np.array(visits)
        self._visits += counted
        work, busiest = self._work(counted), self._busiest
        busiest.issued = max(busiest.issued, work.issued)
        busiest.surely_issued = max(busiest.surely_issued, work.surely_issued)
        for form, count in work.multiply_adds.items():
            busiest.multiply_adds[form] = max(busiest.multiply_adds.get(form, 0), count)

    def waits(self, split: Split, segment: int) -> None:
        """The first instruction of a segment has a split wait, or wait on."""
        if split not in self.waiting:
            self.waiting.add(split)
            self._waited[self._profile.spans[segment].start] += 1

    def polled(self, at: int, split: Split, flags: Array) -> None:
        """Instruction `at` asked a barrier whether its phase is over; `flags` is what lanes were told."""
        if not flags.all():
            self._gave_up[at] += 1
            self._both[at] += split in self.waiting

    def access(self, at: int, lanes: Array | None, address: Array) -> None:
        """Instruction `at` accesses (32,) addresses, of which `lanes` count."""
        if len(self._records[at]) == _BATCH:  # all of which have been made: none was out of bounds
            self._look_at(at)
        self._records[at].append((lanes, address))

    def copied(self, i: Instruction, addresses: Iterable[int], taken: Iterable[int], size: int) -> None:
        """`cp.async` from addresses in global memory, of `taken` bytes for each lane."""
        addresses, taken = list(addresses), list(taken)
        self._copies["cp_async"].copies += len(addresses)
        self._copies["cp_async"].global_bytes += sum(taken)
        self._copies["cp_async"].shared_bytes += size * len(addresses)
        line = self._line(i)
        line.requests += 1
        line.bytes += sum(taken)
        line.sectors += len({at // 32 for at, count in zip(addresses, taken, strict=True) if count})
        for at, count in zip(addresses, taken, strict=True):
            if count:
                self._touched.mark_run(LOADED, self._memory.region(at), at, count)

    def loaded(self, kind: str, region: Region | None, address: Array, unit: int, shared_bytes: int) -> None:
        """An asynchronous copy of items of `unit` bytes at addresses in a region of global memory."""
        self._copies[kind].add(len(address) * unit if region is not None else 0, shared_bytes)
        if region is not None:
            self._touched.mark(LOADED, region, address, unit)

    def stored(self, i: Instruction, region: Region | None, address: Array, unit: int) -> None:
        """An asynchronous copy to global memory, with or without a reduction."""
        size = len(address) * unit if region is not None else 0
        self._copies["tma_store" if i.has("tensor") else "bulk_store"].add(size, size)
        if region is not None:
            self._touched.mark(STORED, region, address, unit)
            if i.has("reduce"):
                self._touched.mark(LOADED, region, address, unit)

    # Looking at what has been noted.

    def _line(self, i: Instruction) -> LineCounts:
        found = self._lines.get(i.index)
        if found is None:
            found = self._lines[i.index] = LineCounts(i.line, i.text, i.index in self._profile.main_loop)
        return found

    def _look_at(self, at: int) -> None:
        """Count the accesses that have been noted for an instruction."""
        i = self._code[at]
        records = self._records.pop(at)
        address = np.array([each for _, each in records]).astype(np.int64)
        if i.opcode[0] in ("ldmatrix", "stmatrix"):
            rows, size = rows_of(i)
            taking = np.ones((len(address), rows), bool)
            return self._count_shared(i, address[:, :rows], taking, size, MATRIX_ROWS)
        active = np.array([_flags(lanes) for lanes, _ in records])
        size, space = classes.access_bytes(i), space_of(i)
        if space != "generic":
            in_shared = np.full(address.shape, space == "shared")
        else:
            in_shared = (address >= SHARED_WINDOW) & (address < SHARED_WINDOW + WINDOW_BYTES)
        in_global = ~in_shared & (address < SHARED_WINDOW)
        self._count_shared(i, address, active & in_shared, size, phase_lanes(size))
        self._count_global(i, address, active & in_global, size)
        return None

    def _count_shared(self, i: Instruction, address: Array, active: Array, size: int, lanes: int) -> None:
        requests = int(np.count_nonzero(active.any(axis=1)))
        if not requests or i.opcode[0] not in _SHARED:  # atomic operations are no matter of banks alone
            return
        found, least = wavefronts(address, active, size, lanes)
        for counts in (self._shared[_SHARED[i.opcode[0]]], self._line(i)):
            counts.requests += requests
            counts.wavefronts += found
            counts.minimum += least

    def _count_global(self, i: Instruction, address: Array, active: Array, size: int) -> None:
        requests = int(np.count_nonzero(active.any(axis=1)))
        if not requests:
            return
        name = _GLOBAL[i.opcode[0]]
        moved, touched = int(np.count_nonzero(active)) * size, sectors(address, active)
        for counts in (self._global[name], self._line(i)):
            counts.requests += requests
            counts.bytes += moved
            counts.sectors += touched
        for how in (LOADED,) if name == "load" else (STORED,) if name == "store" else (LOADED, STORED):
            self._touched.mark_anywhere(how, self._memory, address[active], size)

    # The end.

    def result(self) -> Counters:
        """What was counted in a launch that has ended."""
        for at in list(self._records):
            self._look_at(at)
        if self._session is not None:
            self._session.follow(self._touched)
        executed = {
            at: int(visits)
            for span, visits in zip(self._profile.spans, self._visits, strict=True)
            if visits
            for at in span
        }
        instructions: Counter[str] = Counter()
        mma: dict[str, dict[str, int]] = {}
        for at, times in executed.items():
            instructions[self._profile.classes[at]] += times
            if at in self._profile.mmas:
                counts = mma.setdefault(self._profile.mmas[at].name, {"issued": 0, "multiply_adds": 0})
                counts["issued"] += times
                counts["multiply_adds"] += times * self._profile.mmas[at].multiply_adds
        return Counters(
            dict(sorted(instructions.items())),
            self._work(self._visits),
            self._busiest,
            mma,
            self._shared,
            self._global,
            dict(sorted(self._copies.items())),
            {how: self._touched.count(how) for how in (LOADED, STORED)},
            self._all_waits(executed),
            [self._lines[at] for at in sorted(self._lines)],
        )

    def _work(self, visits: Array) -> Work:
        by_form = {form: int(visits @ each) for form, each in self._profile.multiply_adds.items()}
        return Work(int(visits @ self._profile.issued), int(visits @ self._profile.sure), by_form)

    def _all_waits(self, executed: dict[int, int]) -> dict[str, Waits]:
        found = {name: Waits() for name in ("mbarrier", "named_barrier", "copies")}
        for at, times in executed.items():
            name = _WAITS.get(self._profile.classes[at])
            if name is None or not classes.may_wait(self._code[at]):
                continue
            waits = found[name]
            both, gave_up = self._both[at], self._gave_up[at]
            waits.gave_up += gave_up
            waits.waited += self._waited[at] - both
            waits.at_once += times - gave_up - (self._waited[at] - both)
        return found


def _flags(lanes: Array | None) -> Array:
    if lanes is None:
        return ALL
    found = np.zeros(32, bool)
    found[lanes] = True
    return found

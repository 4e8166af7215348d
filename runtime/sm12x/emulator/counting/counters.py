"""What was counted in a launch, or in several. `collector` counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .touched import LOADED, STORED, Touched


@dataclass(slots=True)
class SharedAccess:
    """Accesses to shared memory. `requests`: by a warp; `conflicts`: wavefronts above the `minimum`."""

    requests: int = 0
    wavefronts: int = 0
    minimum: int = 0

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.minimum


@dataclass(slots=True)
class GlobalAccess:
    """Accesses to global memory by threads. `requests`: by a warp; `bytes`: what the threads asked for, as
    often as they did; `sectors`: of 32 bytes, each once in a request."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / self.requests if self.requests else 0.0


@dataclass(slots=True)
class Copies:
    """Asynchronous copies. `global_bytes`: through global memory, without what is out of a tensor's bounds;
    `shared_bytes`: read from or written to shared memory, with what fills them up."""

    copies: int = 0
    global_bytes: int = 0
    shared_bytes: int = 0

    def add(self, global_bytes: int, shared_bytes: int) -> None:
        self.copies += 1
        self.global_bytes += global_bytes
        self.shared_bytes += shared_bytes


@dataclass(slots=True)
class Waits:
    """Times that a warp came to a barrier: it went on `at_once`, `waited`, or `gave_up`, to go on without it
    and try again. As the emulator's schedule has it, which is no GPU's."""

    at_once: int = 0
    waited: int = 0
    gave_up: int = 0


@dataclass(slots=True)
class Work:
    """What the issue slots and the tensor cores of an SM have to do. `issued`: PTX instructions of warps;
    `surely_issued`: those of which a machine instruction is left for sure (see `instruction_classes`);
    `multiply_adds`: by form of MMA."""

    issued: int = 0
    surely_issued: int = 0
    multiply_adds: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class LineCounts:
    """One PTX instruction that accesses shared or global memory; what does not apply is 0. `main_loop`: it is
    in an innermost loop with an MMA."""

    line: int
    text: str
    main_loop: bool = False
    requests: int = 0
    wavefronts: int = 0
    minimum: int = 0
    sectors: int = 0
    bytes: int = 0

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.minimum


@dataclass(slots=True)
class Counters:
    """What one launch, or several, did.

    instructions: by class (`instruction_classes`), each time that a warp, or a part of one that has diverged,
      executed one; switched off by its predicate or not.
    work, busiest_cta: of the whole launch, and the most of each kind in one CTA, which one SM has to do.
    mma: by shape, kind and types, {"issued", "multiply_adds"}.
    shared_memory: "ldmatrix", "stmatrix", "ld" and "st".
    global_memory: "load", "store" and "atomic", by threads.
    copies: "tma_load", "tma_store", "bulk_load", "bulk_store" and "cp_async"; reductions are stores.
    unique_bytes: "loaded" and "stored" in global memory by anything, each byte once. Tensor maps that only
      the copy engine reads are not among them.
    waits: "mbarrier", "named_barrier", "copies".
    by_line: PTX instructions that access memory, in their order; empty in a sum of launches.
    """

    instructions: dict[str, int] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    busiest_cta: Work = field(default_factory=Work)
    mma: dict[str, dict[str, int]] = field(default_factory=dict)
    shared_memory: dict[str, SharedAccess] = field(default_factory=dict)
    global_memory: dict[str, GlobalAccess] = field(default_factory=dict)
    copies: dict[str, Copies] = field(default_factory=dict)
    unique_bytes: dict[str, int] = field(default_factory=dict)
    waits: dict[str, Waits] = field(default_factory=dict)
    by_line: list[LineCounts] = field(default_factory=list)

    @property
    def main_loop_conflicts(self) -> int:
        """Bank conflicts in main loops."""
        return sum(line.conflicts for line in self.by_line if line.main_loop)

    @property
    def multiply_adds(self) -> int:
        return sum(self.work.multiply_adds.values())

    @property
    def requested_bytes(self) -> int:
        """Bytes of global memory that threads and copies asked for, as often as they did."""
        by_threads = sum(each.bytes for each in self.global_memory.values())
        return by_threads + sum(each.global_bytes for each in self.copies.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: fields, and what follows from them."""
        found = asdict(self)
        for name, shared in self.shared_memory.items():
            found["shared_memory"][name]["conflicts"] = shared.conflicts
        for name, accesses in self.global_memory.items():
            found["global_memory"][name]["sectors_per_request"] = round(accesses.sectors_per_request, 3)
        for written, line in zip(found["by_line"], self.by_line, strict=True):
            written["conflicts"] = line.conflicts
        return found


def total(launches: Iterable[Counters], touched: Touched) -> Counters:
    """The counters of several launches together; `touched` is what they did in global memory, one after the
    other. Of `busiest_cta` it has the busiest of any.
    """
    found = Counters(unique_bytes={how: touched.count(how) for how in (LOADED, STORED)})
    for each in launches:
        _add_numbers(found.instructions, each.instructions)
        for mine, theirs in ((found.work, each.work), (found.busiest_cta, each.busiest_cta)):
            join = max if mine is found.busiest_cta else _sum
            mine.issued = join(mine.issued, theirs.issued)
            mine.surely_issued = join(mine.surely_issued, theirs.surely_issued)
            for form, count in theirs.multiply_adds.items():
                mine.multiply_adds[form] = join(mine.multiply_adds.get(form, 0), count)
        for name, counts in each.mma.items():
            _add_numbers(found.mma.setdefault(name, {}), counts)
        for field_name in ("shared_memory", "global_memory", "copies", "waits"):
            have = getattr(found, field_name)
            for name, counts in getattr(each, field_name).items():
                have[name] = _joined(have.get(name), counts)
    return found


def _sum(a: int, b: int) -> int:
    return a + b


def _add_numbers(have: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        have[name] = have.get(name, 0) + count


def _joined(have: Any, more: Any) -> Any:
    """Two of a dataclass of numbers, added up."""
    if have is None:
        return type(more)(**asdict(more))
    return type(more)(**{name: getattr(have, name) + count for name, count in asdict(more).items()})

"""A CTA: shared memory, named barriers and mbarriers, and its warps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .checkers import barriers as barrier_checks
from .checkers.actor import line, now
from .checkers.races import Races
from .errors import Fault
from .memory import OPAQUE, SHARED_BASE, UNWRITTEN, Array, Region
from .warp import LANE_BITS, LANES, Split, Warp

if TYPE_CHECKING:
    from .grid import Grid
    from .ptx.ir import Instruction

NAMED_BARRIERS = 16
_TX_LIMIT = (1 << 20) - 1
_COUNT_LIMIT = (1 << 20) - 1


class NamedBarrier:
    """One of the 16 barriers of `bar` (PTX ISA, "bar"). `expected` is None while no thread has arrived."""

    __slots__ = ("arrived", "counted", "expected", "generation", "lanes", "queue", "reduction")

    def __init__(self) -> None:
        self.expected: int | None = None
        self.counted = False  # whether the count was given, so that threads that end do not lower it
        self.arrived = 0
        self.generation = 0
        self.lanes: dict[Warp, Array] = {}  # those counted in, bool (32,): arrived, or ended
        self.queue: list[Split] = []
        self.reduction: list[Any] = []

    def count_ended(self, warp: Warp) -> None:
        """Barriers count whole warps: lanes that have ended come with the warp's first that has not."""
        counted = self.lanes.get(warp)
        if counted is not None and (not warp.alive_count or counted[warp.alive.argmax()]):
            self.arrived += int(np.count_nonzero(~(warp.alive | counted)))
            self.lanes[warp] = counted | ~warp.alive


class Mbarrier:
    """An mbarrier object (PTX ISA, "mbarrier"): `pending` arrivals and `tx` transaction bytes until `phase`
    ends. `clock` is what those who arrived in any phase knew, `released` the same up to the last phase's end
    (see checkers.clocks).
    """

    __slots__ = (
        *("address", "clock", "expected", "pending", "phase", "polls", "queue", "released", "seen", "tx"),
        *("tx_by", "woken"),
    )

    def __init__(self, address: int, count: int) -> None:
        self.address, self.expected, self.pending = address, count, count
        self.phase = 0
        self.tx = 0
        self.queue: list[Split] = []
        self.clock: Array | None = None
        self.released: Array | None = None
        self.woken: list[Split] = []  # those that the end of the last phase woke
        self.seen: dict[tuple[int, int], int] = {}  # phases whose end threads saw last, by warp and lane
        self.tx_by: Instruction | None = None  # that last changed tx
        self.polls: dict[
            tuple[int, int], int
        ] = {}  # the phase that threads found unfinished, by warp and lane

    def __str__(self) -> str:
        left = f"{self.expected - self.pending} of {self.expected} arrivals"
        if self.pending:
            left += f", {self.pending} missing"
        tx = f", {self.tx} transaction bytes to come" if self.tx > 0 else ""
        if self.tx < 0:
            tx = f", {-self.tx} transaction bytes more than were expected"
        return f"the mbarrier at shared {self.address:#x} in phase {self.phase} ({left}{tx})"


class Cta:
    """CTA `index` of a grid, at `position` (x, y, z); `threads` of them, in warps of 32."""

    def __init__(self, grid: Grid, index: int, position: tuple[int, int, int]) -> None:
        self.grid, self.index, self.position = grid, index, position
        program = grid.program
        size = program.layout.dynamic_shared - SHARED_BASE + grid.shared_bytes
        self.shared = Region(SHARED_BASE, size, "shared memory")
        self.local: dict[int, Region] = {}  # by warp
        self.barriers = [NamedBarrier() for _ in range(NAMED_BARRIERS)]
        self.cluster_barrier = NamedBarrier()
        self.mbarriers: dict[int, Mbarrier] = {}
        self.unfenced: dict[int, Warp] = {}  # warps that initialised mbarriers, by address: see checkers
        self.map_cache: dict[int, bytes] = {}  # tensor maps as this CTA last saw them
        self.visits = [] if grid.counts is None else grid.counts.visits()  # by segment
        self.cancel_refused = False  # whether a thread has seen that a clusterlaunchcontrol.try_cancel failed
        self.in_flight = 0  # asynchronous operations that still touch the shared memory
        self.threads = grid.block[0] * grid.block[1] * grid.block[2]
        self.alive = self.threads
        kinds = program.register_kinds
        self.warps = [
            Warp(self, at, LANES + 32 * at < self.threads, self._special(at), kinds)
            for at in range(-(-self.threads // 32))
        ]
        self.running = len(self.warps)
        self.races = Races(self) if grid.races else None

    def _special(self, warp: int) -> dict[str, Array]:
        grid = self.grid
        linear = (LANES + 32 * warp).astype(np.uint32)
        x, y, _ = grid.block
        found: dict[str, Array] = {
            "%tid.x": linear % np.uint32(x),
            "%tid.y": linear // np.uint32(x) % np.uint32(y),
            "%tid.z": linear // np.uint32(x * y),
            "%laneid": LANES.astype(np.uint32),
            "%lanemask_eq": LANE_BITS,
            "%lanemask_lt": LANE_BITS - np.uint32(1),
            "%lanemask_le": LANE_BITS | (LANE_BITS - np.uint32(1)),
            "%lanemask_gt": ~(LANE_BITS | (LANE_BITS - np.uint32(1))),
            "%lanemask_ge": ~(LANE_BITS - np.uint32(1)),
            "%is_explicit_cluster": np.zeros(32, bool),
            "%gridid": np.full(32, grid.number, np.uint64),
        }
        size = self.shared.size
        for axis, at in (("x", 0), ("y", 1), ("z", 2)):
            found[f"%ntid.{axis}"] = _each(grid.block[at])
            found[f"%nctaid.{axis}"] = found[f"%nclusterid.{axis}"] = _each(grid.size[at])
            found[f"%ctaid.{axis}"] = found[f"%clusterid.{axis}"] = _each(self.position[at])
            found[f"%cluster_ctaid.{axis}"] = _each(0)  # clusters of one
            found[f"%cluster_nctaid.{axis}"] = _each(1)
        for name, value in (
            ("%warpid", warp),
            ("%nwarpid", -(-self.threads // 32)),
            ("%smid", self.index),
            ("%nsmid", grid.size[0] * grid.size[1] * grid.size[2]),
            ("%cluster_ctarank", 0),
            ("%cluster_nctarank", 1),
            ("%dynamic_smem_size", grid.shared_bytes),
            ("%total_smem_size", size),
            ("%aggr_smem_size", size),
        ):
            found[name] = _each(value)
        return found

    # Ends

    def lanes_ended(self, warp: Warp) -> None:
        """Lanes of `warp` have ended: barriers that wait for all threads expect fewer."""
        self.alive = sum(w.alive_count for w in self.warps)
        for barrier in self.barriers:
            if barrier.expected is not None:
                barrier.count_ended(warp)
                if not barrier.counted:
                    barrier.expected = self.barrier_count()
                self.complete(barrier)
        self.settle_cluster_barrier()
        if warp.alive_count == 0:
            self.running -= 1
            if self.running == 0:
                self._ended()

    def _ended(self) -> None:
        if self.in_flight:
            raise barrier_checks.ends_under_copies(self)
        for barrier in self.mbarriers.values():
            if barrier.tx:
                raise Fault("exit", f"the CTA ends with {barrier}; last changed at {line(barrier.tx_by)}")
        self.grid.cta_ended(self)

    def release(self) -> None:
        """Give back what an ended CTA takes: its memory and its warps' registers."""
        self.shared = Region(SHARED_BASE, 0, "shared memory of a CTA that has ended")
        self.local.clear()
        self.races = None
        self.mbarriers.clear()
        self.map_cache.clear()
        self.visits = []
        for warp in self.warps:
            warp.registers.clear()
            warp.special = {}
            warp.convergence.clear()
            warp.groups.clear()

    # Named barriers

    def barrier_count(self) -> int:
        """Threads that a barrier without a count waits for: those of warps that have not ended, in whole
        warps.
        """
        return 32 * sum(w.alive_count > 0 for w in self.warps)

    def complete(self, barrier: NamedBarrier) -> None:
        """Let a barrier's threads go if all have arrived."""
        if barrier.expected is None or barrier.arrived < barrier.expected:
            return
        barrier.expected, barrier.arrived, barrier.counted, barrier.lanes = None, 0, False, {}
        barrier.reduction = []  # those who leave keep the old one
        barrier.generation += 1
        self.grid.scheduler.wake(barrier.queue)

    def settle_cluster_barrier(self) -> None:
        """Let the threads at the cluster barrier go if all that have not ended have arrived."""
        barrier = self.cluster_barrier
        if barrier.arrived and barrier.arrived >= self.alive:
            barrier.arrived = 0
            barrier.generation += 1
            self.grid.scheduler.wake(barrier.queue)

    # mbarriers

    def mbarrier(self, address: int) -> Mbarrier:
        """The mbarrier at a shared address. Raises Fault where none has been initialised."""
        found = self.mbarriers.get(address)
        if found is None:
            raise Fault("barrier", f"no mbarrier has been initialised at shared {address:#x}")
        return found

    def mbarrier_init(self, address: int, count: int, warp: Warp) -> None:
        if address % 8:
            raise Fault("alignment", f"an mbarrier at shared {address:#x}, which is no multiple of 8")
        if not 1 <= count <= _COUNT_LIMIT:
            raise Fault("barrier", f"an mbarrier cannot expect {count} arrivals")
        span = self.shared.span(address, 8, "mbarrier.init")
        previous = self.mbarriers.get(address)
        if previous is not None:
            raise Fault("barrier", f"mbarrier.init of {previous}, which is valid and was not invalidated")
        self.mbarriers[address] = Mbarrier(address, count)
        self.unfenced[address] = warp
        self.shared.shadow[span] = OPAQUE
        self.shared.has_opaque = True

    def mbarrier_invalidate(self, address: int) -> None:
        barrier = self.mbarrier(address)
        if barrier.queue:
            raise Fault("barrier", f"mbarrier.inval of {barrier} while threads wait for it")
        del self.mbarriers[address]
        self.unfenced.pop(address, None)
        self.shared.shadow[self.shared.span(address, 8, "mbarrier.inval")] = UNWRITTEN

    def mbarrier_arrive(self, barrier: Mbarrier, count: int) -> None:
        if count > barrier.pending:
            raise Fault("barrier", f"{count} arrivals at {barrier}, which are more than it expects")
        barrier.pending -= count
        self._phase_end(barrier)

    def mbarrier_expect(self, barrier: Mbarrier, size: int) -> None:
        barrier.tx += size
        self._check_tx(barrier)

    def mbarrier_complete(self, barrier: Mbarrier, size: int) -> None:
        barrier.tx -= size
        self._check_tx(barrier)
        self._phase_end(barrier)

    def _check_tx(self, barrier: Mbarrier) -> None:
        barrier.tx_by = now(self.grid.memory).instruction
        if not -_TX_LIMIT <= barrier.tx <= _TX_LIMIT:
            raise Fault(
                "barrier", f"{barrier.tx} pending transaction bytes at {barrier}: at most 2^20-1 are allowed"
            )

    def _phase_end(self, barrier: Mbarrier) -> None:
        if barrier.pending == 0 and barrier.tx == 0:
            barrier_checks.phase_ends(barrier)
            barrier.released = barrier.clock
            barrier.phase += 1
            barrier.pending = barrier.expected
            self.grid.scheduler.wake(barrier.queue, late=True)


def _each(value: int) -> Array:
    return np.full(32, value, np.uint32)

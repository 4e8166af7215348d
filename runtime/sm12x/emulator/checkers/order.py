"""What orders the accesses of a CTA's threads and of the copies that they issue: barriers, fences, waits.

All that synchronises comes by here and moves the clocks. `checkers.races` asks the clocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..memory import Array
from .clocks import FENCED, HAPPENED, Clocks, joined

if TYPE_CHECKING:
    from ..cta import Mbarrier
    from ..warp import Warp


class Order:
    """Of one CTA of `warps` warps."""

    def __init__(self, warps: int) -> None:
        self.clocks = Clocks(warps)
        self._agents: dict[tuple[int, str], int] = {}
        self._named: dict[tuple[int, int], Array] = {}  # rows at named barriers, by barrier and generation
        self._to_leave: dict[tuple[int, int], int] = {}  # lanes that have yet to learn such a row
        self._groups: dict[tuple[int, str], list[int]] = {}  # times of the last copy of each committed group
        self._open: dict[tuple[int, str], int] = {}
        self._places: dict[int, Array] = {}  # rows that strong writes published, by address
        self._fenced: dict[int, Array] = {}  # by thread: what it knew at its last fence
        self._seen: dict[int, Array] = {}  # by thread: what strong reads saw since its last fence

    # Barriers

    def at_barrier(
        self,
        w: Warp,
        lanes: Array | None,
        barrier: int,
        generation: int,
        *,
        leaves: bool = True,
        releases: bool = True,
    ) -> None:
        """Lanes arrive at a named barrier (-1: the cluster's), which they do or do not leave by
        `past_barrier`. Those that do not release tell what they knew at their last fence.
        """
        key = barrier, generation
        row = self.clocks.release(w.index, lanes) if releases else self._at_fence(w, lanes)
        self._named[key] = joined(self._named.get(key), row)
        if leaves:
            self._to_leave[key] = self._to_leave.get(key, 0) + (32 if lanes is None else len(lanes))
        if (barrier, generation - 16) not in self._to_leave:  # nobody left it
            self._named.pop((barrier, generation - 16), None)

    def past_barrier(
        self, w: Warp, lanes: Array | None, barrier: int, generation: int, *, acquires: bool = True
    ) -> None:
        """Lanes leave a named barrier."""
        key = barrier, generation
        self._learn(w, lanes, self._named[key], acquires)
        self._to_leave[key] -= 32 if lanes is None else len(lanes)
        if not self._to_leave[key]:
            del self._to_leave[key], self._named[key]

    def _at_fence(self, w: Warp, lanes: Array | None) -> Array:
        """What lanes knew at their last fence, together."""
        found: Array = np.zeros(self.clocks.known.shape[1:], np.uint32)
        for thread in self.clocks.threads_of(w.index, lanes).tolist():
            row = self._fenced.get(thread)
            if row is not None:
                found = joined(found, row)
        return found

    def _learn(self, w: Warp, lanes: Array | None, row: Array, acquires: bool) -> None:
        """Lanes learn a row: now, or at their next fence."""
        if acquires:
            self.clocks.acquire(w.index, lanes, row)
            return
        for thread in self.clocks.threads_of(w.index, lanes).tolist():
            self._seen[thread] = joined(self._seen.get(thread), row)

    def arrived(self, w: Warp, lanes: Array | None, barrier: Mbarrier, *, releases: bool = True) -> None:
        """Lanes arrive at an mbarrier: before the arrival is counted. Without release semantics they tell
        what they knew at their last fence.
        """
        row = self.clocks.release(w.index, lanes) if releases else self._at_fence(w, lanes)
        barrier.clock = joined(barrier.clock, row)

    def saw(self, w: Warp, lanes: Array | None, barrier: Mbarrier, *, acquires: bool = True) -> None:
        """Lanes have seen that a phase of an mbarrier is over."""
        if barrier.released is not None:
            self._learn(w, lanes, barrier.released, acquires)

    def completed(self, barrier: Mbarrier) -> tuple[int, int]:
        """A bulk copy has completed, which an mbarrier tells of: the agent and time of what it wrote."""
        agent = self._agent(-1 - barrier.address, "mbarrier")
        time = self.clocks.tick_agent(agent)
        barrier.clock = joined(barrier.clock, self._row(agent, time))
        return agent, time

    def completed_by(self, w: Warp, lanes: Array | None, barrier: Mbarrier) -> None:
        """mbarrier.complete_tx by lanes, which stand for a copy. PTX makes it a relaxed operation; it tells
        of what a proxy fence of theirs made visible, as CUTLASS has it.
        """
        fenced = self.clocks.known[self.clocks.threads_of(w.index, lanes), FENCED].max(axis=0)
        barrier.clock = joined(barrier.clock, np.stack([fenced, fenced]))

    def _row(self, agent: int, time: int) -> Array:
        row: Array = np.zeros(self.clocks.known.shape[1:], np.uint32)
        row[HAPPENED, agent] = time
        return row

    # Fences and strong accesses

    def fence_proxy(self, w: Warp, lanes: Array | None) -> None:
        """fence.proxy.async"""
        self.clocks.fence_proxy(w.index, lanes)

    def meet(self, w: Warp, lanes: Array | None) -> None:
        """bar.warp.sync"""
        self.clocks.meet(w.index, lanes)

    def fence(self, w: Warp, lanes: Array | None) -> None:
        """A memory fence: with the strong accesses around it, it synchronises."""
        clocks = self.clocks
        for thread in clocks.threads_of(w.index, lanes).tolist():
            seen = self._seen.pop(thread, None)
            if seen is not None:
                clocks.acquire(w.index, np.array([thread % 32]), seen)
            self._fenced[thread] = clocks.known[thread].copy()
        clocks.tick(w.index)

    def strong_write(self, w: Warp, lanes: Array | None, address: Array, words: frozenset[str]) -> None:
        """Strong writes publish what their threads know: all, or what they knew at their last fence."""
        threads = self.clocks.threads_of(w.index, lanes)
        releases = bool(words & {"release", "acq_rel"})
        for thread, at in zip(threads.tolist(), address.tolist(), strict=True):
            row = self.clocks.known[thread].copy() if releases else self._fenced.get(thread)
            if row is not None:
                self._places[at] = joined(self._places.get(at), row)
        if releases:
            self.clocks.tick(w.index)

    def strong_read(self, w: Warp, lanes: Array | None, address: Array, words: frozenset[str]) -> None:
        """Strong reads learn what was published at their address: now, or at their next fence."""
        threads = self.clocks.threads_of(w.index, lanes)
        acquires = bool(words & {"acquire", "acq_rel"})
        for thread, at in zip(threads.tolist(), address.tolist(), strict=True):
            row = self._places.get(at)
            if row is None:
                continue
            if acquires:
                self.clocks.acquire(w.index, np.array([thread % 32]), row)
            else:
                self._seen[thread] = joined(self._seen.get(thread), row)

    # Copies that their own thread waits for: "bulk" copies to global memory, and `cp.async` ("copy")

    def issue(self, w: Warp, lanes: Array | None, kind: str) -> tuple[Array, int]:
        """Lanes issue a copy each: the agents (n,) that do them, and the copies' time."""
        threads = self.clocks.threads_of(w.index, lanes).tolist()
        agents = [self._agent(thread, kind) for thread in threads]
        time = max(self.clocks.tick_agent(agent) for agent in agents)
        for thread, agent in zip(threads, agents, strict=True):
            self.clocks.ticks[agent] = time
            self._open[thread, kind] = time
        return np.array(agents), time

    def _agent(self, thread: int, kind: str) -> int:
        found = self._agents.get((thread, kind))
        if found is None:
            found = self._agents[thread, kind] = self.clocks.add_agent()
        return found

    def commit(self, w: Warp, lanes: Array | None, kind: str) -> None:
        for thread in self.clocks.threads_of(w.index, lanes).tolist():
            if (thread, kind) in self._agents:
                self._groups.setdefault((thread, kind), []).append(self._open.pop((thread, kind), 0))

    def waited(self, w: Warp, lanes: Array | None, kind: str, most: int) -> None:
        """Lanes know that all but the `most` latest groups of theirs are done."""
        for thread in self.clocks.threads_of(w.index, lanes).tolist():
            groups = self._groups.get((thread, kind))
            if groups and len(groups) > most:
                done = groups[: len(groups) - most]
                del groups[: len(done)]
                self.clocks.learn(thread, self._agents[thread, kind], max(done))

    def waited_all(self, w: Warp, lanes: Array | None) -> None:
        """Lanes know that all their `cp.async`s are done, committed or not."""
        for thread in self.clocks.threads_of(w.index, lanes).tolist():
            agent = self._agents.get((thread, "copy"))
            if agent is not None:
                self._groups.pop((thread, "copy"), None)
                self._open.pop((thread, "copy"), None)
                self.clocks.learn(thread, agent, self.clocks.ticks[agent])

    def copies_until(self, w: Warp, lane: int) -> int:
        """The time of the latest `cp.async` of a thread."""
        agent = self._agents.get((32 * w.index + lane, "copy"))
        return 0 if agent is None else self.clocks.ticks[agent]

    def copies_arrived(self, barrier: Mbarrier, w: Warp, lane: int, time: int) -> None:
        """The arrival of `cp.async.mbarrier.arrive`: what it tells is that copies of a thread up to a time
        are done.
        """
        agent = self._agents.get((32 * w.index + lane, "copy"))
        if agent is not None:
            barrier.clock = joined(barrier.clock, self._row(agent, time))

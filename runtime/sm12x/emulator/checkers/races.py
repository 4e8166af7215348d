"""Races in a CTA's shared memory: accesses of which one writes and that nothing orders.

Between threads, also those of one warp, and with the async proxy: bulk copies, which read and write shared
memory behind their issuer's back, and `cp.async`. What orders is what PTX says does: barriers of the CTA
and of a warp, mbarriers, fences with strong accesses, waits for asynchronous copies, and for what the async
proxy is to see `fence.proxy.async` (PTX ISA, "Memory Consistency Model", "Async proxy"). That it went well
this time does not help.

Beyond the ISA: what `ldmatrix` reads counts as read by each lane of its warp, and a warp's own `stmatrix` is
ordered behind its earlier accesses. Not seen: that threads of one CTA are ordered through another CTA.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Fault
from ..memory import SHARED_BASE, Array
from . import shadow
from .clocks import FENCED, HAPPENED, View, extended, view_of
from .order import Order

if TYPE_CHECKING:
    from ..cta import Cta, Mbarrier
    from ..warp import Warp

_GRAIN = 16
_LATE = "nothing orders the two"


@dataclass(slots=True)
class Party:
    """Who accesses: lanes of a warp, or a copy that one issued. `rows` (n, 2, agents) are what each knows,
    None for those of now; `collective` where the warp does as one.
    """

    view: View
    warp: int
    lanes: Array | None
    collective: bool = False
    rows: Array | None = None


@dataclass(slots=True)
class Ticket:
    """What the issuer of an asynchronous copy knew, and the copy's instruction. `agent` and `time` are the
    copy's, where its issuer waits for it; a copy that an mbarrier waits for gets the mbarrier's when it is
    done.
    """

    party: Party
    line: int
    agents: Array | None = None
    time: int = 0


class Races:
    """The checker of one CTA. Raises Fault "race", or "proxy" where only fence.proxy.async is missing."""

    def __init__(self, cta: Cta) -> None:
        self._cta = cta
        self.order = Order(len(cta.warps))
        self.clocks = self.order.clocks
        self._grain = _GRAIN
        pieces = -(-cta.shared.size // _GRAIN)
        self._writes = shadow.Writes(pieces)
        self._reads: dict[int, shadow.Reads] = {}  # by warp, and by agents that are no threads
        self.strong: frozenset[str] | None = None  # of the access that is under way

    # Pieces of memory

    def _pieces(self, offset: Array, size: int) -> Array:
        """Indices of the pieces of `size` bytes at each offset: (n, pieces)."""
        low = int(np.bitwise_or.reduce(offset, initial=0)) | size
        while low & (self._grain - 1):
            self._refine()
        first = offset // self._grain
        if size == self._grain:
            return first[:, None]
        found: Array = first[:, None] + np.arange(size // self._grain)
        return found

    def _refine(self) -> None:
        self._grain //= 4
        self._writes.refine(4)
        for reads in self._reads.values():
            reads.refine(4)

    def _line(self) -> int:
        """The instruction, by index, that a segment's function is at."""
        return self._cta.grid.program.executing(sys._getframe(2))

    # Accesses of threads

    def _party(self, w: Warp, lanes: Array | None, *, collective: bool = False) -> Party:
        return Party(self.clocks.view(w.index, lanes), w.index, lanes, collective)

    def load(self, w: Warp, lanes: Array | None, address: Array, size: int) -> None:
        """Lanes have read `size` bytes at an address each."""
        party = self._party(w, lanes)
        pieces = self._pieces(address.astype(np.int64) - SHARED_BASE, size)
        line = self._line()
        self._after_writes(party, pieces, "read of")
        self._stamp_reads(w.index, lanes, pieces, line)

    def store(self, w: Warp, lanes: Array | None, address: Array, size: int) -> None:
        """Lanes have written `size` bytes at an address each."""
        party = self._party(w, lanes)
        pieces = self._pieces(address.astype(np.int64) - SHARED_BASE, size)
        self._after_writes(party, pieces, "write to")
        self._after_reads(party, pieces, "write to")
        threads = self.clocks.threads_of(w.index, lanes)
        now = self.clocks.now[w.index]
        self._writes.put(pieces, threads[:, None], now, self._line(), self.strong is not None)
        lost = self._writes.agent[pieces] != threads[:, None]
        if np.count_nonzero(lost):
            self._written_together(w.index, threads % 32, pieces, np.unique(pieces[lost]))

    def _written_together(self, warp: int, lanes: Array, pieces: Array, shared: Array) -> None:
        """Several lanes have written the same to some pieces at once: to be ordered behind one of them will
        do.
        """
        self._writes.agent[shared] = -1 - self.clocks.warps - warp
        self._writes.lanes[shared] = 0
        np.bitwise_or.at(
            self._writes.lanes, pieces, np.broadcast_to(shadow.bits_of(lanes)[:, None], pieces.shape)
        )

    def collided(self, lanes: Array) -> Fault:
        """Lanes of one instruction have written different values to one address."""
        return Fault(
            "race", "lanes write different values to one address of shared memory", tuple(lanes.tolist())
        )

    def load_rows(self, w: Warp, address: Array, size: int) -> None:
        """The warp has read rows of a matrix."""
        party = self._party(w, None if w.alive_count == 32 else np.flatnonzero(w.alive), collective=True)
        pieces = self._pieces(address.astype(np.int64) - SHARED_BASE, size).ravel()
        self._after_writes(party, pieces, "read of")
        reads = self._of(w.index)
        if reads.by_lanes:
            self._keep(reads, w.index, party.lanes, pieces)
        reads.stamp[pieces] = shadow.stamp(self.clocks.now[w.index], shadow.COLLECTIVE)
        reads.line[pieces] = self._line()

    def store_rows(self, w: Warp, address: Array) -> None:
        """The warp has written rows of 16 bytes of a matrix."""
        party = self._party(w, None if w.alive_count == 32 else np.flatnonzero(w.alive), collective=True)
        pieces = self._pieces(address.astype(np.int64) - SHARED_BASE, 16).ravel()
        self._after_writes(party, pieces, "write to")
        self._after_reads(party, pieces, "write to")
        self._writes.put(pieces, -1 - w.index, self.clocks.now[w.index], self._line(), False)

    def _of(self, agent: int) -> shadow.Reads:
        found = self._reads.get(agent)
        if found is None:
            found = self._reads[agent] = shadow.Reads(len(self._writes.time))
        return found

    def _stamp_reads(self, warp: int, lanes: Array | None, pieces: Array, line: int) -> None:
        reads = self._of(warp)
        flags = shadow.STRONG if self.strong is not None else 0
        self._keep(reads, warp, lanes, pieces)
        bits = shadow.bits_of(self.clocks.threads_of(0, lanes))[:, None]
        reads.put(pieces, bits, self.clocks.now[warp], flags, line)

    def _keep(self, reads: shadow.Reads, warp: int, lanes: Array | None, pieces: Array) -> None:
        """Before new reads take the place of older ones by other lanes that they are not ordered behind."""
        old = reads.stamp[pieces]
        by_lanes = (old != 0) & (old & np.uint32(shadow.COLLECTIVE) == 0)
        if pieces.ndim == 2:  # those of the same time stay
            by_lanes &= shadow.time_of(old) != self.clocks.now[warp]
        if not by_lanes.any():
            return
        rows = self.clocks.known[self.clocks.threads_of(warp, lanes), HAPPENED, 32 * warp : 32 * warp + 32]
        rows = rows if pieces.ndim == 2 else rows.min(axis=0)[None]
        grid = pieces if pieces.ndim == 2 else pieces[None]
        known = shadow.known_of(rows, reads.lanes[grid]).reshape(pieces.shape)
        lost = by_lanes & (shadow.time_of(old) > known)
        if lost.any():
            reads.keep(np.unique(pieces[lost]))

    # The two questions

    def _after_writes(self, party: Party, pieces: Array, what: str, *, proxy: bool = False) -> None:
        """Refuse an access that some write to the pieces did not happen before."""
        writes = self._writes
        agents, times = writes.agent[pieces], writes.time[pieces]
        view = party.view.fenced if proxy else party.view.happened
        late = times > view[agents]
        if proxy:  # copies by the proxy itself need no fence
            copies = agents >= self.clocks.threads
            late = np.where(copies, times > party.view.happened[agents], late)
        if not late.any():
            return
        if self.strong is not None:
            late &= ~writes.strong[pieces]
        if (party.rows is None and not party.collective) or (party.rows is not None and len(party.rows) > 1):
            rows = extended(self._rows(party), self.clocks.warps)[:, HAPPENED]
            late &= times > np.take_along_axis(rows, agents % rows.shape[1], axis=1)
        elif party.collective and what != "read of":
            late &= agents != -1 - party.warp
            late &= agents != -1 - self.clocks.warps - party.warp
            late &= agents // 32 != party.warp
        if (late & (agents < -self.clocks.warps)).any():
            late &= (agents >= -self.clocks.warps) | self._late_for_all(party, pieces, agents, times, proxy)
        if late.any():
            raise self._write_fault(party, pieces, late, what, proxy)

    def _late_for_all(self, party: Party, pieces: Array, agents: Array, times: Array, proxy: bool) -> Array:
        """Of pieces that several lanes wrote at once: whether none of their writes happened before."""
        rows, masks = self._rows(party)[:, FENCED if proxy else HAPPENED], self._writes.lanes[pieces]
        late = np.zeros(pieces.shape, bool)
        for agent in np.unique(agents[agents < -self.clocks.warps]).tolist():
            warp = -1 - self.clocks.warps - agent
            lanes = rows[:, 32 * warp : 32 * warp + 32]
            if pieces.ndim == 2:
                known = shadow.known_of_any(lanes, masks)
            else:
                every = np.broadcast_to(masks, (len(lanes), len(masks)))
                known = shadow.known_of_any(lanes, every).min(axis=0)
            late |= (agents == agent) & (times > known)
        return late

    def _after_reads(self, party: Party, pieces: Array, what: str) -> None:
        """Refuse a write that some read of the pieces did not happen before."""
        for agent, reads in self._reads.items():
            stamps = reads.stamp[pieces]
            if agent < self.clocks.warps:
                if (shadow.time_of(stamps) > party.view.low[agent]).any():
                    self._after_lanes(party, agent, pieces, stamps, reads.line, what)
                if reads.older is not None:
                    self._after_older(party, agent, pieces, what)
            else:
                late = shadow.time_of(stamps) > party.view.happened[agent]
                if pieces.ndim == 2 and late.any():  # which thread's piece it is matters
                    late &= shadow.time_of(stamps) > self._rows(party)[:, HAPPENED, agent, None]
                if late.any():
                    raise self._read_fault(agent, pieces, late, reads.line[pieces], what)

    def _after_lanes(
        self, party: Party, warp: int, pieces: Array, stamps: Array, lines: Array, what: str
    ) -> None:
        rows = self._rows(party)[:, HAPPENED, 32 * warp : 32 * warp + 32]
        if pieces.ndim == 1:
            rows = rows.min(axis=0)[None]
        grid = stamps if stamps.ndim == 2 else stamps[None]
        if party.warp == warp and party.rows is None:
            together = np.uint32(0xFFFFFFFF)  # it took part itself
        else:
            together = rows.max(axis=1)[:, None]
        known = shadow.known_of(rows, self._reads[warp].lanes[pieces].reshape(grid.shape))
        late = shadow.time_of(grid) > np.where(grid & np.uint32(shadow.COLLECTIVE), together, known)
        if party.collective and party.warp == warp:
            late[:] = False
        if self.strong is not None:
            late &= grid & np.uint32(shadow.STRONG) == 0
        late = late.reshape(stamps.shape)
        if late.any():
            raise self._read_fault(warp, pieces, late, lines[pieces], what)

    def _after_older(self, party: Party, warp: int, pieces: Array, what: str) -> None:
        """As `_after_lanes`, for reads whose place others took."""
        reads = self._reads[warp]
        assert reads.older is not None
        kept, stamps, masks, lines = reads.older
        mine = self._rows(party)[:, HAPPENED, 32 * warp : 32 * warp + 32]
        for number, row in enumerate(pieces) if pieces.ndim == 2 else [(None, pieces)]:
            hit = np.isin(kept, row)
            if hit.any():
                rows = mine.min(axis=0)[None] if number is None else mine[number : number + 1]
                late = shadow.time_of(stamps[hit]) > shadow.known_of(rows, masks[hit][None])[0]
                if self.strong is not None:
                    late &= stamps[hit] & np.uint32(shadow.STRONG) == 0
                if late.any() and not (party.collective and party.warp == warp):
                    raise self._read_fault(warp, kept[hit], late, lines[hit], what)
        reads.forget(pieces)

    def _rows(self, party: Party) -> Array:
        if party.rows is not None:
            return self.clocks.fit(party.rows)
        return self.clocks.known[self.clocks.threads_of(party.warp, party.lanes)]

    # Asynchronous copies

    def issue(self, w: Warp, lanes: Array | None, line: int, kind: str | None = None) -> Ticket:
        """Lanes issue a copy each. `kind`: of the groups by which they wait for it ("bulk", "copy"); None
        where an mbarrier does.
        """
        rows = self.clocks.snapshot(w.index, lanes)
        party = Party(view_of(rows, self.clocks.warps), w.index, lanes, rows=rows)
        ticket = Ticket(party, line)
        if kind is not None:
            ticket.agents, ticket.time = self.order.issue(w, lanes, kind)
        return ticket

    def copied_in(self, ticket: Ticket, address: Array, size: int, barrier: Mbarrier) -> None:
        """A bulk copy has written `size` bytes at each shared address, which `barrier` (an Mbarrier) tells
        of.
        """
        pieces = self._pieces(address - SHARED_BASE, size).ravel()
        self._overwrite(ticket, pieces, proxy=True)
        agent, time = self.order.completed(barrier)
        self._writes.put(pieces, agent, time, ticket.line, False)

    def lane_copied_in(self, ticket: Ticket, lane: int, address: Array, size: int) -> None:
        """The `cp.async` of lane number `lane` of those that issued it has written."""
        assert ticket.agents is not None
        assert ticket.party.rows is not None
        rows = ticket.party.rows[lane : lane + 1]
        one = Ticket(Party(view_of(rows, self.clocks.warps), ticket.party.warp, None, rows=rows), ticket.line)
        pieces = self._pieces(address - SHARED_BASE, size).ravel()
        self._overwrite(one, pieces, proxy=False)
        self._writes.put(pieces, int(ticket.agents[lane]), ticket.time, ticket.line, False)

    def _overwrite(self, ticket: Ticket, pieces: Array, *, proxy: bool) -> None:
        what = "an asynchronous copy into"
        self._fit(ticket)
        self._after_writes(ticket.party, pieces, what, proxy=proxy)
        self._after_reads(ticket.party, pieces, what)

    def copied_out(self, ticket: Ticket, address: Array, size: int) -> None:
        """A bulk copy has read `size` bytes at each shared address."""
        pieces = self._pieces(address - SHARED_BASE, size).ravel()
        self._fit(ticket)
        self._after_writes(ticket.party, pieces, "a bulk copy out of", proxy=True)
        if ticket.agents is None:  # from shared to shared memory: what follows is the mbarrier's
            return
        reads = self._of(int(ticket.agents[0]))
        reads.stamp[pieces] = shadow.stamp(ticket.time, 0)
        reads.line[pieces] = ticket.line

    def _fit(self, ticket: Ticket) -> None:
        rows = ticket.party.rows
        assert rows is not None
        if rows.shape[-1] != self.clocks.known.shape[2]:
            ticket.party.rows = self.clocks.fit(rows)
            ticket.party.view = view_of(ticket.party.rows, self.clocks.warps)

    # Reports

    def _write_fault(self, party: Party, pieces: Array, late: Array, what: str, proxy: bool) -> Fault:
        at = int(pieces[late][0])
        agent, line = int(self._writes.agent[at]), self._text(int(self._writes.line[at]))
        where = f"shared memory at {SHARED_BASE + at * self._grain:#x}"
        lanes = self._lanes_of(party, late)
        if agent >= self.clocks.threads:
            return Fault(
                "race",
                f"{what} {where}, which the copy of {line} writes: its completion was not waited for",
                lanes,
            )
        writer = self._who(agent)
        if proxy and int(self._writes.time[at]) <= int(party.view.happened[agent]):
            return Fault(
                "proxy",
                f"{what} {where}, which {writer} wrote at {line}: without fence.proxy.async between the two "
                "the async proxy need not see it",
                lanes,
            )
        return Fault("race", f"{what} {where}, which {writer} wrote at {line}: {_LATE}", lanes)

    def _read_fault(self, agent: int, pieces: Array, late: Array, lines: Array, what: str) -> Fault:
        at = int(pieces[late][0])
        line = self._text(int(lines[late][0]))
        where = f"shared memory at {SHARED_BASE + at * self._grain:#x}"
        if agent >= self.clocks.threads:
            return Fault(
                "race",
                f"{what} {where}, which the bulk copy of {line} may still read: its thread's wait for it "
                "(cp.async.bulk.wait_group.read) is not ordered before",
            )
        return Fault("race", f"{what} {where}, which warp {agent} read at {line}: {_LATE}")

    def _who(self, agent: int) -> str:
        if agent < 0:
            return f"warp {(-1 - agent) % self.clocks.warps}"
        return f"warp {agent // 32} lane {agent % 32}"

    def _text(self, index: int) -> str:
        instruction = self._cta.grid.program.kernel.instructions[index]
        return f"PTX line {instruction.line} ({instruction.text})"

    @staticmethod
    def _lanes_of(party: Party, late: Array) -> tuple[int, ...]:
        if party.rows is not None or party.collective or late.ndim == 1:
            return ()
        guilty = np.flatnonzero(late.any(axis=1))
        found = guilty if party.lanes is None else party.lanes[guilty]
        return tuple(found.tolist())

"""Vector clocks of the threads of a CTA: which access of whom happened before which.

Every thread, and every agent that copies for one (an mbarrier's bulk loads, a thread's bulk stores, a
thread's `cp.async`s), has a clock. `known[t, HAPPENED, a]` is the time of agent a up to which all it did
happened before what thread t does next (base causality order, PTX ISA, "Memory Consistency Model");
`known[t, FENCED, a]` the time up to which a's generic writes are also visible to the async proxy there
(`fence.proxy.async`). The threads of a warp share one time, so that what a warp does together has one.

Source of the method: Flanagan and Freund, "FastTrack: Efficient and Precise Dynamic Race Detection" (PLDI
2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import Fault
from ..memory import Array

HAPPENED, FENCED = 0, 1
LATEST = (1 << 24) - 1  # a time is kept in 24 bits


@dataclass(frozen=True, slots=True)
class View:
    """What all of some threads know. `happened` and `fenced` are times by agent, and at [-1 - w] what is
    known of all lanes of warp w (and again at [-1 - warps - w]); `lanes` (warps, 32) are those of threads
    again; `low` (warps,) the smallest of each warp.
    """

    happened: Array
    fenced: Array
    lanes: Array
    low: Array


def view_of(rows: Array, warps: int) -> View:
    """Of rows (n, 2, agents) of `Clocks.known`."""
    all_of_them = extended(rows[:1] if len(rows) == 1 else rows.min(axis=0)[None], warps)[0]
    happened = all_of_them[HAPPENED]
    lanes = happened[: 32 * warps].reshape(warps, 32)
    return View(happened, all_of_them[FENCED], lanes, happened[: -warps - 1 : -1])


def extended(rows: Array, warps: int) -> Array:
    """(n, 2, agents + 2 * warps): rows, with what each knows of all lanes of warp w at [-1 - w] and again at
    [-1 - warps - w].
    """
    low = rows[:, :, : 32 * warps].reshape(len(rows), 2, warps, 32).min(axis=3)
    joined: Array = np.concatenate([rows, low[:, :, ::-1], low[:, :, ::-1]], axis=2)
    return joined


class Clocks:
    """The clocks of a CTA of `warps` warps."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.threads = 32 * warps
        self.agents = self.threads
        self.known: Array = np.zeros((self.threads, 2, self.threads + 32), np.uint32)
        every = np.arange(self.threads)
        self.known[every, HAPPENED, every] = 1
        self.now = [1] * warps
        self.ticks: dict[int, int] = {}  # of agents that are no threads
        self._views: list[View | None] = [None] * warps
        self._lanes = [np.arange(32 * w, 32 * w + 32) for w in range(warps)]

    def add_agent(self) -> int:
        """A new agent, which is no thread."""
        if self.agents == self.known.shape[2]:
            self.known = np.pad(self.known, ((0, 0), (0, 0), (0, self.agents)))
            self._views = [None] * self.warps
        self.ticks[self.agents] = 0
        self.agents += 1
        return self.agents - 1

    def tick_agent(self, agent: int) -> int:
        """The next time of an agent that is no thread."""
        self.ticks[agent] += 1
        return self.ticks[agent]

    def threads_of(self, warp: int, lanes: Array | None) -> Array:
        """Numbers of threads; `lanes` None for the whole warp."""
        every = self._lanes[warp]
        return every if lanes is None else every[lanes]

    def view(self, warp: int, lanes: Array | None) -> View:
        """What all of some lanes of a warp know."""
        if lanes is not None and len(lanes) < 32:
            return view_of(self.known[self.threads_of(warp, lanes)], self.warps)
        found = self._views[warp]
        if found is None:
            found = self._views[warp] = view_of(self.known[32 * warp : 32 * warp + 32], self.warps)
        return found

    def fit(self, row: Array) -> Array:
        """A row that was taken when there were fewer agents."""
        missing = self.known.shape[2] - row.shape[-1]
        return np.pad(row, ((0, 0),) * (row.ndim - 1) + ((0, missing),)) if missing else row

    def tick(self, warp: int) -> None:
        """What a warp does next is later than all that it did."""
        if self.now[warp] == LATEST:
            raise Fault(
                "limit", f"a warp synchronises more than {LATEST} times: run it without the race checker"
            )
        self.now[warp] += 1
        lanes = self._lanes[warp]
        self.known[lanes, HAPPENED, lanes] = self.now[warp]

    def release(self, warp: int, lanes: Array | None) -> Array:
        """What some lanes know together, (2, agents), for whoever synchronises with them."""
        row: Array = self.known[self.threads_of(warp, lanes)].max(axis=0)
        self.tick(warp)
        return row

    def acquire(self, warp: int, lanes: Array | None, row: Array) -> None:
        """Some lanes learn a row."""
        row = self.fit(row)
        if lanes is None:
            here = self.known[32 * warp : 32 * warp + 32]
            np.maximum(here, row, out=here)
        else:
            threads = self.threads_of(warp, lanes)
            self.known[threads] = np.maximum(self.known[threads], row)
        self._views[warp] = None

    def learn(self, thread: int, agent: int, time: int) -> None:
        """A thread learns the time of one agent."""
        self.known[thread, HAPPENED, agent] = max(int(self.known[thread, HAPPENED, agent]), time)
        self._views[thread // 32] = None

    def meet(self, warp: int, lanes: Array | None) -> None:
        """Some lanes of a warp synchronise with each other."""
        self.acquire(warp, lanes, self.release(warp, lanes))

    def fence_proxy(self, warp: int, lanes: Array | None) -> None:
        """All that happened before these lanes' next step is visible to the async proxy there."""
        threads = self.threads_of(warp, lanes)
        rows = self.known[threads]
        self.known[threads, FENCED] = rows.max(axis=1)
        self._views[warp] = None
        self.tick(warp)  # a write behind the fence is not

    def snapshot(self, warp: int, lanes: Array | None) -> Array:
        """Rows (n, 2, agents) as they are now; what the lanes do next is later."""
        rows: Array = self.known[self.threads_of(warp, lanes)].copy()
        self.tick(warp)
        return rows


def joined(first: Array | None, second: Array) -> Array:
    """Two rows together; one may be from when there were fewer agents. Gives a new array."""
    if first is None:
        return second
    if first.shape[-1] != second.shape[-1]:
        wide, narrow = (first, second) if first.shape[-1] > second.shape[-1] else (second, first)
        result: Array = wide.copy()
        part = result[..., : narrow.shape[-1]]
        np.maximum(part, narrow, out=part)
        return result
    largest: Array = np.maximum(first, second)
    return largest

"""The race checker against a model that is too slow to use: every access is kept, and who happened before
whom is a set of events. Random histories of two or three warps; both must object to the same event, or to
none.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from sm12x.emulator.checkers.races import Races
from sm12x.emulator.cta import Mbarrier
from sm12x.emulator.errors import Fault
from sm12x.emulator.memory import SHARED_BASE, Region

WORDS = 12


class Model:
    """Events by number; `before[t]` is the set of events that happened before what thread t does next,
    `fenced[t]` those whose writes the async proxy sees there. A thread is (warp, lane), a copy ("copy",
    number).
    """

    def __init__(self, warps):
        self.threads = [(w, lane) for w in range(warps) for lane in range(32)]
        self.before = {t: frozenset() for t in self.threads}
        self.fenced = {t: frozenset() for t in self.threads}
        self.accesses = []  # (event, byte, writes, owner, collective)
        self.published = {}
        self.overwritten = {}  # by warp and byte: what happened before the warp's last write there
        self.event = 0

    def meet(self, threads):
        row = self.release(threads)
        self.learn(threads, row)

    def release(self, threads):
        return (
            frozenset().union(*(self.before[t] for t in threads)),
            frozenset().union(*(self.fenced[t] for t in threads)),
        )

    def learn(self, threads, row):
        for t in threads:
            self.before[t] |= row[0]
            self.fenced[t] |= row[1]

    def fence(self, threads):
        for t in threads:
            self.fenced[t] = self.fenced[t] | self.before[t]

    def conflicts(self, number, owners, touched, writes, known, proxied=None, *, collective=None, copy=False):
        """Whether an access conflicts with one that it is not ordered behind. `known(owner)` are the events
        before it; `collective` the warp that does it as one.
        """
        for event, byte, wrote, owner, together in self.accesses:
            if byte not in touched or not (writes or wrote) or event == number:
                continue
            by = touched[byte]
            if collective is not None and writes and owner[0] == collective and owner[0] != "copy":
                continue  # a warp's own accesses before its stmatrix
            if isinstance(together, tuple):  # several lanes wrote the same: to know of one will do
                ordered = all(any(each in known(o) for each in together) for o in by)
                if ordered and proxied is not None:
                    ordered = any(each in proxied for each in together)
                if not ordered and not (
                    collective is not None
                    and writes
                    and any(each in self.overwritten.get((collective, byte), ()) for each in together)
                ):
                    return True
                continue
            if not wrote and together is not None:  # any lane's knowledge of an ldmatrix will do
                ordered = all(event in known(o) for o in by) or (not copy and together == by[0][0])
            else:
                ordered = all(event in known(o) or owner == o for o in by)
            if collective is not None and writes and wrote:  # or before the warp's own write there
                ordered = ordered or event in self.overwritten.get((collective, byte), ())
            if ordered and proxied is not None and wrote and owner[0] != "copy":
                ordered = event in proxied
            if not ordered:
                return True
        return False


class History:
    """Runs the same random events on the checker and on the model."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.warps = self.random.choice((2, 2, 3))
        program = SimpleNamespace(
            executing=lambda _frame: 0,
            kernel=SimpleNamespace(instructions=[SimpleNamespace(line=1, text="access")]),
        )
        cta = SimpleNamespace(
            warps=[None] * self.warps,
            shared=Region(SHARED_BASE, 64, "shared memory"),
            grid=SimpleNamespace(program=program),
        )
        self.races, self.model = Races(cta), Model(self.warps)
        self.words = [SimpleNamespace(index=w, cta=cta, alive_count=32) for w in range(self.warps)]
        self.barriers = [Mbarrier(8 * at, 1) for at in range(2)]
        self.released = [None, None]  # the model's rows
        self.flying = []
        self.log = []

    def lanes(self):
        """Some lanes; few, so that histories do meet."""
        if self.random.random() < 0.3:
            return None, list(range(32))
        chosen = sorted(self.random.sample((0, 1, 2, 31), self.random.randint(1, 3)))
        return np.array(chosen), chosen

    def avoid(self):
        """Most races are left out, so that histories get long."""
        return self.random.random() < 0.9

    def step(self):
        """One event. Whether it is a race: (what the checker says, what the model says)."""
        r, m = self.random, self.model
        w = r.randrange(self.warps)
        lanes, chosen = self.lanes()
        threads = [(w, lane) for lane in chosen]
        kind = r.choices(
            ("load", "store", "store_same", "rows", "store_rows", "meet", "arrive", "see", "fence", "barrier",
             "copy_in", "copy_out", "land", "wait"),
            (6, 5, 2, 2, 1, 3, 3, 3, 1, 1, 1, 1, 2, 1),
        )[0]  # fmt: skip
        m.event += 1
        self.log.append((kind, w, chosen))
        handler = getattr(self, kind)
        return handler(w, lanes, threads)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except Fault as fault:
            if fault.kind not in ("race", "proxy"):
                raise
            return True
        return False

    def _addresses(self, threads):
        """A word for each thread: one for all, one for each lane by turns, or any."""
        r = self.random
        way, first = r.randrange(3), r.randrange(WORDS)
        return [
            first if way == 0 else (first + at) % WORDS if way == 1 else r.randrange(WORDS)
            for at, _ in enumerate(threads)
        ]

    def _plain(self, w, lanes, threads, writes):
        words = self._addresses(threads)
        if writes:  # of lanes that write one word the last counts, as it does in memory
            words = [(words[0] + at) % WORDS for at in range(len(threads))][:WORDS]
            if len(threads) > len(words):
                threads, lanes = threads[: len(words)], np.arange(len(words))
        m = self.model
        touched = {}
        for t, word in zip(threads, words, strict=True):
            touched.setdefault(word, []).append(t)
        wrong = m.conflicts(m.event, threads, touched, writes, lambda o: m.before[o])
        if wrong and self.avoid():
            return False, False
        address = np.array(words, np.uint64) * np.uint64(4) + np.uint64(SHARED_BASE)
        function = self.races.store if writes else self.races.load
        found = self._try(function, self.words[w], lanes, address, 4)
        # one event for each thread, as each is ordered on its own
        for t, word in zip(threads, words, strict=True):
            m.event += 1
            m.accesses.append((m.event, word, writes, t, None))
            if writes:
                m.overwritten[w, word] = m.before[t]
            m.before[t] |= {m.event}
        return found, wrong

    def load(self, w, lanes, threads):
        return self._plain(w, lanes, threads, False)

    def store(self, w, lanes, threads):
        return self._plain(w, lanes, threads, True)

    def store_same(self, w, lanes, threads):
        """Several lanes write the same value to one word."""
        m, word = self.model, self.random.randrange(WORDS)
        wrong = m.conflicts(m.event, threads, {word: threads}, True, lambda o: m.before[o])
        if wrong and self.avoid():
            return False, False
        address = np.full(len(threads), SHARED_BASE + 4 * word, np.uint64)
        found = self._try(self.races.store, self.words[w], lanes, address, 4)
        before = frozenset().union(*(m.before[t] for t in threads))
        events = []
        for t in threads:
            m.event += 1
            events.append(m.event)
            m.before[t] |= {m.event}
        m.accesses.append((m.event, word, True, (w, None), tuple(events)))
        m.overwritten[w, word] = before
        return found, wrong

    def _rows(self, w, writes):
        m, first = self.model, self.random.randrange(3)
        words = range(4 * first, 4 * first + 4)
        threads = [(w, lane) for lane in range(32)]
        touched = dict.fromkeys(words, threads)
        wrong = m.conflicts(m.event, threads, touched, writes, lambda o: m.before[o], collective=w)
        if wrong and self.avoid():
            return False, False
        address = np.array([SHARED_BASE + 16 * first], np.uint64)
        if writes:
            found = self._try(self.races.store_rows, self.words[w], address)
        else:
            found = self._try(self.races.load_rows, self.words[w], address, 16)
        if writes:  # known only to who knows it of all lanes
            for t in threads:
                m.event += 1
                m.accesses += [(m.event, word, True, t, w) for word in words]
                m.before[t] |= {m.event}
        else:
            m.event += 1
            m.accesses += [(m.event, word, False, (w, None), w) for word in words]
            for t in threads:
                m.before[t] |= {m.event}
        return found, wrong

    def rows(self, w, _lanes, _threads):
        return self._rows(w, False)

    def store_rows(self, w, _lanes, _threads):
        return self._rows(w, True)

    # Order

    def meet(self, w, lanes, threads):
        self.model.meet(threads)
        self.races.order.meet(self.words[w], lanes)
        return False, False

    def fence(self, w, lanes, threads):
        self.model.fence(threads)
        self.races.order.fence_proxy(self.words[w], lanes)
        return False, False

    def barrier(self, w, lanes, threads):
        """All threads meet."""
        generation = self.model.event
        for each in range(self.warps):
            self.races.order.at_barrier(self.words[each], None, 0, generation)
        for each in range(self.warps):
            self.races.order.past_barrier(self.words[each], None, 0, generation)
        self.model.meet(self.model.threads)
        return False, False

    def arrive(self, w, lanes, threads):
        at = self.random.randrange(2)
        barrier = self.barriers[at]
        self.races.order.arrived(self.words[w], lanes, barrier)
        self._publish(at, self.model.release(threads))
        return False, False

    def _publish(self, at, row):
        old = self.released[at] or (frozenset(), frozenset())
        self.released[at] = (old[0] | row[0], old[1] | row[1])
        self.barriers[at].released = self.barriers[at].clock  # every arrival ends a phase here

    def see(self, w, lanes, threads):
        at = self.random.randrange(2)
        self.races.order.saw(self.words[w], lanes, self.barriers[at])
        if self.released[at] is not None:
            self.model.learn(threads, self.released[at])
        return False, False

    # Copies

    def _issue(self, w, kind):
        lane = self.random.choice((0, 1))
        t, m = (w, lane), self.model
        ticket = self.races.issue(self.words[w], np.array([lane]), 0, kind)
        first = self.random.randrange(3)
        self.flying.append((ticket, t, (m.before[t], m.fenced[t]), first, kind, self.random.randrange(2)))
        if kind is not None:
            self.races.order.commit(self.words[w], np.array([lane]), kind)
        return False, False

    def copy_in(self, w, _lanes, _threads):
        return self._issue(w, None)

    def copy_out(self, w, _lanes, _threads):
        return self._issue(w, "bulk")

    def land(self, _w, _lanes, _threads):
        if not self.flying:
            return False, False
        ticket, t, (known, fenced), first, kind, at = self.flying.pop(self.random.randrange(len(self.flying)))
        return self._land(ticket, t, known, fenced, first, kind, at)

    def _land(self, ticket, t, known, fenced, first, kind, at):
        m, words = self.model, range(4 * first, 4 * first + 4)
        owner = ("copy", m.event)
        wrong = m.conflicts(
            m.event,
            [owner],
            {word: [owner] for word in words},
            kind is None,
            lambda _o: known,
            fenced,
            copy=True,
        )
        if wrong and self.avoid():
            return False, False
        address = np.array([SHARED_BASE + 16 * first])
        if kind is None:
            found = self._try(self.races.copied_in, ticket, address, 16, self.barriers[at])
        else:
            found = self._try(self.races.copied_out, ticket, address, 16)
        m.accesses += [(m.event, word, kind is None, owner, None) for word in words]
        if kind is None:
            self._publish(at, (frozenset({m.event}), frozenset()))
        else:
            m.published.setdefault(t, set()).add(m.event)
        return found, wrong

    def wait(self, w, _lanes, _threads):
        """A thread waits for all its bulk copies: those still under way land first."""
        lane = self.random.choice((0, 1))
        t = (w, lane)
        for copy in [c for c in self.flying if c[1] == t and c[4] is not None]:
            self.flying = [other for other in self.flying if other is not copy]
            self.model.event += 1
            ticket, _, (known, fenced), first, kind, at = copy
            verdict = self._land(ticket, t, known, fenced, first, kind, at)
            if any(verdict):
                return verdict
        self.races.order.waited(self.words[w], np.array([lane]), "bulk", 0)
        self.model.before[t] |= frozenset(self.model.published.get(t, ()))
        return False, False


@pytest.mark.parametrize("seed", range(300))
def test_it_objects_to_what_a_model_objects_to(seed):
    history = History(seed)
    for _ in range(60):
        found, wrong = history.step()
        assert found == wrong, (seed, history.log)
        if found:
            return

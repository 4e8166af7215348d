"""Waiters that an mbarrier leaves behind, and mbarriers that the async proxy may not know of yet.

A wait for the end of a phase, by parity or by state, is answered right only during the next phase: one phase
later the parity is the same again, and the thread may wait for ever (PTX ISA, "mbarrier.test_wait,
mbarrier.try_wait"). Here that is an error as soon as it happens: when a phase ends although a thread that
waits for the end of the one before has not seen it; or when a thread that did not see its phase end asks
again too late. In some seeds the scheduler lets waiters go on as late as the others allow, so that it does
happen.

Asynchronous copies complete at an mbarrier through the async proxy: between its mbarrier.init and the issue
of the copy the initialising warp has to execute fence.mbarrier_init or fence.proxy.async (PTX ISA, "membar,
fence").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import EmulatorError, Fault, Violation
from . import actor

if TYPE_CHECKING:
    from ..cta import Cta, Mbarrier
    from ..grid import Grid
    from ..memory import Array
    from ..warp import Split, Warp


def phase_ends(barrier: Mbarrier) -> None:
    """Before a phase of `barrier` ends. Raises Fault where a thread has not seen the last one end."""
    for split in barrier.woken:
        if split.memo == (barrier, barrier.phase - 1):
            raise _overtaken(barrier, split.warp, barrier.phase - 1, _line_of(split), "has not seen")
    barrier.woken = list(barrier.queue)


def blocked(barrier: Mbarrier, split: Split) -> None:
    """A split is about to wait for the end of this phase."""
    split.memo = (barrier, barrier.phase)


def resumed(barrier: Mbarrier, split: Split, *, seen: bool) -> None:
    """A split asks again, or for the first time; `seen` says whether the phase it means has ended. Raises
    Fault where that was so and is no longer.
    """
    memo, split.memo = split.memo, None
    key = (split.warp.index, int(split.lanes[0]))
    since = memo[1] if memo is not None and memo[0] is barrier else barrier.polls.get(key)
    if seen:
        barrier.polls.pop(key, None)
        barrier.seen[key] = barrier.phase - 1
    elif since is not None and since < barrier.phase and since % 2 == barrier.phase % 2:
        raise _overtaken(barrier, split.warp, since, "this instruction", "did not see")
    else:
        barrier.polls[key] = barrier.phase


def _line_of(split: Split) -> str:
    return actor.line(split.warp.cta.grid.program.instruction_at(split.pc))


def _overtaken(barrier: Mbarrier, warp: Warp, phase: int, where: str, saw: str) -> Fault:
    return Fault(
        "barrier",
        f"{barrier} overtakes a waiter: warp {warp.index}, which waits at {where}, {saw} the end of phase "
        f"{phase}, and the parity that it waits for means another phase by now",
    )


def waits_for(barrier: Mbarrier, split: Split) -> str:
    """What a split waits for, for the report of a deadlock: also phases that ended before it looked."""
    last = barrier.seen.get((split.warp.index, int(split.lanes[0])), -1)
    if barrier.phase - last < 3:
        return str(barrier)
    return f"{barrier}, of which phases {last + 1} to {barrier.phase - 1} ended before it looked,"


def underflow(grid: Grid) -> EmulatorError | None:
    """The error for a barrier at which more bytes have completed than were expected, so that its phase cannot
    end although all threads have arrived: for grids in which nothing moves any more.
    """
    for cta in grid.ctas:
        for barrier in cta.mbarriers.values():
            if barrier.queue and barrier.pending == 0 and barrier.tx < 0:
                message = f"transaction underflow at {barrier}"
                by = barrier.tx_by
                text, line = (by.text, by.line) if by is not None else (None, None)
                violation = Violation("barrier", message, line, text, cta.index)
                return EmulatorError(message, text, line, violation=violation)
    return None


def ends_under_copies(cta: Cta) -> Fault:
    """A CTA ends while asynchronous copies are pending that use its shared memory."""
    pending = cta.grid.scheduler.pending(cta)
    first = f", the first issued at {actor.line(pending[0].instruction)}" if pending else ""
    return Fault(
        "exit",
        f"the CTA ends while {cta.in_flight} asynchronous copies still use its shared memory{first}",
    )


def fence_initialisation(w: Warp, _s: Split, _lanes: Array | None) -> None:
    """fence.mbarrier_init or fence.proxy.async by a warp."""
    cta = w.cta
    if cta.unfenced:
        cta.unfenced = {at: by for at, by in cta.unfenced.items() if by is not w}


def check_initialisation(cta: Cta, address: int) -> None:
    """Before an asynchronous copy that completes at an mbarrier. Raises Fault where it may not see it."""
    if address in cta.unfenced:
        raise Fault(
            "barrier",
            f"an asynchronous copy is to complete at {cta.mbarrier(address)}, whose initialisation by warp "
            f"{cta.unfenced[address].index} is not fenced: the async proxy may not see it without "
            "fence.mbarrier_init or fence.proxy.async",
        )

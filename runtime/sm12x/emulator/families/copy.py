"""Asynchronous copies of a thread's own (PTX ISA, "cp.async", "cp.async.commit_group", "cp.async.wait_group",
"cp.async.mbarrier.arrive")."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..asynchronous import Copy, Issuer, Operation, thread_groups
from ..cta import Mbarrier
from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Immediate, Instruction, Register
from ..registry import instruction, unsupported
from ..spaces import shared_addresses, space_of
from ..warp import LANES, Split, Wait, Warp
from .bulk_copy import committer, copies_of, waiter

_WORDS = {"shared", "shared::cta", "global", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"}


def _active(lanes: Array | None) -> Array:
    return LANES if lanes is None else lanes


@instruction("cp.async.ca", "cp.async.cg", yields=True)
def cp_async(i: Instruction, e: Emitter) -> None:
    """Copies `size` bytes of which the first `source size` come from global memory and the rest are zero."""
    words = i.opcode[3:]
    size = i.operands[2]
    if any(word not in _WORDS for word in words) or not isinstance(size, Immediate):
        raise unsupported(i)
    if size.value not in ((16,) if i.opcode[2] == "cg" else (4, 8, 16)):
        raise unsupported(i, f"a size of {size.value}")
    rest = list(i.operands[3:])
    if i.has("L2::cache_hint"):
        rest.pop()
    if rest and isinstance(rest[0], Register) and rest[0].type == "pred":
        raise unsupported(i, "ignore-src")
    taken = e.value(rest[0], "u32").u if rest else e.constant("u4", size.value)
    e.call(_copier(i, size.value), e.address(i.operands[0]), e.address(i.operands[1]), taken)


def _copier(i: Instruction, size: int) -> Callable[..., None]:
    def run(w: Warp, _s: Split, lanes: Array | None, to: Array, at: Array, taken: Array) -> None:
        active = _active(lanes)
        mask = to.dtype.type(size - 1)
        if np.count_nonzero((to[active] & mask) | (at[active].astype(to.dtype) & mask)):
            raise Fault("alignment", f"cp.async of {size} bytes at an address that is no multiple of it")
        if int(taken[active].max()) > size:
            raise Fault("bounds", f"cp.async with a source of {int(taken[active].max())} bytes for {size}")
        chosen = active.tolist()
        threads = [thread_groups(w, lane, "copy") for lane in chosen]
        groups = [thread.open for thread in threads]
        token = Copy()
        for thread, group in zip(threads, groups, strict=True):
            group.running += 1
            thread.copies = [copy for copy in thread.copies if not copy.done] + [token]
        w.cta.in_flight += 1
        races = w.cta.races
        ticket = None if races is None else races.issue(w, lanes, i.index, "copy")

        def copy() -> None:
            w.cta.in_flight -= 1
            for number, (lane, thread, group) in enumerate(zip(chosen, threads, groups, strict=True)):
                shared = int(shared_addresses(to[lane : lane + 1], "shared")[0])
                _copy_one(w, shared, int(at[lane]), int(taken[lane]), size)
                if races is not None and ticket is not None:
                    races.lane_copied_in(ticket, number, np.array([shared]), size)
                group.running -= 1
                w.cta.grid.scheduler.wake(thread.queue)
            if w.cta.grid.counts is not None:
                w.cta.grid.counts.copied(i, at[active].tolist(), taken[active].tolist(), size)
            token.finish()

        w.cta.grid.scheduler.submit(Operation(Issuer(i, w, chosen[0]), copy))

    return run


def _copy_one(w: Warp, to: int, at: int, taken: int, size: int) -> None:
    content = np.zeros(size, np.uint8)
    if taken:
        region = w.cta.grid.memory.region(at, "cp.async")
        span = region.span(at, taken, "cp.async")
        region.tell(at, taken, None)
        if np.count_nonzero(region.shadow[span]):
            raise Fault("uninitialised", f"cp.async reads bytes at {at:#x} that were never written")
        content[:taken] = region.data[span]
    w.cta.shared.span(to, size, "cp.async")
    w.cta.shared.scatter(to + np.arange(size), content, 1)


@instruction("cp.async.commit_group", yields=True)
def commit_group(i: Instruction, e: Emitter) -> None:
    e.call(committer("copy"))


@instruction("cp.async.wait_group", blocks=True)
def wait_group(i: Instruction, e: Emitter) -> None:
    most = i.operands[0]
    if not isinstance(most, Immediate):
        raise unsupported(i)
    e.wait_call(waiter("copy", most.value, reading=False))


@instruction("cp.async.wait_all", blocks=True)
def wait_all(i: Instruction, e: Emitter) -> None:
    e.wait_call(_wait_all)


def _wait_all(w: Warp, _s: Split, lanes: Array | None) -> Any:
    """Until every copy of each thread is done, committed or not."""
    for lane in _active(lanes).tolist():
        thread = thread_groups(w, lane, "copy")
        if not all(copy.done for copy in thread.copies):
            return Wait("copy", thread.queue, partial(copies_of, lane))
    if w.cta.races is not None:
        w.cta.races.order.waited_all(w, lanes)
    return None


@instruction("cp.async.mbarrier.arrive", yields=True)
def arrive(i: Instruction, e: Emitter) -> None:
    """An arrival at an mbarrier when all earlier copies of the thread are done. The barrier does not expect
    it from before, unless .noinc.
    """
    space, expected = space_of(i), i.has("noinc")
    if i.opcode[-1] != "b64":
        raise unsupported(i)

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array) -> None:
        for lane in _active(lanes).tolist():
            barrier = w.cta.mbarrier(int(shared_addresses(address[lane : lane + 1], space)[0]))
            if w.cta.grid.dependency is not None:
                w.cta.grid.dependency.arrive(w, np.array([lane]), barrier, barrier.phase)
            if not expected:
                barrier.pending += 1
            _arrive_after(w, barrier, thread_groups(w, lane, "copy").copies, Issuer(i, w, lane))

    e.call(run, e.address(i.operands[0]))


def _arrive_after(w: Warp, barrier: Mbarrier, copies: list[Copy], issuer: Issuer) -> None:
    """Issue an arrival as an operation of its own once some copies are done."""
    waiting = [copy for copy in copies if not copy.done]
    left = len(waiting)
    w.cta.in_flight += 1
    races = w.cta.races
    until = 0 if races is None else races.order.copies_until(w, issuer.lane)

    def arrive() -> None:
        w.cta.in_flight -= 1
        if races is not None:
            races.order.copies_arrived(barrier, w, issuer.lane, until)
        w.cta.mbarrier_arrive(barrier, 1)

    def one_done() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            w.cta.grid.scheduler.submit(Operation(issuer, arrive))

    for copy in waiting:
        copy.followers.append(one_done)
    if not waiting:
        one_done()

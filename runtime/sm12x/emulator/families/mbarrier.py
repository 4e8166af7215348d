"""mbarrier objects (PTX ISA, "mbarrier"): their state is the Cta's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..checkers import barriers as checks
from ..cta import Mbarrier
from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Address, Instruction, Operand, Sink
from ..registry import instruction, unsupported
from ..spaces import shared_addresses, space_of
from ..warp import ALL, NONE, Split, Wait, Warp

_ORDER = {"release", "acquire", "relaxed", "cta", "cluster"}
_SPACES = {"shared", "shared::cta", "shared::cluster"}

# A try_wait that would wait may give up instead ("suspendTimeHint", or a limit of the system's own): one in
# so many does.
_GIVES_UP = 16
_NO_STATE = np.empty(0, np.uint64)


def _check(i: Instruction, *expected: str) -> str:
    """The state space, where there are no modifiers but those expected."""
    extra = [word for word in i.opcode[2:-1] if word not in _ORDER | _SPACES and word not in expected]
    if extra or i.opcode[-1] != "b64":
        raise unsupported(i, f"modifier .{extra[0]}" if extra else f"type .{i.opcode[-1]}")
    return space_of(i)


def _each(space: str, lanes: Array | None, address: Array) -> list[int]:
    """The shared address of each active lane."""
    active = address if lanes is None else address[lanes]
    found: list[int] = shared_addresses(active, space).tolist()
    return found


def _values(lanes: Array | None, value: Array) -> list[int]:
    found: list[int] = (value if lanes is None else value[lanes]).tolist()
    return found


def _state(barrier: Mbarrier) -> int:
    """The opaque state that an arrival gives: phase, and arrivals pending before it."""
    return barrier.phase << 20 | barrier.pending


@instruction("mbarrier.init", yields=True)
def init(i: Instruction, e: Emitter) -> None:
    space = _check(i)

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array, count: Array) -> None:
        for at, value in zip(_each(space, lanes, address), _values(lanes, count), strict=True):
            w.cta.mbarrier_init(at, value, w)

    e.call(run, e.address(i.operands[0]), e.value(i.operands[1], "u32").u)


@instruction("mbarrier.inval", yields=True)
def inval(i: Instruction, e: Emitter) -> None:
    space = _check(i)

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array) -> None:
        for at in _each(space, lanes, address):
            w.cta.mbarrier_invalidate(at)

    e.call(run, e.address(i.operands[0]))


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx", yields=True)
def transaction(i: Instruction, e: Emitter) -> None:
    space = _check(i)
    expect = i.opcode[1] == "expect_tx"

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array, size: Array) -> None:
        for at, value in zip(_each(space, lanes, address), _values(lanes, size), strict=True):
            barrier = w.cta.mbarrier(at)
            if not expect and w.cta.races is not None:
                w.cta.races.order.completed_by(w, lanes, barrier)
            (w.cta.mbarrier_expect if expect else w.cta.mbarrier_complete)(barrier, value)

    e.call(run, e.address(i.operands[0]), e.value(i.operands[1], "u32").u)


def _arrival(
    space: str, *, expect: bool, drop: bool, completes: bool, keep: bool, releases: bool
) -> Callable[..., Array]:
    """`(w, s, lanes, address, number)` -> the state before each lane's arrival, if anybody wants to `keep`
    it. `number` is the transaction bytes where `expect`, else the count of arrivals; None for one.
    """

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array, number: Array | None = None) -> Array:
        cta = w.cta
        addresses = _each(space, lanes, address)
        if cta.grid.dependency is not None:
            for at in dict.fromkeys(addresses):
                cta.grid.dependency.arrive(w, lanes, cta.mbarrier(at), cta.mbarrier(at).phase)
        numbers = [1] * len(addresses) if number is None else _values(lanes, number)
        if not keep and not drop and completes and addresses.count(addresses[0]) == len(addresses):
            barrier = cta.mbarrier(addresses[0])
            if cta.races is not None:
                cta.races.order.arrived(w, lanes, barrier, releases=releases)
            if expect:
                cta.mbarrier_expect(barrier, sum(numbers))
            cta.mbarrier_arrive(barrier, len(numbers) if expect else sum(numbers))
            return _NO_STATE
        found = np.empty(len(addresses), np.uint64)
        for at, (where, value) in enumerate(zip(addresses, numbers, strict=True)):
            barrier = cta.mbarrier(where)
            found[at] = _state(barrier)
            if cta.races is not None:
                one = np.array([at if lanes is None else lanes[at]])
                cta.races.order.arrived(w, one, barrier, releases=releases)
            count = 1 if expect else value
            if expect:
                cta.mbarrier_expect(barrier, value)
            if drop:
                if barrier.expected < count:
                    raise Fault(
                        "barrier", f"{count} threads drop out of {barrier}, which are more than it expects"
                    )
                barrier.expected -= count
            if not completes and count >= barrier.pending:
                raise Fault("barrier", f"an arrival marked .noComplete completes the phase of {barrier}")
            cta.mbarrier_arrive(barrier, count)
        return found

    return run


@instruction("mbarrier.arrive", "mbarrier.arrive_drop", yields=True)
def arrive(i: Instruction, e: Emitter) -> None:
    expect = i.has("expect_tx")
    space = _check(i, "expect_tx", "noComplete")
    operands = list(i.operands)
    d: Operand = Sink()
    if not isinstance(operands[0], Address):
        d = operands.pop(0)
    if len(operands) > 2 or (expect and len(operands) != 2):
        raise unsupported(i)
    run = _arrival(
        space,
        expect=expect,
        drop=i.opcode[1] == "arrive_drop",
        completes=not i.has("noComplete"),
        keep=not isinstance(d, Sink),
        releases=not i.has("relaxed"),
    )
    lanes = e.lanes()
    numbers = [e.value(operand, "u32").u for operand in operands[1:]]
    found = e.call(run, e.address(operands[0]), *numbers, result=True)
    e.put(d, "b64", found, lanes)


@instruction("mbarrier.pending_count")
def pending_count(i: Instruction, e: Emitter) -> None:
    d, a = i.operands
    e.assign(d, "u32", f"({e.value(a, 'b64').u} & {e.constant('u8', (1 << 20) - 1)}).astype(u4)")


def _completed(barrier: Mbarrier, operand: int, parity: bool) -> bool:
    """Whether the phase that a wait means has ended: this one or the one before it. Raises Fault for a state
    of an older one.
    """
    if parity:
        return barrier.phase & 1 != operand & 1
    if barrier.phase - (operand >> 20) > 1:
        raise Fault("barrier", f"a wait with a state of phase {operand >> 20} at {barrier}: that is too old")
    return barrier.phase != operand >> 20


def _follow(w: Warp, lanes: Array | None, barrier: Mbarrier, acquires: bool) -> None:
    """Threads have seen a phase end: what arrived in it comes before what they do next."""
    dependency = w.cta.grid.dependency
    if dependency is not None:
        dependency.leave(w, lanes, barrier, barrier.phase - 1)
    if w.cta.races is not None:
        w.cta.races.order.saw(w, lanes, barrier, acquires=acquires)


def _follow_each(
    w: Warp, lanes: Array | None, addresses: list[int], flags: list[bool], acquires: bool
) -> Array:
    """The same for those lanes whose flag is set; gives the flags."""
    for at, (address, flag) in enumerate(zip(addresses, flags, strict=True)):
        if flag:
            _follow(w, np.array([at if lanes is None else lanes[at]]), w.cta.mbarrier(address), acquires)
    return np.array(flags)


def _try_wait(space: str, parity: bool, acquires: bool) -> Callable[..., Any]:
    def run(w: Warp, s: Split, lanes: Array | None, address: Array, operand: Array) -> Any:
        addresses, wanted = _each(space, lanes, address), _values(lanes, operand)
        first = w.cta.mbarrier(addresses[0])
        if addresses.count(addresses[0]) == len(addresses) == wanted.count(wanted[0]):  # the lanes agree
            seen = _completed(first, wanted[0], parity)
            if parity:  # a state says which phase it means
                checks.resumed(first, s, seen=seen)
            if seen:
                _follow(w, lanes, first, acquires)
                return ALL if lanes is None else ALL[lanes]
            if w.cta.grid.scheduler.chance(_GIVES_UP):
                return NONE if lanes is None else NONE[lanes]
            checks.blocked(first, s)
            return Wait("mbarrier", first.queue, lambda: checks.waits_for(first, s))
        flags = [
            _completed(first if at == addresses[0] else w.cta.mbarrier(at), value, parity)
            for at, value in zip(addresses, wanted, strict=True)
        ]
        # Whichever barrier's phase ends first lets its lanes go on: there is no one queue to wait in.
        return _follow_each(w, lanes, addresses, flags, acquires)

    return run


def _test_wait(space: str, parity: bool, acquires: bool) -> Callable[..., Array]:
    def run(w: Warp, s: Split, lanes: Array | None, address: Array, operand: Array) -> Array:
        addresses, wanted = _each(space, lanes, address), _values(lanes, operand)
        pairs = zip(addresses, wanted, strict=True)
        flags = [_completed(w.cta.mbarrier(at), value, parity) for at, value in pairs]
        if parity and addresses.count(addresses[0]) == len(addresses) and all(flags) == any(flags):
            checks.resumed(w.cta.mbarrier(addresses[0]), s, seen=flags[0])
        if addresses.count(addresses[0]) == len(addresses) and all(flags):
            _follow(w, lanes, w.cta.mbarrier(addresses[0]), acquires)
            return np.array(flags)
        return _follow_each(w, lanes, addresses, flags, acquires)

    return run


@instruction("mbarrier.try_wait", "mbarrier.test_wait", blocks=True)
def wait(i: Instruction, e: Emitter) -> None:
    """try_wait sleeps until its barrier's phase ends; both give what they find."""
    parity, tries = i.has("parity"), i.opcode[1] == "try_wait"
    space = _check(i, "parity")
    d, a, operand = i.operands[:3]
    lanes = e.lanes()
    arguments = (e.address(a), e.value(operand, "u32" if parity else "b64").u)
    acquires = not i.has("relaxed")
    if tries:
        found = e.wait_call(_try_wait(space, parity, acquires), *arguments)
    else:
        found = e.call(_test_wait(space, parity, acquires), *arguments, result=True)
    e.line(f"if w.cta.grid.counts is not None: w.cta.grid.counts.polled({i.index}, s, {found})")
    e.put(d, "pred", found, lanes)

"""Exchange between the lanes of a warp: shuffles, votes, elections, reductions (PTX ISA, "shfl.sync",
"vote.sync", "elect.sync", "redux.sync", "match.sync", "activemask", "bar.warp.sync").

None of them needs its lanes to be converged: those named in the member mask wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Immediate, Instruction, Operand, Pair
from ..registry import instruction, unsupported
from ..warp import ALL, LANE_BITS, LANES, NONE, Meeting, Split, Wait, Warp, lane_mask


def meet(w: Warp, s: Split, executing: Array, members: Array, key: int) -> Any:
    """Lanes for which to execute a warp-wide instruction now: bool (32,), or a Wait.

    The last split to come executes it for all; for the others there is nothing left to do. `key` tells
    instructions apart.
    """
    if s.memo == key:
        s.memo = None
        return NONE
    active = members[executing]
    if not active.size:
        return NONE
    needed = int(np.bitwise_or.reduce(active)) & lane_mask(w.alive)
    if not needed & ~lane_mask(executing):
        return executing
    meeting = w.convergence.setdefault(key, Meeting())
    meeting.join(s, executing)
    missing = needed & ~lane_mask(meeting.lanes)
    if missing:
        return Wait("lanes", meeting.queue, lambda: f"lanes {_names(missing)} of its warp")
    del w.convergence[key]
    for other in meeting.splits:
        if other is not s:
            other.memo = key
    w.cta.grid.scheduler.wake(meeting.queue)
    return meeting.lanes


def _names(bits: int) -> str:
    return ", ".join(str(lane) for lane in range(32) if bits >> lane & 1)


def _gather(i: Instruction, e: Emitter, members: Operand) -> None:
    """Emit the wait for the lanes that the member mask names. Results then go to the lanes that came
    together.
    """
    mask = e.mask
    if mask is None:
        return
    name = e.temporary()
    source = e.value(members, "b32").u
    e.line(f"{name} = {e.bind(meet)}(w, s, {mask}, {source}, {i.index})")
    e.line(f"if {name}.__class__ is Wait: return {name}")
    e.set_mask(name)


def _constant(operand: Operand) -> int | None:
    return operand.value & 0xFFFFFFFF if isinstance(operand, Immediate) else None


# Shuffles


def _source_lane(mode: str, b: Array, c: Array) -> tuple[Array, Array]:
    """For each lane the lane that it reads, and whether that one is in range (PTX ISA, "shfl.sync",
    Semantics).
    """
    lane = LANES.astype(np.uint32)
    offset, clamp, segment = b & np.uint32(31), c & np.uint32(31), c >> np.uint32(8) & np.uint32(31)
    most = (lane & segment) | (clamp & ~segment)
    least = lane & segment
    if mode == "up":
        chosen = lane.astype(np.int64) - offset
        valid = chosen >= most
    elif mode == "down":
        chosen = lane.astype(np.int64) + offset
        valid = chosen <= most
    elif mode == "bfly":
        chosen = (lane ^ offset).astype(np.int64)
        valid = chosen <= most
    else:
        chosen = (least | (offset & ~segment)).astype(np.int64)
        valid = chosen <= most
    return np.where(valid, chosen, LANES), valid


@instruction("shfl.sync", blocks=True)
def shfl(i: Instruction, e: Emitter) -> None:
    mode = i.opcode[2]
    if i.opcode[3:] != ("b32",) or mode not in ("up", "down", "bfly", "idx"):
        raise unsupported(i)
    first, a, b, c, members = i.operands
    d, flag = (first.first, first.second) if isinstance(first, Pair) else (first, None)
    _gather(i, e, members)
    source = e.value(a, "b32").u
    step, clamp = _constant(b), _constant(c)
    if step is not None and clamp is not None:
        lanes, valid = _source_lane(mode, np.full(32, step, np.uint32), np.full(32, clamp, np.uint32))
        e.line(f"x, y = {source}[{e.bind(lanes)}], {e.bind(valid)}")
    else:
        run = _shuffles[mode]
        e.line(f"x, y = {e.bind(run)}({source}, {e.value(b, 'b32').u}, {e.value(c, 'b32').u})")
    e.assign(d, "b32", "x")
    if flag is not None:
        e.assign(flag, "pred", "y")


def _shuffle(mode: str) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    def run(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
        lanes, valid = _source_lane(mode, b, c)
        return a[lanes], valid

    return run


_shuffles = {mode: _shuffle(mode) for mode in ("up", "down", "bfly", "idx")}


# Votes


@instruction("vote.sync", blocks=True)
def vote(i: Instruction, e: Emitter) -> None:
    mode = i.opcode[2]
    if (mode, i.opcode[3]) not in (("all", "pred"), ("any", "pred"), ("uni", "pred"), ("ballot", "b32")):
        raise unsupported(i)
    d, a, members = i.operands
    _gather(i, e, members)
    flags, named = e.value(a, "pred").u, e.value(members, "b32").u
    if e.mask is not None:  # lanes that have ended have no vote
        named = f"{named} & {e.bind(_as_mask)}({e.mask})"
    text = f"{e.bind(_votes[mode])}({flags}, {named})"
    e.assign(d, "b32" if mode == "ballot" else "pred", text)


def _named_in(members: Array, flags: Array) -> Array:
    """uint32: which of the lanes that each lane's member mask names have a flag."""
    found: Array = members & np.uint32(lane_mask(flags))
    return found


_votes: dict[str, Callable[[Array, Array], Array]] = {
    "ballot": lambda flags, members: _named_in(members, flags),
    "any": lambda flags, members: _named_in(members, flags) != 0,
    "all": lambda flags, members: _named_in(members, flags) == members,
    "uni": lambda flags, members: (_named_in(members, flags) == 0) | (_named_in(members, flags) == members),
}


@instruction("activemask")
def activemask(i: Instruction, e: Emitter) -> None:
    mask = e.mask
    if mask is None:
        return e.assign(i.operands[0], "b32", e.constant("u4", -1))
    return e.assign(i.operands[0], "b32", f"{e.bind(_as_mask)}({mask})")


def _as_mask(flags: Array) -> Array:
    return np.full(32, lane_mask(flags), np.uint32)


@instruction("elect.sync", blocks=True)
def elect(i: Instruction, e: Emitter) -> None:
    """The lowest lane that is named in the member mask is elected; the same one for the same mask, as PTX
    asks.
    """
    d, members = i.operands
    if not isinstance(d, Pair):
        raise unsupported(i)
    _gather(i, e, members)
    if e.mask is None and _constant(members) == 0xFFFFFFFF:
        e.line(f"x, y = {e.constant('u4', 0)}, {e.bind(_FIRST)}")
    else:
        e.line(f"x, y = {e.bind(_elected)}({e.mask or e.bind(ALL)}, {e.value(members, 'b32').u})")
    e.assign(d.first, "b32", "x")
    e.assign(d.second, "pred", "y")


_FIRST = LANES == 0
_FIRST.flags.writeable = False


def _elected(executing: Array, members: Array) -> tuple[Array, Array]:
    active = members[executing]
    candidates = lane_mask(executing) & (int(active[0]) if active.size else 0)
    if not candidates:
        return np.zeros(32, np.uint32), NONE
    leader = (candidates & -candidates).bit_length() - 1
    return np.full(32, leader, np.uint32), np.equal(LANES, leader)


# Reductions and matches


def _groups(members: Array, executing: Array) -> list[Array]:
    """Index arrays of the lanes that work together: those with the same member mask."""
    found = []
    for bits in np.unique(members[executing]):
        inside = executing & ((bits & LANE_BITS) != 0)
        found.append(np.flatnonzero(inside))
    return found


@instruction("redux.sync", blocks=True)
def redux(i: Instruction, e: Emitter) -> None:
    name, kind = i.opcode[2], i.opcode[-1]
    if len(i.opcode) != 4 or (name, kind) not in _REDUCTIONS:
        raise unsupported(i)
    d, a, members = i.operands
    _gather(i, e, members)
    run = _REDUCTIONS[name, kind]
    executing = e.mask or e.bind(ALL)
    e.assign(d, kind, f"{e.bind(run)}({e.value(a, kind).u}, {e.value(members, 'b32').u}, {executing})")


def _reduction(function: Any, kind: str) -> Callable[[Array, Array, Array], Array]:
    number = np.int32 if kind == "s32" else np.uint32

    def run(a: Array, members: Array, executing: Array) -> Array:
        found = np.zeros(32, number)
        for lanes in _groups(members, executing):
            found[lanes] = function.reduce(a.view(number)[lanes], dtype=number)
        return found.view(np.uint32)

    return run


_REDUCTIONS = {
    (name, kind): _reduction(function, kind)
    for name, function, kinds in (
        ("add", np.add, ("u32", "s32")),
        ("min", np.minimum, ("u32", "s32")),
        ("max", np.maximum, ("u32", "s32")),
        ("and", np.bitwise_and, ("b32",)),
        ("or", np.bitwise_or, ("b32",)),
        ("xor", np.bitwise_xor, ("b32",)),
    )
    for kind in kinds
}


@instruction("match.any.sync", "match.all.sync", blocks=True)
def match(i: Instruction, e: Emitter) -> None:
    kind = i.opcode[-1]
    if kind not in ("b32", "b64"):
        raise unsupported(i)
    d, a, members = i.operands
    _gather(i, e, members)
    executing = e.mask or e.bind(ALL)
    function = _match_any if i.opcode[1] == "any" else _match_all
    e.line(f"x, y = {e.bind(function)}({e.value(a, kind).u}, {e.value(members, 'b32').u}, {executing})")
    if isinstance(d, Pair):
        e.assign(d.first, "b32", "x")
        e.assign(d.second, "pred", "y")
    else:
        e.assign(d, "b32", "x")


def _match_any(a: Array, members: Array, executing: Array) -> tuple[Array, Array]:
    found = np.zeros(32, np.uint32)
    for lanes in _groups(members, executing):
        same = a[lanes][:, None] == a[lanes]
        found[lanes] = (same * LANE_BITS[lanes]).sum(axis=1).astype(np.uint32)
    return found, found != 0


def _match_all(a: Array, members: Array, executing: Array) -> tuple[Array, Array]:
    found, all_same = np.zeros(32, np.uint32), np.zeros(32, bool)
    for lanes in _groups(members, executing):
        if np.count_nonzero(a[lanes] != a[lanes[0]]) == 0:
            found[lanes] = LANE_BITS[lanes].sum().astype(np.uint32)
            all_same[lanes] = True
    return found, all_same


@instruction("bar.warp.sync", "barrier.warp.sync", blocks=True)
def bar_warp_sync(i: Instruction, e: Emitter) -> None:
    """The lanes named wait for each other."""
    _gather(i, e, i.operands[0])
    e.line(f"{e.bind(_converge)}(w, {e.mask or 's.mask'})")
    if e.mask is None and _constant(i.operands[0]) == 0xFFFFFFFF:
        e.line(f"{e.bind(_order)}(w, None)")
        return
    e.line(f"{e.bind(_named)}(w, {e.mask or 's.mask'}, {e.value(i.operands[0], 'b32').u})")


def _converge(w: Warp, executing: Array) -> None:
    if w.cta.grid.dependency is not None:
        w.cta.grid.dependency.converge(w, executing)


def _order(w: Warp, lanes: Array | None) -> None:
    """What the lanes did happened before what any of them does next."""
    if w.cta.races is not None:
        w.cta.races.order.meet(w, lanes)


def _named(w: Warp, executing: Array, members: Array) -> None:
    for lanes in _groups(members, executing):
        _order(w, lanes)
    outside = np.flatnonzero(executing & ((members & LANE_BITS) == 0))
    if len(outside):
        raise Fault(
            "divergence",
            "lanes execute a warp barrier whose mask does not name them",
            tuple(outside.tolist()),
        )

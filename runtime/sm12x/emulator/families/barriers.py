"""Barriers of a CTA and memory fences (PTX ISA, "bar, barrier", "membar, fence")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..checkers import barriers as barrier_checks
from ..checkers import tensor_maps
from ..cta import NAMED_BARRIERS
from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Instruction, Negated, Operand, Register
from ..registry import instruction, unsupported
from ..spaces import aligned, uniform
from ..warp import LANES, NONE, Split, Wait, Warp

_FENCES = {
    *("acq_rel", "sc", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl"),
    *("mbarrier_init", "proxy", "alias", "async", "async.global", "async::generic", "sync_restrict"),
    *(
        "global",
        "shared::cta",
        "shared::cluster",
        "sync_restrict::shared::cta",
        "sync_restrict::shared::cluster",
    ),
}


def _words(i: Instruction) -> tuple[str, bool, tuple[str, ...]]:
    """The kind (sync, arrive, red), whether it is .aligned, what follows. `bar` is `barrier.aligned`."""
    words = [word for word in i.opcode[1:] if word not in ("cta", "aligned")]
    return words[0], i.opcode[0] == "bar" or i.has("aligned"), tuple(words[1:])


def _arrive(
    w: Warp,
    s: Split,
    lanes: Array | None,
    barrier: int,
    count: int | None,
    is_aligned: bool,
    values: Sequence[bool] = (),
    *,
    leaves: bool = True,
) -> Any:
    """Count the threads of a split in at a barrier, with `values` to be reduced; gives (barrier, generation
    that they belong to, its results).
    """
    if not 0 <= barrier < NAMED_BARRIERS:
        raise Fault("barrier", f"barrier {barrier}: there are {NAMED_BARRIERS}")
    if count is not None and (count <= 0 or count % 32):
        raise Fault("barrier", f"barrier {barrier} for {count} threads: expected a multiple of 32")
    if is_aligned:
        aligned(s, lanes)
    executing = 32 if lanes is None else len(lanes)
    found = w.cta.barriers[barrier]
    expected = w.cta.barrier_count() if count is None else count
    if found.expected is None:
        found.expected, found.counted = expected, count is not None
    elif found.expected != expected:
        raise Fault(
            "barrier",
            f"barrier {barrier} for {expected} threads, where others wait at it for {found.expected}",
        )
    if w.cta.grid.dependency is not None:
        w.cta.grid.dependency.arrive(w, lanes, found, found.generation)
    found.arrived += executing
    found.lanes[w] = np.logical_or(
        found.lanes.get(w, NONE), s.mask if lanes is None else np.isin(LANES, lanes)
    )
    found.count_ended(w)
    if found.arrived > found.expected:
        raise Fault("barrier", f"{found.arrived} threads at barrier {barrier}, which is for {found.expected}")
    found.reduction.extend(values)
    generation, results = found.generation, found.reduction
    if w.cta.races is not None:
        w.cta.races.order.at_barrier(w, lanes, barrier, generation, leaves=leaves)
    w.cta.complete(found)
    return found, generation, results


def _follow(w: Warp, lanes: Array | None, number: int, generation: int) -> None:
    """Threads leave a barrier: what arrived at it comes before what they do next."""
    if w.cta.grid.dependency is not None:
        w.cta.grid.dependency.leave(w, lanes, w.cta.barriers[number], generation)
    if w.cta.races is not None:
        w.cta.races.order.past_barrier(w, lanes, number, generation)


def _synchronise(is_aligned: bool) -> Callable[..., Any]:
    def run(w: Warp, s: Split, lanes: Array | None, barrier: Array, count: Array | None = None) -> Any:
        number = uniform(barrier, lanes, "the barrier")
        if s.memo is None:
            threads = None if count is None else uniform(count, lanes, "the number of threads")
            found, generation, _ = _arrive(w, s, lanes, number, threads, is_aligned)
            s.memo = generation
        else:
            found = w.cta.barriers[number]
        if found.generation != s.memo:
            _follow(w, lanes, number, s.memo)
            s.memo = None
            return None
        return Wait(
            "barrier",
            found.queue,
            lambda: f"barrier {number} ({found.arrived} of {found.expected} threads are there)",
        )

    return run


def _arrive_only(is_aligned: bool) -> Callable[..., None]:
    def run(w: Warp, s: Split, lanes: Array | None, barrier: Array, count: Array) -> None:
        number = uniform(barrier, lanes, "the barrier")
        threads = uniform(count, lanes, "the number of threads")
        _arrive(w, s, lanes, number, threads, is_aligned, leaves=False)

    return run


def _reduce(is_aligned: bool, name: str) -> Callable[..., Any]:
    """The predicate of every thread combined: a number (popc) or a predicate."""

    def run(
        w: Warp, s: Split, lanes: Array | None, barrier: Array, flags: Array, count: Array | None = None
    ) -> Any:
        number = uniform(barrier, lanes, "the barrier")
        if s.memo is None:
            threads = None if count is None else uniform(count, lanes, "the number of threads")
            values: list[bool] = (flags if lanes is None else flags[lanes]).tolist()
            s.memo = _arrive(w, s, lanes, number, threads, is_aligned, values)
        found, generation, results = s.memo
        if found.generation != generation:
            _follow(w, lanes, number, generation)
            s.memo = None
            size = 32 if lanes is None else len(lanes)
            if name == "popc":
                return np.full(size, sum(results), np.uint32)
            return np.full(size, all(results) if name == "and" else any(results))
        return Wait(
            "barrier",
            found.queue,
            lambda: f"barrier {number} ({found.arrived} of {found.expected} threads are there)",
        )

    return run


@instruction("bar", "barrier", "bar.cta", "barrier.cta", blocks=True)
def bar(i: Instruction, e: Emitter) -> None:
    kind, is_aligned, rest = _words(i)
    operands = list(i.operands)
    if kind == "sync" and not rest and len(operands) in (1, 2):
        e.wait_call(_synchronise(is_aligned), *(e.value(operand, "u32").u for operand in operands))
    elif kind == "arrive" and not rest and len(operands) == 2:
        e.call(_arrive_only(is_aligned), *(e.value(operand, "u32").u for operand in operands))
    elif kind == "red" and rest in (("popc", "u32"), ("and", "pred"), ("or", "pred")):
        _emit_reduction(i, e, operands, is_aligned, rest)
    else:
        raise unsupported(i)


def _emit_reduction(
    i: Instruction, e: Emitter, operands: list[Operand], is_aligned: bool, rest: tuple[str, ...]
) -> None:
    d, barrier, *others = operands
    flag = others.pop()
    if not isinstance(flag, (Register, Negated)):
        raise unsupported(i)
    lanes = e.lanes()
    arguments = [e.value(barrier, "u32").u, e.value(flag, "pred").u, *(e.value(o, "u32").u for o in others)]
    found = e.wait_call(_reduce(is_aligned, rest[0]), *arguments)
    e.put(d, rest[1], found, lanes)


@instruction("fence", "membar", yields=True)
def fence(i: Instruction, e: Emitter) -> None:
    """Memory is sequentially consistent, and both proxies see it: only tensor maps are ever seen late. What a
    fence orders is the race checker's business.
    """
    words = i.opcode[1:]
    if words[:2] == ("proxy", "tensormap::generic"):
        if "acquire" in words:
            e.call(_acquire_map, e.address(i.operands[0]))
        elif "release" not in words:
            raise unsupported(i)
        else:
            e.call(tensor_maps.release)
        return
    extra = [word for word in words if word not in _FENCES]
    if extra:
        raise unsupported(i, f"modifier .{extra[0]}")
    if "mbarrier_init" in words:
        e.call(barrier_checks.fence_initialisation)
    elif words[0] != "proxy":
        e.call(_fence)
    elif words[1] == "async" and "global" not in words:
        e.call(barrier_checks.fence_initialisation)
        e.call(_fence_proxy)
    elif words[1] == "async::generic":  # in front of clusterlaunchcontrol.try_cancel
        e.call(barrier_checks.fence_initialisation)


def _fence_proxy(w: Warp, _s: Split, lanes: Array | None) -> None:
    if w.cta.races is not None:
        w.cta.races.order.fence_proxy(w, lanes)


def _fence(w: Warp, _s: Split, lanes: Array | None) -> None:
    if w.cta.races is not None:
        w.cta.races.order.fence(w, lanes)


def _acquire_map(w: Warp, _s: Split, lanes: Array | None, address: Array) -> None:
    for at in np.unique(address if lanes is None else address[lanes]).tolist():
        w.cta.map_cache.pop(at, None)
        tensor_maps.acquire(w.cta, at)

"""Bulk copies, with and without a tensor map (PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor", and their
groups).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import tensor_box, tensor_map
from ..asynchronous import Issuer, Operation, ThreadGroups, thread_groups
from ..checkers import tensor_maps
from ..checkers.barriers import check_initialisation
from ..checkers.races import Ticket
from ..cta import Cta
from ..emitter import Emitter
from ..errors import Fault
from ..memory import PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES, Array, Region
from ..ptx.ir import Address, Immediate, Instruction, Operand
from ..registry import instruction, unsupported
from ..spaces import shared_addresses
from ..tensor_box import Box
from ..warp import LANES, Split, Wait, Warp

# Reduces unsigned words: old ones in global memory and new ones from shared memory.
Combine = Callable[[Array, Array], Array]

_CLUSTER = {"reqnctapercluster", "explicitcluster"}  # directives of kernels that are launched as clusters
_HINTS = {"L2::cache_hint", "tile", "weak"}
_LOAD = ("global", "mbarrier::complete_tx::bytes")
_STORE = ("global", "shared::cta", "bulk_group")


def map_region(cta: Cta, address: int) -> tuple[Region, int]:
    """The region that a tensor map's generic address lies in, and its address there."""
    if PARAM_WINDOW <= address < PARAM_WINDOW + WINDOW_BYTES:
        return cta.grid.parameters, address - PARAM_WINDOW
    if SHARED_WINDOW <= address < SHARED_WINDOW + WINDOW_BYTES:
        raise Fault("tensor map", "a tensor map in shared memory cannot be used, only edited")
    return cta.grid.memory.region(address, "read of a tensor map"), address


def read_map(cta: Cta, address: int) -> tensor_map.TensorMap:
    """The tensor map at a generic address as the CTA sees it: as it was at its first use behind the last
    acquire fence for that address (PTX ISA, "fence.proxy.tensormap::generic").
    """
    content = cta.map_cache.get(address)
    if content is None:
        if address % tensor_map.ALIGNMENT:
            raise Fault(
                "alignment", f"a tensor map at {address:#x}, which is no multiple of {tensor_map.ALIGNMENT}"
            )
        region, start = map_region(cta, address)
        span = region.span(start, tensor_map.SIZE, "read of a tensor map")
        if np.count_nonzero(region.shadow[span]):
            raise Fault("uninitialised", f"the tensor map at {address:#x} was never wholly written")
        region.tell(start, tensor_map.SIZE, None)
        content = cta.map_cache[address] = region.data[span].tobytes()
    return tensor_map.decode(content)


def _box(
    cta: Cta,
    source: int | tensor_map.TensorMap,
    coordinates: tuple[int, ...],
    shared: int,
    *,
    writes: bool = False,
) -> tuple[Box, Region | None, int, bool]:
    """The box of a copy, the allocation that its in-bounds part lies in (None where it has none), its fill,
    and whether loads round to TF32. `source` is the address of the map, or the map as it was.
    """
    found = read_map(cta, source) if isinstance(source, int) else source
    box = found.box_elements(coordinates, shared, writes=writes)
    region = None
    if box.low < box.high:
        region = cta.grid.memory.region(box.low, "tensor copy")
        region.span(box.low, box.high - box.low, "tensor copy")
    return box, region, int.from_bytes(found.fill_pattern[: min(box.unit, 8)], "little"), found.rounds


def _load_box(
    issuer: Issuer,
    source: int | tensor_map.TensorMap,
    coordinates: tuple[int, ...],
    shared: int,
    barrier: int,
    ticket: Ticket | None,
) -> None:
    cta = issuer.cta
    box, region, fill, rounds = _box(cta, source, coordinates, shared)
    if isinstance(source, int):
        tensor_maps.done(issuer, source)
    gathered = None
    if region is not None:
        held = box.addresses if box.in_bounds is None else box.addresses[box.in_bounds]
        gathered = region.gather(held, box.unit)
        if rounds:
            gathered = tensor_box.to_tf32(gathered)
    if box.in_bounds is None and gathered is not None:
        values = gathered
    else:
        word = np.dtype(f"u{min(box.unit, 8)}")
        values = np.full((len(box.offsets), 2) if box.unit == 16 else len(box.offsets), fill, word)
        if gathered is not None and box.in_bounds is not None:
            values[box.in_bounds] = gathered
    cta.shared.scatter(box.offsets + shared, values, box.unit)
    if cta.grid.counts is not None:
        held = box.addresses if box.in_bounds is None else box.addresses[box.in_bounds]
        cta.grid.counts.loaded("tma_load", region, held, box.unit, len(box.offsets) * box.unit)
    cta.in_flight -= 1
    target = cta.mbarrier(barrier)
    if ticket is not None and cta.races is not None:
        cta.races.copied_in(ticket, box.offsets + shared, box.unit, target)
    cta.mbarrier_complete(target, box.transaction_bytes)


class _Store:
    """A copy from shared to global memory: reads first, and writes, or combines with what is there, some time
    later.

    `locate` finds, when it reads, addresses in both memories, the region of the global ones and the bytes of
    an item.
    """

    def __init__(
        self,
        cta: Cta,
        thread: ThreadGroups,
        locate: Callable[[], tuple[Array, Array, Region | None, int]],
        combine: Callable[[Array, Array], Array] | None,
        ticket: Ticket | None,
    ) -> None:
        self._cta, self._thread, self._group = cta, thread, thread.open
        self._ticket = ticket
        self._locate, self._combine = locate, combine
        self._group.reading += 1
        self._group.running += 1
        self._to: Array
        self._values: Array
        self._region: Region | None
        self._unit: int

    def read(self) -> None:
        source, self._to, self._region, self._unit = self._locate()
        self._values = self._cta.shared.gather(source, self._unit)
        if self._ticket is not None and self._cta.races is not None:
            self._cta.races.copied_out(self._ticket, source, self._unit)
        self._cta.in_flight -= 1
        self._group.reading -= 1
        self._cta.grid.scheduler.wake(self._thread.queue)

    def write(self) -> None:
        if self._cta.grid.counts is not None:
            self._cta.grid.counts.stored(self._instruction, self._region, self._to, self._unit)
        if self._region is not None:
            values = self._values
            if self._combine is not None:
                values = self._combine(self._region.gather(self._to, self._unit), values)
            self._region.scatter(self._to, values, self._unit)
        self._group.running -= 1
        self._cta.grid.scheduler.wake(self._thread.queue)

    def submit(self, issuer: Issuer) -> None:
        self._instruction = issuer.instruction
        self._cta.in_flight += 1
        self._cta.grid.scheduler.submit(Operation(issuer, self.read, self.write))


def issue(i: Instruction, w: Warp, lane: int, kind: str | None = None) -> Ticket | None:
    """What the race checker has to know of a copy that a lane issues; see `Races.issue`."""
    races = w.cta.races
    return None if races is None else races.issue(w, np.array([lane]), i.index, kind)


def _coordinates(i: Instruction, e: Emitter, operand: Operand) -> list[str]:
    if not isinstance(operand, Address) or operand.coordinates is None:
        raise unsupported(i, "a tensor copy without coordinates")
    rank = int(i.opcode[i.opcode.index("tensor") + 1][0])
    if len(operand.coordinates) != rank:
        raise unsupported(i, f"expected {rank} coordinates")
    return [e.value(coordinate, "s32").s for coordinate in operand.coordinates]


def _words(i: Instruction, first: int) -> tuple[str, ...]:
    """Modifiers behind the first ones, without hints: im2col and multicast are among what is left."""
    return tuple(word for word in i.opcode[first:] if word not in _HINTS)


def _active(lanes: Array | None) -> list[int]:
    found: list[int] = (LANES if lanes is None else lanes).tolist()
    return found


def _shared(address: Array, lane: int) -> int:
    return int(shared_addresses(address[lane : lane + 1], "shared")[0])


@instruction("cp.async.bulk.tensor", yields=True)
def cp_async_bulk_tensor(i: Instruction, e: Emitter) -> None:
    words = _words(i, 5)
    if words[1:] == _LOAD and words[0] in ("shared::cta", "shared::cluster"):
        _tensor_load(i, e)
    elif words == _STORE:
        tensor_store(i, e)
    else:
        raise unsupported(i)


def _tensor_load(i: Instruction, e: Emitter) -> None:
    destination, source, barrier = i.operands[:3]

    def run(
        w: Warp, _s: Split, lanes: Array | None, to: Array, at: Array, barrier: Array, *where: Array
    ) -> None:
        cta = w.cta
        for lane in _active(lanes):
            shared, map_address, target = _shared(to, lane), int(at[lane]), _shared(barrier, lane)
            coordinates = tuple(int(c[lane]) for c in where)
            cta.mbarrier(target)
            check_initialisation(cta, target)
            issuer = Issuer(i, w, lane)
            tensor_maps.issue(issuer, map_address)
            cta.in_flight += 1
            # Nothing in the ISA says when a copy reads its map, if not before it completes.
            used: int | tensor_map.TensorMap = map_address
            if cta.grid.early_maps:
                used = read_map(cta, map_address)
                tensor_maps.done(issuer, map_address)
            ticket = issue(i, w, lane)
            step = _bound(_load_box, issuer, used, coordinates, shared, target, ticket)
            cta.grid.scheduler.submit(Operation(issuer, step))

    e.call(run, e.address(destination), _base(e, source), e.address(barrier), *_coordinates(i, e, source))


def tensor_store(i: Instruction, e: Emitter, combine: Callable[[str], Combine | None] | None = None) -> None:
    """Emit a tensor copy to global memory; `combine` gives the reduction for the map's element type, None for
    none.
    """
    destination, source = i.operands[:2]

    def run(w: Warp, _s: Split, lanes: Array | None, at: Array, source: Array, *where: Array) -> None:
        for lane in _active(lanes):
            coordinates = tuple(int(c[lane]) for c in where)
            _submit_tensor_store(i, w, lane, int(at[lane]), coordinates, _shared(source, lane), combine)

    e.call(run, _base(e, destination), e.address(source), *_coordinates(i, e, destination))


def _submit_tensor_store(
    i: Instruction,
    w: Warp,
    lane: int,
    map_address: int,
    coordinates: tuple[int, ...],
    shared: int,
    combine: Callable[[str], Combine | None] | None,
) -> None:
    cta, issuer = w.cta, Issuer(i, w, lane)
    tensor_maps.issue(issuer, map_address)

    def function_of(element: tensor_map.Element) -> Combine:
        assert combine is not None
        function = combine(element.name)
        if function is None:
            raise Fault("tensor map", f"elements of type {element.name} cannot be reduced so")
        return function

    def locate() -> tuple[Array, Array, Region | None, int]:
        if combine is not None:
            function_of(read_map(cta, map_address).element)
        box, region, *_ = _box(cta, map_address, coordinates, shared, writes=True)
        tensor_maps.done(issuer, map_address)
        source, to = box.offsets + shared, box.addresses
        if box.in_bounds is not None:
            source, to = source[box.in_bounds], to[box.in_bounds]
        return source, to, region, box.unit

    def reduce(old: Array, new: Array) -> Array:
        element = read_map(cta, map_address).element
        word = f"u{element.bits // 8}"
        return function_of(element)(old.view(word), np.ascontiguousarray(new).view(word)).view(old.dtype)

    ticket = issue(i, w, lane, "bulk")
    store = _Store(cta, thread_groups(w, lane, "bulk"), locate, None if combine is None else reduce, ticket)
    store.submit(issuer)


def _base(e: Emitter, operand: Operand) -> str:
    """The address in front of coordinates."""
    assert isinstance(operand, Address)
    return e.address(Address(operand.base, operand.offset))


def _bound(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


@instruction("cp.async.bulk.prefetch.tensor", yields=True)
def prefetch_tensor(i: Instruction, e: Emitter) -> None:
    """Into a cache, of which there are none: only the map and the coordinates are judged."""
    source = i.operands[0]

    def run(w: Warp, _s: Split, lanes: Array | None, at: Array, *where: Array) -> None:
        for lane in _active(lanes):
            read_map(w.cta, int(at[lane])).box_elements(tuple(int(c[lane]) for c in where))

    if _words(i, 6) != ("L2", "global"):
        raise unsupported(i)
    e.call(run, _base(e, source), *_coordinates(i, e, source))


# Without a tensor map


@instruction("cp.async.bulk", yields=True)
def cp_async_bulk(i: Instruction, e: Emitter) -> None:
    words = _words(i, 3)
    if words[1:] == _LOAD and words[0] in ("shared::cta", "shared::cluster"):
        _bulk_load(i, e, from_shared=False)
    elif words == ("shared::cluster", "shared::cta", "mbarrier::complete_tx::bytes"):
        _bulk_load(i, e, from_shared=True)
    elif words == _STORE:
        bulk_store(i, e)
    else:
        raise unsupported(i)


def _check_bulk(size: int, *addresses: int) -> None:
    if size % 16:
        raise Fault("alignment", f"a bulk copy of {size} bytes, which is no multiple of 16")
    for address in addresses:
        if address % 16:
            raise Fault("alignment", f"a bulk copy at {address:#x}, which is no multiple of 16")


def _bulk_load(i: Instruction, e: Emitter, *, from_shared: bool) -> None:
    destination, source, size, barrier = i.operands[:4]

    def copy(cta: Cta, to: int, at: int, count: int, target: int, ticket: Ticket | None) -> None:
        region = cta.shared if from_shared else cta.grid.memory.region(at, "bulk copy")
        region.span(at, count, "bulk copy")
        steps = np.arange(0, count, 16)
        cta.shared.scatter(to + steps, region.gather(at + steps, 16), 16)
        if cta.grid.counts is not None and not from_shared:
            cta.grid.counts.loaded("bulk_load", region, at + steps, 16, count)
        cta.in_flight -= 1
        if ticket is not None and cta.races is not None:
            if from_shared:
                cta.races.copied_out(ticket, at + steps, 16)
            cta.races.copied_in(ticket, to + steps, 16, cta.mbarrier(target))
        cta.mbarrier_complete(cta.mbarrier(target), count)

    def run(
        w: Warp, _s: Split, lanes: Array | None, to: Array, at: Array, size: Array, barrier: Array
    ) -> None:
        if from_shared and not _CLUSTER & set(w.cta.grid.program.kernel.directives):
            raise Fault(
                "cluster", "a bulk copy from shared memory to that of a cluster, in a launch without clusters"
            )
        for lane in _active(lanes):
            shared, count, target = _shared(to, lane), int(size[lane]), _shared(barrier, lane)
            begin = _shared(at, lane) if from_shared else int(at[lane])
            _check_bulk(count, shared, begin)
            w.cta.mbarrier(target)
            check_initialisation(w.cta, target)
            w.cta.in_flight += 1
            step = _bound(copy, w.cta, shared, begin, count, target, issue(i, w, lane))
            w.cta.grid.scheduler.submit(Operation(Issuer(i, w, lane), step))

    e.call(run, e.address(destination), e.address(source), e.value(size, "u32").u, e.address(barrier))


def bulk_store(i: Instruction, e: Emitter, word: str = "u1", combine: Combine | None = None) -> None:
    """Emit a bulk copy to global memory, or a reduction of elements that are a `word` (a NumPy type) each."""
    destination, source, size = i.operands[:3]

    def run(w: Warp, _s: Split, lanes: Array | None, to: Array, at: Array, size: Array) -> None:
        for lane in _active(lanes):
            begin, count = _shared(at, lane), int(size[lane])
            _check_bulk(count, int(to[lane]), begin)
            store = _Store(
                w.cta,
                thread_groups(w, lane, "bulk"),
                _run_of(w.cta, begin, int(to[lane]), count),
                reduce,
                issue(i, w, lane, "bulk"),
            )
            store.submit(Issuer(i, w, lane))

    def reduce_words(old: Array, new: Array) -> Array:
        assert combine is not None
        return combine(old.view(word), new.view(word)).view(old.dtype)

    reduce = None if combine is None else reduce_words
    e.call(run, e.address(destination), e.address(source), e.value(size, "u32").u)


def _run_of(
    cta: Cta, source: int, to: int, count: int
) -> Callable[[], tuple[Array, Array, Region | None, int]]:
    """Where the items of a run of bytes lie, found when it is asked for."""

    def locate() -> tuple[Array, Array, Region | None, int]:
        cta.shared.span(source, count, "bulk copy")
        region = cta.grid.memory.region(to, "bulk copy")
        region.span(to, count, "bulk copy")
        steps = np.arange(0, count, 16)
        return source + steps, to + steps, region, 16

    return locate


# Groups


@instruction("cp.async.bulk.commit_group", yields=True)
def bulk_commit_group(i: Instruction, e: Emitter) -> None:
    e.call(committer("bulk"))


@instruction("cp.async.bulk.wait_group", blocks=True)
def bulk_wait_group(i: Instruction, e: Emitter) -> None:
    most = i.operands[0]
    if not isinstance(most, Immediate) or i.opcode[4:] not in ((), ("read",)):
        raise unsupported(i)
    e.wait_call(waiter("bulk", most.value, reading=i.has("read")))


def copies_of(lane: int) -> str:
    """What a thread waits for, in words."""
    return f"asynchronous copies of lane {lane}"


def committer(kind: str) -> Callable[..., None]:
    """`(w, s, lanes)`: each thread closes its open group."""

    def run(w: Warp, _s: Split, lanes: Array | None) -> None:
        for lane in _active(lanes):
            thread_groups(w, lane, kind).commit()
        if w.cta.races is not None:
            w.cta.races.order.commit(w, lanes, kind)

    return run


def waiter(kind: str, most: int, *, reading: bool) -> Callable[..., Any]:
    """`(w, s, lanes)` -> None or a Wait: until at most the `most` latest groups of each thread are
    unfinished.
    """

    def run(w: Warp, _s: Split, lanes: Array | None) -> Any:
        if not w.groups:
            return None
        for lane in _active(lanes):
            thread = w.groups.get((lane, kind))
            if thread is not None and thread.pending(most, reading=reading):
                return Wait(kind, thread.queue, partial(copies_of, lane))
        if w.cta.races is not None:
            w.cta.races.order.waited(w, lanes, kind, most)
        return None

    return run

"""Loads and stores of a warp in a state space: which region an address is in, and which lanes take part.

What these give and take are arrays of one element for each active lane: all 32 where `lanes` is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import Fault
from .memory import (
    CONST_WINDOW,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_BYTES,
    Array,
    Region,
)
from .ptx.ir import Instruction
from .registry import unsupported
from .warp import LANES, Split, Warp

Load = Callable[[Warp, "Array | None", Array, int, int], Array]
Store = Callable[[Warp, "Array | None", Array, Array, int, int], None]

_SPACES = {
    "global": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "shared::cluster": "shared",
    "param": "param",
    "param::entry": "param",
    "const": "const",
    "local": "local",
}
WINDOWS = {
    "shared": SHARED_WINDOW,
    "local": LOCAL_WINDOW,
    "param": PARAM_WINDOW,
    "const": CONST_WINDOW,
    "global": 0,
}


def space_of(i: Instruction) -> str:
    """The state space that an opcode names, "generic" where it names none."""
    found = [_SPACES[word] for word in i.opcode[1:] if word in _SPACES]
    if len(found) > 1:
        raise unsupported(i, "two state spaces")
    return found[0] if found else "generic"


def shared_addresses(address: Array, space: str) -> Array:
    """Addresses in the shared window as integers: of a shared space as they are, generic ones less the
    window.
    """
    if space != "generic":
        return address.astype(np.int64)
    found: Array = (address - np.uint64(SHARED_WINDOW)).view(np.int64)
    if int(found.min()) < 0 or int(found.max()) >= WINDOW_BYTES:
        raise Fault("bounds", f"the generic address {int(address[0]):#x} is not one of shared memory")
    return found


def shared_address(address: Array, lanes: Array | None, space: str) -> int:
    """The one shared address that an operand gives in all active lanes."""
    return int(shared_addresses(uniform_array(address, lanes, "the address"), space)[0])


def uniform_array(values: Array, lanes: Array | None, what: str) -> Array:
    """The (1,) value that an operand has in all active lanes. Raises Fault where lanes disagree."""
    active = values if lanes is None else values[lanes]
    if np.count_nonzero(active != active[0]):
        raise Fault("divergence", f"lanes disagree about {what}")
    return active[:1]


def uniform(values: Array, lanes: Array | None, what: str) -> int:
    """As `uniform_array`, as an integer."""
    return int(uniform_array(values, lanes, what)[0])


# Named spaces. An address of shared memory may be in a 32-bit or a 64-bit register.


def _region_load(region: Callable[[Warp], Region]) -> Load:
    def load(w: Warp, lanes: Array | None, address: Array, width: int, count: int) -> Array:
        if lanes is None:
            return region(w).load(address, width, count)
        try:
            return region(w).load(address[lanes], width, count)
        except Fault as fault:
            raise _of_warp(fault, lanes) from None

    return load


def _region_store(region: Callable[[Warp], Region]) -> Store:
    def store(w: Warp, lanes: Array | None, address: Array, value: Array, width: int, count: int) -> None:
        if lanes is None:
            return region(w).store(address, value, width, count)
        try:
            return region(w).store(address[lanes], value[..., lanes], width, count)
        except Fault as fault:
            raise _of_warp(fault, lanes) from None

    return store


def _of_warp(fault: Fault, lanes: Array) -> Fault:
    """A fault of some of the active lanes, with their numbers in the warp."""
    return Fault(fault.kind, fault.message, tuple(int(lanes[lane]) for lane in fault.lanes))


def _shared(w: Warp) -> Region:
    return w.cta.shared


_load_shared, _store_shared = _region_load(_shared), _region_store(_shared)


def _shared_load(w: Warp, lanes: Array | None, address: Array, width: int, count: int) -> Array:
    found = _load_shared(w, lanes, address, width, count)
    races = w.cta.races
    if races is not None:
        races.load(w, lanes, address if lanes is None else address[lanes], width * count)
    return found


def _shared_store(w: Warp, lanes: Array | None, address: Array, value: Array, width: int, count: int) -> None:
    _store_shared(w, lanes, address, value, width, count)
    races = w.cta.races
    if races is not None:
        active = LANES if lanes is None else lanes
        races.store(w, lanes, address[active], width * count)
        differs = w.cta.shared.load(address[active], width, count) != value[..., active]
        if np.count_nonzero(differs):
            raise races.collided(active[np.flatnonzero(differs if count == 1 else differs.any(axis=0))])


def _parameters(w: Warp) -> Region:
    return w.cta.grid.parameters


def _constants(w: Warp) -> Region:
    return w.cta.grid.constants


def _global_load(w: Warp, lanes: Array | None, address: Array, width: int, count: int) -> Array:
    if lanes is None:
        return w.cta.grid.memory.load(address, width, count)
    try:
        return w.cta.grid.memory.load(address[lanes], width, count)
    except Fault as fault:
        raise _of_warp(fault, lanes) from None


def _global_store(w: Warp, lanes: Array | None, address: Array, value: Array, width: int, count: int) -> None:
    if lanes is None:
        return w.cta.grid.memory.store(address, value, width, count)
    try:
        return w.cta.grid.memory.store(address[lanes], value[..., lanes], width, count)
    except Fault as fault:
        raise _of_warp(fault, lanes) from None


def _local(w: Warp) -> tuple[Region, int]:
    """The local memory of a warp, lane behind lane, and the bytes of each."""
    size = -(-w.cta.grid.program.layout.local_bytes // 256) * 256
    if w.index not in w.cta.local:
        w.cta.local[w.index] = Region(0, 32 * size, "local memory")
    return w.cta.local[w.index], size


def _local_addresses(size: int, limit: int, lanes: Array, address: Array, total: int) -> Array:
    at = address[lanes].astype(np.uint64)
    outside = np.flatnonzero(at + np.uint64(total) > np.uint64(limit))
    if len(outside):
        raise Fault(
            "bounds",
            f"{total}-byte access to local memory at {int(at[outside[0]]):#x}, of which a thread has {limit} "
            "bytes",
            tuple(int(lanes[lane]) for lane in outside),
        )
    found: Array = at + (lanes * size).astype(np.uint64)
    return found


def _local_load(w: Warp, lanes: Array | None, address: Array, width: int, count: int) -> Array:
    region, size = _local(w)
    active = LANES if lanes is None else lanes
    limit = w.cta.grid.program.layout.local_bytes
    return region.load(_local_addresses(size, limit, active, address, width * count), width, count)


def _local_store(w: Warp, lanes: Array | None, address: Array, value: Array, width: int, count: int) -> None:
    region, size = _local(w)
    active = LANES if lanes is None else lanes
    limit = w.cta.grid.program.layout.local_bytes
    region.store(
        _local_addresses(size, limit, active, address, width * count), value[..., active], width, count
    )


# Generic addressing: the window that an address lies in says which space it means (PTX ISA, "Generic
# Addressing").


def _window(address: Array) -> list[tuple[str, Array]]:
    """Spaces that addresses lie in, with the positions in the array."""
    top = int(address.max())
    if top < SHARED_WINDOW:
        return [("global", address)]
    names = np.full(len(address), "global", dtype="U6")
    for name, base in WINDOWS.items():
        if base:
            names[(address >= np.uint64(base)) & (address < np.uint64(base + WINDOW_BYTES))] = name
    return [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]


def _generic_load(w: Warp, lanes: Array | None, address: Array, width: int, count: int) -> Array:
    active = LANES if lanes is None else lanes
    chosen = address if lanes is None else address[lanes]
    parts = _window(chosen)
    if len(parts) == 1:
        name = parts[0][0]
        moved = address if name == "global" else address - np.uint64(WINDOWS[name])
        return LOADS[name](w, lanes, moved, width, count)
    shape: Any = (len(active),) if count == 1 else (count, len(active))
    found = np.empty(shape, f"u{width}")
    for name, at in parts:
        found[..., at] = LOADS[name](w, active[at], address - np.uint64(WINDOWS[name]), width, count)
    return found


def _generic_store(
    w: Warp, lanes: Array | None, address: Array, value: Array, width: int, count: int
) -> None:
    active = LANES if lanes is None else lanes
    chosen = address if lanes is None else address[lanes]
    parts = _window(chosen)
    if len(parts) == 1:
        name = parts[0][0]
        moved = address if name == "global" else address - np.uint64(WINDOWS[name])
        return STORES[name](w, lanes, moved, value, width, count)
    for name, at in parts:
        STORES[name](w, active[at], address - np.uint64(WINDOWS[name]), value, width, count)
    return None


LOADS: dict[str, Load] = {
    "global": _global_load,
    "shared": _shared_load,
    "param": _region_load(_parameters),
    "const": _region_load(_constants),
    "local": _local_load,
    "generic": _generic_load,
}
STORES: dict[str, Store] = {
    "global": _global_store,
    "shared": _shared_store,
    "param": _region_store(_parameters),
    "const": _region_store(_constants),
    "local": _local_store,
    "generic": _generic_store,
}


_STRONG = frozenset({"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"})


def strong_words(i: Instruction) -> frozenset[str]:
    """What makes an access a strong one, and what it orders; empty for weak ones (PTX ISA, "Memory
    Consistency Model", "Strong operations"). Atomics are strong anyhow.
    """
    return _STRONG & set(i.opcode)


def strong(
    run: Callable[..., Any], words: frozenset[str], *, reads: bool, writes: bool
) -> Callable[..., Any]:
    """An access `(w, s, lanes, address, ...)` that is strong: it races with no other strong one, and may
    synchronise with one."""

    def ordered(w: Warp, s: Split, lanes: Array | None, address: Array, *operands: Array) -> Any:
        races = w.cta.races
        if races is None:
            return run(w, s, lanes, address, *operands)
        races.strong = words
        try:
            found = run(w, s, lanes, address, *operands)
        finally:
            races.strong = None
        chosen = (address if lanes is None else address[lanes]).astype(np.uint64)
        inside = (chosen >= SHARED_WINDOW) & (chosen < SHARED_WINDOW + WINDOW_BYTES)
        place = np.where(inside, chosen - np.uint64(SHARED_WINDOW), chosen)
        if reads:
            races.order.strong_read(w, lanes, place, words)
        if writes:
            races.order.strong_write(w, lanes, place, words)
        return found

    return ordered


def aligned(split: Split, lanes: Array | None) -> None:
    """For an instruction marked .aligned: all threads of the warp that have not ended execute it together.

    Raises Fault where some do not.
    """
    warp = split.warp
    executing = 32 if lanes is None else len(lanes)
    if executing != warp.alive_count:
        missing = warp.alive.copy()
        if lanes is not None:
            missing[lanes] = False
        raise Fault(
            "divergence",
            f"only {executing} of the warp's {warp.alive_count} lanes execute an instruction that is "
            ".aligned",
            tuple(np.flatnonzero(missing).tolist()),
        )

"""Argument sets of cuTensorMapEncodeTiled, legal ones and ones at the edges of its rules."""

from __future__ import annotations

import random
from typing import Any

from emulated.copies.case import SLICES, TYPES
from emulated.copies.draw import random_map
from sm12x.emulator import tensor_map

Change = tuple[str, int | None, int]


def draw(rng: random.Random) -> tuple[dict[str, Any], list[Change]]:
    """A legal set, and up to three changes (argument, index or None, value) to it."""
    interleave = rng.choice([0, 0, 0, 1, 2])
    m = random_map(rng, interleave=interleave, steps=rng.random() < 0.5, overlap=rng.random() < 0.2)
    base = {
        "kind": m.kind,
        "rank": m.rank,
        "shift": 0,
        "null": 0,
        "dims": list(m.dims),
        "strides": list(m.strides),
        "box": list(m.box),
        "steps": list(m.steps),
        "interleave": m.interleave,
        "swizzle": m.swizzle,
        "l2": m.l2,
        "fill": m.fill,
    }
    changes = [_change(rng, base) for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 3]))]
    kept: list[Change] = []
    for change in changes:
        if change not in kept:
            kept.append(change)
    return base, kept


def _change(rng: random.Random, base: dict[str, Any]) -> Change:
    rank = base["rank"]
    d = rng.randrange(rank)
    size = SLICES[base["interleave"]] or TYPES[base["kind"]][1]
    name = rng.choice(
        [
            *("kind", "rank", "shift", "null", "interleave", "swizzle", "swizzle", "l2", "fill"),
            *("dims", "dims", "strides", "strides", "box", "box", "box", "steps", "steps"),
        ]
    )
    if name == "strides" and rank == 1:
        name = "dims"
    if name == "kind":
        return name, None, rng.choice([-1, *range(17), 100])
    if name == "rank":
        return name, None, rng.choice([0, 1, 2, 3, 4, 5, 6, 255])
    if name == "shift":
        return name, None, rng.choice([1, 2, 4, 8, 16, 24, 32, 48, 64])
    if name == "null":
        return name, None, 1
    if name == "dims":
        wide = [0, 1, 2, 3, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, 1 << 40, 1 << 63]
        return name, d, rng.choice(wide)
    if name == "strides":
        d = rng.randrange(rank - 1)
        row = base["dims"][0] * size
        wide = [0, 1, 8, 15, 16, 17, 24, 32, 48, row, row - 16, row + 16, (1 << 40) - 16, (1 << 40) - 32]
        return name, d, rng.choice([*wide, 1 << 40, 1 << 41, 1 << 63]) % (1 << 64)
    if name == "box":
        edge = [0, 1, 2, 3, 255, 256, 257, 512, 1 << 16, (1 << 32) - 1]
        inner = [16 // min(size, 16), 32 // size, 64 // size, 128 // size, 144 // size, 24 // size]
        return name, d, rng.choice(edge + (inner if d == 0 else []))
    if name == "steps":
        return name, d, rng.choice([0, 1, 2, 3, 5, 7, 8, 9, 16, (1 << 32) - 1])
    if name == "interleave":
        return name, None, rng.choice([-1, 0, 1, 2, 3])
    if name == "swizzle":
        return name, None, rng.choice([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    if name == "l2":
        return name, None, rng.choice([-1, 0, 1, 2, 3, 4])
    return name, None, rng.choice([-1, 0, 1, 2])


def applied(base: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    """A set with changes; where the rank grows the arrays get more of what is harmless."""
    found = {name: list(value) if isinstance(value, list) else value for name, value in base.items()}
    for name, blank in (("dims", 1), ("box", 1), ("steps", 1)):
        found[name] += [blank] * (6 - len(found[name]))
    last = base["strides"][-1] if base["strides"] else 1 << 16
    found["strides"] += [last * max(1, base["dims"][-1])] * (6 - len(found["strides"]))
    for name, index, value in changes:
        if index is None:
            found[name] = value
        else:
            found[name][index] = value
    return found


def accepts(arguments: dict[str, Any], address: int) -> tuple[bool, str | None]:
    """Whether the emulator takes a set, and why not."""
    where = 0 if arguments["null"] else address + arguments["shift"]
    lists = [arguments[name] for name in ("dims", "strides", "box", "steps")]
    modes = [arguments[name] for name in ("interleave", "swizzle", "l2", "fill")]
    try:
        tensor_map.encode_tiled(arguments["kind"], arguments["rank"], where, *lists, *modes)
    except ValueError as error:
        return False, str(error)
    return True, None


def of_later_devices(arguments: dict[str, Any]) -> bool:
    """Whether a set has types or swizzles that sm_90 does not know, whatever its driver says about them."""
    return arguments["kind"] in (13, 14, 15) or arguments["swizzle"] in (4, 5, 6)

"""Drawing maps, places of boxes and cases with them."""

from __future__ import annotations

import random

from emulated.copies.case import GUARD, SHARED_BYTES, SLICES, SPANS, TYPES, Case, Map

ROOM = SHARED_BYTES - 2048  # what boxes may take of shared memory


def align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def random_map(
    rng: random.Random,
    *,
    rank: int | None = None,
    kind: int | None = None,
    interleave: int = 0,
    swizzle: int | None = None,
    steps: bool = False,
    overlap: bool = False,
) -> Map:
    """A legal map whose box fits `ROOM`; `overlap` lets strides be shorter than what they step over, which a
    load may."""
    while True:
        r = rank or rng.randint(3 if interleave else 1, 5)
        k = rng.choice(list(TYPES)) if kind is None else kind
        size = SLICES[interleave] or TYPES[k][1]
        s = rng.randint(int(interleave == 2), 3) if swizzle is None else swizzle
        widest = SPANS[s] or rng.choice([16, 32, 64, 128, 128, 256])
        if interleave:
            # The driver judges a row as if its slices were elements.
            inner = rng.randint(1, 6) * 16 // TYPES[k][1]
            first = rng.randint(1, 9)
        else:
            units = rng.randint(1, max(1, min(widest, 256 * size) // 16))
            inner = min(256, units * 16 // size)
            first = rng.randint(1, 3 * inner)
            if rng.random() < 0.4:
                first = align(first, 16 // size if size < 16 else 1)
        box = (inner, *(rng.choice([1, 2, 3, 4, 5, 8]) for _ in range(r - 1)))
        dims = (first, *(rng.randint(1, 9) for _ in range(r - 1)))
        element_steps = tuple(rng.choice([1, 2, 3, 8]) if steps else 1 for _ in range(r))
        if not interleave:
            element_steps = (1, *element_steps[1:])
        multiple = 32 if interleave == 2 else 16
        strides: list[int] = []
        stride = first * size
        for extent in dims[1:]:
            stride = align(stride, multiple) + multiple * rng.choice([0, 0, 1, 2])
            if overlap and rng.random() < 0.5:
                stride = multiple * rng.randint(0, 4)
            strides.append(stride)
            stride = max(stride * extent, first * size)
        fill = int(TYPES[k][2] and rng.random() < 0.4)
        m = Map(k, dims, tuple(strides), box, element_steps, interleave, s, rng.randint(0, 3), fill)
        if m.shared_bytes + 1024 <= ROOM and m.tensor_bytes < 60000:
            return m


def coordinates(
    rng: random.Random, m: Map, mode: str = "any", *, aligned: bool = True, negative: bool = True
) -> tuple[int, ...]:
    """Where a box begins: inside, across one edge or another, or wholly outside. `aligned`: at a multiple of
    16 bytes of its row, as hardware wants it."""
    found = []
    for extent, box, step in zip(m.dims, m.box, m.steps, strict=True):
        reach = box
        del step
        choices = {
            "inside": [rng.randint(0, max(0, extent - reach))],
            "any": [0, 0, rng.randint(-reach, extent), rng.randint(0, extent), -1, extent - 1],
            "outside": [-reach, extent, -reach - 1, extent + 1, -reach - rng.randint(0, 1 << 20), 1 << 30],
        }
        found.append(rng.choice(choices["any" if mode == "outside" else mode]))
    if mode == "outside":
        d = rng.randrange(m.rank)
        found[d] = rng.choice(
            [-m.box[d], m.dims[d], -m.box[d] - 1, m.dims[d] + 1, -(1 << 30), (1 << 31) - 1, -(1 << 31)]
        )
    if aligned:
        unit = max(1, 16 // m.item)
        found[0] = found[0] // unit * unit
    if not negative:
        found = [max(0, at) for at in found]
    return tuple(found)


def tensor_case(
    rng: random.Random,
    family: str,
    kernel: str,
    m: Map,
    coords: tuple[int, ...],
    *,
    content: str = "bits",
    note: str = "",
    template: Map | None = None,
    replaced: tuple[str, ...] = (),
) -> Case:
    offset = 128 * rng.randint(0, 7)
    return Case(
        family,
        f"{kernel}_{m.rank}d",
        rng.randrange(1 << 32),
        align(m.tensor_bytes + m.offset + GUARD, 256),
        min(SHARED_BYTES, align(offset + m.shared_bytes, 512)),
        m,
        template,
        replaced,
        coords,
        offset,
        m.box_bytes,
        content=content,
        note=note,
    )

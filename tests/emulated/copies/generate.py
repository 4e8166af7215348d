"""The cases: which copies are run on both sides, drawn from a seed, and what each family is about."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from emulated.copies import mbarrier_scripts, ptx
from emulated.copies.case import FIELDS, GUARD, SHARED_BYTES, SPANS, TYPES, Case, Map
from emulated.copies.draw import align, coordinates, random_map, tensor_case

_REDUCIBLE = {  # element types of tensor reductions; those not of PTX ISA's table that an H200 takes, too
    "add": (2, 3, 4, 6, 9, 7, 8),
    "min": (2, 3, 4, 5, 6, 9),
    "max": (2, 3, 4, 5, 6, 9),
    "inc": (2,),
    "dec": (2,),
    "and": (2, 3, 4),
    "or": (2, 3, 4),
    "xor": (2, 3, 4),
}
_CONTENT = {2: "u32", 3: "u32", 4: "u64", 5: "u64", 6: "f16", 7: "f32", 8: "f64", 9: "bf16"}
_CONTENT |= {10: "f32", 11: "f32", 12: "f32"}
_TF32, _ROUNDABLE = (11, 12), (7, 10, 11, 12)  # types whose loads round to TF32, and those that can


def loads(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(count):
        mode = ("any", "inside", "any", "outside", "any")[number % 5]
        m = random_map(rng, rank=1 + number // 5 % 5, overlap=number % 7 == 0)
        content = _CONTENT.get(m.kind, "bits") if number % 2 else "bits"
        yield tensor_case(rng, "load", "load", m, coordinates(rng, m, mode), content=content)


def strided_loads(rng: random.Random, count: int) -> Iterator[Case]:
    for _ in range(count):
        m = random_map(rng, rank=rng.randint(2, 5), steps=True)
        yield tensor_case(rng, "load, element strides", "load", m, coordinates(rng, m))


def narrow_loads(rng: random.Random, count: int) -> Iterator[Case]:
    """Rows narrower than the swizzle span."""
    for number in range(count):
        swizzle = 1 + number % 3
        kind = rng.choice(list(TYPES))
        size = TYPES[kind][1]
        inner = rng.randint(1, max(1, SPANS[swizzle] // 16 - 1)) * 16 // size
        rank = rng.randint(2, 3)
        dims = (rng.randint(1, 2 * inner), *(rng.randint(2, 12) for _ in range(rank - 1)))
        strides = [align(dims[0] * size, 16)]
        if rank == 3:
            strides.append(strides[0] * dims[1])
        box = (inner, *(rng.randint(1, 9) for _ in range(rank - 1)))
        m = Map(kind, dims, tuple(strides), box, (1,) * rank, 0, swizzle, 0, 0)
        kernel = ("load", "load", "store")[number % 3]
        coords = coordinates(rng, m, negative=kernel == "load")
        yield tensor_case(rng, f"{kernel}, narrow rows", kernel, m, coords)


def interleaved(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(count):
        kind = rng.choice(list(TYPES))
        m = random_map(
            rng,
            kind=kind,
            interleave=1 + number % 2,
            swizzle=0 if number % 4 == 0 else None,
            steps=number % 3 == 0,
        )
        kernel = "load" if number % 3 or m.steps[0] > 1 else "store"
        if kernel == "store" and any(step > 1 for step in m.steps):
            kernel = "load"
        coords = coordinates(rng, m, negative=kernel == "load")
        yield tensor_case(rng, f"{kernel}, interleave", kernel, m, coords)


def stores(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(count):
        mode = ("any", "inside", "any", "outside", "any")[number % 5]
        m = random_map(rng, rank=1 + number // 5 % 5)
        content = _CONTENT.get(m.kind, "bits") if number % 2 else "bits"
        coords = coordinates(rng, m, mode, negative=False)
        yield tensor_case(rng, "store", "store", m, coords, content=content)


def row_ends(rng: random.Random, count: int) -> Iterator[Case]:
    """A row of every length against boxes that end in it, at it and behind it: what is written past it.

    The same map and place for a store, a reduction and a load.
    """
    del count
    for kind in (0, 1, 2, 4):
        size = TYPES[kind][1]
        per_unit = 16 // size
        for swizzle in range(4):
            inner = min(SPANS[swizzle] or 48, 48) // size
            inner = align(inner, per_unit) if inner % per_unit else inner
            for extent in range(1, 2 * per_unit + 2):
                for start in (-per_unit, 0, per_unit, 2 * per_unit):
                    stride = align(extent * size, 16) + 16 * rng.randint(0, 1)
                    m = Map(kind, (extent, 3), (stride,), (inner, 2), (1, 1), 0, swizzle, 0, 0)
                    coords = (start, rng.choice([0, 1, 2]))
                    note = f"extent {extent * size} bytes, from {start * size} on"
                    yield tensor_case(rng, "load, row ends", "load", m, coords, note=note)
                    if start < 0:
                        continue
                    yield tensor_case(rng, "store, row ends", "store", m, coords, note=note)
                    if size >= 4:
                        yield tensor_case(rng, "reduce, row ends", "reduce_xor", m, coords, note=note)


def reductions(rng: random.Random, count: int) -> Iterator[Case]:
    every = [(op, kind) for op, kinds in _REDUCIBLE.items() for kind in kinds]
    for number in range(count):
        operation, kind = every[number % len(every)]
        m = random_map(rng, rank=1 + number // len(every) % 5, kind=kind)
        coords = coordinates(rng, m, negative=False)
        family = f"reduce {operation} {TYPES[kind][0]}"
        yield tensor_case(rng, family, f"reduce_{operation}", m, coords, content=_CONTENT[kind])


def doubtful(rng: random.Random, count: int) -> Iterator[Case]:
    """What both sides refuse: rows that begin between multiples of 16 bytes, writes that begin in front of
    the tensor, misaligned addresses, a cluster's memory without one, elements that cannot be reduced, types
    without a rounding in a map that has one."""
    kernels = ("load", "store", "reduce_xor", "prefetch")
    yield from _misaligned(rng, count // 2)
    yield from _bulk_copies(rng, ["bulk_within", "bulk_within_mapped"], 8)
    for operation, kinds in _REDUCIBLE.items():
        # An H200 adds these, which no document says anything of.
        odd = set(TYPES) - set(kinds) - ({10, 11, 12} if operation == "add" else set())
        kind = rng.choice(sorted(odd))
        m = random_map(rng, kind=kind)
        content = _CONTENT.get(kind, "bits")
        family, coords = f"reduce {operation} {TYPES[kind][0]}", coordinates(rng, m, negative=False)
        yield tensor_case(rng, family, f"reduce_{operation}", m, coords, content=content)
    for kind in set(TYPES) - set(_ROUNDABLE):
        for tf32 in _TF32:
            target, template = random_map(rng, rank=2, kind=kind), random_map(rng, rank=2, kind=tf32)
            coords = coordinates(rng, target)
            family = "replace elemtype of TF32"
            yield tensor_case(rng, family, "replace", target, coords, template=template, replaced=FIELDS)
    for number in range(count):
        kernel = kernels[number % 4]
        m = random_map(rng, rank=1 + number // 4 % 5, kind=2)
        inside = coordinates(rng, m, negative=False)
        off = rng.choice([1, 2, 3, 5, -1, -2, -3])
        yield tensor_case(rng, f"{kernel}, misaligned row", kernel, m, (off, *inside[1:]))
    for number in range(count):
        kernel = kernels[1 + number % 2]
        m = random_map(rng, rank=1 + number // 2 % 5, kind=rng.choice([2, 4]))
        found = list(coordinates(rng, m, negative=False))
        d = rng.randrange(m.rank)
        unit = max(1, 16 // m.item) if d == 0 else 1
        found[d] = -unit * rng.choice([1, 2, m.box[d] // unit or 1, 1 << 20])
        note = f"negative in dimension {d}"
        yield tensor_case(rng, f"{kernel}, in front of the tensor", kernel, m, tuple(found), note=note)


def _leaves_rounding(template: Map, target: Map) -> bool:
    """Whether a map that rounds to TF32 becomes one whose type cannot: the rounding stays."""
    return template.kind in _TF32 and target.kind not in _ROUNDABLE


def _misaligned(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(count):
        kernel = ("load", "store")[number % 2]
        m = random_map(rng, kind=2)
        case = tensor_case(rng, "", kernel, m, coordinates(rng, m, "inside"))
        family = f"{kernel}, misaligned in shared memory"
        yield replace(case, family=family, offset=case.offset + rng.choice([8, 16, 32, 64]))
    for number, case in enumerate(_bulk_copies(rng, ["bulk_load", "bulk_store"], count)):
        name, where = case.kernel.replace("_", " "), ("offset", "start")[number // 2 % 2]
        family = f"{name}, misaligned {'in shared memory' if where == 'offset' else 'in global memory'}"
        yield replace(case, family=family, **{where: getattr(case, where) + rng.choice([1, 4, 8])})


def prefetches(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(count):
        m = random_map(rng, rank=1 + number % 5)
        yield tensor_case(rng, "prefetch", "prefetch", m, coordinates(rng, m))


def replacements(rng: random.Random, count: int) -> Iterator[Case]:
    """One field after the other replaced alone, then all: the map that the load goes through is the target's,
    whose fields the template has but for those."""
    for number in range(count):
        rank = 1 + number % 5
        target = random_map(rng, rank=rank, steps=number % 3 == 0)
        other = random_map(rng, rank=rank)
        while _leaves_rounding(other, target):
            other = random_map(rng, rank=rank)
        kinds = [("global_address", {"offset": target.offset + 64})]
        kinds.append(("global_dim", {"dims": other.dims}))
        kinds.append(("box_dim", {"box": (target.box[0], *other.box[1:])}))
        kinds.append(("fill_mode", {"fill": 0}))
        if rank > 1:
            kinds.append(("global_stride", {"strides": tuple(s + 32 for s in target.strides)}))
            kinds.append(("element_stride", {"steps": (1,) * rank}))
            kinds.append(("swizzle_mode", {"swizzle": (target.swizzle + 1) % 4}))
        same = [k for k, (_, size, floating) in TYPES.items() if size == TYPES[target.kind][1]]
        same = [k for k in same if TYPES[k][2] or not target.fill]
        same = [k for k in same if k not in _TF32 or target.kind in _ROUNDABLE]
        kinds.append(("elemtype", {"kind": rng.choice(same)}))
        kinds.append(("rank", {}))
        which = number // 5 % (len(kinds) + 2)
        fields = target.__dict__.copy()
        if which < len(kinds):
            name, change = kinds[which]
            names: tuple[str, ...] = (name,)
            template = Map(**{**fields, **change})
            if name == "rank":
                # A map of one dimension more, whose last is not looked at any more, or the target itself.
                deeper = rank < 5
                template = (
                    Map(
                        **{
                            **fields,
                            "dims": (*target.dims, 1),
                            "strides": (*target.strides, align(target.tensor_bytes, 16)),
                            "box": (*target.box, 1),
                            "steps": (*target.steps, 1),
                        }
                    )
                    if deeper
                    else target
                )
            elif name == "swizzle_mode":
                wide = target.box[0] * TYPES[target.kind][1]
                if template.swizzle and wide > SPANS[template.swizzle]:
                    template = Map(**{**fields, "swizzle": 0})
        else:
            template = other
            names = FIELDS
        family = "replace all fields" if names == FIELDS else f"replace {names[0]}"
        coords = coordinates(rng, target)
        yield tensor_case(rng, family, "replace", target, coords, template=template, replaced=names)
    for number in range(count // 8):
        # Interleave on and off needs a template that is legal both ways.
        target = random_map(rng, rank=3 + number % 3, interleave=1, swizzle=0)
        template = random_map(rng, rank=target.rank)
        while _leaves_rounding(template, target):
            template = random_map(rng, rank=target.rank)
        yield tensor_case(
            rng,
            "replace all fields, interleave",
            "replace",
            target,
            coordinates(rng, target),
            template=template,
            replaced=FIELDS,
        )


def bulk_copies(rng: random.Random, count: int) -> Iterator[Case]:
    names = ["bulk_load", "bulk_store", "bulk_load", "bulk_store", "bulk_prefetch"]
    yield from _bulk_copies(rng, names, count)


def bulk_within(rng: random.Random, count: int) -> Iterator[Case]:
    """From shared to shared memory of a cluster."""
    yield from _bulk_copies(rng, ["bulk_within_cluster", "bulk_within_both"], count)


def _bulk_copies(rng: random.Random, names: list[str], count: int) -> Iterator[Case]:
    for number in range(count):
        kernel = names[number % len(names)]
        size = 16 * rng.choice([1, 2, 3, rng.randint(1, 255), 255, 256])
        offset = 16 * rng.randint(0, 64)
        start = GUARD + 16 * rng.randint(0, 15)
        extra = 8192 + 16 * rng.randint(0, 64)
        dump = align(max(offset, extra if kernel.startswith("bulk_within") else 0) + size + 256, 512)
        yield Case(
            kernel.replace("_", " "),
            kernel,
            rng.randrange(1 << 32),
            align(start + size + GUARD, 256),
            min(dump, SHARED_BYTES),
            offset=offset,
            size=size,
            start=start,
            extra=extra,
        )


def bulk_reductions(rng: random.Random, count: int) -> Iterator[Case]:
    every = [(op, kind) for op, kinds in ptx.BULK_REDUCTIONS.items() for kind in kinds]
    for number in range(count):
        operation, kind = every[number % len(every)]
        size = 16 * rng.choice([1, 2, rng.randint(1, 127), 128])
        offset, start = 16 * rng.randint(0, 16), GUARD + 16 * rng.randint(0, 15)
        yield Case(
            f"bulk {operation} {kind}",
            f"bulk_{operation}_{kind}",
            rng.randrange(1 << 32),
            align(start + size + GUARD, 256),
            align(offset + size + 256, 512),
            offset=offset,
            size=size,
            start=start,
            content=f"u{kind[1:]}" if kind[0] in "sb" and kind != "bf16" else kind,
        )


def cp_asyncs(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(count):
        cache, size = ptx.CP_ASYNC[number % len(ptx.CP_ASYNC)]
        start = GUARD + size * rng.randint(0, 9)
        yield Case(
            "cp.async",
            f"cp_async_{cache}_{size}",
            rng.randrange(1 << 32),
            align(start + 32 * size + GUARD, 256),
            1024,
            offset=16 * rng.randint(0, 16),
            start=start,
            extra=rng.randint(0, 16),
            note=f"sources of {size} bytes and fewer",
        )


def barriers(rng: random.Random, count: int) -> Iterator[Case]:
    for number in range(min(count, mbarrier_scripts.COUNT)):
        yield Case("mbarrier", f"mbarrier_{number}", rng.randrange(1 << 32), 256, 512)


# What is drawn, and how much of it: the number of cases for a full run.
FAMILIES: dict[str, tuple[Callable[[random.Random, int], Iterator[Case]], int]] = {
    "loads": (loads, 2000),
    "strided": (strided_loads, 500),
    "narrow": (narrow_loads, 600),
    "interleaved": (interleaved, 400),
    "stores": (stores, 1200),
    "row_ends": (row_ends, 0),
    "reductions": (reductions, 1240),
    "prefetches": (prefetches, 20),
    "replacements": (replacements, 1200),
    "bulk": (bulk_copies, 400),
    "bulk_within": (bulk_within, 100),
    "bulk_reductions": (bulk_reductions, 540),
    "cp_async": (cp_asyncs, 60),
    "mbarrier": (barriers, mbarrier_scripts.COUNT),
    "doubtful": (doubtful, 40),
}
DOUBTFUL = {"doubtful"}  # those of FAMILIES whose cases hardware is expected to refuse


def batch(name: str, seed: int) -> list[Case]:
    """The cases of one of FAMILIES."""
    make, count = FAMILIES[name]
    return list(make(random.Random(f"{seed} {name}"), count))

"""Data movement: mov, ld, st, cvta and kin (PTX ISA, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..emitter import DTYPES, Emitter, container
from ..memory import Array
from ..ptx.ir import TYPE_BITS, Address, Instruction, Operand, Register, Sink, Vector
from ..registry import instruction, unsupported
from ..spaces import LOADS, STORES, WINDOWS, space_of, strong, strong_words
from ..warp import Split, Warp

_VALUES = {f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)} | {"f32", "f64", "b128"}
_COUNTS = {"v2": 2, "v4": 4, "v8": 8}

# Modifiers of ld and st that say how soon others see an access, or what to keep in a cache. Memory here is
# sequentially consistent and has no caches.
_ORDER = {"weak", "volatile", "relaxed", "acquire", "release", "mmio", "cta", "cluster", "gpu", "sys"}
_CACHE = {
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "unified",
    "L2::cache_hint",
    "L2::64B",
    "L2::128B",
    "L2::256B",
}
_NOWHERE = 0xC1000000  # a shared address, in a CTA that does not exist
_SPACES = {"global", "shared", "shared::cta", "shared::cluster", "param", "param::entry", "const", "local"}


@instruction("mov")
def mov(i: Instruction, e: Emitter) -> None:
    kind = i.opcode[-1]
    if len(i.opcode) != 2 or kind not in _VALUES | {"pred"}:
        raise unsupported(i)
    d, a = i.operands
    if isinstance(d, Vector):
        return _unpack(i, e, d.elements, a, kind)
    if isinstance(a, Vector):
        return _pack(i, e, d, a.elements, kind)
    return e.assign(d, kind, e.value(a, kind).u)


def _part(i: Instruction, kind: str, count: int) -> str:
    bits = TYPE_BITS[kind] // count
    if bits < 8 or (kind == "b128" and count != 2):
        raise unsupported(i, f"elements of {bits} bits")
    return f"b{bits}"


def _unpack(i: Instruction, e: Emitter, elements: tuple[Operand, ...], a: Operand, kind: str) -> None:
    part = _part(i, kind, len(elements))
    bits = TYPE_BITS[part]
    if kind == "b128":
        e.line(f"x = {e.value(a, kind).u}")
        for element, half in zip(elements, ("low", "high"), strict=True):
            e.assign(element, part, f"x[{half!r}]")
        return
    e.line(f"x = {e.value(a, kind).u}")  # before any element is written: one of them may be the source
    for at, element in enumerate(elements):
        if not isinstance(element, Sink):
            shifted = f"(x >> {e.constant(container(kind), at * bits)})" if at else "x"
            text = f"{shifted}.astype({container(part)})"
            e.assign(element, part, f"({text} & {e.constant('u2', 255)})" if bits == 8 else text)


def _pack(i: Instruction, e: Emitter, d: Operand, elements: tuple[Operand, ...], kind: str) -> None:
    part = _part(i, kind, len(elements))
    bits, whole = TYPE_BITS[part], container(kind)
    if kind == "b128":
        halves = ", ".join(e.value(element, part).u for element in elements)
        return e.assign(d, kind, f"{e.bind(_joined)}({halves})")
    terms = []
    for at, element in enumerate(elements):
        text = f"{e.value(element, part).u}.astype({whole})"
        terms.append(f"({text} << {e.constant(whole, at * bits)})" if at else text)
    e.assign(d, kind, " | ".join(terms))


def _joined(low: Array, high: Array) -> Array:
    """Two halves of 64 bits as values of 128."""
    found = np.empty(low.shape, DTYPES["u16"])
    found["low"], found["high"] = low, high
    return found


def _access(i: Instruction) -> tuple[str, int, str]:
    """Space, elements and type of a load or store."""
    kind, count = i.opcode[-1], 1
    if kind not in _VALUES:
        raise unsupported(i, f"type .{kind}")
    for word in i.opcode[1:-1]:
        if word in _COUNTS:
            count = _COUNTS[word]
        elif word not in _ORDER | _CACHE | _SPACES and not word.startswith("L1::"):
            raise unsupported(i, f"modifier .{word}")
    if kind == "b128" and count > 1:
        raise unsupported(i, "a vector of .b128")
    return space_of(i), count, kind


def _address(i: Instruction, e: Emitter, operand: Operand, space: str) -> str:
    if space in ("global", "generic") and isinstance(operand, Address):
        base = operand.base
        if isinstance(base, Register) and TYPE_BITS[base.type] != 64:
            raise unsupported(i, f"an address in a .{base.type} register")
    return e.address(operand)


def loader(space: str, width: int, count: int) -> Callable[..., Array]:
    """`(w, s, lanes, address)` -> what is loaded, in the containers of registers."""
    load = LOADS[space]

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array) -> Array:
        return load(w, lanes, address, width, count)

    def run_bytes(w: Warp, _s: Split, lanes: Array | None, address: Array) -> Array:
        return load(w, lanes, address, 1, count).astype(np.uint16)

    def run_halves(w: Warp, _s: Split, lanes: Array | None, address: Array) -> Array:
        return _joined(*load(w, lanes, address, 8, 2))

    return run_halves if width == 16 else run_bytes if width == 1 else run


def storer(space: str, width: int, count: int) -> Callable[..., None]:
    """`(w, s, lanes, address, value...)`; values are in the containers of registers."""
    store = STORES[space]

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array, value: Array) -> None:
        store(w, lanes, address, value, width, 1)

    def run_bytes(w: Warp, _s: Split, lanes: Array | None, address: Array, value: Array) -> None:
        store(w, lanes, address, value.astype(np.uint8), 1, 1)

    def run_vector(w: Warp, _s: Split, lanes: Array | None, address: Array, *values: Array) -> None:
        store(w, lanes, address, np.array(values).astype(f"u{width}", copy=False), width, count)

    def run_halves(w: Warp, _s: Split, lanes: Array | None, address: Array, value: Array) -> None:
        store(w, lanes, address, np.array([value["low"], value["high"]]), 8, 2)

    if width == 16:
        return run_halves
    return run_vector if count > 1 else run_bytes if width == 1 else run


@instruction("ld", "ldu")
def ld(i: Instruction, e: Emitter) -> None:
    space, count, kind = _access(i)
    d, a = i.operands[:2]
    lanes = e.lanes()
    e.observe(space, _address(i, e, a, space))
    run, words = loader(space, TYPE_BITS[kind] // 8, count), strong_words(i)
    if words:
        run = strong(run, words, reads=True, writes=False)
    found = e.call(run, _address(i, e, a, space), result=True)
    if count == 1:
        return e.put(d, kind, found, lanes)
    if not isinstance(d, Vector) or len(d.elements) != count:
        raise unsupported(i, f"expected {count} destinations")
    for at, element in enumerate(d.elements):
        e.put(element, kind, f"{found}[{at}]", lanes)
    return None


@instruction("st")
def st(i: Instruction, e: Emitter) -> None:
    space, count, kind = _access(i)
    if space in ("const", "param"):
        raise unsupported(i, f"a store to .{space}")
    a, b = i.operands[:2]
    values = b.elements if isinstance(b, Vector) else (b,)
    if len(values) != count:
        raise unsupported(i, f"expected {count} sources")
    sources = [e.value(value, kind).u for value in values]
    e.observe(space, _address(i, e, a, space))
    run, words = storer(space, TYPE_BITS[kind] // 8, count), strong_words(i)
    if words:
        run = strong(run, words, reads=False, writes=True)
    e.call(run, _address(i, e, a, space), *sources)


@instruction("cvta")
def cvta(i: Instruction, e: Emitter) -> None:
    """Generic addresses and back. Those of global memory are the same in both."""
    space, kind = space_of(i), i.opcode[-1]
    if kind != "u64" or space == "generic":
        raise unsupported(i)
    d, a = i.operands
    source = e.value(a, kind).u
    window = e.constant("u8", WINDOWS[space])
    sign = "-" if i.has("to") else "+"
    e.assign(d, kind, f"{source} {sign} {window}" if WINDOWS[space] else source)


@instruction("isspacep")
def isspacep(i: Instruction, e: Emitter) -> None:
    space = space_of(i)
    d, a = i.operands
    source = e.value(a, "u64").u
    if space == "global":
        return e.assign(d, "pred", f"({source} < {e.constant('u8', WINDOWS['shared'])})")
    window = e.constant("u8", WINDOWS[space] >> 32)
    return e.assign(d, "pred", f"(({source} >> {e.constant('u8', 32)}) == {window})")


@instruction("mapa")
def mapa(i: Instruction, e: Emitter) -> None:
    """Shared memory of a CTA of the cluster. Clusters have one CTA, whose own address it is; for any other
    the address is one that no shared memory has. CUTLASS asks with every lane, and then uses few.
    """
    kind = i.opcode[-1]
    if kind not in ("u32", "u64") or i.opcode[1:-1] not in ((), ("shared::cluster",)):
        raise unsupported(i)
    d, a, b = i.operands
    generic = kind == "u64" and "shared::cluster" not in i.opcode
    nowhere = e.constant(container(kind), _NOWHERE + (WINDOWS["shared"] if generic else 0))
    own = f"{e.value(b, 'u32').u} == {e.constant('u4', 0)}"
    e.assign(d, kind, f"where({own}, {e.value(a, kind).u}, {nowhere})")


@instruction("getctarank")
def getctarank(i: Instruction, e: Emitter) -> None:
    e.assign(i.operands[0], "u32", e.constant("u4", 0))


@instruction("prefetch", "prefetchu", "applypriority", "cp.async.bulk.prefetch.L2")
def prefetch(i: Instruction, e: Emitter) -> None:
    """A hint. There are no caches, so that all it can do is be wrong about an address, which PTX allows it
    to.
    """


@instruction("createpolicy")
def createpolicy(i: Instruction, e: Emitter) -> None:
    """A cache policy, which nothing here looks at."""
    e.assign(i.operands[0], "b64", e.constant("u8", 0))

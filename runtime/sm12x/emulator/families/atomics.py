"""Atomic operations (PTX ISA, "atom", "red"). Lanes follow each other in order.

A sum of f32 in global memory takes subnormal operands as zeros and gives zeros for subnormal results; in
shared memory it does not. A sum of f64 in global memory passes a NaN on as it is, signalling or not, the
operand's before that in memory; in shared memory it is a loop around an add of the operand and the old value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..emitter import Emitter
from ..memory import SHARED_WINDOW, Array
from ..numerics import arith, bitwise
from ..ptx.ir import TYPE_BITS, Instruction
from ..registry import instruction, unsupported
from ..spaces import LOADS, STORES, space_of, strong, strong_words
from ..warp import LANES, Split, Warp

_WORDS = {
    *("relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys"),
    *("global", "shared", "shared::cta", "shared::cluster", "L2::cache_hint"),
}
_TYPES = {"b32", "b64", "u32", "s32", "u64", "s64", "f32", "f64"}

# Old value and operands, of the type's own NumPy kind, to the new value.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "min": min,
    "max": max,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: c if old == b else old,
    "inc": lambda old, b: old.dtype.type(0) if old >= b else old + old.dtype.type(1),
    "dec": lambda old, b: b if old == 0 or old > b else old - old.dtype.type(1),
}
_BITWISE = {"and", "or", "xor", "exch", "cas"}


def _operation(i: Instruction) -> tuple[str, str]:
    """Operation and type."""
    kind = i.opcode[-1]
    names = [word for word in i.opcode[1:-1] if word in _OPERATIONS]
    extra = [word for word in i.opcode[1:-1] if word not in _OPERATIONS and word not in _WORDS]
    if extra or len(names) != 1 or kind not in _TYPES:
        raise unsupported(i, f"modifier .{extra[0]}" if extra else "")
    name = names[0]
    if (kind[0] == "b") != (name in _BITWISE) or (kind[0] == "f" and name != "add"):
        raise unsupported(i)
    return name, kind


def _atomic(space: str, name: str, kind: str) -> Callable[..., Array]:
    load, store = LOADS[space], STORES[space]
    operation = _OPERATIONS[name] if kind[0] != "f" else None
    width = TYPE_BITS[kind] // 8
    number = np.dtype({"s": f"i{width}", "f": f"f{width}"}.get(kind[0], f"u{width}"))
    bits = np.dtype(f"u{width}")

    def run(w: Warp, _s: Split, lanes: Array | None, address: Array, *operands: Array) -> Array:
        active = LANES if lanes is None else lanes
        found = np.empty(len(active), bits)
        for at, lane in enumerate(active):
            one = np.array([lane])
            old = load(w, one, address, width, 1)
            if operation is None:
                is_global = _is_global(space, int(address[lane]))
                value = _sum(kind, is_global, old, operands[0][one]).view(number)[0]
            else:
                value = operation(old.view(number)[0], *(x.view(number)[lane] for x in operands))
            store(w, one, address, np.full(32, value, number).view(bits), width, 1)
            found[at] = old[0]
        return found

    return run


def _is_global(space: str, address: int) -> bool:
    return space == "global" or (space == "generic" and address < SHARED_WINDOW)


def _sum(kind: str, is_global: bool, old: Array, operand: Array) -> Array:
    """Bits of the sum of the bits of two numbers, rounded to nearest even."""
    terms = (operand, old)
    flushed = is_global and kind == "f32"
    if flushed:
        terms = (bitwise.flush(kind, operand), bitwise.flush(kind, old))
    total = arith.lookup("add", kind, None, frozenset())(*terms)
    if is_global and kind == "f64":
        for nan in (old, operand):
            total = np.where(bitwise.is_nan(kind, nan), nan, total)
    return bitwise.flush(kind, total) if flushed else total


@instruction("atom", yields=True)
def atom(i: Instruction, e: Emitter) -> None:
    name, kind = _operation(i)
    d, a, *sources = i.operands
    if i.has("L2::cache_hint"):
        sources.pop()
    lanes = e.lanes()
    values = [e.value(source, kind).u for source in sources]
    e.observe(space_of(i), e.address(a))
    run = strong(_atomic(space_of(i), name, kind), strong_words(i), reads=True, writes=True)
    found = e.call(run, e.address(a), *values, result=True)
    e.put(d, kind, found, lanes)


@instruction("red", yields=True)
def red(i: Instruction, e: Emitter) -> None:
    if i.opcode[1] == "async":
        raise unsupported(i)
    name, kind = _operation(i)
    if name in ("exch", "cas"):
        raise unsupported(i)
    a, b = i.operands[:2]
    e.observe(space_of(i), e.address(a))
    run = strong(_atomic(space_of(i), name, kind), strong_words(i), reads=True, writes=True)
    e.call(run, e.address(a), e.value(b, kind).u)

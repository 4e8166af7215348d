"""Bulk reductions from shared to global memory (PTX ISA, "cp.reduce.async.bulk",
"cp.reduce.async.bulk.tensor").

They are bulk stores that combine with what is there, element by element and each element at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..emitter import Emitter
from ..memory import Array
from ..numerics import arith
from ..ptx.ir import Instruction
from ..registry import instruction, unsupported
from .bulk_copy import Combine, bulk_store, tensor_store

_STORE = ("global", "shared::cta")
_REST = {"bulk_group", "tile", "noftz", "L2::cache_hint"}
_NAMES = {"add", "min", "max", "inc", "dec", "and", "or", "xor"}
_FLOATS = {"f16", "bf16", "f32", "f64"}
_ORDERED = {"u32", "s32", "u64", "s64", "f16", "bf16"}
_BITS = {"b32", "b64", "u32", "s32", "u64"}
# Types by operation: those of PTX ISA's table, and for elements of tensors those that an H200 takes. It adds
# f32.ftz, tf32 and tf32.ftz, too, which no document mentions, and refuses all others.
_TYPES = {
    "add": {"u32", "s32", "u64", *_FLOATS},
    "min": _ORDERED,
    "max": _ORDERED,
    "inc": {"u32"},
    "dec": {"u32"},
    "and": _BITS,
    "or": _BITS,
    "xor": _BITS,
}


def combiner(name: str, kind: str) -> Combine | None:
    """`old, new -> result` on arrays of unsigned words of the type's width; None where PTX has no such
    reduction.
    """
    if kind not in _TYPES[name]:
        return None
    if kind in _FLOATS:
        run = arith.lookup(name, kind, "rn" if name == "add" else None, frozenset())
        if kind == "f64":
            return lambda old, new: _keeping_nan(old, new, run(old, new))
        return lambda old, new: run(old, new)
    number = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "inc": lambda old, new: np.where(old >= new, 0, old + 1),
        "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1),
    }
    function = functions[name]
    return lambda old, new: function(old.view(number), new.view(number)).astype(number).view(old.dtype)


def _keeping_nan(old: Array, new: Array, found: Array) -> Array:
    """Results with a NaN operand of binary64 as it is, of two the new one: an H200 makes none quiet."""
    infinite, magnitude = np.uint64(0x7FF << 52), np.uint64((1 << 63) - 1)
    found = np.where(old & magnitude > infinite, old, found)
    return np.where(new & magnitude > infinite, new, found)


@instruction("cp.reduce.async.bulk.tensor", yields=True)
def tensor_reduce(i: Instruction, e: Emitter) -> None:
    name = _checked(i, i.opcode[6:8], i.opcode[8:])
    tensor_store(i, e, lambda kind: combiner(name, kind))


@instruction("cp.reduce.async.bulk", yields=True)
def bulk_reduce(i: Instruction, e: Emitter) -> None:
    kind = i.opcode[-1]
    name = _checked(i, i.opcode[4:6], i.opcode[6:-1])
    combine = combiner(name, kind)
    if combine is None:
        raise unsupported(i)
    bits = 16 if kind == "bf16" else int(kind[1:])
    bulk_store(i, e, f"u{bits // 8}", combine)


def _checked(i: Instruction, direction: tuple[str, ...], rest: tuple[str, ...]) -> str:
    """The operation's name, of a form that is implemented."""
    names = [word for word in rest if word in _NAMES]
    extra = [word for word in rest if word not in _NAMES | _REST]
    if direction != _STORE or len(names) != 1 or extra:
        raise unsupported(i)
    return names[0]

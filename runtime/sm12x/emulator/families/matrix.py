"""Warp-level matrix instructions (PTX ISA, "mma.sync", "ldmatrix", "stmatrix", "movmatrix"). What they
compute is in `numerics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..emitter import Emitter
from ..memory import Array
from ..numerics import matrix as matrix_numerics
from ..numerics import mma as mma_numerics
from ..numerics.unsupported import Unsupported
from ..ptx.ir import Immediate, Instruction, Operand, Register, Vector
from ..registry import instruction, unsupported
from ..spaces import aligned, space_of
from ..warp import Split, Warp


def _elements(i: Instruction, operand: Operand) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector):
        raise unsupported(i, "an operand that is no vector")
    return operand.elements


def _aligned(i: Instruction, e: Emitter) -> None:
    if i.guard is not None:
        raise unsupported(i, "a guard")
    if not e.full:
        e.call(_check_aligned)


def _check_aligned(_w: Warp, s: Split, lanes: Array | None) -> None:
    aligned(s, lanes)


@instruction("mma.sync.aligned")
def mma(i: Instruction, e: Emitter) -> None:
    """MMAs that do not need each other's results are computed together."""
    words = list(i.opcode[3:])
    kind = next((w.removeprefix("kind::") for w in words if w.startswith("kind::")), None)
    scale_vec = next((w.removeprefix("scale_vec::") for w in words if w.startswith("scale_vec::")), None)
    satfinite, scaled = "satfinite" in words, "block_scale" in words
    rest = [w for w in words if "::" not in w and w not in ("satfinite", "block_scale")]
    scale_type = rest.pop() if scaled else "ue8m0"
    if len(rest) != 7 or rest[1:3] != ["row", "col"]:
        raise unsupported(i)
    shape, _, _, d_type, a_type, b_type, c_type = rest
    try:
        run = mma_numerics.lookup(
            shape, kind, a_type, b_type, c_type, d_type, scale_vec, scale_type, satfinite, e.truncate_bits
        )
    except Unsupported as error:
        raise unsupported(i, str(error)) from error
    _aligned(i, e)
    d, a, b, c, *scales = i.operands
    inputs = [e.value(x, "b32").u for operand in (a, b, c) for x in _elements(i, operand)]
    counts = tuple(len(_elements(i, operand)) for operand in (a, b, c))
    selectors: tuple[int, ...] = ()
    if scaled:
        data, selectors = _scales(i, e, scales)
        inputs += data
    elif scales:
        raise unsupported(i)
    function = _joined.setdefault((run, counts, selectors), _batched(run, counts, selectors))
    e.batch(function, function, inputs, list(_elements(i, d)))


_joined: dict[Any, Callable[..., Any]] = {}


def _scales(i: Instruction, e: Emitter, operands: list[Operand]) -> tuple[list[str], tuple[int, ...]]:
    """Source of the two scale registers, and byte and thread selectors of A and of B."""
    if len(operands) != 4:
        raise unsupported(i)
    data = [e.value(_elements(i, operand)[0], "b32").u for operand in operands[::2]]
    chosen = [x for operand in operands[1::2] for x in _elements(i, operand)]
    constants = [value for x in chosen if (value := _constant(e, x)) is not None]
    if len(constants) != 4:
        raise unsupported(i, "selectors that are no constants")
    return data, tuple(constants)


def _constant(e: Emitter, operand: Operand) -> int | None:
    """The integer that an operand always is, None where it may change."""
    if isinstance(operand, Register):
        return e.constants.get(operand.index)
    return operand.value if isinstance(operand, Immediate) else None


def _batched(
    run: Callable[..., Any], counts: tuple[int, ...], selectors: tuple[int, ...]
) -> Callable[..., Any]:
    """`(w, [inputs, ...])` -> the registers of D of each MMA."""
    a_end, b_end = counts[0], counts[0] + counts[1]
    c_end = b_end + counts[2]

    def compute(_w: Warp, calls: tuple[tuple[Array, ...], ...]) -> Array:
        flat = np.concatenate([x for call in calls for x in call])
        stacked = flat.reshape(len(calls), -1, 32).swapaxes(0, 1)
        scales = None
        if selectors:
            a_byte, a_thread, b_byte, b_thread = selectors
            scales = (stacked[c_end], a_byte, a_thread, stacked[c_end + 1], b_byte, b_thread)
        found = run(stacked[:a_end], stacked[a_end:b_end], stacked[b_end:c_end], scales)
        by_call: Array = np.array(found).swapaxes(0, 1)
        return by_call

    return compute


def _form(i: Instruction) -> tuple[str, str, bool, str, str | None]:
    """shape, number, trans, type, source type"""
    words = [w for w in i.opcode[3:] if w not in ("shared", "shared::cta", "trans")]
    number = next((w for w in words if w[0] == "x"), "")
    words = [w for w in words if w != number]
    if len(words) not in (2, 3):
        raise unsupported(i)
    return words[0], number, i.has("trans"), words[1], words[2] if len(words) == 3 else None


def rows_of(i: Instruction) -> tuple[int, int]:
    """Rows that an ldmatrix or stmatrix touches, at the addresses of the first lanes, and bytes of each."""
    shape, number, trans, kind, source = _form(i)
    if i.opcode[0] == "stmatrix":
        stored = matrix_numerics.stmatrix(shape, number, trans, kind)
        return stored.rows, stored.bytes_per_row
    loaded = matrix_numerics.ldmatrix(shape, number, trans, kind, source)
    return loaded.rows, loaded.bytes_per_row


@instruction("ldmatrix.sync.aligned")
def ldmatrix(i: Instruction, e: Emitter) -> None:
    shape, number, trans, kind, source = _form(i)
    if space_of(i) != "shared":
        raise unsupported(i, "a generic address")
    try:
        form = matrix_numerics.ldmatrix(shape, number, trans, kind, source)
    except Unsupported as error:
        raise unsupported(i, str(error)) from error
    d = _elements(i, i.operands[0])
    if len(d) != form.registers:
        raise unsupported(i, f"expected {form.registers} destinations")
    _aligned(i, e)
    rows, size, fragments = form.rows, form.bytes_per_row, form.fragments

    def run(w: Warp, address: Array) -> Array:
        chosen = address if rows == 32 else address[:rows]
        found = fragments(w.cta.shared.load_rows(chosen, size))
        if w.cta.races is not None:
            w.cta.races.load_rows(w, chosen, size)
        return found

    e.observe("shared", e.address(i.operands[1]))
    name = e.temporary()
    e.line(f"{name} = {e.bind(run)}(w, {e.address(i.operands[1])})")
    for at, element in enumerate(d):
        e.put(element, "b32", f"{name}[{at}]", "None")


@instruction("stmatrix.sync.aligned")
def stmatrix(i: Instruction, e: Emitter) -> None:
    shape, number, trans, kind, source = _form(i)
    if space_of(i) != "shared" or source is not None:
        raise unsupported(i)
    try:
        form = matrix_numerics.stmatrix(shape, number, trans, kind)
    except Unsupported as error:
        raise unsupported(i, str(error)) from error
    values = _elements(i, i.operands[1])
    if len(values) != form.registers:
        raise unsupported(i, f"expected {form.registers} sources")
    _aligned(i, e)
    rows, row_bytes = form.rows, form.row_bytes

    def run(w: Warp, address: Array, *registers: Array) -> None:
        w.cta.shared.store_rows(address[:rows], row_bytes(np.array(registers)))
        if w.cta.races is not None:
            w.cta.races.store_rows(w, address[:rows])

    e.observe("shared", e.address(i.operands[0]))
    e.line(
        f"{e.bind(run)}(w, {', '.join((e.address(i.operands[0]), *(e.value(v, 'b32').u for v in values)))})"
    )


@instruction("movmatrix.sync.aligned.m8n8.trans.b16")
def movmatrix(i: Instruction, e: Emitter) -> None:
    _aligned(i, e)
    d, a = i.operands
    e.assign(d, "b32", f"{e.bind(matrix_numerics.movmatrix)}({e.value(a, 'b32').u})")

"""Checks of addresses: alignment, overlap, room in the workspace. They run on every call, on integers
only."""

from __future__ import annotations

from collections.abc import Sequence

from .validate import ALIGNMENT, Matrix

WORKSPACE_ALIGNMENT = 256


def overlaps(p: int, x: Matrix, q: int, y: Matrix) -> bool:
    """Whether matrix x at address p and matrix y at address q share a byte.

    Rows may lie in the gaps between the rows of the other, as column slices of one buffer do; strides that
    differ are taken to meet wherever the ranges do.
    """
    if p >= q + y.span or q >= p + x.span:
        return False
    wide_x, wide_y = x.length * x.element_bytes, y.length * y.element_bytes
    step_x, step_y = x.stride * x.element_bytes, y.stride * y.element_bytes
    if x.rows == 1:
        step_x = step_y
    elif y.rows == 1:
        step_y = step_x
    if step_x != step_y or step_x == 0:
        return True
    apart = (q - p) % step_x
    return apart < wide_x or apart + wide_y > step_x


def check_alignment(pointers: Sequence[tuple[str, int, int]]) -> None:
    """Raises ValueError for the first (argument, address, multiple) that is not aligned."""
    for argument, address, multiple in pointers:
        if address % multiple:
            raise ValueError(
                f"{argument}: expected an address that is a multiple of {multiple} bytes, got {address:#x} "
                f"({address % multiple} beyond one)"
            )


def check_present(pointers: Sequence[tuple[str, int]]) -> None:
    """Raises ValueError for the first (argument, address) of an array with elements that has no memory."""
    for argument, address in pointers:
        if not address:
            raise ValueError(
                f"{argument}: expected an array that has memory, got address 0 (storage resized to nothing?)"
            )


def check_overlap(out: str, address: int, d: Matrix, inputs: Sequence[tuple[str, int, Matrix]]) -> None:
    """Raises ValueError where `out` shares memory with an input."""
    for argument, pointer, x in inputs:
        if overlaps(address, d, pointer, x):
            raise ValueError(f"{out}: expected memory of its own, got an array that overlaps {argument}")


def workspace_base(
    address: int,
    size: int,
    needed: int,
    enough: str = "sm12x.workspace_size gives enough for every variant",
) -> int:
    """First aligned address in a workspace. Raises ValueError where `needed` bytes do not fit behind it;
    `enough` tells the caller who knows how many."""
    base = -(-address // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    if base + needed > address + size:
        lost = base - address
        beyond = f", of which {lost} lie before the first multiple of {WORKSPACE_ALIGNMENT}" if lost else ""
        raise ValueError(f"workspace: expected at least {needed} bytes ({enough}), got {size}{beyond}")
    return base


def check_workspace(base: int, needed: int, others: Sequence[tuple[str, int, Matrix]]) -> None:
    """Raises ValueError where the part of the workspace that is used shares memory with another argument."""
    used = Matrix(1, needed, needed, 1)
    for argument, pointer, x in others:
        if overlaps(base, used, pointer, x):
            raise ValueError(f"workspace: expected memory of its own, got an array that overlaps {argument}")


def check_operands(a: int, b: int, out: int) -> None:
    """Raises ValueError where a, b or out is not aligned as TMA needs it."""
    check_alignment((("a", a, ALIGNMENT), ("b", b, ALIGNMENT), ("out", out, ALIGNMENT)))

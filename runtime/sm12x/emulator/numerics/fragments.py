"""Where the elements of A, B, C and the block scales of an ``mma.sync`` lie in the registers of a warp.

PTX ISA 9.3, 9.7.15.3 (block scaling) and 9.7.15.5.6 to 9.7.15.5.11 (fragments of m16n8k4 to m16n8k64). With
g = lane / 4 and t = lane % 4, every one of these shapes follows one rule; a register holds ``per``
elements, the first in its low bits:

* A: register r holds row g + 8 * (r % 2), columns (r / 2) * 4 * per + t * per + 0 .. per - 1
* B: register r holds column g, rows r * 4 * per + t * per + 0 .. per - 1
* C, D: elements 2 * r and 2 * r + 1 of a lane are row g + 8 * r, columns 2 * t and 2 * t + 1

Arrays of elements have shape (..., registers * 32 * per), in register, lane, element order; leading axes
are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from sm12x.emulator.numerics.arrays import Array, permuted

ROWS, COLUMNS = 16, 8


def join(registers: Sequence[Array]) -> Array:
    """Registers of shape (..., 32) one after the other: contiguous, shape (..., 32 * len(registers))."""
    joined: Array = np.ascontiguousarray(np.concatenate(registers, axis=-1))
    return joined


def a_matrix(elements: Array, per: int) -> Array:
    """A of shape (..., 16, k) from its elements (..., 16 * k)."""
    # chunk of k, half of the rows, g, t, element
    return permuted(elements, (-1, 2, 8, 4, per), (1, 2, 0, 3, 4), (ROWS, -1))


def b_matrix(elements: Array, per: int) -> Array:
    """B transposed, of shape (..., 8, k), from its elements (..., 8 * k)."""
    # chunk of k, g, t, element
    return permuted(elements, (-1, 8, 4, per), (1, 0, 2, 3), (COLUMNS, -1))


def c_matrix(elements: Array, per: int) -> Array:
    """C of shape (..., 16, 8) from its elements (..., 128); ``per`` is 1 (32-bit) or 2 (packed 16-bit)."""
    # half of the rows, column of the pair if in different registers, g, t, the same if in one register
    return permuted(elements, (2, 2 // per, 8, 4, per), (0, 2, 3, 1, 4), (ROWS, COLUMNS))


def d_elements(matrix: Array, per: int) -> Array:
    """Elements (..., 128) in register order from D of shape (..., 16, 8); the inverse of ``c_matrix``."""
    rows = matrix.reshape(*matrix.shape[:-2], ROWS * COLUMNS)
    return permuted(rows, (2, 8, 4, 2 // per, per), (0, 3, 1, 2, 4), (ROWS * COLUMNS,))


def registers(elements: Array) -> list[Array]:
    """Register operands, uint32 (..., 32) each, from the elements of D."""
    words = elements.view(np.uint32)
    words = words.reshape(*words.shape[:-1], -1, 32)
    return [words[..., r, :] for r in range(words.shape[-2])]


@cache
def a_scale_bytes(count: int, byte: int, thread: int) -> Array:
    """Which of the warp's 128 bytes of ``scale-a-data`` hold the scales of A, shape (16, count).

    ``count`` scales of one row (1X, 2X, 4X) are adjacent bytes from ``byte`` on. In each quad the pair of
    lanes chosen by ``thread`` holds two rows: quad g's first lane row g, its second row g + 8. ValueError:
    a selector outside Table 40, where PTX leaves the behaviour undefined.
    """
    _check_selectors("a", count, byte, thread, 2)
    rows = np.arange(ROWS)
    lanes = 4 * (rows % 8) + 2 * thread + rows // 8
    return 4 * lanes[:, None] + byte + np.arange(count)


@cache
def b_scale_bytes(count: int, byte: int, thread: int) -> Array:
    """The same for ``scale-b-data``, shape (8, count): lane ``thread`` of quad g has column g of B."""
    _check_selectors("b", count, byte, thread, 4)
    lanes = 4 * np.arange(COLUMNS) + thread
    return 4 * lanes[:, None] + byte + np.arange(count)


def _check_selectors(operand: str, count: int, byte: int, thread: int, threads: int) -> None:
    if byte not in range(0, 4, count):
        allowed = ", ".join(map(str, range(0, 4, count)))
        raise ValueError(f"byte-id-{operand} is {byte}; with .scale_vec::{count}X it is one of {allowed}")
    if thread not in range(threads):
        raise ValueError(f"thread-id-{operand} is {thread}; it is between 0 and {threads - 1}")

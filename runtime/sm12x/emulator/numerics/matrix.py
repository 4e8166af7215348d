"""``ldmatrix``, ``stmatrix``, ``movmatrix``: which bytes of shared memory lie in which register and lane.

PTX ISA 9.3, 9.7.15.5.15 to 9.7.15.5.17. A load is two steps: read the rows that the first ``rows`` lanes
point to, then ``fragments(rows)``; a store is ``row_bytes(registers)``, then write the rows. So the memory,
its bounds and its shadow bits are the caller's, who sees every row as one access of ``bytes_per_row``
bytes, aligned to 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from sm12x.emulator.numerics.arrays import Array, permuted
from sm12x.emulator.numerics.unsupported import Unsupported

ALIGNMENT = 16
"""Every row address is a multiple of this many bytes."""

_NUMBERS = {"x1": 1, "x2": 2, "x4": 4}


@dataclass(frozen=True)
class Load:
    """One form of ``ldmatrix``.

    ``registers``: 32-bit registers that every lane receives. ``rows``: lanes 0 to rows - 1 hold the row
    addresses. ``bytes_per_row``: bytes read at each (the padding of a packed row is not read).
    """

    registers: int
    rows: int
    bytes_per_row: int
    _arrange: Callable[[Array], Array]

    def addresses(self, addresses: Array) -> Array:
        """Byte addresses (..., rows, bytes_per_row) of what is read, from the lanes' addresses (..., 32)."""
        return _spread(addresses, self.rows, self.bytes_per_row)

    def fragments(self, rows: Array) -> Array:
        """Registers, uint32 (..., registers, 32), from what was read, uint8 (..., rows, bytes_per_row)."""
        return self._arrange(np.ascontiguousarray(rows))


@dataclass(frozen=True)
class Store:
    """One form of ``stmatrix``: lanes 0 to rows - 1 hold the addresses of rows of ``bytes_per_row`` bytes."""

    registers: int
    rows: int
    bytes_per_row: int
    _arrange: Callable[[Array], Array]

    def addresses(self, addresses: Array) -> Array:
        """Byte addresses (..., rows, bytes_per_row) of what is written, from the lanes' (..., 32)."""
        return _spread(addresses, self.rows, self.bytes_per_row)

    def row_bytes(self, registers: Array) -> Array:
        """What to write, uint8 (..., rows, bytes_per_row), from registers, uint32 (..., registers, 32)."""
        return self._arrange(np.ascontiguousarray(registers, dtype=np.uint32))


def _spread(addresses: Array, rows: int, size: int) -> Array:
    spread: Array = addresses[..., :rows, None] + np.arange(size, dtype=addresses.dtype)
    return spread


@cache
def ldmatrix(shape: str, number: str, trans: bool, type_: str, source: str | None = None) -> Load:
    """The form ``ldmatrix.sync.aligned.shape.number{.trans}.type{.source}``.

    ``shape``, ``type_``, ``source``: "m8n8" with "b16"; "m16n16" with "b8" or with "b8x16" from "b6x16_p32"
    or "b4x16_p64", transposed; "m8n16" with "b8x16" from the same two, not transposed. ``number``: "x1",
    "x2", "x4" (m16n16: not x4). An unpacked 4-bit or 6-bit element is in the low bits of its byte.
    Unsupported: anything else.
    """
    count = _NUMBERS.get(number, 0)
    packed = source in ("b6x16_p32", "b4x16_p64")
    if shape == "m8n8" and type_ == "b16" and source is None and count:
        return Load(count, 8 * count, 16, _transposed_halves if trans else _quarter_rows)
    if (
        shape == "m16n16"
        and trans
        and count in (1, 2)
        and ((type_ == "b8" and source is None) or (packed and type_ == "b8x16"))
    ):
        unpack, size = _unpacking(source)
        return Load(2 * count, 16 * count, size, lambda rows: _transposed_bytes(unpack(rows)))
    if shape == "m8n16" and not trans and count and packed and type_ == "b8x16":
        unpack, size = _unpacking(source)
        return Load(count, 8 * count, size, lambda rows: _quarter_rows(unpack(rows)))
    form = f"{shape}.{number}{'.trans' if trans else ''}.{type_}{f'.{source}' if source else ''}"
    raise Unsupported(f"ldmatrix.sync.aligned.{form}")


@cache
def stmatrix(shape: str, number: str, trans: bool, type_: str) -> Store:
    """The form ``stmatrix.sync.aligned.shape.number{.trans}.type``: "m8n8" "b16", or "m16n8" "b8" .trans."""
    count = _NUMBERS.get(number, 0)
    if shape == "m8n8" and type_ == "b16" and count:
        return Store(count, 8 * count, 16, _halves_to_columns if trans else _quarters_to_rows)
    if shape == "m16n8" and type_ == "b8" and trans and count:
        return Store(count, 8 * count, 16, _bytes_to_columns)
    raise Unsupported(f"stmatrix.sync.aligned.{shape}.{number}{'.trans' if trans else ''}.{type_}")


def movmatrix(register: Array) -> Array:
    """``movmatrix.sync.aligned.m8n8.trans.b16``: a register, uint32 (..., 32), as a transposed 8x8 matrix."""
    halves = np.ascontiguousarray(register, dtype=np.uint32).view(np.uint16)
    halves = halves.reshape(*register.shape[:-1], 8, 8)
    return np.ascontiguousarray(np.swapaxes(halves, -1, -2)).view(np.uint32).reshape(register.shape)


def _quarter_rows(rows: Array) -> Array:
    """Lane 4 * r + q has quarter q of the 16 bytes of row r: the order in memory is that of the lanes."""
    return rows.view(np.uint32).reshape(*rows.shape[:-2], -1, 32)


def _quarters_to_rows(registers: Array) -> Array:
    return registers.view(np.uint8).reshape(*registers.shape[:-2], -1, 16)


def _transposed_halves(rows: Array) -> Array:
    """Lane 4 * c + q has elements 2 * q and 2 * q + 1 of column c."""
    matrices = rows.view(np.uint16).reshape(*rows.shape[:-2], -1, 8, 8)
    columns = np.ascontiguousarray(np.swapaxes(matrices, -1, -2))
    return columns.view(np.uint32).reshape(*rows.shape[:-2], -1, 32)


def _halves_to_columns(registers: Array) -> Array:
    matrices = registers.view(np.uint16).reshape(*registers.shape[:-1], 8, 8)
    rows = np.ascontiguousarray(np.swapaxes(matrices, -1, -2))
    return rows.view(np.uint8).reshape(*registers.shape[:-2], -1, 16)


def _transposed_bytes(rows: Array) -> Array:
    """Lane 4 * g + t has rows 4 * t to 4 * t + 3 of column g, then of column g + 8."""
    matrices = rows.reshape(*rows.shape[:-2], -1, 16, 16)
    columns = np.ascontiguousarray(np.swapaxes(matrices, -1, -2))
    return columns.view(np.uint32).reshape(*rows.shape[:-2], -1, 32)


def _bytes_to_columns(registers: Array) -> Array:
    """A 16x8 matrix laid out like D of an mma, stored by columns."""
    # matrix, g, t, half of the rows, column of the pair
    data = registers.view(np.uint8)
    return permuted(data.reshape(*data.shape[:-2], -1), (-1, 8, 4, 2, 2), (0, 2, 4, 3, 1), (-1, 16))


def _unpacking(source: str | None) -> tuple[Callable[[Array], Array], int]:
    """How 16 elements of a row become 16 bytes, and how many bytes of the row hold them."""
    if source is None:
        return lambda rows: rows, 16
    if source == "b4x16_p64":
        return _unpack_nibbles, 8
    return _unpack_sixes, 12


def _unpack_nibbles(rows: Array) -> Array:
    pairs = np.stack([rows & 15, rows >> 4], axis=-1)
    return pairs.reshape(*rows.shape[:-1], 16)


def _unpack_sixes(rows: Array) -> Array:
    triples = rows.reshape(*rows.shape[:-1], 4, 3).astype(np.uint32)
    words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
    sixes = words[..., None] >> np.arange(0, 24, 6, dtype=np.uint32) & 63
    out: Array = sixes.astype(np.uint8).reshape(*rows.shape[:-1], 16)
    return out

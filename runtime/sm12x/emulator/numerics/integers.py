"""Integer operands of conversions: registers to numbers, numbers to registers, and to and from float64.

PTX ISA 9.3, 6.5.1 (chop, sign and zero extension), 9.7.9.22 (clamping, NaN), 9.4.1 (wider registers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sm12x.emulator.numerics.arrays import Array, Floats
from sm12x.emulator.numerics.rounding import two_sum


class Integer(NamedTuple):
    """An integer type of PTX."""

    bits: int
    signed: bool

    @property
    def low(self) -> int:
        """The smallest value."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest value."""
        return (1 << (self.bits - self.signed)) - 1


INTEGERS = {f"{sign}{bits}": Integer(bits, sign == "s") for sign in "us" for bits in (8, 16, 32, 64)}

_ROUND: dict[str, Callable[[Floats], Floats]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def to_integral(values: Floats, rounding: str) -> Floats:
    """float64 values rounded to integral float64 values ("rni", "rzi", "rmi", "rpi")."""
    return _ROUND[rounding](values)


def read(type_: Integer, bits: Array) -> Array:
    """The numbers in the low bits of registers: uint64 for an unsigned type, int64 for a signed one."""
    shift = 64 - type_.bits
    numbers: Array = bits.astype(np.uint64) << np.uint64(shift)
    numbers = numbers.view(np.int64) >> np.int64(shift) if type_.signed else numbers >> np.uint64(shift)
    return numbers


def write(type_: Integer, values: Array) -> Array:
    """Register bits of int64 or uint64 numbers, chopped to the type.

    They are uint16 for types of 8 bits (sign- or zero-extended) and 16 bits, else uint32 or uint64.
    """
    chopped = read(type_, values.astype(np.uint64))
    return chopped.astype(np.uint16 if type_.bits <= 16 else np.uint32 if type_.bits == 32 else np.uint64)


def extend(type_: str, bits: Array, width: int) -> Array:
    """A result of a type in a register of ``width`` bits: sign-extended for s8 to s64, else with zeros."""
    storage = {16: np.uint16, 32: np.uint32, 64: np.uint64}[width]
    integer = INTEGERS.get(type_)
    if integer is None or not integer.signed:
        return bits.astype(storage)
    return read(integer, bits).astype(storage)


def saturate(type_: Integer, values: Array) -> Array:
    """int64 or uint64 numbers clamped to the range of the type."""
    clamped: Array
    if values.dtype == np.uint64:
        clamped = np.minimum(values, np.uint64(type_.high))
    else:
        clamped = np.clip(values, type_.low, min(type_.high, (1 << 63) - 1))
    return clamped


def from_integral(type_: Integer, values: Floats, nan: int) -> Array:
    """Register bits of integral float64 values, clamped to the type's range; a NaN becomes ``nan``."""
    above = values >= 2.0 ** (type_.bits - type_.signed)
    below = values < type_.low
    inside = np.where(above | below | np.isnan(values), 0.0, values)
    numbers = inside.astype(np.int64 if type_.signed else np.uint64).astype(np.uint64)
    numbers = np.where(above, np.uint64(type_.high), numbers)
    numbers = np.where(below, np.uint64(type_.low & 0xFFFFFFFFFFFFFFFF), numbers)
    return write(type_, np.where(np.isnan(values), np.uint64(nan), numbers))


def to_float(values: Array) -> tuple[Floats, Floats]:
    """int64 or uint64 numbers as nearest float64 and what is missing, both exact."""
    head = ((values >> 11) << 11).astype(np.float64)  # 53 bits
    nearest, error = two_sum(head, (values & 0x7FF).astype(np.float64))
    return nearest, error


def directed(nearest: Floats, error: Floats, rounding: str) -> Floats:
    """``nearest + error`` rounded to float64 in mode rn, rz, rm or rp."""
    if rounding == "rn":
        return nearest
    down = error < 0
    up = error > 0
    if rounding == "rz":
        down, up = down & (nearest > 0), up & (nearest < 0)
    elif rounding == "rm":
        up = np.zeros_like(up)
    else:
        down = np.zeros_like(down)
    lower, upper = np.nextafter(nearest, -np.inf), np.nextafter(nearest, np.inf)
    return np.where(down, lower, np.where(up, upper, nearest))

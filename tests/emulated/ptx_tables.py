"""Fragment tables and formats of the PTX ISA, written out from its text with exact rationals.

Deliberately slow and independent of ``sm12x.emulator.numerics``: nothing here is imported from it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

Value = Fraction | str  # a finite number, or "nan", "inf", "-inf"

# name -> (bits, exponent bits, fraction bits, bias); PTX ISA 5.2.1, 5.2.3
LAYOUT = {
    "e4m3": (8, 4, 3, 7),
    "e5m2": (8, 5, 2, 15),
    "e2m3": (6, 2, 3, 1),
    "e3m2": (6, 3, 2, 3),
    "e2m1": (4, 2, 1, 1),
    "f16": (16, 5, 10, 15),
    "bf16": (16, 8, 7, 127),
    "tf32": (19, 8, 10, 127),
    "f32": (32, 8, 23, 127),
    "f64": (64, 11, 52, 1023),
}
IEEE = ("e5m2", "f16", "bf16", "tf32", "f32", "f64")


def value(name: str, code: int) -> Value:
    """What a code stands for."""
    if name == "ue8m0":
        return "nan" if code == 0xFF else Fraction(2) ** (code - 127)
    if name == "ue4m3":
        return value("e4m3", code & 0x7F)
    bits, exponent_bits, fraction_bits, bias = LAYOUT[name]
    sign = -1 if code >> (bits - 1) & 1 else 1
    exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = code & ((1 << fraction_bits) - 1)
    if name == "e4m3" and code & 0x7F == 0x7F:
        return "nan"
    if name in IEEE and exponent == (1 << exponent_bits) - 1:
        return "nan" if fraction else "inf" if sign > 0 else "-inf"
    significand = sign * (fraction + (1 << fraction_bits if exponent else 0))
    power = max(exponent, 1) - bias - fraction_bits
    return Fraction(significand << max(power, 0), 1 << max(-power, 0))


@cache
def all_values(name: str) -> tuple[Value, ...]:
    """The values of all codes of a format of at most 16 bits."""
    return tuple(value(name, code) for code in range(1 << LAYOUT[name][0]))


def largest(name: str) -> int:
    """Magnitude code of the largest finite number."""
    bits, exponent_bits, fraction_bits, _ = LAYOUT[name]
    if name in IEEE:
        return (((1 << exponent_bits) - 1) << fraction_bits) - 1
    return 0x7E if name == "e4m3" else (1 << (bits - 1)) - 1


def rounded(
    name: str, x: Fraction, mode: str, *, satfinite: bool = False, negative: bool | None = None
) -> int:
    """The code of ``x`` rounded to the format; ``negative`` gives zero its sign."""
    bits, _, fraction_bits, bias = LAYOUT[name]
    minus = x < 0 if negative is None else negative
    numerator, denominator = abs(x.numerator), x.denominator
    # floor(log2), then the exponent field, which is 1 for subnormals too
    exponent = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-exponent, 0) < denominator << max(exponent, 0):
        exponent -= 1
    field = max(exponent + bias, 1) if numerator else 1
    shift = fraction_bits + bias - field
    # in units of the last place: whole steps and what is left
    whole, rest = divmod(numerator << max(shift, 0), denominator << max(-shift, 0))
    half = (denominator << max(-shift, 0)) - 2 * rest  # positive below the middle
    toward_zero = mode == "rz" or (mode == "rm" and not minus) or (mode == "rp" and minus)
    if (
        rest
        and not toward_zero
        and (mode in ("rm", "rp") or half < 0 or (half == 0 and (mode == "rna" or whole % 2)))
    ):
        whole += 1
    code = ((field - 1) << fraction_bits) + whole
    if code > largest(name):
        endless = name in ("e2m3", "e3m2", "e2m1")
        # one more is infinity, or the NaN of e4m3
        code = largest(name) + (not satfinite and not toward_zero and not endless)
        if name == "e4m3" and not satfinite:
            code = 0x7F
    return code | (minus << (bits - 1))


def a_place(shape: str, bits: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element a_i of a lane (9.7.15.5.6 to 9.7.15.5.11), for elements of ``bits`` bits."""
    group, thread = lane >> 2, lane % 4
    if (shape, bits) == ("m16n8k4", 32):
        return (group if i == 0 else group + 8), thread
    if (shape, bits) == ("m16n8k8", 16):
        return (group if i < 2 else group + 8), thread * 2 + (i & 1)
    if (shape, bits) == ("m16n8k8", 32):
        return (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)
    if (shape, bits) == ("m16n8k16", 16):
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)
    if (shape, bits) == ("m16n8k16", 8):
        return (group if i < 4 else group + 8), thread * 4 + (i & 3)
    if (shape, bits) == ("m16n8k32", 8):
        row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
        return row, thread * 4 + (i & 3) + (0 if i < 8 else 16)
    assert (shape, bits) == ("m16n8k64", 4)
    row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
    return row, thread * 8 + (i & 7) + (0 if i < 16 else 32)


def b_place(shape: str, bits: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element b_i of a lane."""
    group, thread = lane >> 2, lane % 4
    row = {
        ("m16n8k4", 32): lambda: thread,
        ("m16n8k8", 16): lambda: thread * 2 + i,
        ("m16n8k8", 32): lambda: thread if i == 0 else thread + 4,
        ("m16n8k16", 16): lambda: thread * 2 + (i & 1) + (0 if i < 2 else 8),
        ("m16n8k16", 8): lambda: thread * 4 + i,
        ("m16n8k32", 8): lambda: thread * 4 + (i & 3) + (0 if i < 4 else 16),
        ("m16n8k64", 4): lambda: thread * 8 + (i & 7) + (0 if i < 8 else 32),
    }[(shape, bits)]()
    return row, group


def c_place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element c_i of a lane, the same for all of these shapes."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def elements(registers: list[list[int]], bits: int, lane: int) -> list[int]:
    """The codes that a lane's registers hold, low to high."""
    count = 32 // bits
    return [
        registers[i // count][lane] >> (bits * (i % count)) & ((1 << bits) - 1)
        for i in range(count * len(registers))
    ]


def matrix(
    registers: list[list[int]], bits: int, size: tuple[int, int], place: Callable[[int, int], tuple[int, int]]
) -> list[list[int]]:
    """The codes of a matrix of ``size`` rows and columns; every element must be held exactly once."""
    codes: list[list[int | None]] = [[None] * size[1] for _ in range(size[0])]
    for lane in range(32):
        for i, code in enumerate(elements(registers, bits, lane)):
            row, column = place(lane, i)
            assert codes[row][column] is None
            codes[row][column] = code
    return [[c for c in row if c is not None] for row in codes]


def scale_a(data: list[int], count: int, byte: int, thread: int, row: int, chunk: int) -> int:
    """Code of SF_A: Figure 43 (thread pair of the quad, first thread rows 0-7, second rows 8-15), Figure
    45.
    """
    lane = (row % 8) * 4 + (2 if thread == 1 else 0) + (1 if row >= 8 else 0)
    return data[lane] >> (8 * (byte + chunk)) & 0xFF


def scale_b(data: list[int], count: int, byte: int, thread: int, column: int, chunk: int) -> int:
    """Code of SF_B: Figure 44 (one thread of the quad), Figure 45."""
    return data[column * 4 + thread] >> (8 * (byte + chunk)) & 0xFF

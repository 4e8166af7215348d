"""Operands: random ones of every magnitude, and the special values of each type in all combinations."""

from __future__ import annotations

import itertools
import zlib
from functools import cache
from typing import Any

import numpy as np

from sm12x.emulator.numerics.formats import decode, encode

from .forms import PREDICATES, Form, width

# bits, exponent bits, fraction bits of the formats (PTX ISA 5.2)
FLOATS = {"f16": (16, 5, 10), "bf16": (16, 8, 7), "f32": (32, 8, 23), "f64": (64, 11, 52)}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
Rng = np.random.Generator


def generate(form: Form, count: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """`count` operands of each kind as unsigned arrays of the register's width; the same for the same seed.

    Up to half of them are special values, in all combinations where there is room; an only operand of 16 bits
    has every value if `count` is 65536.
    """
    rng = np.random.default_rng([seed, zlib.crc32(form.name.encode())])
    kinds = form.operands
    if len(kinds) == 1 and width(kinds[0]) == 16 and count == 1 << 16:
        return [np.arange(1 << 16, dtype=np.uint16)]
    columns = [_random(kind, rng, count) for kind in kinds]
    pools = [_specials(kind) for kind in kinds]
    if all(len(pool) for pool in pools) and "warp" not in form.relation:
        _put_specials(columns, pools, rng, count // 2)
    _relate(form, columns, rng, count)
    return columns


def _put_specials(columns: list[Any], pools: list[Any], rng: Rng, room: int) -> None:
    total = int(np.prod([float(len(pool)) for pool in pools]))
    if total <= room:
        rows = np.array(list(itertools.product(*(range(len(pool)) for pool in pools)))).T
    else:
        rows = np.array([rng.integers(0, len(pool), room) for pool in pools])
    for column, pool, chosen in zip(columns, pools, rows, strict=True):
        column[: len(chosen)] = pool[chosen]


def _relate(form: Form, columns: list[Any], rng: Rng, count: int) -> None:
    """Some operands equal to the first, next to it, or its negative, in the random half of the rows."""
    if not form.operands or any(kind in _WARP or kind.startswith("mma:") for kind in form.operands):
        return
    half = np.arange(count) >= count // 2
    first = columns[0]
    for kind, column in list(zip(form.operands, columns, strict=True))[1:]:
        if column.dtype != first.dtype or kind in ("amount", "position", "lane", "segment", "pred"):
            continue
        word = column.dtype.type
        top = word(1 << 8 * column.dtype.itemsize - 1)
        chosen = rng.random(count)
        for low, change in ((0.0, first), (0.08, first ^ word(1)), (0.12, first ^ top), (0.16, ~first)):
            here = half & (chosen >= low) & (chosen < low + 0.04)
            column[here] = change[here]
        if kind.startswith("nonzero"):
            column[column == 0] = 1
    if form.relation == "cancel":
        _cancel(form.operands[0], columns, rng, half)
    elif form.relation == "angles":
        columns[0][half] = rng.uniform(-320, 320, int(half.sum())).astype(np.float32).view(np.uint32)


def _cancel(kind: str, columns: list[Any], rng: Rng, half: Any) -> None:
    """Addends that all but cancel a product: its negative rounded, and neighbours of that."""
    scalar = PAIRS.get(kind, kind)
    part = np.dtype(f"u{FLOATS[scalar][0] // 8}")
    a, b, c = (column.view(part) for column in columns)
    with np.errstate(all="ignore"):
        product = -(decode(scalar, a) * decode(scalar, b))
        near = encode(scalar, product) if scalar != "f64" else product.view(np.uint64)
    near = near + rng.integers(-1, 2, len(near)).astype(near.dtype)
    here = np.repeat(half, len(c) // len(half)) & (rng.random(len(c)) < 0.3)
    c[here] = near[here]


# Kinds


def _random(kind: str, rng: Rng, count: int) -> Any:
    if kind.startswith("mma:"):
        return _multiplicand(*kind.split(":")[1:], rng, count)
    if kind in _WARP:
        return _WARP[kind](rng, count)
    if kind in PAIRS:
        return _float(PAIRS[kind], rng, 2 * count).view(np.uint32)
    if kind in FLOATS:
        return _float(kind, rng, count)
    bits = width(kind)
    dtype = f"u{bits // 8}"
    if kind == "pred":
        return rng.integers(0, 2, count).astype(dtype)
    found = rng.integers(0, 1 << 64, count, np.uint64, endpoint=False) if bits == 64 else None
    if found is None:
        found = rng.integers(0, 1 << bits, count, np.uint64)
    if kind in ("amount", "position", "lane"):
        # small numbers, and now and then one that must be cut or clamped
        small = rng.integers(0, {"amount": 72, "position": 80, "lane": 34}[kind], count).astype(np.uint64)
        return np.where(rng.random(count) < 0.9, small, found).astype(dtype)
    if kind == "segment":
        clamp, segment = rng.integers(0, 32, (2, count)).astype(np.uint64)
        common = rng.choice(np.array([0x1F, 0, 0x181F, 0x1C1F, 0x1E00, 0x100F], np.uint64), count)
        return np.where(rng.random(count) < 0.5, common, clamp | segment << np.uint64(8)).astype(dtype)
    short = found >> rng.integers(0, bits, count).astype(np.uint64)
    found = np.where(rng.random(count) < 0.5, found, short)
    found = np.where(rng.random(count) < 0.15, ~found, found).astype(dtype)
    if kind.startswith("nonzero"):
        found[found == 0] = 1
    return found


def _float(kind: str, rng: Rng, count: int) -> Any:
    """A quarter each: any bits; near 1; few significant bits, with a tail that is a tie or beside one; whole
    numbers and simple fractions.
    """
    bits, exponent_bits, fraction_bits = FLOATS[kind]
    bias, dtype = (1 << exponent_bits - 1) - 1, np.dtype(f"u{bits // 8}")
    word = np.uint64
    anything = rng.integers(0, 1 << 63, count, np.uint64) * word(2) + rng.integers(0, 2, count).astype(word)
    anything &= word((1 << bits) - 1)
    sign = anything & word(1 << bits - 1)
    fraction = anything & word((1 << fraction_bits) - 1)

    def assembled(exponent: Any, fraction: Any) -> Any:
        field = np.clip(exponent + bias, 0, (1 << exponent_bits) - 1).astype(word)
        return sign | field << word(fraction_bits) | fraction

    near = assembled(rng.integers(-5, 6, count), fraction)
    tail = rng.integers(0, fraction_bits + 1, count).astype(word)
    half = (word(1) << tail) >> word(1)
    ending = np.choose(
        rng.integers(0, 4, count), [np.zeros_like(half), half, half - (half > 0), half + (half > 1)]
    )
    short = assembled(rng.integers(-40, 70, count), (fraction >> tail << tail) | ending)
    whole = (rng.integers(-4096, 4097, count) * np.exp2(rng.integers(-4, 3, count))).astype(np.float64)
    simple = whole.view(word) if kind == "f64" else encode(kind, whole).astype(word)
    found = np.choose(rng.integers(0, 4, count), [anything, near, short, simple])
    return found.astype(dtype)


@cache
def _specials(kind: str) -> Any:
    if kind in FLOATS:
        return _float_specials(kind)
    if kind in PAIRS:
        values = _float_specials(PAIRS[kind]).astype(np.uint32)
        return values | np.roll(values, 5) << np.uint32(16)
    if kind in PREDICATES or kind in _WARP or kind.startswith("mma:") or kind in ("segment",):
        return np.zeros(0, np.uint32)
    bits = width(kind)
    small = [0, 1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 32767, 32768, 65535]
    if kind in ("amount", "position", "lane"):
        values = [*small, (1 << 32) - 1, 1 << 31]
    else:
        top = int(kind[1:]) if kind[1:].isdigit() else bits
        values = (
            small + [(1 << top - 1) + n for n in (-1, 0, 1)] + [(1 << bits) - n for n in (1, 2, 128, 129)]
        )
        values += [(1 << n) - d for n in (31, 32) if n < bits for d in (0, 1)]
    found = np.unique(np.array([v & (1 << bits) - 1 for v in values], np.uint64)).astype(f"u{bits // 8}")
    return found[found != 0] if kind.startswith("nonzero") else found


def _float_specials(kind: str) -> Any:
    """Zeros, subnormals, numbers around powers of two and the largest one, infinities, NaN; of both signs."""
    bits, exponent_bits, fraction_bits = FLOATS[kind]
    bias, unit = (1 << exponent_bits - 1) - 1, 1 << fraction_bits
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    one = bias << fraction_bits
    values = [0, 1, 2, unit // 2, unit - 1, unit, unit + 1, 2 * unit]
    values += [one - 1, one, one + 1, one - unit, one + unit // 2, one + unit, one + unit + unit // 4]
    values += [
        infinity - 1,
        infinity - unit,
        infinity,
        infinity + 1,
        infinity + unit // 2,
        infinity + unit - 1,
    ]
    values += [infinity + unit // 2 + 3, infinity + 5]
    codes = np.array(values, np.uint64)
    return np.concatenate([codes, codes | np.uint64(1 << bits - 1)]).astype(f"u{bits // 8}")


# Operands that belong together in a warp: `count` is a multiple of 32.


def _few(bits: int) -> Any:
    """Few different values in a warp."""

    def run(rng: Rng, count: int) -> Any:
        pool = rng.integers(0, 1 << 32, (count // 32, 4)).astype(f"u{bits // 8}") * np.array(
            1, f"u{bits // 8}"
        )
        return np.take_along_axis(pool, rng.integers(0, 4, (count // 32, 32)), axis=1).ravel()

    return run


def _same(bits: int) -> Any:
    """One value in a warp."""

    def run(rng: Rng, count: int) -> Any:
        values = np.repeat(rng.integers(0, 50, (count // 32, 1)), 32, axis=1)
        return values.astype(f"u{bits // 8}").ravel()

    return run


def _choice(rng: Rng, count: int) -> Any:
    """Predicates: warps of true, of false, of either with one exception, and any."""
    base = rng.integers(0, 2, (count // 32, 1)) * np.ones((1, 32), np.int64)
    kind = rng.integers(0, 3, (count // 32, 1))
    exception = base ^ (np.arange(32) == rng.integers(0, 32, (count // 32, 1)))
    any_ = rng.integers(0, 2, base.shape)
    return np.where(kind == 0, base, np.where(kind == 1, exception, any_)).astype(np.uint32).ravel()


def _whole(kind: str) -> Any:
    def run(rng: Rng, count: int) -> Any:
        values = rng.integers(-1000, 1000, count).astype(kind)
        return values.view(f"u{values.dtype.itemsize}")

    return run


_WARP = {
    **{f"few{bits}": _few(bits) for bits in (32, 64)},
    **{f"same{bits}": _same(bits) for bits in (32, 64)},
    **{"choice": _choice, "whole32": _whole("f4"), "whole64": _whole("f8")},
}


def _multiplicand(type_: str, inputs: str, rng: Rng, count: int) -> Any:
    """A register of operands of mma: `gentle` random numbers around 1, small integers, or any bits."""
    if type_ in ("s8", "u8", "s32"):
        found = rng.integers(0, 1 << 32, count).astype(np.uint32)
        edge = np.array([0x7FFFFFFF, 0x80000000, 0x7F7F7F7F, 0x80808080, 0xFFFFFFFF], np.uint32)
        return np.where(rng.random(count) < 0.1, rng.choice(edge, count), found)
    per = {"f32": 1, "tf32": 1, "f16": 2, "bf16": 2}.get(type_, 4)
    if inputs == "any":
        found = rng.integers(0, 1 << 32, count).astype(np.uint32)
        if type_ in FLOATS:  # exponents of which most sums are finite, and some special values
            found = _float(type_, rng, per * count).view(np.uint32)
        return found
    values = rng.integers(-4, 5, per * count).astype(np.float64)
    if inputs == "gentle":
        values = rng.standard_normal(per * count) * (4.0 if type_ in ("e4m3", "e5m2") else 1.0)
    codes = encode(type_, values)
    if type_ == "tf32":  # the low bits do not count
        codes = codes | rng.integers(0, 1 << 13, count).astype(np.uint32)
    found = np.ascontiguousarray(codes).view(np.uint32)
    return found

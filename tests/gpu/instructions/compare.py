"""Applies the rules of comparison to two sets of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sm12x.emulator.numerics import mma
from sm12x.emulator.numerics.formats import decode

from .forms import Form, width
from .operands import FLOATS, PAIRS
from .rules import Accumulation, Approximation, Bits

EXAMPLES = 8


@dataclass(frozen=True)
class Outcome:
    """What a comparison found. `compared` counts results; `examples` show operands and both
    results, of the first mismatch first; `worst` is the largest error as a part of the
    bound; `nan` counts results that differ in the payload of a NaN that the ISA leaves open.
    """

    compared: int
    mismatches: int
    examples: tuple[str, ...] = ()
    worst: float = 0.0
    nan: int = 0


def compare(form: Form, operands: Sequence[Any], got: Sequence[Any], want: Sequence[Any]) -> Outcome:
    """`got` is the device's, `want` the emulator's."""
    with np.errstate(all="ignore"):
        if isinstance(form.rule, Bits):
            bad, worst, nan = _bits(form.rule, got, want)
        elif isinstance(form.rule, Approximation):
            bad, worst = _approximation(form, form.rule, operands, got, want)
            nan = 0
        else:
            bad, worst = _accumulation(form.rule, operands, got, want)
            nan = 0
    rows = np.any(np.array(bad), axis=0)
    # the first, and others from all over
    chosen = np.flatnonzero(rows)
    chosen = (
        chosen[np.unique(np.linspace(0, len(chosen) - 1, EXAMPLES).astype(int))] if len(chosen) else chosen
    )
    examples = tuple(
        f"thread {at}: operands {_row(form.operands, operands, at)}: "
        f"device {_row(form.results, got, at)}, emulator {_row(form.results, want, at)}"
        for at in chosen.tolist()
    )
    return Outcome(sum(len(x) for x in got), int(np.sum(bad)), examples, worst, nan)


def _row(kinds: Sequence[str], columns: Sequence[Any], at: int) -> str:
    pairs = zip(kinds, columns, strict=True)
    return " ".join(f"{int(column[at]):#0{width(kind) // 4 + 2}x}" for kind, column in pairs)


def _bits(rule: Bits, got: Sequence[Any], want: Sequence[Any]) -> tuple[list[Any], float, int]:
    bad, nan = [], 0
    for x, y in zip(got, want, strict=True):
        differ = x != y
        if rule.open_nan:
            part = np.dtype(f"u{FLOATS[PAIRS.get(rule.open_nan, rule.open_nan)][0] // 8}")
            scalar = PAIRS.get(rule.open_nan, rule.open_nan)
            codes = [np.ascontiguousarray(v).view(part) for v in (x, y)]
            both = np.isnan(decode(scalar, codes[0])) & np.isnan(decode(scalar, codes[1]))
            wrong = ((codes[0] != codes[1]) & ~both).reshape(len(x), -1).any(axis=1)
            nan += int((differ & ~wrong).sum())
            differ = wrong
        bad.append(differ)
    return bad, 0.0, nan


def _parts(type_: str, bits: Any) -> Any:
    """The elements of registers as codes, shape (threads, elements)."""
    return np.ascontiguousarray(bits).view(f"u{FLOATS[type_][0] // 8}").reshape(len(bits), -1)


def _approximation(
    form: Form, rule: Approximation, operands: Sequence[Any], got: Sequence[Any], want: Sequence[Any]
) -> tuple[list[Any], float]:
    """Both sides within the bound of the exact function, and the same bits where that is special."""
    _, exponent_bits, fraction_bits = FLOATS[rule.type]
    bias = (1 << exponent_bits - 1) - 1
    smallest = 2.0 ** (1 - bias)
    inputs = [_flushed(decode(rule.type, _parts(rule.type, x)), smallest, rule.ftz) for x in operands]
    exact = rule.function(*inputs)
    first, second = (_parts(rule.type, x[0]) for x in (got, want))
    values = [decode(rule.type, x) for x in (first, second)]
    magnitude = np.abs(exact)
    ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(magnitude, smallest))), 1 - bias) - fraction_bits)
    bound = np.maximum(np.maximum(rule.relative * magnitude, rule.absolute), rule.ulps * ulp)
    # a result is a number of the type: half a unit of its last place is never the function's error
    bound = bound + ulp / 2 + np.where(magnitude < smallest, rule.subnormal_ulps * ulp, 0.0)
    special = ~np.isfinite(exact) | (exact == 0)
    inside = np.ones(exact.shape, bool) if rule.inside is None else rule.inside(*inputs)
    largest = 2.0**bias * (2 - 2.0**-fraction_bits)
    error = np.zeros(exact.shape)
    bad = special & inside & (first != second)
    for value in values:
        off = np.abs(value - exact)
        # beyond the largest number the result is infinite, and below the smallest zero with .ftz
        over = np.isinf(value) & (magnitude + bound >= largest) & (np.sign(value) == np.sign(exact))
        under = (value == 0) & (magnitude - bound < smallest) & rule.ftz
        ok = special | over | under
        off = np.where(ok | ~inside, 0.0, off / bound)
        bad = bad | ~(off <= 1)
        error = np.maximum(error, np.nan_to_num(off, nan=np.inf))
    return [bad.any(axis=1)], float(error.max(initial=0.0))


def _flushed(values: Any, smallest: float, ftz: bool) -> Any:
    return np.where((np.abs(values) < smallest) & ftz, np.copysign(0.0, values), values)


def _accumulation(
    rule: Accumulation, operands: Sequence[Any], got: Sequence[Any], want: Sequence[Any]
) -> tuple[list[Any], float]:
    if rule.exact:
        return [x != y for x, y in zip(got, want, strict=True)], 0.0
    limit = _sum_of_magnitudes(rule, operands, len(got))
    k = int(rule.shape.rpartition("k")[2])
    bad, worst = [], 0.0
    half = rule.accumulator == "f16"
    for x, y, whole in zip(got, want, limit, strict=True):
        device, emulator, total = (
            decode(rule.accumulator, _parts(rule.accumulator, v)) for v in (x, y, whole)
        )
        # k products and C: k sums, each off by at most one unit of a partial sum, and the last rounding
        bound = (k + 1) * 2.0 ** (1 - rule.bits) * total + (2.0**-24 if half else 2.0**-149)
        special = ~np.isfinite(emulator)
        off = np.where(
            special, np.where(_parts(rule.accumulator, x) == _parts(rule.accumulator, y), 0, np.inf), 0.0
        )
        # sums of which a part may overflow have no bound, and no order that is theirs
        open_ = ~np.isfinite(total) | (total > (60000.0 if half else 2.0**127))
        off = np.where(special | open_, off, np.abs(device - emulator) / bound)
        off = np.where(open_ & ~_invalid(emulator), 0.0, off)
        off = np.nan_to_num(off, nan=np.inf, posinf=np.inf)
        worst = max(worst, float(off.max()))
        bad.append((off > 1).any(axis=1))
    return bad, worst


def _invalid(values: Any) -> Any:
    return np.isnan(values)


def _sum_of_magnitudes(rule: Accumulation, operands: Sequence[Any], results: int) -> list[Any]:
    """Registers of D with |A| * |B| + |C|: an mma of the same operands without their signs."""
    run = mma.lookup(rule.shape, None, rule.a_type, rule.b_type, rule.accumulator, rule.accumulator)
    signs = {"f16": 0x80008000, "bf16": 0x80008000, "e4m3": 0x80808080, "e5m2": 0x80808080}
    k = int(rule.shape.rpartition("k")[2])
    per = {"tf32": 1, "f16": 2, "bf16": 2}.get(rule.a_type, 4)
    a_count, b_count = k * 16 // 32 // per, k * 8 // 32 // per
    types = [rule.a_type] * a_count + [rule.b_type] * b_count + [rule.accumulator] * results
    plain = [
        (x & np.uint32(~signs.get(type_, 1 << 31) & 0xFFFFFFFF)).reshape(-1, 32)
        for x, type_ in zip(operands, types, strict=True)
    ]
    found = run(plain[:a_count], plain[a_count : a_count + b_count], plain[a_count + b_count :])
    return [np.ascontiguousarray(x).reshape(-1) for x in found]

"""The packed forms of ``cvt`` (pairs and quadruples of 4 to 16-bit floats, ue8m0, s2f6) and ``cvt.pack``.

PTX ISA 9.3, 5.2.3, 5.2.4, 9.7.9.22, 9.7.9.23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sm12x.emulator.numerics import integers
from sm12x.emulator.numerics.arrays import Array, Floats
from sm12x.emulator.numerics.formats import decode, encode
from sm12x.emulator.numerics.unsupported import Unsupported

Function = Callable[..., Array]

_SCALED = "scaled::n2::ue8m0"
_HALVES = {"f16x2": "f16", "bf16x2": "bf16"}
_NARROW_PAIRS = {f"{t}x2": t for t in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")}
_NARROW_QUADS = {f"{t}x4": t for t in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")}
# bits from one element of a packed register to the next
_PITCH = {"f16": 16, "bf16": 16, "e2m1": 4}


def function(destination: str, source: str, rounding: str | None, flags: frozenset[str]) -> Function | None:
    """The function of one packed form, None if PTX does not have it."""
    finite, relu, scaled = "satfinite" in flags, "relu" in flags, _SCALED in flags
    if not flags <= {"satfinite", "relu", _SCALED}:
        return None
    if destination in _HALVES and source == "f32":
        if rounding in ("rn", "rz") and not scaled:
            return _halves_from_single(_HALVES[destination], rounding, finite, relu)
        if rounding == "rs" and not scaled:
            return _stochastic(_HALVES[destination], 2, finite, relu)
    elif destination in _NARROW_QUADS and source == "f32":
        if rounding == "rs" and finite and not scaled:
            return _stochastic(_NARROW_QUADS[destination], 4, finite, relu)
    elif destination in _NARROW_PAIRS and source in ("f32", *_HALVES):
        if rounding == "rn" and finite and not scaled:
            type_ = _NARROW_PAIRS[destination]
            return _to_pair(source, lambda x: encode(type_, x, satfinite=True, relu=relu), _pitch(type_))
    elif destination == "ue8m0x2" and source in ("f32", "bf16x2"):
        if rounding in ("rz", "rp") and not relu and not scaled:
            return _to_pair(source, lambda x: encode("ue8m0", x, rounding, satfinite=finite), 8)
    elif destination == "s2f6x2" and source in ("f32", "bf16x2"):
        if rounding == "rn" and finite:
            return _to_pair(source, lambda x: _to_s2f6(x, relu), 8, scaled=scaled)
    elif destination in _HALVES and source in (*_NARROW_PAIRS, "ue8m0x2", "s2f6x2"):
        return _from_pair(destination, source, rounding, flags)
    return None


def nearest_bf16(a: Array) -> Array:
    """``cvt.rn.bf16.f32`` on uint32 bits, in integer arithmetic; NaN gives 0x7fff."""
    a = a.astype(np.uint32, copy=False)
    even = (a >> np.uint32(16)) & np.uint32(1)
    rounded: Array = (a + (np.uint32(0x7FFF) + even)) >> np.uint32(16)
    special = (a & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if special.any():
        rounded = np.where(special, np.uint32(0x7FFF), rounded)
    return rounded.astype(np.uint16)


def pack(type_: str, a: Array, b: Array, c: Array | None = None) -> Array:
    """``cvt.pack.sat.type.s32{.b32}``: ``a`` and ``b`` (s32 in uint32), saturated and packed, ``b`` lowest.

    ``type_``: "u16" and "s16" without ``c``; "u8", "s8", "u4", "s4", "u2", "s2" with it: its low bits fill
    the rest.
    """
    bits = int(type_[1:]) if type_ in ("u2", "s2", "u4", "s4", "u8", "s8", "u16", "s16") else 0
    if not bits or (bits == 16) != (c is None):
        raise Unsupported(f"cvt.pack.sat.{type_}.s32{'' if c is None else '.b32'}")
    form = integers.Integer(bits, type_[0] == "s")
    mask = np.uint32((1 << bits) - 1)
    numbers = [integers.read(integers.INTEGERS["s32"], x) for x in (a, b)]
    high, low = (integers.saturate(form, x).astype(np.uint32) & mask for x in numbers)
    packed: Array = high << np.uint32(bits) | low
    return packed if c is None else packed | c << np.uint32(2 * bits)


def _pitch(type_: str) -> int:
    return _PITCH.get(type_, 8)


def _joined(codes: Sequence[Array], pitch: int) -> Array:
    """Codes of one element each, the first in the upper bits, in one register."""
    word = np.uint32 if pitch * len(codes) > 16 else np.uint16
    total = codes[0].astype(word)
    for code in codes[1:]:
        total = total << word(pitch) | code.astype(word)
    return total


def _split(type_: str, register: Array) -> tuple[Floats, Floats]:
    """The values of the upper and the lower element of a packed pair."""
    word, pitch = register.dtype.type, _pitch(type_)
    mask = word((1 << pitch) - 1)
    return _values(type_, register >> word(pitch) & mask), _values(type_, register & mask)


def _values(type_: str, codes: Array) -> Floats:
    if type_ != "s2f6":
        return decode(type_, codes)
    return codes.astype(np.uint8).view(np.int8).astype(np.float64) / 64


def _halves_from_single(type_: str, rounding: str, satfinite: bool, relu: bool) -> Function:
    def convert(a: Array) -> Array:
        if type_ == "bf16" and rounding == "rn" and not (satfinite or relu):
            return nearest_bf16(a)
        return encode(type_, decode("f32", a), rounding, satfinite=satfinite, relu=relu)

    return lambda a, b: _joined((convert(a), convert(b)), 16)


def _stochastic(type_: str, count: int, satfinite: bool, relu: bool) -> Function:
    """``.rs``: one set of random bits for each half of the operands (Figures 38 to 41)."""
    used = 13 if type_ == "f16" else 16

    def run(*operands: Array) -> Array:
        *singles, random = operands
        if type_ == "e2m1":
            # the upper operands take the upper bytes of both halves, the lower operands the lower bytes
            upper = (random >> np.uint32(16) & np.uint32(0xFF00)) | (random >> np.uint32(8) & np.uint32(0xFF))
            lower = (random >> np.uint32(8) & np.uint32(0xFF00)) | (random & np.uint32(0xFF))
        else:
            mask = np.uint32((1 << used) - 1)
            upper, lower = random >> np.uint32(16) & mask, random & mask
        codes = [
            encode(type_, decode("f32", x), "rs", satfinite=satfinite, relu=relu, random=(bits, used))
            for x, bits in zip(singles, [upper] * (count // 2) + [lower] * (count // 2), strict=True)
        ]
        return _joined(codes, _pitch(type_))

    return run


def _to_pair(
    source: str, convert: Callable[[Floats], Array], pitch: int, *, scaled: bool = False
) -> Function:
    """Two numbers, divided by the scale factors if there are any, to a pair of codes."""
    operands = 2 if source == "f32" else 1

    def run(*registers: Array) -> Array:
        if operands == 2:
            values = [decode("f32", x) for x in registers[:2]]
        else:
            values = list(_split(_HALVES[source], registers[0]))
        if scaled:
            values = [x / s for x, s in zip(values, _split("ue8m0", registers[-1]), strict=True)]
        return _joined([convert(x) for x in values], pitch)

    return run


def _to_s2f6(values: Floats, relu: bool) -> Array:
    steps = np.rint(np.where(np.isnan(values), np.inf, values * 64))
    return np.clip(steps, 0 if relu else -128, 127).astype(np.int8).view(np.uint8)


def _from_pair(destination: str, source: str, rounding: str | None, flags: frozenset[str]) -> Function | None:
    type_ = source.removesuffix("x2")
    wide = _HALVES[destination]
    allowed: set[str] = {"relu"}
    if wide == "bf16":
        allowed = set() if type_ == "ue8m0" else {"relu", "satfinite", _SCALED}
    elif type_ in ("ue8m0", "s2f6"):
        return None
    if rounding != "rn" or not flags <= allowed:
        return None
    satfinite, relu, scaled = "satfinite" in flags, "relu" in flags, _SCALED in flags

    def run(a: Array, factors: Array | None = None) -> Array:
        values = list(_split(type_, a))
        if scaled:
            assert factors is not None
            values = [x * s for x, s in zip(values, _split("ue8m0", factors), strict=True)]
        return _joined([encode(wide, x, satfinite=satfinite, relu=relu) for x in values], 16)

    return run

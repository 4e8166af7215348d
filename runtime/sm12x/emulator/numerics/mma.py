"""``mma.sync``: D = A * B + C on the registers of a warp, every element rounded once.

PTX ISA 9.3, 9.7.15.3, 9.7.15.5.14. The ISA leaves order and rounding of the accumulation open ("at least
single precision"); here every element of D is the exact sum of products and C, rounded once to nearest
even. Where the hardware is to be imitated, ``truncate_bits`` cuts the exact sum to that many significant
bits toward zero instead: FP8 tensor cores are reported to keep about 22.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from sm12x.emulator.numerics import fragments
from sm12x.emulator.numerics.arrays import Array
from sm12x.emulator.numerics.exact_dot import dot_to_odd
from sm12x.emulator.numerics.formats import Format, decode, format_of, table
from sm12x.emulator.numerics.rounding import has_nan
from sm12x.emulator.numerics.unsupported import Unsupported

Scales = tuple[Array, int, int, Array, int, int]
Run = Callable[..., list[Array]]

_FP8 = ("e4m3", "e5m2")
_NARROW = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
_INTEGER = ("s8", "u8")
_CANONICAL_NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF}

# kind -> scale_vec -> scale types (Table 39); the first scale_vec is the default, mxf4nvf4 has none
_BLOCK_SCALES: dict[str, dict[str, tuple[str, ...]]] = {
    "mxf8f6f4": {"1X": ("ue8m0",)},
    "mxf4": {"2X": ("ue8m0",)},
    "mxf4nvf4": {"2X": ("ue8m0",), "4X": ("ue8m0", "ue4m3")},
}


@dataclass(frozen=True)
class _Operand:
    """How one multiplicand is read from its registers.

    ``per``: elements in a register. ``read``: joined registers to float64 elements in register order.
    Elements are multiples of 2^``unit`` and less than 2^(``unit`` + ``span``), with at most ``fraction_bits``
    after the leading one.
    """

    per: int
    read: Callable[[Array], Array]
    unit: int
    span: int
    fraction_bits: int


def mma(
    shape: str,
    kind: str | None,
    a_type: str,
    b_type: str,
    c_type: str,
    d_type: str,
    a: Sequence[Array],
    b: Sequence[Array],
    c: Sequence[Array],
    scales: Scales | None = None,
    *,
    scale_vec: str | None = None,
    scale_type: str = "ue8m0",
    satfinite: bool = False,
    truncate_bits: int | None = None,
) -> list[Array]:
    """The registers of D, as PTX lists them: uint32 arrays of the shape of those of C.

    ``a``, ``b``, ``c``: the register operands in PTX order, each a uint32 array of shape (32,) or (n, 32)
    for n independent instructions; leading axes broadcast. ``kind``: None, "f8f6f4", "mxf8f6f4", "mxf4" or
    "mxf4nvf4". ``scales``: (scale-a-data, byte-id-a, thread-id-a, scale-b-data, byte-id-b, thread-id-b) for
    the last three, with ``scale_vec`` "1X", "2X" or "4X" (default as in PTX) and ``scale_type`` "ue8m0" or
    "ue4m3". ``satfinite``: integer accumulation saturates. ``truncate_bits``: see above. A NaN result is
    0x7fffffff (f16: 0x7fff).

    Unsupported: a combination that PTX does not have, or m8n8 shapes, .f64, .b1, .u4 and .s4, which are not
    implemented. ValueError: scales missing, superfluous, or with selectors that PTX does not define.
    """
    run = lookup(shape, kind, a_type, b_type, c_type, d_type, scale_vec, scale_type, satfinite, truncate_bits)
    with np.errstate(all="ignore"):
        return run(a, b, c, scales)


@cache
def lookup(
    shape: str,
    kind: str | None,
    a_type: str,
    b_type: str,
    c_type: str,
    d_type: str,
    scale_vec: str | None = None,
    scale_type: str = "ue8m0",
    satfinite: bool = False,
    truncate_bits: int | None = None,
) -> Run:
    """``run(a, b, c, scales=None)`` of one form; call it under ``np.errstate(all="ignore")``."""
    kind = kind.removeprefix("kind::") if kind else None
    name = f"mma.{shape}.{f'kind::{kind}.' if kind else ''}{d_type}.{a_type}.{b_type}.{c_type}"
    k = _depth(shape, kind, a_type, b_type, c_type, d_type, name)
    if a_type in _INTEGER:
        if truncate_bits is not None:
            raise Unsupported(f"{name}: integer accumulation is exact, truncate_bits does not apply")
        return _integer(a_type, b_type, satfinite)
    if satfinite:
        raise Unsupported(f"{name}: .satfinite is for integer types")
    if truncate_bits is not None and not 2 <= truncate_bits <= 24:
        raise ValueError(f"truncate_bits is {truncate_bits}; it is between 2 and 24")
    count = 0
    if kind in _BLOCK_SCALES:
        vectors = _BLOCK_SCALES[kind]
        vector = scale_vec or (next(iter(vectors)) if kind != "mxf4nvf4" else "")
        if scale_type not in vectors.get(vector, ()):
            raise Unsupported(f"{name}.{scale_type} with .scale_vec::{vector or '(none)'}")
        count = int(vector[0])
    elif scale_vec is not None:
        raise Unsupported(f"{name} with .scale_vec::{scale_vec}")
    return _floating(
        k, _operand(a_type, kind), _operand(b_type, kind), c_type, count, scale_type, truncate_bits
    )


def _depth(
    shape: str, kind: str | None, a_type: str, b_type: str, c_type: str, d_type: str, name: str
) -> int:
    """K of a form that is implemented."""
    half_or_single = c_type == d_type and c_type in ("f16", "f32")
    single = c_type == d_type == "f32"
    types = {a_type, b_type}
    if kind is None:
        allowed = (
            (shape in ("m16n8k8", "m16n8k16") and types == {"f16"} and half_or_single)
            or (shape in ("m16n8k8", "m16n8k16") and types == {"bf16"} and single)
            or (shape in ("m16n8k4", "m16n8k8") and types == {"tf32"} and single)
            or (shape in ("m16n8k16", "m16n8k32") and types <= set(_FP8) and half_or_single)
            or (shape in ("m16n8k16", "m16n8k32") and types <= set(_INTEGER) and c_type == d_type == "s32")
        )
    elif kind == "f8f6f4":
        allowed = shape == "m16n8k32" and types <= set(_NARROW) and half_or_single
    elif kind == "mxf8f6f4":
        allowed = shape == "m16n8k32" and types <= set(_NARROW) and single
    else:
        allowed = kind in ("mxf4", "mxf4nvf4") and shape == "m16n8k64" and types == {"e2m1"} and single
    if not allowed:
        raise Unsupported(name)
    return int(shape.rpartition("k")[2])


@cache
def _operand(type_: str, kind: str | None) -> _Operand:
    form = format_of(type_)
    read: Callable[[Array], Array]
    if form.bits > 8:
        word = np.uint16 if form.bits == 16 else np.uint32
        per = 4 // np.dtype(word).itemsize

        def read(registers: Array) -> Array:
            return decode(type_, registers.view(word))

    elif kind in ("mxf4", "mxf4nvf4"):
        per, values = 8, table(type_)
        pairs = np.stack([values[np.arange(256) & 15], values[np.arange(256) >> 4]], axis=-1)

        def read(registers: Array) -> Array:
            found: Array = pairs.take(registers.view(np.uint8), axis=0)
            return found.reshape(*registers.shape[:-1], -1)

    else:
        # in 8-bit containers e2m1 sits in the middle four bits, e2m3 and e3m2 in the low six
        per, values = 4, table(type_)
        bytes_ = values[np.arange(256) >> 2 & 15] if type_ == "e2m1" else values

        def read(registers: Array) -> Array:
            found: Array = bytes_.take(registers.view(np.uint8))
            return found

    return _Operand(per, read, form.lowest_exponent - form.fraction_bits, _span(form), form.fraction_bits)


def _span(form: Format) -> int:
    largest = decode(form.name, np.array(form.maximum << form.shift, dtype=np.uint64))
    return int(np.frexp(largest)[1]) - (form.lowest_exponent - form.fraction_bits)


def _floating(
    k: int,
    a_operand: _Operand,
    b_operand: _Operand,
    accumulator: str,
    scale_count: int,
    scale_type: str,
    truncate_bits: int | None,
) -> Run:
    per = 2 if accumulator == "f16" else 1
    span = a_operand.span + b_operand.span
    fraction_bits = (a_operand.fraction_bits, b_operand.fraction_bits)
    if scale_count > 1:
        # one scale for a whole row moves all of its products alike; several widen the range of a sum
        scale = format_of(scale_type)
        span += 2 * _span(scale)
        more = scale.fraction_bits + 1 if scale.fraction_bits else 0
        fraction_bits = (fraction_bits[0] + more, fraction_bits[1] + more)
    spare = 53 - (k - 1).bit_length()
    # what float64 holds of a sum of products, in units of the smallest product: always, or up to a magnitude,
    # which is only worth a look where practical FP8 values stay below it
    limit = math.inf if span <= spare else 0.0
    if not limit and scale_count <= 1 and a_operand.per == 4:
        limit = math.ldexp(1.0, spare + a_operand.unit + b_operand.unit)

    def run(
        a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], scales: Scales | None = None
    ) -> list[Array]:
        left = fragments.a_matrix(a_operand.read(fragments.join(a)), a_operand.per)
        right = fragments.b_matrix(b_operand.read(fragments.join(b)), b_operand.per)
        addend = fragments.join(c).view(np.float16 if per == 2 else np.float32).astype(np.float64)
        addend = fragments.c_matrix(addend, per)
        factor: Array | None = None
        if scale_count:
            a_scale, b_scale = _scales(scales, scale_count, scale_type)
            if scale_count == 1:
                factor = a_scale * np.swapaxes(b_scale, -1, -2)
            else:
                left, right = _times(left, a_scale), _times(right, b_scale)
        elif scales is not None:
            raise ValueError("scales given to an mma without .block_scale")
        total = dot_to_odd(left, right, addend, factor, limit=limit, fraction_bits=fraction_bits)
        elements = fragments.d_elements(total, per)
        if truncate_bits is not None:
            elements = _truncated(elements, truncate_bits)
        return fragments.registers(_rounded(elements, accumulator))

    return run


def _scales(scales: Scales | None, count: int, type_: str) -> tuple[Array, Array]:
    """SF_A, shape (..., 16, count), and SF_B transposed, shape (..., 8, count)."""
    if scales is None:
        raise ValueError("an mma with .block_scale needs scales")
    a_data, a_byte, a_thread, b_data, b_byte, b_thread = scales
    found: list[Array] = []
    for data, places in (
        (a_data, fragments.a_scale_bytes(count, int(a_byte), int(a_thread))),
        (b_data, fragments.b_scale_bytes(count, int(b_byte), int(b_thread))),
    ):
        codes = np.ascontiguousarray(data).view(np.uint8).take(places, axis=-1)
        found.append(table(type_).take(codes))
    return found[0], found[1]


def _times(matrix: Array, scale: Array) -> Array:
    """Every chunk of a row multiplied by its scale, which is exact."""
    chunks = matrix.reshape(*matrix.shape[:-1], scale.shape[-1], -1) * scale[..., None]
    return chunks.reshape(*chunks.shape[:-2], -1)


def _truncated(values: Array, bits: int) -> Array:
    """float64 values cut toward zero to ``bits`` significant bits, and to multiples of 2^-149."""
    cut = (values.view(np.uint64) & np.uint64(-(1 << (53 - bits)) & 0xFFFFFFFFFFFFFFFF)).view(np.float64)
    cut = np.where(np.isfinite(values), cut, values)
    small = np.abs(cut) < 2.0**-126
    return np.where(small, np.ldexp(np.trunc(np.ldexp(cut, 149)), -149), cut) if small.any() else cut


def _rounded(values: Array, accumulator: str) -> Array:
    """Bits of float64 values rounded to nearest even in the accumulator's type."""
    single = values.astype(np.float32 if accumulator == "f32" else np.float16)
    codes = single.view(np.uint32 if accumulator == "f32" else np.uint16)
    if has_nan(single):
        codes = np.where(np.isnan(single), codes.dtype.type(_CANONICAL_NAN[accumulator]), codes)
    return codes


def _integer(a_type: str, b_type: str, satfinite: bool) -> Run:
    """s8 and u8: 32 products of at most 16 bits and s32, wrapped or saturated at the end."""
    a_view, b_view = (np.int8 if t == "s8" else np.uint8 for t in (a_type, b_type))
    low, high = -(1 << 31), (1 << 31) - 1

    def run(
        a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], scales: Scales | None = None
    ) -> list[Array]:
        if scales is not None:
            raise ValueError("scales given to an mma without .block_scale")
        # float64 for its matmul: 2^21 and 2^31 are far from 2^53
        left = fragments.a_matrix(fragments.join(a).view(a_view).astype(np.float64), 4)
        right = fragments.b_matrix(fragments.join(b).view(b_view).astype(np.float64), 4)
        addend = fragments.c_matrix(fragments.join(c).view(np.int32), 1)
        total = np.matmul(left, np.swapaxes(right, -1, -2)).astype(np.int64) + addend
        if satfinite:
            total = np.clip(total, low, high)
        return fragments.registers(fragments.d_elements(total.astype(np.uint32), 1))

    return run

"""Tensor maps: the emulator's own 128 bytes behind `cuTensorMapEncodeTiled` and `tensormap.replace`.

A `CUtensorMap` is opaque, so that any layout of its bytes will do that only these functions read. Theirs is
plain: every field has its own bytes, so that 128 zero bytes in which a kernel replaces every field are a
valid map, as they are on hardware. How a box is walked is in `tensor_box`.

Sources: driver API, Tensor Map Object Management; PTX ISA, Tensors (tiled mode) and `tensormap.replace`.
Tiled mode only: im2col has other fields, which nothing here can make.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from .tensor_box import Box, Layout, walk

SIZE = 128  # bytes of a tensor map
ALIGNMENT = 64  # of a tensor map in any memory, in bytes

# address, 5 dims, 4 strides, 5 box, 5 element strides, then one byte each: type, rank - 1, interleave,
# swizzle mode, swizzle atomicity, L2 promotion, fill, whether loads round to TF32
_FIELDS = struct.Struct("<Q5Q4Q5H5B8B")
_MARK_AT = 120
# Written by encode and by every replace: bytes without it were never a tensor map.
_MARK = b"SM12xMap"
_BLANK = bytes(SIZE)


@dataclass(frozen=True, slots=True)
class Element:
    """An element type: `bits` of one value in global memory. `padded` values lie in groups of 16 in 16 bytes
    of shared memory, whatever they take in global memory."""

    name: str
    bits: int
    is_float: bool = False
    padded: bool = False


# In the order of CUtensorMapDataType, by their PTX names.
ELEMENTS = (
    Element("u8", 8),
    Element("u16", 16),
    Element("u32", 32),
    Element("s32", 32),
    Element("u64", 64),
    Element("s64", 64),
    Element("f16", 16, True),
    Element("f32", 32, True),
    Element("f64", 64, True),
    Element("bf16", 16, True),
    Element("f32.ftz", 32, True),
    Element("tf32", 32, True),
    Element("tf32.ftz", 32, True),
    Element("b4x16", 4),
    Element("b4x16_p64", 4, padded=True),
    Element("b6x16_p32", 6, padded=True),
)
# `tensormap.replace.elemtype` counts the same types in another order.
_PTX_ELEMENTS = (0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12, 13, 14, 15)
INTERLEAVES = (0, 16, 32)  # CUtensorMapInterleave, in bytes
# CUtensorMapSwizzle as PTX ISA's (swizzle_mode, swizzle_atomicity).
_SWIZZLES = ((0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3))
_SPANS = (0, 32, 64, 128, 96)  # of a swizzle_mode, in bytes
_ATOMS = (16, 32, 32, 64)  # of a swizzle_atomicity, in bytes
_SWIZZLE_96, _FLIPPED_ATOMS = 4, 2  # a swizzle_mode and a swizzle_atomicity that are not implemented
FILLS = ("zero", "nan")  # CUtensorMapFloatOOBfill
_TF32 = (11, 12)  # types whose loads round
_ROUNDABLE = (7, 10, 11, 12)  # types that a load which rounds may have
_BOX_BYTES = 228 * 1024  # that a box may have at most, whatever the device: the driver's limit on an H200
# Out-of-bounds NaN, on an H200: a NaN in every type when repeated. No document gives its bits.
_NAN_FILL = bytes.fromhex("f77f") * 8


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A decoded tensor map. Dimensions are innermost first.

    address: of the tensor in global memory.
    dims, box, element_strides: elements per dimension (with interleave, dimension 0 counts slices of that
      many bytes); `element_strides[0]` is 1 without interleave, which ignores it.
    strides: bytes between neighbours of dimensions 1 and up.
    interleave: 0, 16 or 32 bytes. swizzle: 0, 32, 64 or 128 bytes, in which chunks of `swizzle_atom` bytes
      change places. l2_promotion: CUtensorMapL2promotion, without effect here. fill: "zero" or "nan".
    rounds: whether loads round FP32 to TF32: to nearest even, a NaN to 0x7fffe000, subnormals like others,
      and what is filled in not at all. Other types load every bit as it is; `.ftz` flushes nothing.
    layout: what decides how a box is walked: all but the address, the tensor's size and the fill.
    """

    address: int
    element: Element
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int
    swizzle: int
    swizzle_atom: int
    l2_promotion: int
    fill: str
    rounds: bool
    layout: Layout

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def transaction_bytes(self) -> int:
        """Bytes that a load of one box reports to its mbarrier: the whole box, also what is out of bounds."""
        return self.layout.transaction_bytes

    @property
    def shared_bytes(self) -> int:
        """Bytes from the first to behind the last that one box takes in shared memory."""
        return self.layout.shared_bytes

    @property
    def fill_pattern(self) -> bytes:
        """16 bytes whose first n are what n bytes out of bounds are filled with, for n = 1, 2, 4, 8, 16."""
        return _NAN_FILL if self.fill == "nan" else bytes(16)

    def box_elements(
        self,
        coords: Sequence[int],
        shared_address: int = 0,
        *,
        unit: int | None = None,
        writes: bool = False,
    ) -> Box:
        """Where the bytes of the box that begins at `coords` (innermost first, may be negative) lie in global
        and in shared memory, where it begins at `shared_address`.

        `unit`: bytes per entry of the index arrays, a power of two up to 16; None takes the largest that fits
        the box. `writes`: for a store or reduction, whose rows end where their last 16 bytes do. Raises
        ValueError where rank, alignment or unit do not fit, and where a write begins in front of the tensor.
        """
        return walk(self.layout, self.address, self.dims, tuple(coords), shared_address, unit, writes)


def encode_tiled(
    data_type: int,
    rank: int,
    address: int,
    dims: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int],
    interleave: int,
    swizzle: int,
    l2: int,
    oob_fill: int,
) -> bytes:
    """The 128 bytes of a tensor map; arguments, in order and numbering, are cuTensorMapEncodeTiled's.

    Raises ValueError, which names the argument in the driver's words, for what the driver refuses, and for
    the one swizzle mode that is not implemented. An H200's driver (580.159) was asked 30,000 times
    (tests/gpu/twins/encoding.py). Where it parts from the driver API's reference it is followed:
    - the address may be 0, and is below 2**57;
    - with interleave, too, `box[0]` elements (not slices) are a multiple of 16 bytes;
    - an interleave of 32 bytes goes with any swizzle;
    - strides need not grow, nor step over what is inside: 0 will do;
    - a box has at most 228 KiB, its extents divided by element strides, dimension 0's too, and rounded down.
    Types and swizzles that only later devices have are refused by that driver and taken here.
    """
    _in_range("tensorRank", rank, 1, 5)
    for name, values, count in (
        ("globalDim", dims, rank),
        ("globalStrides", strides_bytes, rank - 1),
        ("boxDim", box, rank),
        ("elementStrides", element_strides, rank),
    ):
        if len(values) < count:
            raise ValueError(f"{name}: expected {count} values, got {len(values)}")
    _in_range("swizzle", swizzle, 0, len(_SWIZZLES) - 1)
    raw = _Raw(
        address,
        [*dims[:rank], *[1] * (5 - rank)],
        [*strides_bytes[: rank - 1], *[0] * (5 - rank)],
        [*box[:rank], *[1] * (5 - rank)],
        [*element_strides[:rank], *[1] * (5 - rank)],
        data_type,
        rank,
        interleave,
        *_SWIZZLES[swizzle],
        l2,
        oob_fill,
        data_type in _TF32,
    )
    _check(raw)
    return raw.pack()


def decode(data: bytes) -> TensorMap:
    """The tensor map in 128 bytes, as the instruction that uses it sees it.

    Raises ValueError where they never were one, or where replaced fields break a rule of `encode_tiled`.
    """
    return _decode(bytes(data))


def replace(data: bytes, field: str, index: int | None, value: int) -> bytes:
    """`tensormap.replace.tile.<field>` on 128 bytes; returns the new ones.

    field: "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
      "interleave_layout", "swizzle_mode", "swizzle_atomicity" or "fill_mode". `index` is the ordinal of the
      four that have one, else None. `value` as PTX ISA has it: rank less 1, strides in bytes, types and modes
      by its own numbering.

    Whole maps are judged where they are used, since a kernel replaces one field after the other. Raises
    ValueError where `data` is neither a tensor map nor zero, or where field, index or value do not exist.
    """
    data = bytes(data)
    raw = _Raw.unpack(data, blank=True)
    arrays = {
        "box_dim": raw.box,
        "global_dim": raw.dims,
        "global_stride": raw.strides,
        "element_stride": raw.element_strides,
    }
    if field in arrays:
        target = arrays[field]
        if index is None or not 0 <= index < len(target):
            raise ValueError(f"{field}: expected an ordinal from 0 to {len(target) - 1}, got {index}")
        limit = 2**64 if field == "global_stride" else 2**32
        target[index] = value % limit
        # Wider than the field: no value that fits would be what was written.
        if field == "box_dim":
            _in_range("box_dim", target[index], 1, 256)
        elif field == "element_stride":
            _in_range("element_stride", target[index], 1, 8)
        return raw.pack()
    if index is not None:
        raise ValueError(f"{field}: expected no ordinal, got {index}")
    if field == "global_address":
        raw.address = value % 2**64
    elif field == "rank":
        _in_range("rank", value, 0, 4)
        raw.rank = value + 1
    elif field == "elemtype":
        _in_range("elemtype", value, 0, len(_PTX_ELEMENTS) - 1)
        raw.data_type = _PTX_ELEMENTS[value]
        # As on an H200, no other type takes the rounding away.
        raw.rounds |= raw.data_type in _TF32
    elif field == "interleave_layout":
        _in_range("interleave_layout", value, 0, 2)
        raw.interleave = value
    elif field == "swizzle_mode":
        _in_range("swizzle_mode", value, 0, len(_SPANS) - 1)
        raw.swizzle = value
    elif field == "swizzle_atomicity":
        _in_range("swizzle_atomicity", value, 0, len(_ATOMS) - 1)
        raw.atomicity = value
    elif field == "fill_mode":
        _in_range("fill_mode", value, 0, 1)
        raw.fill = value
    else:
        raise ValueError(f"expected a field of tensormap.replace, got {field!r}")
    return raw.pack()


@dataclass(slots=True)
class _Raw:
    """The fields as they are stored: five of everything but strides, whatever the rank; types, interleave and
    fill by the driver's numbering, swizzle and atomicity by PTX ISA's."""

    address: int
    dims: list[int]
    strides: list[int]
    box: list[int]
    element_strides: list[int]
    data_type: int
    rank: int
    interleave: int
    swizzle: int
    atomicity: int
    l2: int
    fill: int
    rounds: int

    def pack(self) -> bytes:
        fields = _FIELDS.pack(
            self.address,
            *self.dims,
            *self.strides,
            *self.box,
            *self.element_strides,
            self.data_type,
            self.rank - 1,
            self.interleave,
            self.swizzle,
            self.atomicity,
            self.l2,
            self.fill,
            self.rounds,
        )
        return fields.ljust(_MARK_AT, b"\0") + _MARK

    @classmethod
    def unpack(cls, data: bytes, *, blank: bool) -> _Raw:
        if len(data) != SIZE:
            raise ValueError(f"tensor map: expected {SIZE} bytes, got {len(data)}")
        if data[_MARK_AT:] != _MARK and not (blank and data == _BLANK):
            raise ValueError(
                "tensor map: these 128 bytes were not made by cuTensorMapEncodeTiled or tensormap.replace"
            )
        values = _FIELDS.unpack_from(data)
        address, dims, strides = values[0], list(values[1:6]), list(values[6:10])
        box, steps = list(values[10:15]), list(values[15:20])
        kind, rank, *modes = values[20:]
        return cls(address, dims, strides, box, steps, kind, rank + 1, *modes)


@lru_cache(maxsize=1024)
def _decode(data: bytes) -> TensorMap:
    raw = _Raw.unpack(data, blank=False)
    _check(raw)
    if raw.rounds and raw.data_type not in _ROUNDABLE:
        raise ValueError(
            f"elemtype: {ELEMENTS[raw.data_type].name} in a map of TF32, whose rounding no replacement ends"
        )
    rank, element = raw.rank, ELEMENTS[raw.data_type]
    box, strides = tuple(raw.box[:rank]), tuple(raw.strides[: rank - 1])
    steps = tuple(raw.element_strides[:rank])
    if not raw.interleave:
        steps = (1, *steps[1:])
    interleave, swizzle, atom = INTERLEAVES[raw.interleave], _SPANS[raw.swizzle], _ATOMS[raw.atomicity]
    counts = [-(-extent // step) for extent, step in zip(box, steps, strict=True)]
    if interleave:
        counts[-2] = 1  # C/8 of NC/8HWC8: an H200 takes one slice of channels, whatever the box says
    return TensorMap(
        address=raw.address,
        element=element,
        dims=tuple(raw.dims[:rank]),
        strides=strides,
        box=box,
        element_strides=steps,
        interleave=interleave,
        swizzle=swizzle,
        swizzle_atom=atom,
        l2_promotion=raw.l2,
        fill=FILLS[raw.fill],
        rounds=bool(raw.rounds),
        layout=Layout(element.bits, element.padded, strides, tuple(counts), steps, interleave, swizzle, atom),
    )


def _check(raw: _Raw) -> None:
    """The rules of cuTensorMapEncodeTiled; see `encode_tiled`."""
    _in_range("tensorDataType", raw.data_type, 0, len(ELEMENTS) - 1)
    _in_range("interleave", raw.interleave, 0, 2)
    _in_range("l2Promotion", raw.l2, 0, 3)
    _in_range("oobFill", raw.fill, 0, 1)
    element, interleave = ELEMENTS[raw.data_type], INTERLEAVES[raw.interleave]
    if raw.swizzle == _SWIZZLE_96 or raw.atomicity == _FLIPPED_ATOMS:
        raise ValueError("swizzle: spans of 96 bytes and atoms with an 8-byte flip are not implemented")
    span = _SPANS[raw.swizzle]
    if raw.atomicity and span != 128:
        raise ValueError(f"swizzle: expected atoms of 16 bytes with a span of {span} bytes")
    if interleave and raw.rank < 3:
        raise ValueError(f"tensorRank: expected at least 3 with interleave, got {raw.rank}")
    wide = interleave == 32 or element.padded
    _in_range("globalAddress", raw.address, 0, 2**57 - 1)
    _multiple("globalAddress", raw.address, 32 if wide else 16)
    rank = raw.rank
    for i, size in enumerate(raw.dims[:rank]):
        _in_range(f"globalDim[{i}]", size, 1, 2**32)
    if element.padded:
        _multiple("globalDim[0]", raw.dims[0], 128)
    elif element.bits == 4:
        _multiple("globalDim[0]", raw.dims[0], 2)
    for i, stride in enumerate(raw.strides[: rank - 1]):
        _multiple(f"globalStrides[{i}]", stride, 32 if wide else 16)
        _in_range(f"globalStrides[{i}]", stride, 0, 2**40 - 1)
    for i, extent in enumerate(raw.box[:rank]):
        _in_range(f"boxDim[{i}]", extent, 1, 256)
    for i, step in enumerate(raw.element_strides[:rank]):
        _in_range(f"elementStrides[{i}]", step, 1, 8)
    if element.padded:
        if raw.box[0] != 128:
            raise ValueError(f"boxDim[0]: expected 128 with {element.name}, got {raw.box[0]}")
        if interleave:
            raise ValueError(f"interleave: expected none with {element.name}, got {interleave}")
        if span not in (0, 128):
            raise ValueError(f"swizzle: expected none or 128 bytes with {element.name}, got {span}")
    bits = 8 if element.padded else element.bits
    if raw.box[0] * element.bits % 128 and not element.padded:
        raise ValueError(f"boxDim[0]: expected a multiple of 16 bytes, got {raw.box[0]} x {element.name}")
    if not interleave and span and raw.box[0] * bits // 8 > span:
        raise ValueError(
            f"boxDim[0]: expected at most {span} bytes with that swizzle, got {raw.box[0]} x {element.name}"
        )
    pairs = zip(raw.box[:rank], raw.element_strides[:rank], strict=True)
    size = prod(extent // step for extent, step in pairs) * bits // 8
    if size > _BOX_BYTES:
        raise ValueError(f"boxDim: expected at most {_BOX_BYTES} bytes, got {size}")
    if raw.fill and not element.is_float:
        raise ValueError(f"oobFill: expected zeros for {element.name}, which has no NaN")


def _in_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def _multiple(name: str, value: int, unit: int) -> None:
    if value % unit:
        raise ValueError(f"{name}: expected a multiple of {unit}, got {value}")

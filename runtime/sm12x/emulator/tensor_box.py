"""Walking the box of a tensor map: where each of its bytes lies in global and in shared memory.

Everything that does not depend on where a box begins is worked out once for a `Layout` and kept, so that a
load or store is an addition, perhaps a mask, and one gather and one scatter.

Sources: PTX ISA, Tensors: tiled mode, out-of-boundary access, interleave layout, swizzling modes; CUDA
programming guide, TMA swizzle. Where they leave a choice, this is the one taken:
- A box whose rows are narrower than its swizzle has them a whole swizzle span apart.
- With interleave, dimension 0 counts slices of 16 or 32 bytes that lie behind each other (W of NC/8HWC8, of
  which C/8 is the last dimension but one). A box has one slice of channels, whatever its size there says.
- A write does not stop at the end of a row but at that of the row's last 16 bytes, past the tensor's extent
  where that is no multiple of 16 bytes; reads do stop there.
- A box begins at a multiple of 16 bytes of its row, also where it is out of bounds, and a write begins
  nowhere in front of the tensor (no coordinate below 0); everything else may lie out of bounds anywhere.
No document says so; an H200 does it, and refuses what is refused here (CUDA_ERROR_ILLEGAL_INSTRUCTION).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 256 * 1024  # more than the shared memory of any SM
SHARED_ALIGNMENT = 128  # of a box in shared memory, in bytes
_UNITS = (1, 2, 4, 8, 16)
_ROW_UNIT = 16  # bytes of a row at whose multiples boxes begin, and which are written together or not at all
_PATTERN = 1024  # bytes after which the widest swizzle repeats


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides how a box is walked. Dimensions innermost first; `counts` are the elements of a box,
    `steps` how many elements of the tensor lie from one of them to the next."""

    bits: int
    padded: bool
    strides: tuple[int, ...]
    counts: tuple[int, ...]
    steps: tuple[int, ...]
    interleave: int
    swizzle: int
    swizzle_atom: int

    @property
    def item(self) -> tuple[int, int, int]:
        """What dimension 0 is walked in: elements of an item, its bytes, and bytes from item to item in
        shared memory."""
        if self.interleave:
            return 1, self.interleave, self.interleave
        if self.padded:  # 16 values in 8 or 12 bytes, of which shared memory has 16
            return 16, 2 * self.bits, 16
        if self.bits < 8:
            return 2, 1, 1
        return 1, self.bits // 8, self.bits // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a box in shared memory, padding between values included."""
        elements, _, pitch = self.item
        return self.counts[0] // elements * pitch

    @property
    def rows(self) -> int:
        return prod(self.counts[1:])

    @property
    def transaction_bytes(self) -> int:
        """Without the padding between packed values: what CUTLASS's kernels for 6-bit operands expect."""
        elements, size, _ = self.item
        return self.rows * (self.counts[0] // elements) * size

    @property
    def row_pitch(self) -> int:
        """Bytes from row to row in shared memory."""
        return self.row_bytes if self.interleave else max(self.row_bytes, self.swizzle)

    @property
    def shared_bytes(self) -> int:
        span = self.swizzle or 1
        return -(-((self.rows - 1) * self.row_pitch + self.row_bytes) // span) * span


@dataclass(frozen=True, slots=True)
class Box:
    """The bytes of one box in entries of `unit` bytes each, the same order in every array, innermost first.

    addresses: of each entry in global memory, int64; meaningless where out of bounds.
    in_bounds: bool, False where the entry is outside of the tensor; None where the whole box is inside.
    offsets: of each entry from the box's own address in shared memory, after swizzling.
    low, high: address of the first byte and behind the last byte that is in bounds; equal where none is.
    transaction_bytes: what a load reports to its mbarrier, whatever is out of bounds.

    Entries are aligned to `unit` in both memories. Padding between packed values has no entry.
    """

    unit: int
    addresses: NDArray[np.int64]
    in_bounds: NDArray[np.bool_] | None
    offsets: NDArray[np.intp]
    low: int
    high: int
    transaction_bytes: int

    def by_byte(self) -> Box:
        """The same box with one entry for each byte."""
        if self.unit == 1:
            return self
        within = np.arange(self.unit)
        return Box(
            1,
            (self.addresses[:, None] + within).ravel(),
            None if self.in_bounds is None else np.repeat(self.in_bounds, self.unit),
            (self.offsets[:, None] + within).ravel(),
            self.low,
            self.high,
            self.transaction_bytes,
        )


def walk(
    layout: Layout,
    address: int,
    dims: tuple[int, ...],
    coords: Sequence[int],
    shared_address: int,
    unit: int | None,
    writes: bool = False,
) -> Box:
    """The box at `coords` of a tensor at `address`; see `TensorMap.box_elements`."""
    if len(coords) != len(dims):
        raise ValueError(f"expected {len(dims)} coordinates for a tensor map of that rank, got {len(coords)}")
    if shared_address % SHARED_ALIGNMENT:
        raise ValueError(
            f"expected an address in shared memory that is a multiple of {SHARED_ALIGNMENT}, got "
            f"{shared_address:#x}"
        )
    elements, size, pitch = layout.item
    multiple = 128 if layout.padded else elements * max(1, _ROW_UNIT // size)
    if coords[0] % multiple:
        raise ValueError(
            f"coordinate 0: expected a multiple of {multiple} for that type ({_ROW_UNIT} bytes of a row), "
            f"got {coords[0]}"
        )
    if writes and min(coords) < 0:
        raise ValueError(f"coordinates: expected none below 0 for a write, got {tuple(coords)}")
    first, have, items = coords[0] // elements, dims[0] // elements, layout.counts[0] // elements
    if writes:
        have = -(-have * size // _ROW_UNIT) * _ROW_UNIT // size
    step = layout.steps[0]
    # The items of a row that are inside, if any are.
    begin = min(items, max(0, -(first // step)))
    end = max(begin, min(items, -((first - have) // step)))
    gaps = size != pitch or step > 1
    fits = gcd(16, first * size, begin * size, end * size, size if gaps else items * size)
    if unit is None:
        unit = fits
    elif unit not in _UNITS or fits % unit:
        raise ValueError(f"unit: expected a power of two that divides {fits} for this box, got {unit}")
    relative, offsets = _index(layout, unit, shared_address % _PATTERN)
    base = address + first * size + sum(c * s for c, s in zip(coords[1:], layout.strides, strict=True))
    addresses = relative + base
    outer = zip(coords[1:], layout.counts[1:], layout.steps[1:], dims[1:], strict=True)
    if end - begin == items and all(c >= 0 and c + (n - 1) * s < d for c, n, s, d in outer):
        high = base + int(relative[-1]) + unit
        return Box(unit, addresses, None, offsets, base, high, layout.transaction_bytes)
    inside = np.zeros(items * size // unit, np.bool_)
    inside[begin * size // unit : end * size // unit] = True
    mask = (_rows_inside(layout, coords, dims)[:, None] & inside).ravel()
    held = addresses[mask]
    low, high = (int(held.min()), int(held.max()) + unit) if held.size else (base, base)
    return Box(unit, addresses, mask, offsets, low, high, layout.transaction_bytes)


def to_tf32(values: NDArray[Any]) -> NDArray[Any]:
    """FP32 bits in words of 4 bytes and more, rounded as loads through a map of TF32 round: to nearest even,
    subnormals like others, a NaN to 0x7fffe000."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0xFFF) + (bits >> 13 & 1))) & np.uint32(0xFFFFE000)
    nan = bits & 0x7FFFFFFF > 0x7F800000
    found: NDArray[Any] = np.where(nan, np.uint32(0x7FFFE000), rounded).view(values.dtype)
    return found


def _rows_inside(layout: Layout, coords: Sequence[int], dims: tuple[int, ...]) -> NDArray[np.bool_]:
    """For each row of a box, in order, whether dimensions 1 and up are inside."""
    rows = np.ones((), np.bool_)
    for c, n, s, d in zip(coords[1:], layout.counts[1:], layout.steps[1:], dims[1:], strict=True):
        at = c + np.arange(n) * s
        rows = ((at >= 0) & (at < d)).reshape(-1, *[1] * rows.ndim) & rows
    return rows.ravel()


@lru_cache(maxsize=256)
def _index(layout: Layout, unit: int, phase: int) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """For each entry its distance from the first in global memory, and its offset in shared memory where the
    box begins `phase` bytes behind a multiple of the pattern."""
    if layout.shared_bytes > MOST_BYTES:
        raise ValueError(f"a box of {layout.shared_bytes} bytes fits no shared memory")
    elements, size, pitch = layout.item
    data = np.arange(layout.counts[0] // elements * size // unit) * unit
    item, within = data // size, data % size
    far = item * (size * layout.steps[0]) + within
    near = item * pitch + within
    rows = np.zeros((), np.int64)
    for n, s, stride in zip(layout.counts[1:], layout.steps[1:], layout.strides, strict=True):
        rows = (np.arange(n) * (s * stride)).reshape(-1, *[1] * rows.ndim) + rows
    relative = (rows.ravel()[:, None] + far).ravel()
    shared = (np.arange(layout.rows)[:, None] * layout.row_pitch + near).ravel() + phase
    offsets = _swizzled(shared, layout.swizzle, layout.swizzle_atom) - phase
    relative.flags.writeable = offsets.flags.writeable = False  # shared by all boxes of this layout
    return relative, offsets.astype(np.intp)


def _swizzled(address: NDArray[np.int64], span: int, atom: int) -> NDArray[np.int64]:
    """Where the byte meant for `address` of shared memory goes: the atoms of each 128-byte line change places
    by the number of the line."""
    if not span:
        return address
    line = address >> 7
    return address ^ ((line & (span // atom - 1)) * atom)

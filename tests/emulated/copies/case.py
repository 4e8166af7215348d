"""One asynchronous copy as data: what is in memory before, the kernel that runs, and the tensor map it uses.

A case owns an arena, which is all of global memory that it touches: the tensor between guards, what shared
memory is filled with before, room for what it holds after, and a few words of result. Everything begins as
random bytes, and everything is compared, so that no stray byte stays unseen. `ptx` has the kernels.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RECORD_BYTES = 256  # of a case in the table that a kernel reads
RESULT_BYTES = 256
SHARED_BYTES = 16384  # of `box`, the shared memory that copies work on
GUARD = 256  # bytes around the tensor
# Offsets in a record. Addresses first.
MAP, GLOBAL, SHARED_IN, SHARED_OUT, RESULT, NEW_ADDRESS = range(0, 48, 8)
STRIDES = 48  # 4 x u64
COORDS, BOX, DIMS, STEPS = 80, 100, 120, 140  # 5 x u32 each
(OFFSET, SIZE, DUMP, EXTRA, RAW, MASK, RANK, TYPE, INTERLEAVE, SWIZZLE, FILL) = range(160, 204, 4)

# CUtensorMapDataType -> PTX name, bytes, whether it has a NaN; those that sm_90 has
TYPES = {
    0: ("u8", 1, False),
    1: ("u16", 2, False),
    2: ("u32", 4, False),
    3: ("s32", 4, False),
    4: ("u64", 8, False),
    5: ("s64", 8, False),
    6: ("f16", 2, True),
    7: ("f32", 4, True),
    8: ("f64", 8, True),
    9: ("bf16", 2, True),
    10: ("f32.ftz", 4, True),
    11: ("tf32", 4, True),
    12: ("tf32.ftz", 4, True),
}
# The numbers by which tensormap.replace.elemtype knows them.
PTX_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 10: 8, 8: 9, 9: 10, 11: 11, 12: 12}
SPANS = (0, 32, 64, 128)  # of CUtensorMapSwizzle, bytes
SLICES = (0, 16, 32)  # of CUtensorMapInterleave, bytes
# Fields that tensormap.replace can write, a bit of MASK each.
FIELDS = (
    "global_address",
    "rank",
    "box_dim",
    "global_dim",
    "global_stride",
    "element_stride",
    "elemtype",
    "interleave_layout",
    "swizzle_mode",
    "fill_mode",
)


@dataclass(frozen=True)
class Map:
    """Arguments of cuTensorMapEncodeTiled but the address, which is `offset` bytes into the arena."""

    kind: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    interleave: int = 0
    swizzle: int = 0
    l2: int = 0
    fill: int = 0
    offset: int = GUARD

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def item(self) -> int:
        """Bytes of what dimension 0 counts: an element, or with interleave a slice."""
        return SLICES[self.interleave] or TYPES[self.kind][1]

    @property
    def counts(self) -> tuple[int, ...]:
        """Items that a box has in each dimension. The step of dimension 0 counts with interleave only, which
        has one slice of channels only."""
        steps = self.steps if self.interleave else (1, *self.steps[1:])
        found = [-(-extent // step) for extent, step in zip(self.box, steps, strict=True)]
        if self.interleave:
            found[-2] = 1
        return tuple(found)

    @property
    def box_bytes(self) -> int:
        """Bytes that a load of one box brings."""
        return int(np.prod(self.counts)) * self.item

    @property
    def pitch(self) -> int:
        """Bytes from row to row of a box in shared memory: a narrow row takes a whole swizzle span."""
        row = self.counts[0] * self.item
        return row if self.interleave else max(row, SPANS[self.swizzle])

    @property
    def shared_bytes(self) -> int:
        """Bytes from the first to behind the last that a box may touch in shared memory."""
        rows = int(np.prod(self.counts[1:]))
        return rows * self.pitch + 1024

    @property
    def tensor_bytes(self) -> int:
        """Bytes from the first to behind the last of the tensor."""
        last = self.dims[0] * self.item
        return last + sum((n - 1) * s for n, s in zip(self.dims[1:], self.strides, strict=True))


@dataclass(frozen=True)
class Case:
    """`family` groups cases in reports; `kernel` is one of `ptx`'s; `region` are the bytes of the tensor with
    its guards; `offset` is where in `box` the copy begins. `template` is the map that replaced fields are
    written into, where the kernel does that. `content` says what memory holds before: "bits" are random
    bytes, else values of a type, special ones among them. `note` is what the case is about.
    """

    family: str
    kernel: str
    seed: int
    region: int
    dump: int
    map: Map | None = None
    template: Map | None = None
    replaced: tuple[str, ...] = ()
    coords: tuple[int, ...] = ()
    offset: int = 0
    size: int = 0  # of a bulk copy; of a tensor load what its mbarrier is to expect
    start: int = GUARD  # of a bulk copy in the tensor's region
    extra: int = 0
    content: str = "bits"
    note: str = ""

    @property
    def places(self) -> tuple[int, int, int, int]:
        """Offsets in the arena: shared memory before, shared memory after, result, end."""
        first = -(-self.region // 256) * 256
        shared = -(-self.dump // 256) * 256
        return first, first + shared, first + 2 * shared, first + 2 * shared + RESULT_BYTES

    def arena(self) -> np.ndarray:
        """What global memory holds before the kernel runs: uint8 (places[3],)."""
        rng = np.random.default_rng(self.seed)
        found = rng.integers(0, 256, self.places[3], np.uint8)
        if self.content != "bits":
            end = self.places[1]
            found[:end] = values(rng, self.content, end)
        return found

    def record(self, arena: int, map_address: int, *, raw: bool) -> bytes:
        """The case in the table of a kernel, for an arena at an address. `raw`: the kernel is to look into
        the mbarrier, which only hardware lets it."""
        shared_in, shared_out, result, _ = self.places
        data = bytearray(RECORD_BYTES)
        m = self.map
        struct.pack_into(
            "<6Q",
            data,
            0,
            map_address,
            arena + self.start,
            arena + shared_in,
            arena + shared_out,
            arena + result,
            arena + (m.offset if m else 0),
        )
        coords = (*self.coords, 0, 0, 0, 0, 0)[:5]
        struct.pack_into("<5i", data, COORDS, *coords)
        mask = sum(1 << FIELDS.index(name) for name in self.replaced)
        struct.pack_into("<6I", data, OFFSET, self.offset, self.size, self.dump, self.extra, int(raw), mask)
        if m:
            struct.pack_into("<4Q", data, STRIDES, *(*m.strides, 0, 0, 0, 0)[:4])
            for at, found in ((BOX, m.box), (DIMS, m.dims), (STEPS, m.steps)):
                struct.pack_into("<5I", data, at, *(*found, 1, 1, 1, 1, 1)[:5])
            struct.pack_into(
                "<5I", data, RANK, m.rank - 1, PTX_TYPES[m.kind], m.interleave, m.swizzle, m.fill
            )
        return bytes(data)

    def described(self) -> dict[str, Any]:
        """The case for a report: what differs from a field's default."""
        blank = Case("", "", 0, 0, 0)
        found = {}
        for name, value in asdict(self).items():
            if value != getattr(blank, name):
                found[name] = value
        return found


@dataclass
class Outcome:
    """What one side made of a case: the arena after, or why there is none. `raw` is what hardware had in the
    mbarrier."""

    arena: bytes | None = None
    error: str | None = None
    raw: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


_SPECIAL = {
    "f16": (np.uint16, [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7D01]),
    "bf16": (np.uint16, [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81]),
    "f32": (
        np.uint32,
        [
            *(0, 1 << 31, 1, (1 << 31) + 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000),
            *(0xFF800000, 0x7FC00000, 0x7F800001),
        ],
    ),
    "f64": (
        np.uint64,
        [
            *(0, 1 << 63, 1, (1 << 63) + 1, (1 << 52) - 1, 1 << 52, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF),
            *(0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001),
        ],
    ),
}


def values(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """`size` bytes of values of a type: numbers near one another, random bits, special and extreme ones."""
    if kind in _SPECIAL:
        word, special = _SPECIAL[kind]
        count = -(-size // 8) * 8 // np.dtype(word).itemsize
        bits = rng.integers(0, 1 << 8 * np.dtype(word).itemsize, count, np.uint64).astype(word)
        near = rng.standard_normal(count) * 4
        if kind == "bf16":
            usual = (near.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            usual = near.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).view(word)
        pick = rng.random(count)
        found = np.where(pick < 0.7, usual, bits)
        found = np.where(pick > 0.85, rng.choice(np.array(special, word), count), found).astype(word)
        if kind == "f32":
            # Half-way between two tf32 numbers, and next to that.
            end = rng.choice(np.array([0xFFF, 0x1000, 0x1001, 0, 0x1FFF], np.uint32), count)
            found = np.where(rng.random(count) < 0.3, found & np.uint32(0xFFFFE000) | end, found).astype(word)
    else:
        word = np.dtype(f"u{int(kind[1:]) // 8}")
        count = -(-size // 8) * 8 // word.itemsize
        bits = rng.integers(0, 1 << 8 * word.itemsize, count, np.uint64).astype(word)
        top = 1 << 8 * word.itemsize
        extreme = rng.choice(np.array([0, 1, 2, top // 2 - 1, top // 2, top - 1, top - 2], np.uint64), count)
        small = rng.integers(0, 6, count).astype(word)
        pick = rng.random(count)
        found = np.where(pick < 0.3, small, np.where(pick < 0.6, extreme.astype(word), bits)).astype(word)
    return found.view(np.uint8)[:size]

"""Tensor maps of the emulator against a model that walks a box element by element, and against the rules and
tables of the driver API, the CUDA programming guide and the PTX ISA."""

import itertools
import random
import re
from contextlib import suppress

import numpy as np
import pytest

from sm12x.emulator import tensor_map as tm

BASE = 0x7F00_0000_0000
U8, U16, U32, F16, F32, F64, BF16, B4, B4_P64, B6_P32 = 0, 1, 2, 6, 7, 8, 9, 13, 14, 15
SIZES = {U8: 1, U16: 2, U32: 4, F16: 2, F32: 4, F64: 8, BF16: 2}
# cuTensorMapEncodeTiled's swizzle argument -> (bytes that a row may have, lines after which the pattern
# repeats, bytes that move together)
SWIZZLES = {
    0: (None, 1, 16),
    1: (32, 2, 16),
    2: (64, 4, 16),
    3: (128, 8, 16),
    4: (128, 4, 32),
    6: (128, 2, 64),
}


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def plain(**changes):
    """Arguments of encode_tiled for a 2-D map of bytes; `changes` replaces some."""
    arguments = {
        "data_type": U8,
        "rank": 2,
        "address": BASE,
        "dims": [256, 64],
        "strides_bytes": [256],
        "box": [128, 8],
        "element_strides": [1, 1],
        "interleave": 0,
        "swizzle": 0,
        "l2": 0,
        "oob_fill": 0,
    }
    return {**arguments, **changes}


def refused(text):
    return pytest.raises(ValueError, match=re.escape(text))


def encoded(**changes):
    return tm.decode(tm.encode_tiled(**plain(**changes)))


class Model:
    """A box of a tensor, element by element, as the ISA tells it. `pieces` are (offset in shared memory,
    address or None where out of bounds, bytes), one for each element (or slice, with interleave)."""

    def __init__(self, arguments, coords, shared_address):
        rank, kind = arguments["rank"], arguments["data_type"]
        dims, box, steps = arguments["dims"], arguments["box"], list(arguments["element_strides"])
        interleave = (0, 16, 32)[arguments["interleave"]]
        width, lines, atom = SWIZZLES[arguments["swizzle"]]
        group, size, pitch = 1, interleave or SIZES.get(kind), None
        if kind in (B4, B4_P64, B6_P32):
            group = {B4: 2, B4_P64: 16, B6_P32: 16}[kind]
            size = {B4: 1, B4_P64: 8, B6_P32: 12}[kind]
            pitch = {B4: 1, B4_P64: 16, B6_P32: 16}[kind]
        pitch = pitch or size
        if not interleave:
            steps[0] = 1
        counts = [-(-box[i] // steps[i]) for i in range(rank)]
        counts[0] //= group
        if interleave:
            counts[-2] = 1
        row = counts[0] * pitch
        row_pitch = max(row, width) if width and not interleave else row
        self.pieces = []
        self.transaction_bytes = counts[0] * size  # of packed values, as they are in global memory
        for extent in counts[1:]:
            self.transaction_bytes *= extent
        outer = [range(extent) for extent in reversed(counts[1:])]
        for number, where in enumerate(itertools.product(*outer)):
            j = (0, *reversed(where))
            for i in range(counts[0]):
                address, inside = arguments["address"], True
                at = coords[0] // group + i * steps[0]
                inside = 0 <= at < dims[0] // group
                address += at * size
                for d in range(1, rank):
                    at = coords[d] + j[d] * steps[d]
                    inside = inside and 0 <= at < dims[d]
                    address += at * arguments["strides_bytes"][d - 1]
                for b in range(size):
                    to = shared_address + number * row_pitch + i * pitch + b
                    if width:
                        line, x = divmod(to, 128)
                        unit, rest = divmod(x, atom)
                        to = line * 128 + (unit ^ (line % lines)) * atom + rest
                    self.pieces.append((to - shared_address, address + b if inside else None))


def by_byte(box):
    """{offset in shared memory: address or None} of a box's index arrays."""
    found = {}
    for entry, (address, offset) in enumerate(zip(box.addresses.tolist(), box.offsets.tolist(), strict=True)):
        inside = box.in_bounds is None or bool(box.in_bounds[entry])
        assert (offset % box.unit, (address - BASE) % box.unit if inside else 0) == (0, 0)
        for b in range(box.unit):
            assert offset + b not in found
            found[offset + b] = address + b if inside else None
    return found


def random_map(rng):
    """Arguments of a legal map that is small, and coordinates around its edges."""
    kind = rng.choice([U8, U8, U16, U32, F16, BF16, F32, F64, B4, B4_P64, B6_P32])
    rank = rng.randint(1, 5)
    padded = kind in (B4_P64, B6_P32)
    bits = {B4: 4, B4_P64: 4, B6_P32: 6}.get(kind) or 8 * SIZES[kind]
    interleave = rng.choice([1, 2]) if rank >= 3 and not padded and kind != B4 and rng.random() < 0.25 else 0
    swizzle = 1 if interleave == 2 else rng.choice([0, 3, 4, 6] if padded else list(SWIZZLES))
    widest = SWIZZLES[swizzle][0] or 128
    per_chunk = 128 // bits  # elements in 16 bytes
    if padded:
        inner, first = 128, 128 * rng.randint(1, 3)
    elif interleave:
        inner, first = per_chunk * rng.randint(1, 3), rng.randint(1, 9)
    else:
        inner = per_chunk * rng.randint(1, min(widest // 16, 256 // per_chunk))
        first = max(2, 2 * rng.randint(1, inner))
    box = [inner, *[rng.randint(1, 5) for _ in range(rank - 1)]]
    dims = [first, *[rng.randint(1, 7) for _ in range(rank - 1)]]
    steps = [rng.choice([1, 1, 2, 3]) for _ in range(rank)]
    row = dims[0] * ((0, 16, 32)[interleave] or bits / 8)
    align = 32 if padded or interleave == 2 else 16
    strides, stride = [], int(row)
    for extent in dims[1:]:
        stride = -(-stride // align) * align + align * rng.randint(0, 2)
        strides.append(stride)
        stride *= extent
    coords = []
    for d in range(rank):
        at = rng.choice([0, rng.randint(-box[d], dims[d]), rng.randint(0, dims[d])])
        if d == 0:
            multiple = 128 if padded else 1 if interleave else per_chunk
            at = at // multiple * multiple
        coords.append(at)
    floating = kind in (F16, BF16, F32, F64)
    return plain(
        data_type=kind,
        rank=rank,
        address=BASE + align * rng.randint(0, 3),
        dims=dims,
        strides_bytes=strides,
        box=box,
        element_strides=steps,
        interleave=interleave,
        swizzle=swizzle,
        oob_fill=int(floating and rng.random() < 0.5),
    ), coords


def test_boxes_are_those_of_the_element_model(rng):
    partial = outside = whole = 0
    for _ in range(250):
        arguments, coords = random_map(rng)
        shared = 128 * rng.randint(0, 17)
        print(arguments, coords, shared)
        tensor_map = tm.decode(tm.encode_tiled(**arguments))
        model = Model(arguments, coords, shared)
        box = tensor_map.box_elements(coords, shared)
        expected = dict(model.pieces)
        assert len(expected) == len(model.pieces)
        assert by_byte(box) == expected
        assert box.transaction_bytes == tensor_map.transaction_bytes == model.transaction_bytes
        assert tensor_map.shared_bytes >= 1 + max(expected)
        held = [address for address in expected.values() if address is not None]
        assert (box.low, box.high) == ((min(held), max(held) + 1) if held else (box.low, box.low))
        assert (box.in_bounds is None) == (len(held) == len(expected))
        assert by_byte(box.by_byte()) == expected
        assert by_byte(tensor_map.box_elements(coords, shared, unit=1)) == expected
        whole += len(held) == len(expected)
        outside += not held
        partial += 0 < len(held) < len(expected)
    assert min(whole, outside, partial) > 5, "the cases no longer cover what they should"


def test_entries_come_in_the_order_of_elements():
    # Reductions take element by element: entry i is element i of the box, innermost first.
    box = encoded(data_type=F32, dims=[16, 8], strides_bytes=[64], box=[4, 2]).box_elements((4, 1), unit=4)
    assert box.addresses.tolist() == [BASE + 64 * y + 4 * x for y in (1, 2) for x in range(4, 8)]
    assert box.offsets.tolist() == [16 * y + 4 * x for y in (0, 1) for x in range(4)]


# Chunks of 16 bytes of the first lines of shared memory, as the guide's figures have them.
FIGURES = {
    1: [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6], [0, 1, 2, 3, 4, 5, 6, 7]],
    2: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ],
    3: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [5, 4, 7, 6, 1, 0, 3, 2],
        [6, 7, 4, 5, 2, 3, 0, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ],
}


@pytest.mark.parametrize("swizzle", sorted(FIGURES))
def test_swizzles_are_the_figures(swizzle):
    width = SWIZZLES[swizzle][0]
    rows = len(FIGURES[swizzle]) * 128 // width
    box = encoded(box=[width, rows], swizzle=swizzle).box_elements((0, 0))
    assert box.unit == 16
    lines = (box.offsets // 16).reshape(-1, 8)
    assert (lines % 8).tolist() == FIGURES[swizzle]
    assert (lines // 8 == np.arange(len(lines))[:, None]).all()


def test_a_box_off_the_pattern_starts_within_it():
    # (address / 128) % 8 lines into the pattern, as the guide's offset formula has it.
    tensor_map = encoded(swizzle=3)
    start = tensor_map.box_elements((0, 0), 3 * 128).offsets[:8] // 16
    assert start.tolist() == FIGURES[3][3]


def test_rows_narrower_than_the_swizzle_take_a_whole_span():
    tensor_map = encoded(box=[32, 2], swizzle=3)
    assert (tensor_map.box_elements((0, 0)).offsets // 16).tolist() == [0, 1, 9, 8]
    assert (tensor_map.transaction_bytes, tensor_map.shared_bytes) == (64, 256)


def test_a_null_address_is_for_a_kernel_to_replace():
    # CUTLASS's array kernels encode their maps without an address, and edit it in.
    null = tm.encode_tiled(**plain(address=0))
    assert tm.decode(null).address == 0  # a copy through it is out of bounds
    edited = tm.replace(null, "global_address", None, BASE)
    assert tm.decode(edited).address == BASE


def test_interleave_counts_slices():
    # N = 2, C = 24 in 3 slices of 8 values of 2 bytes, H = 4, W = 5
    arguments = plain(
        data_type=F16,
        rank=4,
        dims=[5, 4, 3, 2],
        strides_bytes=[80, 320, 960],
        box=[8, 2, 2, 1],
        element_strides=[3, 1, 1, 1],
        interleave=1,
    )
    box = tm.decode(tm.encode_tiled(**arguments)).box_elements((-2, 0, 1, 1))
    w, h, c, n = (-2, 1, 4), (0, 1), (1,), (1,)  # one slice of channels, whatever the box says
    at = [16 * x + 80 * y + 320 * z + 960 * b for b in n for z in c for y in h for x in w]
    assert box.addresses.tolist() == [BASE + each for each in at]
    assert box.in_bounds.tolist() == [x >= 0 for y in h for x in w]
    assert (box.unit, box.transaction_bytes) == (16, 96)
    assert box.offsets.tolist() == list(range(0, 96, 16))


@pytest.mark.parametrize(("kind", "size"), [(F16, 2), (BF16, 2), (F32, 4), (F64, 8)])
def test_fill_is_zero_or_a_nan_of_every_type(kind, size):
    arguments = {"data_type": kind, "dims": [64, 64], "strides_bytes": [512], "box": [16, 8]}
    assert encoded(**arguments).fill_pattern == bytes(16)
    pattern = encoded(**arguments, oob_fill=1).fill_pattern
    wide = {2: np.float16, 4: np.float32, 8: np.float64}[size]
    if kind == BF16:
        pattern = b"".join(b"\0\0" + pattern[i : i + 2] for i in range(0, 16, 2))
        wide = np.float32
    assert np.isnan(np.frombuffer(pattern, wide)).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data_type": 16}, "tensorDataType: expected 0 to 15, got 16"),
        ({"rank": 0}, "tensorRank: expected 1 to 5, got 0"),
        ({"rank": 6}, "tensorRank"),
        ({"dims": [256]}, "globalDim: expected 2 values, got 1"),
        ({"rank": 2, "interleave": 1}, "tensorRank: expected at least 3 with interleave, got 2"),
        ({"address": BASE + 8}, "globalAddress: expected a multiple of 16"),
        ({"address": 2**57}, "globalAddress"),
        ({"dims": [0, 64]}, "globalDim[0]: expected 1 to 4294967296, got 0"),
        ({"dims": [256, 2**32 + 1]}, "globalDim[1]"),
        ({"strides_bytes": [264]}, "globalStrides[0]: expected a multiple of 16, got 264"),
        ({"strides_bytes": [2**40]}, "globalStrides[0]"),
        ({"box": [0, 8]}, "boxDim[0]: expected 1 to 256, got 0"),
        ({"box": [128, 257]}, "boxDim[1]"),
        ({"box": [120, 8]}, "boxDim[0]: expected a multiple of 16 bytes, got 120 x u8"),
        ({"data_type": F16, "box": [4, 8]}, "boxDim[0]: expected a multiple of 16 bytes, got 4 x f16"),
        ({"data_type": U32, "box": [256, 229]}, "boxDim: expected at most 233472 bytes, got 234496"),
        ({"element_strides": [1, 9]}, "elementStrides[1]: expected 1 to 8, got 9"),
        ({"element_strides": [1, 0]}, "elementStrides[1]"),
        ({"interleave": 3}, "interleave"),
        ({"swizzle": 7}, "swizzle: expected 0 to 6, got 7"),
        ({"swizzle": 5}, "swizzle: spans of 96 bytes and atoms with an 8-byte flip are not implemented"),
        ({"swizzle": 1}, "boxDim[0]: expected at most 32 bytes with that swizzle, got 128 x u8"),
        ({"swizzle": 2}, "boxDim[0]: expected at most 64"),
        ({"swizzle": 3, "box": [144, 8]}, "boxDim[0]: expected at most 128"),
        ({"l2": 4}, "l2Promotion"),
        ({"oob_fill": 2}, "oobFill: expected 0 to 1, got 2"),
        ({"oob_fill": 1}, "oobFill: expected zeros for u8"),
        ({"data_type": B4, "dims": [33, 64]}, "globalDim[0]: expected a multiple of 2, got 33"),
        ({"data_type": B4_P64, "dims": [192, 64]}, "globalDim[0]: expected a multiple of 128, got 192"),
        ({"data_type": B6_P32, "box": [64, 8]}, "boxDim[0]: expected 128 with b6x16_p32, got 64"),
        ({"data_type": B6_P32, "address": BASE + 16}, "globalAddress: expected a multiple of 32"),
        ({"data_type": B4_P64, "strides_bytes": [144]}, "globalStrides[0]: expected a multiple of 32"),
        ({"data_type": B4_P64, "swizzle": 2}, "swizzle: expected none or 128 bytes with b4x16_p64"),
    ],
)
def test_encoding_refuses_what_the_driver_refuses(changes, named):
    with refused(named):
        tm.encode_tiled(**plain(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"box": [4, 2, 2]}, "boxDim[0]: expected a multiple of 16 bytes, got 4 x f16"),
        ({"address": BASE + 16}, "globalAddress: expected a multiple of 32"),
        ({"strides_bytes": [160, 656]}, "globalStrides[1]: expected a multiple of 32, got 656"),
    ],
)
def test_an_interleave_of_32_bytes_has_rules_of_its_own(changes, named):
    arguments = plain(
        data_type=F16,
        rank=3,
        dims=[5, 4, 3],
        strides_bytes=[160, 640],
        box=[8, 2, 2],
        element_strides=[1, 1, 1],
        interleave=2,
        swizzle=1,
    )
    tm.encode_tiled(**arguments)
    with refused(named):
        tm.encode_tiled(**{**arguments, **changes})


def test_the_driver_takes_what_its_reference_forbids():
    # An H200's does.
    tm.encode_tiled(**plain(address=0))
    tm.encode_tiled(**plain(strides_bytes=[0]))
    tm.encode_tiled(**plain(data_type=U32, box=[256, 228]))
    tm.encode_tiled(**plain(data_type=U32, box=[256, 256], element_strides=[1, 2]))
    shape = {"rank": 3, "dims": [5, 4, 3], "strides_bytes": [160, 640], "element_strides": [1, 1, 1]}
    for swizzle in range(4):
        tm.encode_tiled(**plain(data_type=F16, box=[256, 2, 2], interleave=2, swizzle=swizzle, **shape))


def test_a_map_of_tf32_rounds_what_it_loads_for_ever():
    data = tm.encode_tiled(**plain(data_type=F32, dims=[64, 64], box=[16, 8]))
    assert not tm.decode(data).rounds
    data = tm.replace(data, "elemtype", None, 11)
    assert tm.decode(data).rounds
    assert tm.decode(tm.replace(data, "elemtype", None, 7)).rounds
    with refused("elemtype: s32 in a map of TF32"):
        tm.decode(tm.replace(data, "elemtype", None, 3))


def test_replacing_every_field_of_zeros_makes_a_map():
    # What Triton's kernels do: 128 zero bytes, then one tensormap.replace after the other.
    wanted = tm.encode_tiled(
        **plain(
            data_type=BF16,
            rank=3,
            dims=[512, 40, 6],
            strides_bytes=[1024, 40960],
            box=[64, 16, 2],
            element_strides=[1, 2, 1],
            swizzle=3,
            oob_fill=1,
        )
    )
    fields = [
        ("global_address", None, BASE),
        ("rank", None, 2),
        *(("box_dim", i, n) for i, n in enumerate([64, 16, 2])),
        *(("global_dim", i, n) for i, n in enumerate([512, 40, 6])),
        *(("global_stride", i, n) for i, n in enumerate([1024, 40960])),
        *(("element_stride", i, n) for i, n in enumerate([1, 2, 1])),
        ("elemtype", None, 0xA),
        ("interleave_layout", None, 0),
        ("swizzle_mode", None, 3),
        ("swizzle_atomicity", None, 0),
        ("fill_mode", None, 1),
    ]
    data = bytes(128)
    for field, index, value in fields:
        data = tm.replace(data, field, index, value)
        assert len(data) == 128
    assert tm.decode(data) == tm.decode(wanted)
    # Without one of them, it is refused or another map.
    for left_out in range(len(fields)):
        if fields[left_out][2] == 0:
            continue
        data = bytes(128)
        for field, index, value in fields[:left_out] + fields[left_out + 1 :]:
            data = tm.replace(data, field, index, value)
        with suppress(ValueError):
            assert tm.decode(data) != tm.decode(wanted)


PTX_TYPES = [
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f32.ftz", "f64", "bf16", "tf32", "tf32.ftz"),
    *("b4x16", "b4x16_p64", "b6x16_p32"),
]


@pytest.mark.parametrize(("value", "name"), list(enumerate(PTX_TYPES)))
def test_elemtype_has_the_numbers_of_ptx(value, name):
    data = tm.encode_tiled(**plain(address=BASE, dims=[128, 64], box=[128, 8]))
    assert tm.decode(tm.replace(data, "elemtype", None, value)).element.name == name


@pytest.mark.parametrize(
    ("field", "index", "value", "attribute", "expected"),
    [
        ("global_address", None, BASE + 4096, "address", BASE + 4096),
        ("box_dim", 1, 3, "box", (128, 3)),
        ("global_dim", 0, 48, "dims", (48, 64)),
        ("global_dim", 1, 2**32 - 1, "dims", (256, 2**32 - 1)),
        ("global_stride", 0, 2**33, "strides", (2**33,)),
        ("element_stride", 1, 8, "element_strides", (1, 8)),
        ("rank", None, 0, "rank", 1),
        ("swizzle_mode", None, 3, "swizzle", 128),
        ("fill_mode", None, 0, "fill", "zero"),
    ],
)
def test_one_field_is_replaced_and_no_other(field, index, value, attribute, expected):
    data = tm.encode_tiled(**plain())
    before, after = tm.decode(data), tm.decode(tm.replace(data, field, index, value))
    assert getattr(after, attribute) == expected
    derived = {"layout", "rank"}
    if attribute == "rank":
        derived |= {"dims", "box", "strides", "element_strides"}
    for name in type(before).__dataclass_fields__:
        if name not in {attribute, *derived}:
            assert getattr(after, name) == getattr(before, name)


def test_dimensions_beyond_the_rank_do_not_count():
    # CUTLASS replaces all five dimensions and four strides of maps of any rank.
    data = tm.encode_tiled(**plain())
    before = tm.decode(data)
    for i in (2, 3, 4):
        data = tm.replace(data, "global_dim", i, 1)
    for i in (1, 2, 3):
        data = tm.replace(data, "global_stride", i, 0)
    assert tm.decode(data) == before


@pytest.mark.parametrize(
    ("field", "index", "value", "named"),
    [
        ("global_dim", 5, 1, "global_dim: expected an ordinal from 0 to 4, got 5"),
        ("global_stride", 4, 16, "global_stride: expected an ordinal from 0 to 3, got 4"),
        ("box_dim", None, 16, "box_dim: expected an ordinal"),
        ("rank", 0, 1, "rank: expected no ordinal"),
        ("rank", None, 5, "rank: expected 0 to 4, got 5"),
        ("box_dim", 0, 257, "box_dim: expected 1 to 256, got 257"),
        ("element_stride", 0, 9, "element_stride: expected 1 to 8, got 9"),
        ("elemtype", None, 16, "elemtype: expected 0 to 15"),
        ("swizzle_mode", None, 5, "swizzle_mode: expected 0 to 4, got 5"),
        ("fill_mode", None, 2, "fill_mode"),
        ("interleave_layout", None, 3, "interleave_layout"),
        ("colour", None, 0, "expected a field of tensormap.replace, got 'colour'"),
    ],
)
def test_replacing_refuses_what_does_not_exist(field, index, value, named):
    with refused(named):
        tm.replace(tm.encode_tiled(**plain()), field, index, value)


@pytest.mark.parametrize(
    ("field", "index", "value", "named"),
    [
        ("global_address", None, BASE + 8, "globalAddress: expected a multiple of 16"),
        ("global_dim", 1, 0, "globalDim[1]: expected 1 to 4294967296, got 0"),
        ("global_stride", 0, 264, "globalStrides[0]: expected a multiple of 16, got 264"),
        ("swizzle_mode", None, 4, "swizzle: spans of 96 bytes"),
    ],
)
def test_a_broken_map_is_refused_where_it_is_used(field, index, value, named):
    data = tm.replace(tm.encode_tiled(**plain()), field, index, value)
    with refused(named):
        tm.decode(data)


def test_bytes_that_never_were_a_map_are_refused(rng):
    garbage = bytes(rng.randrange(256) for _ in range(128))
    for use in (tm.decode, lambda data: tm.replace(data, "rank", None, 1)):
        with pytest.raises(ValueError, match="were not made by"):
            use(garbage)
    with pytest.raises(ValueError, match="were not made by"):
        tm.decode(bytes(128))
    with pytest.raises(ValueError, match="expected 128 bytes, got 64"):
        tm.decode(bytes(64))


@pytest.mark.parametrize(
    ("changes", "coords", "options", "named"),
    [
        ({}, (0,), {}, "expected 2 coordinates"),
        ({}, (0, 0), {"shared_address": 64}, "multiple of 128, got 0x40"),
        ({}, (0, 0), {"unit": 32}, "unit: expected a power of two that divides 16"),
        ({"dims": [250, 64]}, (128, 0), {"unit": 16}, "divides 2 for this box, got 16"),
        ({}, (8, 0), {}, "coordinate 0: expected a multiple of 16"),
        ({"data_type": U32}, (-2, 0), {}, "coordinate 0: expected a multiple of 4"),
        ({}, (0, -1), {"writes": True}, "coordinates: expected none below 0 for a write, got (0, -1)"),
        ({"data_type": B4}, (3, 0), {}, "coordinate 0: expected a multiple of 32"),
        ({"data_type": B4_P64}, (64, 0), {}, "coordinate 0: expected a multiple of 128"),
        (
            {"data_type": F64, "box": [256, 256], "element_strides": [8, 1]},
            (0, 0),
            {},
            "fits no shared memory",
        ),
    ],
)
def test_walking_refuses_what_cannot_be(changes, coords, options, named):
    with refused(named):
        encoded(**changes).box_elements(coords, **options)

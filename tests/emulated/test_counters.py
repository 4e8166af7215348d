"""Counters of kernels written by hand, whose numbers anybody can work out."""

from __future__ import annotations

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from emulated.test_emulator_async import INIT, LOAD, SHARED, wait
from sm12x.emulator import EmulatorError, tensor_map
from sm12x.emulator.counting.access_patterns import phase_lanes, sectors, wavefronts

BOX = ".shared .align 1024 .b8 box[32768];"


def counters(text, *, threads=32, grid=1, seed=0, machine=None):
    machine = machine or Machine()
    machine.counting = True
    return machine.run(text, grid, threads, seed=seed, races=False).counters


# Shared memory


def by_lane(stride, store, load, guard=""):
    """Each lane stores and loads at `stride` bytes times its number."""
    return kernel(
        f"""
    mov.u32 %r1, %laneid;
    setp.lt.u32 %p1, %r1, 8;
    mul.lo.u32 %r2, %r1, {stride};
    mov.b32 %r3, box;
    add.u32 %r2, %r2, %r3;
    {guard} {store};
    {guard} {load};
    """,
        shared=BOX,
    )


@pytest.mark.parametrize(
    ("bits", "stride", "needed", "least"),
    [
        (32, 4, 1, 1),  # neighbours
        (32, 8, 2, 1),  # every other bank
        (32, 12, 1, 1),  # 3 and 32 have no common factor
        (32, 128, 32, 1),  # one bank
        (32, 132, 1, 1),  # padded rows
        (32, 0, 1, 1),  # one word for all
        (16, 2, 1, 1),  # two lanes to a word
        (16, 128, 32, 1),
        (8, 1, 1, 1),
        (64, 8, 2, 2),  # half warps
        (64, 16, 4, 2),
        (64, 256, 32, 2),
        (64, 0, 2, 2),
        (128, 16, 4, 4),  # quarter warps
        (128, 32, 8, 4),
        (128, 128, 32, 4),
        (128, 144, 4, 4),
    ],
)
def test_bank_conflicts_of_loads_and_stores(bits, stride, needed, least):
    form, register = {
        8: ("b8", "%h1"),
        16: ("b16", "%h1"),
        32: ("b32", "%r9"),
        64: ("b64", "%rd9"),
        128: ("v4.b32", "{%r10, %r11, %r12, %r13}"),
    }[bits]
    text = by_lane(stride, f"st.shared.{form} [%r2], {register}", f"ld.shared.{form} {register}, [%r2]")
    found = counters(text)
    for name in ("st", "ld"):
        access = found.shared_memory[name]
        assert (access.requests, access.wavefronts, access.minimum) == (1, needed, least)
        assert access.conflicts == needed - least
    assert [(line.line, line.conflicts) for line in found.by_line] == [
        (line_of(text, r"^ *st\.shared"), needed - least),
        (line_of(text, r"^ *ld\.shared"), needed - least),
    ]


def test_lanes_that_take_no_part_conflict_with_nobody():
    load, store = "ld.shared.b32 %r9, [%r2]", "st.shared.b32 [%r2], %r9"
    found = counters(by_lane(128, store, load, "@%p1"))
    assert (found.shared_memory["ld"].wavefronts, found.shared_memory["ld"].minimum) == (8, 1)
    # Switched off altogether they take an issue slot and nothing else.
    off = by_lane(128, store, load, "@%p1").replace("%r1, 8;", "%r1, 0;")
    found = counters(off)
    assert found.instructions["ld.shared"] == found.instructions["st.shared"] == 1
    assert found.shared_memory["ld"].requests == found.shared_memory["st"].requests == 0
    assert found.by_line == []


def test_generic_addresses_count_where_they_point():
    machine = Machine()
    out = machine.upload(np.zeros(32, np.uint32), "out")
    text = kernel(
        f"""
    mov.u32 %r1, %laneid;
    mul.wide.u32 %rd1, %r1, 128;
    mov.u64 %rd2, box;
    cvta.shared.u64 %rd2, %rd2;
    add.u64 %rd2, %rd2, %rd1;
    st.b32 [%rd2], %r1;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd3, %rd1, {out};
    st.b32 [%rd3], %r1;
    setp.lt.u32 %p1, %r1, 16;
    selp.b64 %rd4, %rd2, %rd3, %p1;
    ld.b32 %r2, [%rd4];
    """,
        shared=BOX,
    )
    found = counters(text, machine=machine)
    assert found.shared_memory["st"].wavefronts == 32
    assert (found.shared_memory["ld"].wavefronts, found.shared_memory["ld"].minimum) == (16, 1)
    assert (found.global_memory["store"].requests, found.global_memory["store"].sectors) == (1, 4)
    assert (found.global_memory["load"].bytes, found.global_memory["load"].sectors) == (64, 2)
    assert found.instructions["st.generic"] == 2


def test_generic_addresses_of_local_memory_are_neither_shared_nor_global():
    text = kernel("""
    .local .align 4 .b8 own[4];
    mov.u32 %r1, %laneid;
    mov.u64 %rd1, own;
    cvta.local.u64 %rd1, %rd1;
    st.b32 [%rd1], %r1;
    ld.b32 %r2, [%rd1];
    """)
    found = counters(text)
    assert found.instructions["st.generic"] == found.instructions["ld.generic"] == 1
    assert found.global_memory["store"].requests == found.global_memory["load"].requests == 0
    assert found.shared_memory["st"].requests == found.shared_memory["ld"].requests == 0
    assert found.unique_bytes == {"loaded": 0, "stored": 0}


@pytest.mark.parametrize("seed", range(8))
def test_wavefronts_and_sectors_of_any_access(seed):
    """Against the rule, word by word, with random lanes switched off."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 4, 8, 16, 32]))
    address = rng.integers(0, 64, (20, 32)) * size
    active = rng.random((20, 32)) < rng.choice([0.1, 0.6, 1.0])
    lanes = phase_lanes(size)
    needed = least = touched = 0
    for row, taking in zip(address, active, strict=True):
        for first in range(0, 32, lanes):
            banks = [set() for _ in range(32)]
            for lane in range(first, first + lanes):
                if taking[lane]:
                    for byte in range(row[lane], row[lane] + size):
                        banks[byte // 4 % 32].add(byte // 4)
            most = max(map(len, banks))
            needed, least = needed + most, least + (most > 0)
        touched += len({byte // 32 for at in row[taking] for byte in range(at, at + size)})
    assert wavefronts(address, active, size, lanes) == (needed, least)
    assert sectors(address, active) == touched


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(("swizzle", "needed"), [(False, 8), (True, 1)])
def test_matrix_rows_of_128_bytes_conflict_unless_swizzled(number, swizzle, needed):
    registers = "{" + ", ".join(f"%r{20 + i}" for i in range(number)) + "}"
    text = kernel(
        f"""
    mov.u32 %r1, %laneid;
    shl.b32 %r2, %r1, 7;
    and.b32 %r3, %r1, 7;
    shl.b32 %r3, %r3, 4;
    {"xor.b32 %r2, %r2, %r3;" if swizzle else ""}
    mov.b32 %r4, box;
    add.u32 %r2, %r2, %r4;
    stmatrix.sync.aligned.x{number}.m8n8.shared.b16 [%r2], {registers};
    ldmatrix.sync.aligned.x{number}.m8n8.shared.b16 {registers}, [%r2];
    ldmatrix.sync.aligned.x{number}.trans.m8n8.shared.b16 {registers}, [%r2];
    """,
        shared=BOX,
    )
    found = counters(text, threads=64)
    stored, loaded = found.shared_memory["stmatrix"], found.shared_memory["ldmatrix"]
    assert (stored.requests, stored.wavefronts, stored.minimum) == (2, 2 * number * needed, 2 * number)
    assert (loaded.requests, loaded.wavefronts, loaded.minimum) == (4, 4 * number * needed, 4 * number)
    assert [line.conflicts for line in found.by_line] == [2 * number * (needed - 1)] * 3


def test_many_accesses_of_one_instruction_are_all_counted():
    """More than are looked at together."""
    text = kernel(
        """
    mov.u32 %r1, %laneid;
    shl.b32 %r2, %r1, 3;
    mov.b32 %r3, box;
    add.u32 %r2, %r2, %r3;
    mov.b32 %r4, 0;
AGAIN:
    st.shared.b32 [%r2], %r1;
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, 1300;
    @%p1 bra AGAIN;
    """,
        shared=BOX,
    )
    found = counters(text)
    assert (found.shared_memory["st"].requests, found.shared_memory["st"].conflicts) == (1300, 1300)
    assert found.instructions["st.shared"] == 1300


# Global memory


@pytest.mark.parametrize(
    ("stride", "offset", "form", "sectors_each", "unique"),
    [
        (4, 0, "b32", 4, 128),
        (4, 16, "b32", 5, 128),
        (32, 0, "b32", 32, 128),
        (0, 0, "b32", 1, 4),
        (8, 0, "b64", 8, 256),
        (16, 0, "v4.b32", 16, 512),
        (2, 0, "b16", 2, 64),
    ],
)
def test_sectors_and_bytes_of_global_accesses(stride, offset, form, sectors_each, unique):
    register = {"b32": "%r9", "b64": "%rd9", "v4.b32": "{%r10, %r11, %r12, %r13}", "b16": "%h1"}[form]
    width = {"b32": 4, "b64": 8, "v4.b32": 16, "b16": 2}[form]
    machine = Machine()
    source = machine.upload(np.zeros(4096, np.uint8), "source")
    text = kernel(f"""
    mov.u32 %r1, %laneid;
    mul.wide.u32 %rd1, %r1, {stride};
    add.u64 %rd1, %rd1, {source + offset};
    ld.global.{form} {register}, [%rd1];
    ld.global.{form} {register}, [%rd1];
    st.global.{form} [%rd1], {register};
    """)
    found = counters(text, machine=machine)
    load, store = found.global_memory["load"], found.global_memory["store"]
    assert (load.requests, load.sectors, load.bytes) == (2, 2 * sectors_each, 2 * 32 * width)
    assert (store.requests, store.sectors, store.bytes) == (1, sectors_each, 32 * width)
    assert load.sectors_per_request == sectors_each
    assert found.unique_bytes == {"loaded": unique, "stored": unique}
    assert [(line.sectors, line.bytes) for line in found.by_line] == [(sectors_each, 32 * width)] * 3


def test_atomic_operations_load_and_store():
    machine = Machine()
    cell = machine.upload(np.zeros(8, np.uint32), "cell")
    found = counters(
        kernel(f"""
    mov.u64 %rd1, {cell};
    mov.b32 %r1, 1;
    atom.global.add.u32 %r2, [%rd1], %r1;
    red.global.add.u32 [%rd1+8], %r1;
    """),
        machine=machine,
    )
    atomic = found.global_memory["atomic"]
    assert (atomic.requests, atomic.sectors, atomic.bytes) == (2, 2, 256)
    assert found.unique_bytes == {"loaded": 8, "stored": 8}
    assert found.global_memory["load"].requests == found.global_memory["store"].requests == 0


def test_accesses_in_two_allocations_are_marked_in_each():
    machine = Machine()
    first, second = (machine.upload(np.zeros(16, np.uint64), name) for name in ("first", "second"))
    found = counters(
        kernel(f"""
    mov.u32 %r1, %laneid;
    setp.lt.u32 %p1, %r1, 12;
    mov.u64 %rd1, {first};
    mov.u64 %rd2, {second};
    selp.b64 %rd3, %rd1, %rd2, %p1;
    and.b32 %r2, %r1, 7;
    mul.wide.u32 %rd4, %r2, 8;
    add.u64 %rd3, %rd3, %rd4;
    ld.global.b64 %rd5, [%rd3];
    """),
        machine=machine,
    )
    assert found.unique_bytes["loaded"] == 8 * 8 + 8 * 8
    assert found.global_memory["load"].sectors == 4


# Asynchronous copies


def encoded(address, dims, box, swizzle=0):
    pitch = -(-dims[0] // 16) * 16
    return tensor_map.encode_tiled(0, 2, address, dims, [pitch], box, [1, 1], 0, swizzle, 0, 0)


@pytest.mark.parametrize(
    ("x", "y", "inside"), [(0, 0, 512), (32, 4, 16 * 12), (0, 4, 32 * 12), (64, 0, 0), (16, 8, 32 * 8)]
)
def test_tensor_loads_and_stores_with_boxes_out_of_bounds(x, y, inside):
    """A box of 32 x 16 bytes on a tensor of 48 x 16."""
    machine = Machine(counting=True)
    source = machine.upload(np.zeros((16, 48), np.uint8), "source")
    target = machine.upload(np.zeros((16, 48), np.uint8), "target")
    maps = [
        machine.upload(np.frombuffer(encoded(at, [48, 16], [32, 16]), np.uint8)) for at in (source, target)
    ]
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd1, {maps[0]};
    mov.u64 %rd2, {maps[1]};
    mov.b32 %r1, {x};
    mov.b32 %r2, {y};
    @%p60 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;
    @%p60 {LOAD} [box], [%rd1, {{%r1, %r2}}], [bar];
    {wait()}
    @%p60 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{%r1, %r2}}], [box];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """,
        shared=SHARED,
    )
    found = counters(text, machine=machine)
    load, store = found.copies["tma_load"], found.copies["tma_store"]
    assert (load.copies, load.global_bytes, load.shared_bytes) == (1, inside, 512)
    assert (store.copies, store.global_bytes, store.shared_bytes) == (1, inside, inside)
    assert found.unique_bytes == {"loaded": inside, "stored": inside}
    assert found.waits["copies"].at_once + found.waits["copies"].waited == 1


def test_bulk_copies_and_cp_async():
    machine = Machine()
    source = machine.upload(np.zeros(256, np.uint32), "source")
    target = machine.upload(np.zeros(256, np.uint32), "target")
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd1, {source};
    mov.u64 %rd2, {target};
    @%p60 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
    @%p60 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [box], [%rd1], 256, [bar];
    {wait()}
    @%p60 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [box], 128;
    @%p60 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd2+128], [box], 64;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    mul.wide.u32 %rd3, %r60, 16;
    add.u64 %rd4, %rd1, %rd3;
    mov.b32 %r1, box;
    mad.lo.u32 %r1, %r60, 16, %r1;
    setp.lt.u32 %p1, %r60, 16;
    selp.b32 %r2, 16, 0, %p1;
    cp.async.cg.shared.global [%r1], [%rd4], 16, %r2;
    cp.async.wait_all;
    """,
        shared=SHARED,
    )
    found = counters(text, machine=machine)
    sizes = {name: (c.copies, c.global_bytes, c.shared_bytes) for name, c in found.copies.items()}
    assert sizes == {"bulk_load": (1, 256, 256), "bulk_store": (2, 192, 192), "cp_async": (32, 256, 512)}
    assert found.unique_bytes == {"loaded": 256 + 64, "stored": 192}
    (line,) = (line for line in found.by_line if "cp.async.cg" in line.text)
    assert (line.requests, line.sectors, line.bytes) == (1, 8, 256)


# Instructions


def test_instructions_are_those_that_warps_execute():
    text = kernel("""
    mov.u32 %r1, %tid.x;
    and.b32 %r2, %r1, 31;
    setp.lt.u32 %p1, %r2, 8;
    setp.lt.u32 %p2, %r2, 0;
    @%p2 add.u32 %r3, %r3, 1;                 // nobody's
    @%p1 bra LOW;
    mul.lo.u32 %r4, %r1, 3;
    mul.lo.u32 %r4, %r4, 3;
    bra.uni JOIN;
LOW:
    mul.lo.u32 %r4, %r1, 5;
JOIN:
    xor.b32 %r5, %r4, %r1;
    """)
    found = counters(text, threads=96, grid=2)
    warps = 6
    # Both ways of the branch, and what follows it once.
    assert found.instructions == {
        "compare_select": 2 * warps,
        "control": 3 * warps,
        "integer": 4 * warps,
        "logic": 2 * warps,
        "mov": warps,
    }
    assert found.work.issued == 12 * warps
    assert found.busiest_cta.issued == 12 * warps // 2
    assert found.work.surely_issued == 0


@pytest.mark.parametrize("seed", range(6))
def test_what_waits_is_counted_once(seed):
    """Four warps at a barrier: three wait for the last."""
    found = counters(kernel("bar.sync 0;\nbar.sync 0;\nbar.warp.sync -1;"), threads=128, seed=seed)
    waits = found.waits["named_barrier"]
    assert (waits.waited, waits.at_once, waits.gave_up) == (6, 2, 0)
    assert (found.instructions["barriers"], found.instructions["warp_wide"]) == (8, 4)
    assert found.work.surely_issued == 8


@pytest.mark.parametrize("seed", range(6))
def test_waits_for_an_mbarrier(seed):
    text = kernel(
        INIT
        + f"""
    @%p60 mbarrier.arrive.shared::cta.b64 _, [bar];
    bar.warp.sync -1;
    {wait()}
    setp.ge.u32 %p1, %r60, 32;
    @%p1 bra.uni OTHER;
    {wait(parity=1, n=1)}
    ret;
OTHER:
    bar.sync 1, 32;
    mbarrier.test_wait.parity.shared::cta.b64 %p2, [bar], 1;
    elect.sync %r1|%p3, -1;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [bar];
    """,
        shared=SHARED,
    )
    found = counters(text, threads=64, seed=seed)
    waits = found.waits["mbarrier"]
    tries = found.instructions["mbarrier"] - 5  # init and arrivals, by all warps that come by
    assert waits.at_once + waits.waited + waits.gave_up == tries
    assert waits.gave_up >= 1, "test_wait before the arrival"
    assert waits.at_once >= 1
    # Of each warp init, arrival and bar.sync, of one bar.sync, elect and arrival; polls may take any number.
    assert found.work.surely_issued == 2 * 3 + 3


def test_counting_changes_nothing():
    """The same schedule, and the same number of everything else."""
    text = by_lane(8, "st.shared.b32 [%r2], %r1", "ld.shared.b32 %r9, [%r2]")
    for seed in range(3):
        plain = Machine().run(text, 3, 64, seed=seed, races=False)
        counted = Machine(counting=True).run(text, 3, 64, seed=seed, races=False)
        assert plain.counters is None
        assert (plain.segments, plain.operations) == (counted.segments, counted.operations)


def test_an_access_out_of_bounds_is_reported_as_ever():
    machine = Machine(counting=True)
    source = machine.upload(np.zeros(1024, np.uint32), "source")
    text = kernel(f"""
    mov.u64 %rd1, {source};
AGAIN:
    ld.global.b32 %r1, [%rd1];
    add.u64 %rd1, %rd1, 8;
    bra AGAIN;
    """)
    with pytest.raises(EmulatorError, match=r"4-byte read at .*: 0 bytes past the end of source"):
        machine.run(text, 1, 32)


@pytest.mark.parametrize("seed", range(6))
def test_who_is_woken_in_vain_still_waits_once(seed):
    """Four copies, each of which wakes the thread that waits for all of them."""
    machine = Machine()
    source = machine.upload(np.zeros(1024, np.uint8), "source")
    copies = "\n".join(f"cp.async.cg.shared.global [%r1+{at}], [%rd1+{at}], 16;" for at in (0, 16, 32, 48))
    text = kernel(f"mov.u64 %rd1, {source};\nmov.b32 %r1, box;\n{copies}\ncp.async.wait_all;", shared=BOX)
    waits = counters(text, threads=1, seed=seed, machine=machine).waits["copies"]
    assert (waits.waited, waits.at_once) in ((1, 0), (0, 1))


_SCALES = "{%r5}, {0, 0}, {%r6}, {0, 0}"


@pytest.mark.parametrize(
    ("opcode", "a", "b", "scales", "form", "depth"),
    [
        ("m16n8k16.row.col.f32.bf16.bf16.f32", 4, 2, "", "bf16", 16),
        ("m16n8k32.row.col.f32.e4m3.e5m2.f32", 4, 2, "", "plain", 32),
        ("m16n8k32.row.col.kind::f8f6f4.f32.e2m1.e2m1.f32", 4, 2, "", "plain", 32),
        (
            *("m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0", 4, 2),
            *(_SCALES, "block_scaled", 32),
        ),
        (
            *("m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0", 4, 2),
            *(_SCALES, "nvfp4", 64),
        ),
        (
            *("m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3", 4, 2),
            *(_SCALES, "nvfp4", 64),
        ),
    ],
)
def test_the_rate_of_an_mma_is_that_of_its_kind(opcode, a, b, scales, form, depth):
    """The floor takes these names for those of `devices.Gpu.mma`."""
    registers = [f"%r{at}" for at in range(10, 10 + a + b)]
    operands = f"{{{', '.join(registers[:a])}}}, {{{', '.join(registers[a:])}}}"
    sums = "{%f1, %f2, %f3, %f4}"
    clear = "\n".join(
        f"mov.b32 {each}, 0;" for each in (*registers, "%r5", "%r6", "%f1", "%f2", "%f3", "%f4")
    )
    tail = f", {scales}" if scales else ""
    found = counters(kernel(f"{clear}\nmma.sync.aligned.{opcode} {sums}, {operands}, {sums}{tail};"))
    assert found.work.multiply_adds == {form: 16 * 8 * depth}
    assert found.work.surely_issued == 1


def test_the_main_loop_is_the_innermost_with_an_mma():
    """In a loop over tiles: a loop without an MMA, the main loop with a wait in it, an MMA behind it."""
    mma = "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"
    operands = "{%f1, %f2, %f3, %f4}, {%r10, %r11}, {%r12}, {%f1, %f2, %f3, %f4}"

    def at(offset):
        return f"st.shared.b32 [%r2+{offset}], %r1;"

    def loop(label, register, body):
        return f"""
    mov.b32 %r{register}, 0;
{label}:
    {body}
    add.u32 %r{register}, %r{register}, 1;
    setp.lt.u32 %p1, %r{register}, 3;
    @%p1 bra {label};
    """

    wait = f"SPIN:\n{at(1024)}\nsetp.gt.u32 %p2, %r1, 40;\n@%p2 bra SPIN;"
    body = at(0) + loop("FIRST", 5, at(4)) + loop("MAIN", 6, f"{at(8)}{mma} {operands};{wait}{at(12)}")
    text = kernel(
        "mov.u32 %r1, %laneid;\nshl.b32 %r2, %r1, 5;\nmov.b32 %r3, box;\nadd.u32 %r2, %r2, %r3;"
        + loop("TILES", 7, body + at(16) + f"{mma} {operands};"),
        shared=BOX,
    )
    found = counters(text)
    looped = {line.text.split("]")[0].split("[")[1]: line.main_loop for line in found.by_line}
    in_loop = {"%r2+8", "%r2+1024", "%r2+12"}
    assert looped == {where: where in in_loop for where in looped}
    assert in_loop < looped.keys()
    assert len(looped) == 6
    assert found.main_loop_conflicts == 3 * 3 * 3 * 7
    assert found.shared_memory["st"].conflicts > found.main_loop_conflicts

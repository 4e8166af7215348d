"""Barriers and asynchronous copies: phases, counts and transaction bytes, completion as late as the waits
allow, tensor maps and their proxy. Each wrong kernel has a right twin.
"""

from __future__ import annotations

import numpy as np
import pytest

from emulated.kernels import Machine, kernel
from sm12x.emulator import tensor_map
from sm12x.emulator.errors import EmulatorError

SEEDS = range(6)
SHARED = ".shared .align 1024 .b8 box[8192];\n.shared .align 8 .b64 bar[4];"
# One thread of warp 0 initialises bar[0] for one arrival.
INIT = """
    mov.u32 %r60, %tid.x;
    setp.eq.u32 %p60, %r60, 0;
    mov.b32 %r59, 1;
    @%p60 mbarrier.init.shared::cta.b64 [bar], %r59;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
WAIT = """
AGAIN{n}:
    mbarrier.try_wait.parity.shared::cta.b64 %p59, [{bar}], {parity};
    @!%p59 bra AGAIN{n};
"""


LOAD = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
PUBLISH = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"


def wait(bar="bar", parity=0, n=0):
    return WAIT.format(bar=bar, parity=parity, n=n)


def violation(text, seeds=SEEDS, threads=32, machine=None, **arguments):
    """The violations that a kernel ends with under some seeds; None where it ends well."""
    found = []
    for seed in seeds:
        try:
            (machine or Machine()).run(text, 1, threads, seed=seed, **arguments)
            found.append(None)
        except EmulatorError as error:
            if error.violation is None:
                raise
            found.append(error.violation)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_mbarriers_hands_values_from_warp_to_warp(seed):
    machine = Machine()
    out = machine.upload(np.zeros(40, np.uint32), "out")
    text = kernel(
        f"""
    mov.u32 %r1, %tid.x;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra READY;
    mov.b32 %r2, 1;
    mbarrier.init.shared::cta.b64 [bar], %r2;        // full
    mbarrier.init.shared::cta.b64 [bar+8], 32;       // empty
READY:
    bar.sync 0;
    mov.b32 %r3, 0;                                  // step
    shr.u32 %r4, %r1, 5;
    setp.ne.u32 %p2, %r4, 0;
    @%p2 bra CONSUMER;
PRODUCER:
    and.b32 %r5, %r3, 1;
    xor.b32 %r6, %r5, 1;
    {wait("bar+8", "%r6", 1)}
    elect.sync %r7|%p3, -1;
    mul.lo.u32 %r8, %r3, 3;
    @%p3 st.shared.b32 [box], %r8;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [bar];
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p4, %r3, 40;
    @%p4 bra PRODUCER;
    ret;
CONSUMER:
    and.b32 %r5, %r3, 1;
    {wait("bar", "%r5", 2)}
    ld.shared.b32 %r9, [box];
    mbarrier.arrive.shared::cta.b64 %rd3, [bar+8];
    mul.wide.u32 %rd1, %r3, 4;
    add.u64 %rd1, %rd1, {out};
    st.global.b32 [%rd1], %r9;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p4, %r3, 40;
    @%p4 bra CONSUMER;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 64, seed=seed)
    assert machine.download(out, (40,), np.uint32).tolist() == [3 * i for i in range(40)]


def test_mbarrier_states_and_counts():
    machine = Machine()
    out = machine.upload(np.zeros(6, np.uint32), "out")
    text = kernel(
        f"""
    mov.u64 %rd1, {out};
    mov.b32 %r1, 3;
    mbarrier.init.shared::cta.b64 [bar], %r1;
    mbarrier.arrive.shared::cta.b64 %rd2, [bar];
    mbarrier.pending_count.b64 %r2, %rd2;            // 3
    mbarrier.test_wait.shared::cta.b64 %p1, [bar], %rd2;
    selp.b32 %r3, 1, 0, %p1;                         // 0
    mbarrier.arrive.shared::cta.b64 %rd3, [bar], 2;
    mbarrier.pending_count.b64 %r4, %rd3;            // 2
    mbarrier.test_wait.shared::cta.b64 %p1, [bar], %rd3;
    selp.b32 %r5, 1, 0, %p1;                         // 1
    mbarrier.arrive_drop.shared::cta.b64 %rd4, [bar];
    mbarrier.arrive.noComplete.shared::cta.b64 %rd5, [bar], 1;
    mbarrier.arrive.shared::cta.b64 %rd6, [bar];
    mbarrier.arrive.shared::cta.b64 %rd7, [bar];
    mbarrier.pending_count.b64 %r6, %rd7;            // 2: one thread has dropped out
    mov.u64 %rd8, bar;
    cvta.shared.u64 %rd8, %rd8;
    mbarrier.test_wait.parity.b64 %p1, [%rd8], 1;
    selp.b32 %r7, 1, 0, %p1;                         // phase 1 is over
    st.global.v2.b32 [%rd1], {{%r2, %r3}};
    st.global.v2.b32 [%rd1+8], {{%r4, %r5}};
    st.global.v2.b32 [%rd1+16], {{%r6, %r7}};
    mbarrier.inval.shared::cta.b64 [bar];
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 1)
    assert machine.download(out, (6,), np.uint32).tolist() == [3, 0, 2, 1, 2, 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_join_those_who_arrive_and_those_who_wait(seed):
    machine = Machine()
    out = machine.upload(np.zeros(32, np.uint32), "out")
    text = kernel(
        f"""
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 5;
    setp.eq.u32 %p1, %r2, 0;
    @%p1 bra.uni READER;
    add.u32 %r3, %r1, 500;
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, box;
    add.u32 %r4, %r4, %r5;
    st.shared.b32 [%r4+-128], %r3;
    bar.arrive 3, 64;
    ret;
READER:
    bar.sync 3, 64;
    shl.b32 %r4, %r1, 2;
    mov.b32 %r5, box;
    add.u32 %r4, %r4, %r5;
    ld.shared.b32 %r3, [%r4];
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd1, %rd1, {out};
    st.global.b32 [%rd1], %r3;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 64, seed=seed)
    assert machine.download(out, (32,), np.uint32).tolist() == [532 + lane for lane in range(32)]


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_barriers_of_the_one_cta(seed):
    code = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" * 3
    Machine().run(kernel(code), 2, 96, seed=seed)
    with pytest.raises(EmulatorError, match="arrives twice"):
        Machine().run(kernel("barrier.cluster.arrive.aligned;\n" * 2), 1, 32, seed=seed)


# Bulk copies


def bulk(machine, middle):
    """Thread 0 copies 256 bytes from `source` to `box`; the warp then runs `middle`."""
    source = machine.upload(np.arange(64, dtype=np.uint32), "source")
    out = machine.memory.allocate(256, "out")
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd1, {source};
    mov.u64 %rd2, {out};
    @%p60 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
    @%p60 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [box], [%rd1], 256, [bar];
    {middle}
    """,
        shared=SHARED,
    )
    return text, out


def test_a_bulk_load_is_not_there_before_its_barrier_says_so():
    def read(middle, seed):
        machine = Machine()
        return violation(bulk(machine, middle)[0], [seed], machine=machine)[0]

    early = [read(f"ld.shared.b32 %r1, [box+252];\n{wait()}", seed) for seed in SEEDS]
    assert sum(v is not None and v.kind == "uninitialised" for v in early) >= 4
    assert all(read(f"{wait()}\nld.shared.b32 %r1, [box+252];", seed) is None for seed in SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_completes_also_while_another_warp_polls_for_what_follows_it(seed):
    machine = Machine()
    source = machine.upload(np.arange(64, dtype=np.uint32), "source")
    flag = machine.upload(np.zeros(1, np.uint32), "flag")
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd1, {source};
    mov.u64 %rd2, {flag};
    setp.ge.u32 %p1, %r60, 32;
    @%p1 bra.uni POLL;
    @%p60 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
    @%p60 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [box], [%rd1], 256, [bar];
    {wait()}
    ld.shared.b32 %r1, [box+252];
    st.release.gpu.global.b32 [%rd2], %r1;
    ret;
POLL:
    ld.acquire.gpu.global.b32 %r1, [%rd2];
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra POLL;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 64, seed=seed, limit=100_000)


STORE = """
    {wait}
    fence.proxy.async.shared::cta;
    @%p60 cp.async.bulk.global.shared::cta.bulk_group [%rd2], [box], 256;
    @%p60 cp.async.bulk.commit_group;
    {first}
    @%p60 st.shared.b64 [box], %rd2;
    cp.async.bulk.wait_group 0;
    {second}
"""


def stored(seed, first):
    machine = Machine()
    text, out = bulk(machine, STORE.format(wait=wait(), first=first, second=""))
    machine.run(text, 1, 32, seed=seed, races=False)
    return machine.download(out, (64,), np.uint32).tolist() == list(range(64))


def test_a_bulk_store_reads_its_buffer_as_late_as_it_may():
    assert all(stored(seed, "cp.async.bulk.wait_group.read 0;") for seed in SEEDS)
    assert sum(stored(seed, "") for seed in SEEDS) <= 2


def test_what_a_bulk_store_writes_is_there_after_a_wait_without_read():
    def read(word, seed):
        machine = Machine()
        text, _ = bulk(
            machine,
            STORE.format(wait=wait(), first="cp.async.bulk.wait_group.read 0;", second="").replace(
                "cp.async.bulk.wait_group 0;",
                f"cp.async.bulk.wait_group{word} 0;\nld.global.b32 %r3, [%rd2];",
            ),
        )
        return violation(text, [seed], machine=machine)[0]

    assert all(read("", seed) is None for seed in SEEDS)
    found = [read(".read", seed) for seed in SEEDS]
    assert sum(v is not None and v.kind == "uninitialised" for v in found) >= 2


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_are_waited_for_from_the_oldest(seed):
    machine = Machine()
    out = machine.memory.allocate(64, "out")
    stores = "\n".join(
        f"@%p60 cp.async.bulk.global.shared::cta.bulk_group [%rd2+{16 * i}], [box+{16 * i}], 16;\n"
        "@%p60 cp.async.bulk.commit_group;"
        for i in range(4)
    )
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd2, {out};
    mul.lo.u32 %r1, %r60, 4;
    mov.b32 %r2, box;
    add.u32 %r1, %r1, %r2;
    st.shared.b32 [%r1], %r60;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {stores}
    cp.async.bulk.wait_group 2;
    @%p60 ld.global.b32 %r3, [%rd2+16];
    cp.async.bulk.wait_group.read 0;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 32, seed=seed)
    assert machine.download(out, (16,), np.uint32).tolist() == list(range(16))


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_reductions_combine_with_what_is_there(seed):
    machine = Machine()
    before = np.arange(8, dtype=np.uint32) * 1000
    out = machine.upload(before, "out")
    halves = machine.upload(np.arange(8, dtype=np.float16), "halves")
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd1, {out};
    mov.u64 %rd2, {halves};
    mul.lo.u32 %r1, %r60, 4;
    mov.b32 %r2, box;
    add.u32 %r1, %r1, %r2;
    setp.lt.u32 %p1, %r60, 8;
    @%p1 st.shared.b32 [%r1], %r60;
    mov.b32 %r3, 0x3E003C00;  // 1.5 and 1.0
    @%p1 st.shared.b32 [%r1+64], %r3;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p60 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1], [box], 32;
    @%p60 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1], [box], 32;
    @%p60 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%rd2], [box+64], 16;
    @%p60 cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 32, seed=seed)
    assert machine.download(out, (8,), np.uint32).tolist() == (before + 2 * np.arange(8)).tolist()
    expected = np.arange(8) + np.tile([1.0, 1.5], 4)
    assert machine.download(halves, (8,), np.float16).tolist() == expected.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_threads_own_asynchronous_copies(seed):
    """Zero fill behind a short source, groups, and an arrival when the copies are done."""
    machine = Machine()
    source = machine.upload(np.arange(128, dtype=np.uint32), "source")
    out = machine.upload(np.zeros(128, np.uint32), "out")
    text = kernel(
        f"""
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [bar], 32;
    bar.sync 0;
    mul.wide.u32 %rd1, %r1, 16;
    add.u64 %rd2, %rd1, {source};
    add.u64 %rd3, %rd1, {out};
    cvt.u32.u64 %r2, %rd1;
    mov.b32 %r3, box;
    add.u32 %r2, %r2, %r3;
    and.b32 %r4, %r1, 3;
    shl.b32 %r4, %r4, 2;
    cp.async.cg.shared.global [%r2], [%rd2], 16, %r4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r2+1024], [%rd2], 8;
    cp.async.mbarrier.arrive.noinc.shared.b64 [bar];
    {wait()}
    ld.shared.b32 %r9, [%r2+1028];
    cp.async.wait_group 0;
    ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r2];
    add.u32 %r8, %r8, %r9;
    st.global.v4.b32 [%rd3], {{%r5, %r6, %r7, %r8}};
    cp.async.wait_all;
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 32, seed=seed)
    got = machine.download(out, (32, 4), np.uint32)
    for t in range(32):
        words = [4 * t + j if j < t % 4 else 0 for j in range(4)]
        words[3] += 4 * t + 1
        assert got[t].tolist() == words


# Tensor copies


def encoded(address, shape, box, swizzle=0):
    """A map of a row-major array of uint32."""
    rows, columns = shape
    return tensor_map.encode_tiled(
        2, 2, address, (columns, rows), (4 * columns,), box, (1, 1), 0, {0: 0, 64: 2, 128: 3}[swizzle], 0, 0
    )


@pytest.mark.parametrize(("corner", "swizzle"), [((0, 0), 0), ((-4, 3), 128), ((24, 9), 128), ((8, -2), 64)])
def test_a_box_is_loaded_with_zeros_outside_and_stored_without_them(corner, swizzle):
    machine = Machine()
    rng = np.random.default_rng(3)
    data = rng.integers(1, 1 << 32, (12, 40), np.uint64).astype(np.uint32)
    box = (16 if swizzle == 64 else 32, 6)
    source = machine.upload(data, "source")
    target = machine.upload(np.full((12, 40), 7, np.uint32), "target")
    maps = machine.upload(
        np.frombuffer(
            encoded(source, data.shape, box, swizzle) + encoded(target, data.shape, box, swizzle), np.uint8
        )
    )
    size = box[0] * box[1] * 4
    text = kernel(
        INIT
        + f"""
    mov.u64 %rd1, {maps};
    mov.b32 %r1, {corner[0]};
    mov.b32 %r2, {corner[1]};
    @!%p60 bra END;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {size};
    {LOAD.replace("cta", "cluster")} [box], [%rd1, {{%r1, %r2}}], [bar];
    {wait()}
    max.s32 %r1, %r1, 0;  // a store may not begin in front of the tensor
    max.s32 %r2, %r2, 0;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1+128, {{%r1, %r2}}], [box];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
END:
    """,
        shared=SHARED,
    )
    machine.run(text, 1, 32)
    around = np.pad(data, 40)  # with zeros
    loaded = around[40 + corner[1] :, 40 + corner[0] :][: box[1], : box[0]]
    expected = np.full((12, 40), 7, np.uint32)
    target_rows = expected[max(0, corner[1]) :, max(0, corner[0]) :][: box[1], : box[0]]
    target_rows[...] = loaded[: target_rows.shape[0], : target_rows.shape[1]]
    np.testing.assert_array_equal(machine.download(target, (12, 40), np.uint32), expected)


EDIT = """
    mov.u64 %rd1, {template};
    mov.u64 %rd2, {maps};
    mov.u64 %rd3, {second};
    mov.u64 %rd4, {out};
    mov.b32 %r1, 0;
    mul.lo.u32 %r2, %r60, 4;
    mov.b32 %r3, box;
    add.u32 %r4, %r3, %r2;
    cvt.u64.u32 %rd5, %r2;
    add.u64 %rd6, %rd5, %rd1;
    ld.global.b32 %r5, [%rd6];
    st.shared.b32 [%r4+4096], %r5;
    bar.warp.sync -1;
    // the first tensor
    add.u32 %r6, %r3, 4096;
    {PUBLISH} [%rd2], [%r6], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;
    @%p60 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    @%p60 {LOAD} [box], [%rd2, {{%r1, %r1}}], [bar];
    {wait_first}
    // the second
    @%p60 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r6], %rd3;
    mov.b32 %r7, 1;
    @%p60 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r6], 1, %r7;
    bar.warp.sync -1;
    {PUBLISH} [%rd2], [%r6], 128;
    fence.proxy.tensormap::generic.acquire.gpu [%rd2], 128;
    @%p60 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    @%p60 {LOAD} [box+1024], [%rd2, {{%r1, %r1}}], [bar];
    {wait_second}
    ld.shared.b32 %r8, [%r4+1024];
    add.u64 %rd7, %rd5, %rd4;
    st.global.b32 [%rd7], %r8;
    ld.shared.b32 %r8, [%r4];
    st.global.b32 [%rd7+128], %r8;
"""


def edited(seed, *, drained=True, early_maps=False):
    """Whether loads of the first and of the second tensor, through one map that is edited in between, give
    what they should: waiting for the first load before the edit, or behind it.
    """
    machine = Machine()
    first, second = np.arange(32, dtype=np.uint32) + 100, np.arange(32, dtype=np.uint32) + 200
    addresses = [machine.upload(data, "data") for data in (first, second)]
    template = machine.upload(np.frombuffer(encoded(addresses[0], (2, 16), (16, 2)), np.uint8), "template")
    out = machine.memory.allocate(256, "out")
    text = kernel(
        # Undrained, both loads complete the same phase of the barrier.
        (INIT if drained else INIT.replace("mov.b32 %r59, 1;", "mov.b32 %r59, 2;"))
        + EDIT.format(
            LOAD=LOAD,
            PUBLISH=PUBLISH,
            template=template,
            maps=machine.memory.allocate(128, "maps"),
            second=addresses[1],
            out=out,
            wait_first=wait(n=1) if drained else "",
            wait_second=wait(parity=int(drained), n=2),
        ),
        shared=SHARED,
    )
    machine.run(text, 1, 32, seed=seed, early_maps=early_maps)
    found = machine.download(out, (64,), np.uint32)
    return found.tolist() == [*second[:16].tolist(), *[0] * 16, *first.tolist()]


@pytest.mark.parametrize("seed", SEEDS)
def test_loads_before_and_behind_an_edit_of_their_map(seed):
    """What goes wrong without the fence, or while the first load is in flight, is in planted/."""
    assert edited(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_early_maps_are_those_that_a_load_was_issued_with(seed):
    with pytest.raises(EmulatorError, match="in flight"):
        edited(seed, drained=False)
    assert edited(seed, drained=False, early_maps=True)

"""State spaces: bounds, alignment, initialised bytes, and generic addresses, in every space."""

from __future__ import annotations

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of
from emulated.lanes import run_lanes
from sm12x.emulator.errors import EmulatorError, Fault
from sm12x.emulator.memory import GlobalMemory, Region

SHARED = ".shared .align 16 .b8 box[64];"


def fails(body, kind, message, *, pattern, shared="", lanes=None, setup=None):
    """Run one warp with a buffer of 64 bytes at %rd1, and check the violation that it ends with."""
    machine = Machine()
    buffer = setup(machine) if setup else machine.upload(np.arange(64, dtype=np.uint8), "the buffer")
    text = kernel(
        f"mov.u64 %rd1, {buffer};\nmov.u32 %r1, %tid.x;\ncvt.u64.u32 %rd2, %r1;\n{body}", shared=shared
    )
    with pytest.raises(EmulatorError, match=message) as caught:
        machine.run(text, 1, 32)
    violation = caught.value.violation
    assert violation.kind == kind
    assert violation.line == line_of(text, pattern)
    assert (violation.cta, violation.warp) == (0, 0)
    if lanes is not None:
        assert violation.lanes == tuple(lanes)


def test_global_accesses_past_the_end_name_the_buffer_and_the_lanes():
    fails(
        "mad.lo.u64 %rd3, %rd2, 4, %rd1;\nld.global.b32 %r2, [%rd3];",
        "bounds",
        "0 bytes past the end of the buffer",
        pattern="ld.global.b32",
        lanes=[16],
    )
    fails("st.global.b32 [%rd1+-4], %r1;", "bounds", "write at 0x", pattern="st.global")
    fails("mov.u64 %rd3, 0;\nld.global.b32 %r2, [%rd3];", "bounds", "null pointer", pattern="ld.global.b32")
    fails("ld.b32 %r2, [%rd1+64];", "bounds", "past the end of the buffer", pattern=r"ld\.b32")


def test_an_access_that_straddles_the_end_is_out_of_bounds():
    fails(
        "ld.global.v2.b64 {%rd4, %rd5}, [%rd1+48];",
        "bounds",
        "of 60 bytes|has 60 bytes",
        pattern="ld.global.v2",
        setup=lambda m: m.upload(np.zeros(60, np.uint8), "the buffer"),
    )


def test_misaligned_accesses_in_every_space():
    fails("ld.global.b32 %r2, [%rd1+2];", "alignment", "no multiple of 4", pattern="ld.global.b32")
    fails(
        "st.shared.v2.b32 [box+4], {%r1, %r1};", "alignment", "multiple of 8", pattern="st.sh", shared=SHARED
    )
    fails(
        "mul.lo.u32 %r2, %r1, 2;\nmov.b32 %r3, box;\nadd.u32 %r2, %r2, %r3;\nst.shared.b32 [%r2], %r1;",
        "alignment",
        "shared memory",
        pattern="st.shared",
        shared=SHARED,
        lanes=range(1, 32, 2),
    )


def test_local_memory_is_the_threads_own():
    code = """
    .local .align 8 .b8 stack[16];
    mov.u64 %rd1, stack;
    cvta.local.u64 %rd2, %rd1;
    st.local.b32 [stack+8], %r60;
    bar.sync 0;
    ld.b32 %r11, [%rd2+8];
    st.b32 [%rd2+12], %r11;
    ld.local.b64 %rd12, [%rd1+8];
    """
    first, both = run_lanes(code, [], ["b32", "b64"])
    assert first.tolist() == list(range(96))
    assert both.tolist() == [t | t << 32 for t in range(96)]
    fails(
        ".local .align 4 .b8 stack[8];\nst.local.b32 [stack+8], %r1;",
        "bounds",
        "a thread has 8",
        pattern="st.local",
    )


def test_generic_addresses_reach_every_space_in_one_access():
    """Lanes of one load that mean shared, global and constant memory."""
    machine = Machine()
    source = machine.upload(np.array([111], np.uint32), "source")
    out = machine.memory.allocate(128, "out")
    text = kernel(
        f"""
    mov.u32 %r1, %tid.x;
    mov.b32 %r2, 222;
    st.shared.b32 [box], %r2;
    bar.warp.sync -1;
    mov.u64 %rd1, box;
    cvta.shared.u64 %rd1, %rd1;
    mov.u64 %rd2, {source};
    mov.u64 %rd3, table;
    cvta.const.u64 %rd3, %rd3;
    rem.u32 %r3, %r1, 3;
    setp.eq.u32 %p1, %r3, 0;
    setp.eq.u32 %p2, %r3, 1;
    selp.b64 %rd4, %rd1, %rd2, %p1;
    selp.b64 %rd4, %rd3, %rd4, %p2;
    ld.b32 %r4, [%rd4];
    isspacep.shared %p3, %rd4;
    @%p3 add.u32 %r4, %r4, 1000;
    mul.wide.u32 %rd5, %r1, 4;
    add.u64 %rd5, %rd5, {out};
    st.global.b32 [%rd5], %r4;
    """,
        shared=SHARED + "\n.const .align 4 .u32 table[2] = {333, 444};",
    )
    machine.run(text, 1, 32)
    expected = [(1222, 333, 111)[lane % 3] for lane in range(32)]
    assert machine.download(out, (32,), np.uint32).tolist() == expected


def test_narrow_loads_extend_and_narrow_stores_cut():
    machine = Machine()
    source = machine.upload(np.array([0x80, 0xFF, 0x7F, 0x90], np.uint8), "source")
    out = machine.upload(np.zeros(40, np.uint8), "out")
    text = kernel(f"""
    mov.u64 %rd1, {source};
    mov.u64 %rd2, {out};
    ld.global.s8 %r1, [%rd1];
    ld.global.u8 %r2, [%rd1+1];
    ld.global.s16 %rd3, [%rd1+2];
    ld.global.u16 %h1, [%rd1];
    st.global.b32 [%rd2], %r1;
    st.global.b32 [%rd2+4], %r2;
    st.global.b64 [%rd2+8], %rd3;
    st.global.b16 [%rd2+16], %h1;
    st.global.u8 [%rd2+18], %r2;
    ld.global.v4.u8 {{%h2, %h3, %h4, %h5}}, [%rd1];
    st.global.v4.b16 [%rd2+24], {{%h5, %h4, %h3, %h2}};
    """)
    machine.run(text, 1, 1)
    got = machine.memory.read(out, 40)
    assert got[:4] == b"\x80\xff\xff\xff"
    assert got[4:8] == b"\xff\0\0\0"
    assert got[8:16] == b"\x7f\x90" + b"\xff" * 6
    assert got[16:20] == b"\x80\xff\xff\0"
    assert got[24:32] == b"\x90\0\x7f\0\xff\0\x80\0"


def test_a_guard_that_is_false_everywhere_touches_nothing():
    code = """
    mov.u64 %rd3, 0;
    setp.ne.u32 %p2, %r60, %r60;
    mov.b32 %r11, 5;
    @%p2 ld.global.b32 %r11, [%rd3];
    @%p2 st.shared.b32 [box+999], %r11;
    @%p2 atom.global.add.u32 %r11, [%rd3], %r60;
    @!%p1 ld.b32 %r12, [%rd4];
    """.replace("[%rd4]", "[%rd62]")
    first, _ = run_lanes(f".shared .b32 box;\n{code}", [("b32", range(96))], ["b32", "b32"])
    assert first.tolist() == [5] * 96


def test_kernel_parameters_are_read_only_and_bounded():
    params = ".param .align 8 .b8 launch[16]"
    machine = Machine()
    with pytest.raises(EmulatorError, match="bounds.*kernel parameters has 16 bytes"):
        machine.run(kernel("ld.param.b64 %rd1, [launch+16];", params=params), 1, 1, bytes(16))
    text = kernel("mov.u64 %rd1, launch;\ncvta.param.u64 %rd1, %rd1;\nst.b32 [%rd1], %r1;", params=params)
    with pytest.raises(EmulatorError, match="read-only"):
        machine.run(text, 1, 1, bytes(16))
    with pytest.raises(ValueError, match="parameters: expected 16 bytes"):
        machine.run(kernel("", params=params), 1, 1, bytes(8))


ATOMICS = {
    "add.u32": lambda old, b: (old + b) % (1 << 32),
    "min.s32": lambda old, b: min(old, b),
    "max.u32": lambda old, b: max(old, b),
    "and.b32": lambda old, b: old & b,
    "or.b32": lambda old, b: old | b,
    "xor.b32": lambda old, b: old ^ b,
    "exch.b32": lambda old, b: b,
    "inc.u32": lambda old, b: 0 if old >= b else old + 1,
    "dec.u32": lambda old, b: b if old == 0 or old > b else old - 1,
}


@pytest.mark.parametrize("name", sorted(ATOMICS))
def test_atomics_take_the_lanes_one_by_one(name):
    machine = Machine()
    values = np.random.default_rng(2).integers(0, 1000, 32).astype(np.uint32)
    source = machine.upload(values, "source")
    target = machine.upload(np.array([500], np.uint32), "target")
    out = machine.memory.allocate(128, "out")
    text = kernel(f"""
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd2, %rd1, {source};
    ld.global.b32 %r2, [%rd2];
    mov.u64 %rd3, {target};
    atom.global.{name} %r3, [%rd3], %r2;
    add.u64 %rd4, %rd1, {out};
    st.global.b32 [%rd4], %r3;
    """)
    machine.run(text, 1, 32)
    old, expected = 500, []
    for value in values.tolist():
        expected.append(old)
        old = ATOMICS[name](old, value)
    assert machine.download(out, (32,), np.uint32).tolist() == expected
    assert machine.download(target, (1,), np.uint32)[0] == old


@pytest.mark.parametrize("seed", range(3))
def test_a_lock_by_compare_and_swap_excludes_ctas(seed):
    machine = Machine()
    words = machine.upload(np.zeros(2, np.uint32), "lock and counter")
    text = kernel(
        f"""
    mov.u64 %rd1, {words};
AGAIN:
    atom.global.acquire.gpu.cas.b32 %r1, [%rd1], %r10, %r11;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra AGAIN;
    ld.global.b32 %r2, [%rd1+4];
    nanosleep.u32 20;
    add.u32 %r2, %r2, 1;
    st.global.b32 [%rd1+4], %r2;
    atom.global.release.gpu.exch.b32 %r3, [%rd1], %r10;
    """.replace("mov.u64 %rd1", "mov.b32 %r10, 0;\nmov.b32 %r11, 1;\nmov.u64 %rd1")
    )
    machine.run(text, 6, 1, seed=seed)
    assert machine.download(words, (2,), np.uint32).tolist() == [0, 6]


def test_the_host_side_of_global_memory():
    memory = GlobalMemory(capacity=1000)
    first, second = memory.allocate(100), memory.allocate(200)
    assert first % 256 == second % 256 == 0
    assert second - first > 100
    memory.write(first, b"abc")
    assert memory.read(first, 4) == b"abc\0"
    assert memory.written(first, 4).tolist() == [True, True, True, False]
    with pytest.raises(MemoryError, match="800 bytes"):
        memory.allocate(800)
    with pytest.raises(Fault, match="past its end"):
        memory.write(first + 98, b"abc")
    memory.free(first)
    with pytest.raises(Fault, match="has been freed"):
        memory.read(first, 1)
    with pytest.raises(ValueError, match="beginning of an allocation"):
        memory.free(second + 8)


def test_regions_refuse_addresses_below_them():
    region = Region(1 << 48, 64, "region")
    below = np.array([(1 << 48) - 8], np.uint64)
    with pytest.raises(Fault, match="8 bytes before its beginning"):
        region.load(below, 8)
    with pytest.raises(Fault, match="before its beginning"):
        region.gather(below.astype(np.int64), 8)

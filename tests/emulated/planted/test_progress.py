"""Deadlock, livelock, divergence of .aligned instructions, and grids that need more CTAs than are let in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emulated.kernels import Machine, kernel, line_of
from emulated.planted.planting import Bench, Planted, both, wait
from sm12x.emulator.errors import EmulatorError
from sm12x.emulator.launch import residents

LOW = "setp.lt.u32 %p8, %r1, 8;"
FILL = "st.shared.v4.b32 [%r20], {%r1, %r1, %r1, %r1};\nbar.sync 0;"
BOX = "mov.b32 %r20, box;\nshl.b32 %r21, %r2, 2;\nadd.u32 %r20, %r20, %r21;"
A, B, D = "{%r10, %r11, %r12, %r13}", "{%r14, %r15}", "{%f1, %f2, %f3, %f4}"
MMA = f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {D}, {A}, {B}, {D};"
ALL_FOUR, EARLIER = "mov.b32 %r12, 4;", "mov.u32 %r12, %ctaid.x;"  # CTAs that each one waits for
COUNT = """
    mov.b32 %r9, 1;
    @%p1 red.release.gpu.global.add.u32 [%rd1], %r9;
AGAIN:
    ld.acquire.gpu.global.b32 %r10, [%rd1];
    setp.lt.u32 %p9, %r10, %r12;
    @%p9 bra AGAIN;
"""


def case(name, code, bug, mended, kind, message, line, **more):
    return Planted(name, code, bug, mended, kind, message, line, **more)


def aligned(name, instruction, mended="", before=""):
    """Eight lanes of a warp branch around an instruction that all have to execute together."""
    return Planted(
        f"divergent {name}",
        f"{before}\n{LOW}\n<HERE>\n{instruction}\nMEET:\nst.shared.b32 [box+2048], %r1;", "@%p8 bra MEET;",
        mended, "divergence",
        r"warp 0 \(24 lanes\) waits for the 8 other lanes of its warp, as it is \.aligned, at PTX line \d+: "
        + instruction.split(" ")[0].rstrip(";").replace(".", r"\."), None,
    )  # fmt: skip


CASES = [
    case("a barrier that a warp does not come to", "setp.lt.u32 %p9, %r1, 32;\n<HERE>\nbar.sync 1, 64;",
         "@%p9 ret;", "", "deadlock", r"CTA 0 warp 1 \(32 lanes\) waits for barrier 1 \(32 of 64 threads are "
         r"there\) at PTX line \d+: bar.sync 1, 64", None, threads=64),
    case("two warps that wait for each other", f"""
    mov.b32 %r59, 1;
    @%p1 mbarrier.init.shared::cta.b64 [bar], %r59;
    @%p1 mbarrier.init.shared::cta.b64 [bar+8], %r59;
    bar.sync 0;
    elect.sync %r58|%p10, -1;
    setp.ge.u32 %p9, %r1, 32;
    @%p9 bra.uni SECOND;
    <HERE>
    {wait("bar", n=1)}
    @%p10 mbarrier.arrive.shared::cta.b64 _, [bar+8];
    ret;
SECOND:
    {wait("bar+8", n=2)}
    @%p10 mbarrier.arrive.shared::cta.b64 _, [bar];
    """, "", "@%p10 mbarrier.arrive.shared::cta.b64 _, [bar];", "deadlock",
         r"(?s)(?=.*warp 0 \(32 lanes\) waits for the mbarrier at shared 0x1400 in phase 0 \(0 of 1 "
         r"arrivals, 1 missing\))(?=.*warp 1 \(32 lanes\) waits for the mbarrier at shared 0x1408 in phase 0 "
         r"\(0 of 1 arrivals, 1 missing\))",
         None, threads=64),
    case("lanes that wait for lanes that have left",
         "setp.lt.u32 %p9, %r1, 30;\n<HERE>\nbar.warp.sync 0xC0000000;\n"
         "barrier.sync 1, 64;\nMEET:\nbar.warp.sync -1;", "@%p9 bra MEET;",
         "bra.uni MEET;", "deadlock", r"(?s)warp 0 \(2 lanes\) waits for barrier 1 \(2 of 64.*"
         r"warp 0 \(30 lanes\) waits for its other lanes before PTX line \d+: bar.warp.sync -1", None),
    case("a flag that nobody sets",
         "<HERE>\nAGAIN:\nld.acquire.gpu.global.b32 %r9, [%rd1];\nsetp.eq.u32 %p9, %r9, 0;\n"
         "@%p9 bra AGAIN;", "", "mov.b32 %r9, 1;\nst.release.gpu.global.b32 [%rd1], %r9;", "livelock",
         r"nothing changes any more(?s:.*)warp 0 \(32 lanes\) runs at PTX line", None),
    case("a lock that is never given back", """
    mov.b32 %r9, 0;
    mov.b32 %r10, 1;
AGAIN:
    @%p1 atom.global.acquire.gpu.cas.b32 %r11, [%rd1], %r9, %r10;
    setp.eq.u32 %p9, %r11, 1;
    and.pred %p9, %p9, %p1;
    @%p9 bra AGAIN;
    <HERE>
    """, "", "@%p1 st.release.gpu.global.b32 [%rd1], %r9;", "livelock",
         r"nothing changes any more(?s:.*)runs at PTX line", None, ctas=2),
    case("a poll that counts",
         "mov.b32 %r9, 0;\n<HERE>\nAGAIN:\nadd.u32 %r10, %r10, 1;\nsetp.eq.u32 %p9, %r9, 0;\n"
         "@%p9 bra AGAIN;", "", "mov.b32 %r9, 1;", "livelock", "20001 segments have run|which is the limit",
         None,
         options={"segment_limit": 20_000}),
    case("a grid that needs its CTAs at once", "<HERE>\n" + COUNT, ALL_FOUR, EARLIER, "livelock",
         r"(?s)nothing changes any more.*and [23] CTAs have not been let in", None, ctas=4, seeds=(1, 3, 4,
         6, 8, 9)),
    aligned("bar.sync", "bar.sync 0;"),
    aligned("barrier.cluster", "barrier.cluster.arrive.aligned;"),
    aligned("mma.sync", MMA),
    aligned("ldmatrix", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r20];", before=f"{BOX}\n{FILL}"),
    aligned("stmatrix", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%r1};", before=BOX),
    aligned("setmaxnreg", "setmaxnreg.dec.sync.aligned.u32 40;"),
    case("guard on an .aligned instruction", f"{LOW}\n<HERE> bar.sync 0;", "@%p8", "", "divergence",
         "only 8 of the warp's 32 lanes execute an instruction that is .aligned", r"bar\.sync"),
    case("branch marked .uni that is not", f"{LOW}\n<HERE> A;\nmov.b32 %r9, 1;\nA:", "@%p8 bra.uni",
         "@%p8 bra",
         "divergence", "lanes disagree about a branch that is marked .uni", r"bra\.uni"),
    case("lanes that a warp barrier does not name", "<HERE>", "bar.warp.sync 0xFF;", "bar.warp.sync -1;",
         "divergence",
         "a warp barrier whose mask does not name them", "bar.warp.sync"),
    case("lanes that disagree about a barrier", "and.b32 %r9, %r1, 1;\n<HERE>\nbar.sync %r9;", "",
         "mov.b32 %r9, 0;",
         "divergence", "lanes disagree about the barrier", r"bar\.sync"),
]  # fmt: skip


@both(CASES)
def test_progress(check, planted):
    check(planted)


@pytest.mark.parametrize("seed", range(10))
def test_a_grid_that_needs_its_ctas_at_once_ends_where_they_are(seed):
    """All CTAs are let in by some seeds, and for a cooperative launch."""
    planted = next(each for each in CASES if each.ctas == 4)
    if seed % 5 in (0, 2):
        Bench().run(planted.text(ALL_FOUR), planted, seed)
    Bench().run(planted.text(ALL_FOUR), replace(planted, options={"cooperative": True}), seed)


def test_how_many_ctas_a_seed_lets_in():
    assert [residents(seed, 9) for seed in range(6)] == [9, 1, 9, 2, 5, 9]
    assert [residents(seed, 1) for seed in range(6)] == [1] * 6
    assert {residents(seed, 9) for seed in (1, 2, 3)} == {1, 2, 9}, "what CI runs"


@pytest.mark.parametrize("clock", ["%clock", "%globaltimer_lo"])
def test_a_poll_with_a_timeout_is_no_livelock(clock):
    """Also where the register that held the time holds something else at the end of the loop."""
    text = kernel(f"""
AGAIN:
    mov.u32 %r1, {clock};
    setp.lt.u32 %p1, %r1, 60000;
    mov.b32 %r1, 0;
    @%p1 bra AGAIN;
    """)
    for seed in range(6):
        Machine().run(text, 1, 32, seed=seed)


def test_long_computations_are_no_livelock():
    """No barrier moves, no memory changes, and nobody watches memory behind the end of the kernel."""
    text = kernel("AGAIN:\nadd.u32 %r1, %r1, 1;\nsetp.ne.u32 %p1, %r1, %r2;\n@%p1 bra AGAIN;".replace(
        "AGAIN:", "mov.b32 %r1, 0;\nmov.b32 %r2, 20000;\nAGAIN:"))  # fmt: skip
    for seed in range(6):
        machine = Machine()
        data = machine.memory.allocate(4)
        machine.run(text, 1, 96, seed=seed)
        assert machine.memory.region(data).observers == ()


@pytest.mark.parametrize("space", ["shared", "global"])
def test_a_count_in_memory_is_no_livelock(space):
    """Registers and places are the same each time round, and memory is not."""
    text = kernel(f"""
    mov.u64 %rd1, counted;
    mov.b32 %r1, 0;
    st.{space}.b32 [%rd1], %r1;
AGAIN:
    atom.{space}.add.u32 %r1, [%rd1], 1;
    setp.lt.u32 %p1, %r1, 8000;
    mov.b32 %r1, 0;
    @%p1 bra AGAIN;
    setp.lt.u32 %p1, %r1, 1;
    """, shared=f".{space} .align 4 .b32 counted;")  # fmt: skip
    for seed in range(2):
        Machine().run(text, 1, 1, seed=seed)


def test_livelock_is_proven_soon():
    """Not by running until some limit: a flag that nobody sets, polled by 8 warps with a branch inside."""
    machine = Machine()
    flag = machine.memory.allocate(4, "flag")
    machine.memory.fill(flag, 4, 0)
    text = kernel(f"""
    mov.u64 %rd1, {flag};
    mov.u32 %r1, %tid.x;
    and.b32 %r1, %r1, 1;
    setp.eq.u32 %p2, %r1, 0;
AGAIN:
    @%p2 bra EVEN;
    nanosleep.u32 100;
EVEN:
    ld.acquire.gpu.global.b32 %r2, [%rd1];
    setp.eq.u32 %p1, %r2, 0;
    @%p1 bra AGAIN;
    """)
    for seed in range(6):
        with pytest.raises(EmulatorError, match="nothing changes any more") as caught:
            machine.run(text, 1, 256, seed=seed)
        assert f"PTX line {line_of(text, 'ld.acquire')}" in str(caught.value)
    assert machine.memory.region(flag).observers == ()

"""Kernels at the edges of the rules: warps of which some lanes have ended, relaxed operations with and
without fences, lanes at barriers of their own. What is right passes under every seed; what is not is found.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from emulated.kernels import Machine, kernel
from sm12x.emulator.chain import Link, launch_chain
from sm12x.emulator.errors import EmulatorError

SEEDS = range(8)
SHARED = ".shared .align 1024 .b8 box[8192];\n.shared .align 8 .b64 bar[8];"
# %r0: the thread, %r1: its word in the box, %r4: its lane, %p0: thread 0, %p1: warp 0, %p2: lane 0.
BEGIN = """
    mov.u32 %r0, %tid.x;
    mov.b32 %r3, box;
    shl.b32 %r1, %r0, 2;
    add.u32 %r1, %r1, %r3;
    and.b32 %r4, %r0, 31;
    setp.eq.u32 %p0, %r0, 0;
    setp.lt.u32 %p1, %r0, 32;
    setp.eq.u32 %p2, %r4, 0;
"""
INIT = "@%p0 mbarrier.init.shared::cta.b64 [bar], {};\nfence.mbarrier_init.release.cluster;\nbar.sync 0;\n"
# Lanes from 16 on come to their end, before or behind others at a barrier.
HALF = """
    setp.ge.u32 %p3, %r4, 16;
    @%p3 bra OTHERS;
    barrier.sync {barrier};
    ret;
OTHERS:
    mov.b32 %r20, 0;
LOOP:
    add.u32 %r20, %r20, 1;
    nanosleep.u32 1;
    setp.lt.u32 %p4, %r20, {rounds};
    @%p4 bra LOOP;
"""
MATRIX = """
    and.b32 %r5, %r1, 0xffffff80;
    setp.ge.u32 %p3, %r4, 16;
    @%p3 bra DONE;
    st.shared.b32 [%r1], %r0;
    st.shared.b32 [%r1+64], %r0;
    {}
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r8}}, [%r3];
DONE:
"""
CLUSTER = """
    @%p0 st.shared.b32 [box], %r0;
    {}
    barrier.cluster.arrive.{}.aligned;
    barrier.cluster.wait.acquire.aligned;
    ld.shared.b32 %r9, [box];
"""
MESSAGE = (
    INIT.format(1)
    + """
    @!%p1 bra READER;
    @!%p2 bra DONE;
    st.shared.b32 [box], %r0;
    {}
    mbarrier.arrive.{}.cta.shared::cta.b64 _, [bar];
    bra DONE;
READER:
    mbarrier.try_wait.parity.{}.cta.shared::cta.b64 %p9, [bar], 0;
    @!%p9 bra READER;
    {}
    ld.shared.b32 %r9, [box];
DONE:
"""
)
FENCE = "fence.acq_rel.cta;"
# Lane 0 waits at [bar], lane 1 at [bar+8], which ends first: what lane 1 does then ends the phase of [bar].
OWN = (
    """
    @%p0 mbarrier.init.shared::cta.b64 [bar+8], 1;
"""
    + INIT.format(1)
    + """
    @!%p1 bra OTHER;
    setp.gt.u32 %p3, %r4, 1;
    @%p3 bra DONE;
    mov.b32 %r11, bar;
    shl.b32 %r12, %r4, 3;
    add.u32 %r11, %r11, %r12;
    setp.eq.u32 %p4, %r4, 1;
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p9, [%r11], 0;
    and.pred %p5, %p4, %p9;
    @%p5 mbarrier.arrive.shared::cta.b64 _, [bar];
    @!%p9 bra AGAIN;
    bra DONE;
OTHER:
    @%p2 mbarrier.arrive.shared::cta.b64 _, [bar+8];
DONE:
"""
)
# A thread looks at phase 0 by its state once; meanwhile two phases end.
PEEK = (
    INIT.format(1)
    + """
    @%p1 bra WATCHER;
    bar.sync 0;
    @%p2 mbarrier.arrive.shared::cta.b64 _, [bar];
    @%p2 mbarrier.arrive.shared::cta.b64 _, [bar];
    bar.sync 0;
    bar.sync 0;
    @%p2 mbarrier.arrive.shared::cta.b64 _, [bar];
    bra DONE;
WATCHER:
    mov.b64 %rd5, 1;
    mbarrier.test_wait.shared::cta.b64 %p9, [bar], %rd5;
    bar.sync 0;
    bar.sync 0;
    mov.b64 %rd5, 2097153;
    mbarrier.test_wait.shared::cta.b64 %p9, [bar], %rd5;
    bar.sync 0;
WAIT:
    mbarrier.try_wait.shared::cta.b64 %p9, [bar], %rd5;
    @!%p9 bra WAIT;
DONE:
"""
)
CANCEL = """
    @%p0 mbarrier.init.shared::cta.b64 [bar], 1;
    {}
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 16;
    @%p0 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [box], [bar];
    {}
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p9, [bar], 0;
    @!%p9 bra WAIT;
    ld.shared.b32 %r9, [box];
"""
INIT_FENCE = "fence.mbarrier_init.release.cluster;\nbar.sync 0;"
RIGHT = {
    "barrier.sync behind whose back lanes end": HALF.format(barrier="0", rounds=300),
    "barrier.sync when lanes have ended": HALF.format(barrier="0", rounds=1),
    "a branch to what follows": "@%p0 bra NEXT;\nNEXT:\n" + HALF.format(barrier="1, 64", rounds=1),
    "barrier.sync with a count behind whose back lanes end": HALF.format(barrier="1, 64", rounds=300),
    "ldmatrix when lanes have ended": MATRIX.format("bar.sync 0;"),
    "relaxed arrival at the cluster barrier behind a fence": CLUSTER.format(FENCE, "relaxed"),
    "relaxed arrival at an mbarrier behind a fence": MESSAGE.format(FENCE, "relaxed", "acquire", ""),
    "relaxed wait at an mbarrier before a fence": MESSAGE.format("", "release", "relaxed", FENCE),
    "lanes that wait at mbarriers of their own": OWN,
    "a phase that was looked for by its state once": PEEK,
    "a response of try_cancel": CANCEL.format(INIT_FENCE, ""),
    "try_cancel behind the fence of NVIDIA's examples": CANCEL.format(
        "fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;\nbar.sync 0;", ""
    ),
}  # fmt: skip
WRONG = {
    "ldmatrix without a barrier": (MATRIX.format("").replace("[%r3]", "[%r5]"), "race"),
    "relaxed arrival at the cluster barrier": (CLUSTER.format("", "relaxed"), "race"),
    "relaxed arrival at an mbarrier": (MESSAGE.format("", "relaxed", "acquire", ""), "race"),
    "relaxed wait at an mbarrier": (MESSAGE.format("", "release", "relaxed", ""), "race"),
    "try_cancel at an mbarrier that is not fenced": (CANCEL.format("bar.sync 0;", ""), "barrier"),
    "a response of try_cancel that is not waited for": (
        "@%p0 st.shared.v4.b32 [box], {%r0, %r0, %r0, %r0};\nfence.proxy.async.shared::cta;\n"
        + CANCEL.format(INIT_FENCE, "@%p0 ld.shared.b32 %r9, [box];"),
        "race",
    ),
    "a reduction at a barrier that there is not": (
        "mov.b32 %r10, 16;\nbarrier.red.popc.u32 %r9, %r10, 64, %p0;",
        "barrier",
    ),
}


def run(body, seed):
    Machine().run(kernel(BEGIN + body, shared=SHARED), 1, 64, seed=seed, limit=300_000)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name):
    for seed in SEEDS:
        run(RIGHT[name], seed)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name):
    body, kind = WRONG[name]
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as caught:
            run(body, seed)
        assert caught.value.violation is not None, f"seed {seed}: {caught.value}"
        assert caught.value.violation.kind == kind, f"seed {seed}: {caught.value}"


def test_warps_that_leave_a_named_barrier_long_after_others_used_it_again():
    """Any two of 32 warps meet; one may be overtaken by many meetings of others before it goes on."""
    body = """
    mov.b32 %r20, 0;
LOOP:
    bar.sync 1, 64;
    add.u32 %r20, %r20, 1;
    setp.lt.u32 %p4, %r20, 60;
    @%p4 bra LOOP;
    """
    for seed in (3, 4, 5):  # under others the last warp finds no other
        Machine().run(kernel(BEGIN + body, shared=SHARED), 1, 1024, seed=seed)


TID = "mov.u32 %r0, %tid.x;\nmul.wide.u32 %rd2, %r0, 4;\nadd.u64 %rd1, %rd1, %rd2;\n"
PRIMARY = "griddepcontrol.launch_dependents;\n" + TID + "st.global.b32 [%rd1], %r0;"
TOLD = {
    "cluster barrier": """
    @%p1 griddepcontrol.wait;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    """,
    "cp.async.mbarrier.arrive": """
    @%p1 mbarrier.init.shared::cta.b64 [bar], 1;
    bar.sync 0;
    @!%p1 bra WAIT;
    griddepcontrol.wait;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [bar];
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [bar], 0;
    @!%p2 bra WAIT;
    """,
}


def chain(bodies, seed, size=64):
    machine = Machine()
    buffer = machine.upload(np.zeros(size, np.uint32), "buffer")
    links = [
        Link(
            machine.program(kernel(f"mov.u64 %rd1, {buffer};\n{body}", shared=SHARED)),
            *((1, 1, 1), (64, 1, 1), 0, b""),
            programmatic=True,
            seed=seed,
        )
        for body in bodies
    ]
    launch_chain(links, memory=machine.memory)


@pytest.mark.parametrize("name", TOLD)
def test_threads_are_told_of_the_wait_for_the_grid_before(name):
    begin, end = TID + "setp.eq.u32 %p1, %r0, 0;\n", "ld.global.b32 %r1, [%rd1];"
    for seed in SEEDS:
        chain([PRIMARY, begin + TOLD[name] + end], seed)
        with pytest.raises(EmulatorError, match="dependency"):
            chain(
                [PRIMARY, begin + TOLD[name].replace("griddepcontrol.wait;", "nanosleep.u32 1;") + end], seed
            )


def peak(function, *arguments):
    """Bytes that a call takes at most."""
    function(*arguments)
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_long_chains_forget_what_nothing_can_overlap_with():
    body = "griddepcontrol.wait;\n" + TID + "ld.global.b32 %r1, [%rd1];\nst.global.b32 [%rd1], %r0;\n" \
        "griddepcontrol.launch_dependents;"  # fmt: skip
    few, many = (peak(chain, [body] * links, 1, 1 << 18) for links in (4, 24))
    assert many < 1.5 * few, (few, many)


def test_ctas_that_have_ended_take_little():
    def grid(ctas):
        Machine().run(kernel("mov.u32 %r0, %tid.x;"), ctas, 256, resident=4)

    few, many = peak(grid, 10), peak(grid, 210)
    assert many - few < 200 * 32_000, (few, many)


def test_a_loop_of_stores_is_one_write_to_whoever_watches_tensor_maps():
    def loop(rounds):
        machine = Machine()
        out = machine.memory.allocate(1024)
        body = f"""
    mov.u64 %rd1, {out};
    mov.b32 %r1, 0;
    setp.gt.u32 %p1, %r1, 0;
    @%p1 cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd1, {{%r1, %r1}}];
LOOP:
    st.global.b32 [%rd1], %r1;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p2, %r1, {rounds};
    @%p2 bra LOOP;
        """
        machine.run(kernel(body), 1, 32)

    few, many = peak(loop, 10), peak(loop, 2000)
    assert many - few < 100_000, (few, many)

"""Accesses of shared memory that nothing orders are violations, however they went. Each planted bug has a
clean twin: the same kernel with what was left out.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from emulated.kernels import Machine, kernel
from sm12x.emulator.errors import EmulatorError

SEEDS = range(6)
SHARED = ".shared .align 1024 .b8 box[8192];\n.shared .align 8 .b64 bar[8];"
# %r0: the thread, %r1: its word in the box, %r2: its warp, %p0: thread 0, %p1: warp 0, %p2: lane 0, %rd1: 8
# KiB of global memory. All that the kernels read has been written.
BEGIN = """
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    mov.b32 %r3, box;
    add.u32 %r1, %r1, %r3;
    shr.u32 %r2, %r0, 5;
    and.b32 %r4, %r0, 31;
    setp.eq.u32 %p0, %r0, 0;
    setp.eq.u32 %p1, %r2, 0;
    setp.eq.u32 %p2, %r4, 0;
    mov.u64 %rd1, {memory};
    shl.b32 %r5, %r0, 4;
    add.u32 %r5, %r5, %r3;
    mov.b32 %r6, 0;
    st.shared.v4.b32 [%r5], {{%r6, %r6, %r6, %r6}};
    st.shared.v4.b32 [%r5+1024], {{%r6, %r6, %r6, %r6}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
"""
INIT = """
    @%p0 mbarrier.init.shared::cta.b64 [bar], {full};
    @%p0 mbarrier.init.shared::cta.b64 [bar+8], {empty};
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"
# Thread 0 has the box filled, which bar tells of, or has it stored.
FILL = f"""
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
    @%p0 {LOAD} [box], [%rd1], 256, [bar];
"""
DRAIN = f"@%p0 {STORE} [%rd1], [box], 256;\n@%p0 cp.async.bulk.commit_group;"
TENSOR_MAP = ".tensormap::generic.release.gpu.sync.aligned"


def until(bar, parity, name):
    return f"{name}:\n mbarrier.try_wait.parity.shared::cta.b64 %p9, [{bar}], {parity};\n @!%p9 bra {name};"


def run(body, threads, seed):
    machine = Machine()
    memory = machine.upload(np.arange(2048, dtype=np.uint32), "memory")
    text = kernel(BEGIN.format(memory=memory) + body, shared=SHARED)
    machine.run(text, 1, threads, seed=seed)


# What is to be left out stands between << and >>. Name, kernel, threads, kind, what the message says.
PLANTED = {
    "a word of another warp is read without a barrier": (
        """
        st.shared.b32 [%r1], %r0;
        << bar.sync 0; >>
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        """,
        "race",
        "st.shared",
    ),
    "a word of another lane is read without bar.warp.sync": (
        """
        st.shared.b32 [%r1], %r0;
        << bar.warp.sync -1; >>
        xor.b32 %r5, %r1, 4;
        ld.shared.b32 %r6, [%r5];
        """,
        "race",
        "st.shared",
    ),
    "a word that another warp reads is overwritten without a barrier": (
        """
        st.shared.b32 [%r1], %r0;
        bar.sync 0;
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        << bar.sync 0; >>
        st.shared.b32 [%r1], %r6;
        """,
        "race",
        "(ld|st).shared",
    ),
    "only some of those who share a word come to the barrier between": (
        """
        st.shared.b32 [%r1], %r0;
        @!%p1 bra OTHERS;
        << bar.sync 1, 64; >>
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        ret;
    OTHERS:
        << bar.arrive 1, 64; >>
        """,
        "race",
        "st.shared",
    ),
    "the barrier between has another number": (
        """
        @%p1 bra READER;
        bar.arrive 2, 64;
        st.shared.b32 [%r1], %r0;
        << bar.arrive 1, 64; >>
        ret;
    READER:
        bar.sync 2, 64;
        << bar.sync 1, 64; >>
        ld.shared.b32 %r6, [%r1+128];
        """,
        "race",
        "st.shared",
    ),
    "bytes beside each other are no race, the same byte is": (
        """
        add.u32 %r5, %r3, %r0;
        cvt.u16.u32 %h1, %r0;
        st.shared.b8 [%r5], %h1;
        << bar.sync 0; >>
        st.shared.b8 [%r5+1], %h1;
        """,
        "race",
        "(st|ld).shared.b8",
    ),
    "a matrix is read that other lanes wrote": (
        """
        and.b32 %r5, %r0, 31;
        shl.b32 %r5, %r5, 4;
        add.u32 %r5, %r5, %r3;
        shl.b32 %r6, %r2, 10;
        add.u32 %r5, %r5, %r6;
        st.shared.v4.b32 [%r5], {{%r0, %r0, %r0, %r0}};
        << bar.warp.sync -1; >>
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r5];
        """,
        "race",
        "st.shared.v4",
    ),
    "a matrix that a warp stored is read by its lanes": (
        """
        and.b32 %r5, %r0, 31;
        shl.b32 %r5, %r5, 4;
        add.u32 %r5, %r5, %r3;
        shl.b32 %r6, %r2, 10;
        add.u32 %r5, %r5, %r6;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {{%r0, %r0, %r0, %r0}};
        << bar.warp.sync -1; >>
        ld.shared.b32 %r7, [%r5];
        """,
        "race",
        "stmatrix",
    ),
    "a bulk store reads what was written without fence.proxy.async": (
        f"""
        st.shared.b32 [%r1], %r0;
        << fence.proxy.async.shared::cta; >>
        bar.sync 0;
        {DRAIN}
        cp.async.bulk.wait_group.read 0;
        """,
        "proxy",
        "st.shared",
    ),
    "a write behind the fence needs another one": (
        f"""
        st.shared.b32 [%r1], %r0;
        fence.proxy.async.shared::cta;
        st.shared.b32 [%r1], %r0;
        << fence.proxy.async.shared::cta; >>
        bar.sync 0;
        {DRAIN}
        cp.async.bulk.wait_group.read 0;
        """,
        "proxy",
        "st.shared",
    ),
    "a bulk store reads what another warp still writes": (
        f"""
        st.shared.b32 [%r1], %r0;
        fence.proxy.async.shared::cta;
        << bar.sync 0; >>
        {DRAIN}
        cp.async.bulk.wait_group.read 0;
        """,
        "race",
        "st.shared|cp.async.bulk",
    ),
    "what a bulk store still reads is overwritten by its thread": (
        f"""
        st.shared.b32 [%r1], %r0;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        {DRAIN}
        << cp.async.bulk.wait_group.read 0; >>
        @%p0 st.shared.b32 [box], %r0;
        cp.async.bulk.wait_group 0;
        """,
        "race",
        "st.shared.b32 .box|cp.async.bulk.global",
    ),
    "what a bulk store still reads is overwritten by another warp": (
        f"""
        st.shared.b32 [%r1], %r0;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        {DRAIN}
        cp.async.bulk.wait_group.read 0;
        << bar.sync 0; >>
        st.shared.b32 [%r1], %r0;
        """,
        "race",
        "st.shared|cp.async.bulk.global",
    ),
    "the group that is waited for is an older one": (
        f"""
        st.shared.b32 [%r1], %r0;
        fence.proxy.async.shared::cta;
        bar.sync 0;
        @%p0 {STORE} [%rd1], [box+128], 128;
        @%p0 cp.async.bulk.commit_group;
        @%p0 {STORE} [%rd1+128], [box], 128;
        @%p0 cp.async.bulk.commit_group;
        cp.async.bulk.wait_group.read 1;
        << cp.async.bulk.wait_group.read 0; >>
        @%p0 st.shared.b32 [box], %r0;
        cp.async.bulk.wait_group 0;
        """,
        "race",
        "st.shared.b32 .box|cp.async.bulk.global",
    ),
    "a stage is read before its barrier tells that the load is done": (
        INIT.format(full=1, empty=1)
        + f"""
        {FILL}
        << {until("bar", 0, "FULL")} >>
        ld.shared.b32 %r6, [%r1];
        {until("bar", 0, "DONE")}
        """,
        "race",
        "ld.shared|cp.async.bulk.shared",
    ),
    "a stage is refilled before all its readers arrived": (
        # << >> leaves one warp's arrival out; the barrier then expects one less.
        """
        @%p0 mbarrier.init.shared::cta.b64 [bar], 1;
        << @%p0 mbarrier.init.shared::cta.b64 [bar+8], 2; >>
        >< @%p0 mbarrier.init.shared::cta.b64 [bar+8], 1; ><
        fence.mbarrier_init.release.cluster;
        bar.sync 0;
        """
        + f"""
        {FILL}
        {until("bar", 0, "FULL")}
        ld.shared.b32 %r6, [%r1];
        bar.warp.sync -1;
        << @%p2 mbarrier.arrive.shared::cta.b64 _, [bar+8]; >>
        >< @%p0 mbarrier.arrive.shared::cta.b64 _, [bar+8]; ><
        @!%p0 bra END;
        {until("bar+8", 0, "EMPTY")}
        {FILL}
        {until("bar", 1, "AGAIN")}
    END:
        """,
        "race",
        "ld.shared",
    ),
    "one lane arrives for others that it did not meet": (
        INIT.format(full=1, empty=2)
        + f"""
        {FILL}
        {until("bar", 0, "FULL")}
        ld.shared.b32 %r6, [%r1];
        << bar.warp.sync -1; >>
        @%p2 mbarrier.arrive.shared::cta.b64 _, [bar+8];
        @!%p0 bra END;
        {until("bar+8", 0, "EMPTY")}
        {FILL}
        {until("bar", 1, "AGAIN")}
    END:
        """,
        "race",
        "ld.shared",
    ),
    "an arrival that is relaxed releases nothing": (
        INIT.format(full=64, empty=1)
        + f"""
        st.shared.b32 [%r1], %r0;
        << mbarrier.arrive.release.cta.shared::cta.b64 _, [bar]; >>
        >< mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [bar]; ><
        {until("bar", 0, "FULL")}
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        """,
        "race",
        "st.shared",
    ),
    "bytes that a thread completes itself tell of what it fenced": (
        INIT.format(full=1, empty=1)
        + f"""
        @%p0 st.shared.b32 [box], %r0;
        << @%p0 fence.proxy.async.shared::cta; >>
        @%p0 mbarrier.arrive.expect_tx.relaxed.cta.shared::cta.b64 _, [bar], 16;
        @%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 16;
        {until("bar", 0, "FULL")}
        ld.shared.b32 %r6, [box];
        """,
        "race",
        "st.shared",
    ),
    "lanes that write the same to one word do so together, and one of them may tell": (
        INIT.format(full=1, empty=1)
        + f"""
        @!%p1 bra WAIT;
        st.shared.b32 [box], 7;
        ld.shared.b32 %r6, [box];
        << @%p2 mbarrier.arrive.shared::cta.b64 _, [bar]; >>
        >< @%p2 mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [bar]; ><
    WAIT:
        {until("bar", 0, "FULL")}
        ld.shared.b32 %r6, [box];
        """,
        "race",
        "st.shared",
    ),
    "a thread's own copy is read before it waits": (
        """
        mul.wide.u32 %rd2, %r0, 4;
        add.u64 %rd2, %rd2, %rd1;
        cp.async.ca.shared.global [%r1], [%rd2], 4;
        cp.async.commit_group;
        << cp.async.wait_group 0; >>
        ld.shared.b32 %r6, [%r1];
        cp.async.wait_all;
        """,
        "race",
        "ld.shared|cp.async.ca",
    ),
    "another thread's copy is read though only that thread waited": (
        """
        mul.wide.u32 %rd2, %r0, 4;
        add.u64 %rd2, %rd2, %rd1;
        cp.async.ca.shared.global [%r1], [%rd2], 4;
        cp.async.wait_all;
        << bar.sync 0; >>
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        """,
        "race",
        "ld.shared|cp.async.ca",
    ),
    "copies that an mbarrier tells of are read before it does": (
        INIT.format(full=64, empty=1)
        + f"""
        mul.wide.u32 %rd2, %r0, 4;
        add.u64 %rd2, %rd2, %rd1;
        cp.async.ca.shared.global [%r1], [%rd2], 4;
        cp.async.mbarrier.arrive.noinc.shared.b64 [bar];
        << {until("bar", 0, "FULL")} >>
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        {until("bar", 0, "DONE")}
        """,
        "race",
        "ld.shared|cp.async.ca",
    ),
    "a copy overwrites what another warp still reads": (
        """
        st.shared.b32 [%r1], %r0;
        bar.sync 0;
        ld.shared.b32 %r6, [%r1];
        << bar.sync 0; >>
        xor.b32 %r5, %r1, 128;
        cp.async.ca.shared.global [%r5], [%rd1], 4;
        cp.async.wait_all;
        """,
        "race",
        "ld.shared|cp.async.ca",
    ),
    "an atomic and a plain access of one word": (
        """
        @%p0 st.shared.b32 [box], 0;
        bar.sync 0;
        atom.shared.add.u32 %r5, [box], 1;
        << bar.sync 0; >>
        @%p0 ld.shared.b32 %r6, [box];
        """,
        "race",
        "atom.shared",
    ),
    "a flag that is stored without release publishes nothing": (
        """
        @%p0 st.shared.b32 [box+512], 0;
        bar.sync 0;
        @!%p1 bra READER;
        st.shared.b32 [%r1], %r0;
        bar.warp.sync -1;
        << @%p0 st.release.cta.shared.b32 [box+512], 1; >>
        >< @%p0 st.relaxed.cta.shared.b32 [box+512], 1; ><
        ret;
    READER:
        ld.acquire.cta.shared.b32 %r5, [box+512];
        setp.eq.u32 %p5, %r5, 0;
        @%p5 bra READER;
        ld.shared.b32 %r6, [%r1+-128];
        """,
        "race",
        "st.shared",
    ),
    "relaxed accesses need fences": (
        """
        @%p0 st.shared.b32 [box+512], 0;
        bar.sync 0;
        @!%p1 bra READER;
        st.shared.b32 [%r1], %r0;
        bar.warp.sync -1;
        << fence.acq_rel.cta; >>
        @%p0 st.volatile.shared.b32 [box+512], 1;
        ret;
    READER:
        ld.volatile.shared.b32 %r5, [box+512];
        setp.eq.u32 %p5, %r5, 0;
        @%p5 bra READER;
        << fence.acq_rel.cta; >>
        ld.shared.b32 %r6, [%r1+-128];
        """,
        "race",
        "st.shared",
    ),
    "a cluster's barrier orders too": (
        """
        st.shared.b32 [%r1], %r0;
        << barrier.cluster.arrive.release.aligned; >>
        << barrier.cluster.wait.acquire.aligned; >>
        xor.b32 %r5, %r1, 128;
        ld.shared.b32 %r6, [%r5];
        """,
        "race",
        "st.shared",
    ),
    "lanes write different values to one word": (
        """
        << mov.b32 %r5, 7; >>
        >< mov.b32 %r5, %r4; ><
        @%p1 st.shared.b32 [box], %r5;
        """,
        "race",
        "st.shared",
    ),
    "a tensor map is published while lanes still edit it": (
        f"""
        add.u64 %rd2, %rd1, 4096;
        @!%p1 bra END;
        st.shared.b32 [%r1], %r0;
        << bar.warp.sync -1; >>
        tensormap.cp_fenceproxy.global.shared::cta{TENSOR_MAP} [%rd2], [%r3], 128;
    END:
        """,
        "race",
        "st.shared",
    ),
}


def clean(body):
    """With what stands between << and >>, without what stands between >< and ><."""
    return re.sub(r"<<|>>", "", re.sub(r"><.*?><", "", body, flags=re.S))


def planted(body):
    return re.sub(r"><", "", re.sub(r"<<.*?>>", "", body, flags=re.S))


def _braces(body):
    return body.replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("name", PLANTED)
def test_the_clean_twin_passes(name):
    body = _braces(clean(PLANTED[name][0]))
    for seed in SEEDS:
        run(body, 64, seed)


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_bug_is_found_under_every_seed(name):
    body, kind, pattern = PLANTED[name]
    body = _braces(planted(body))
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as caught:
            run(body, 64, seed)
        violation = caught.value.violation
        assert violation is not None, caught.value
        assert violation.kind == kind, violation
        assert re.search(pattern, f"{violation.message} {violation.instruction}"), violation


def test_the_checker_can_be_left_out():
    body = PLANTED["a word of another warp is read without a barrier"][0]
    machine = Machine()
    memory = machine.memory.allocate(64)
    text = kernel(BEGIN.format(memory=memory) + planted(body), shared=SHARED)
    machine.run(text, 1, 64, races=False)
    with pytest.raises(EmulatorError, match="race"):
        machine.run(text, 1, 64)

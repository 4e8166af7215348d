"""Barriers: counts, phases, transactions, lifetimes, and initialisation that the async proxy may not see."""

from __future__ import annotations

from dataclasses import replace

from emulated.planted.planting import (
    BULK_LOAD,
    BULK_STORE,
    COMMIT,
    FILL,
    Planted,
    both,
    init,
    wait,
)

ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [bar];"
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {};"
COPY = f"@%p1 {BULK_LOAD} [box], [%rd1], 64, [bar];"
ADDRESS = r"the mbarrier at shared 0x1400"
HALF = """
    setp.ge.u32 %p2, %r1, 32;
    @%p2 bra.uni SECOND;
    {first}
    ret;
SECOND:
    {second}
"""
# Long enough for another warp to come to its wait.
DELAY = """
    mov.b32 %r40, 0;
DELAY:
    add.u32 %r40, %r40, 1;
    setp.lt.u32 %p40, %r40, 1500;
    @%p40 bra DELAY;
"""
# Warp 0 fills a buffer and tells warp 1 by bar; warp 1 tells that it has read it by bar+8, for 40 rounds.
RING = """
    mov.b32 %r59, 1;
    @%p1 mbarrier.init.shared::cta.b64 [bar], %r59;
    @%p1 mbarrier.init.shared::cta.b64 [bar+8], %r59;
    bar.sync 0;
    elect.sync %r58|%p10, -1;
    mov.b32 %r10, 0;
""" + HALF.format(
    first=f"""
    {DELAY}
FILL:
    @%p10 st.shared.b32 [box], %r10;
    @%p10 mbarrier.arrive.shared::cta.b64 _, [bar];
    <HERE>
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p11, %r10, 40;
    @%p11 bra FILL;
""",
    second=f"""
READ:
    and.b32 %r12, %r10, 1;
    {wait(parity="%r12", n=2)}
    @%p10 mbarrier.arrive.shared::cta.b64 _, [bar+8];
    add.u32 %r10, %r10, 1;
    setp.lt.u32 %p11, %r10, 40;
    @%p11 bra READ;
""",
)


def case(name, code, bug, mended, kind, message, line, **more):
    return Planted(name, code, bug, mended, kind, message, line, **more)


CASES = [
    case("too many arrivals", f"{init()}@%p1 {ARRIVE}\n<HERE>", f"@%p1 {ARRIVE[:-1]}, 2;", f"@%p1 {ARRIVE}",
         "barrier",
         f"2 arrivals at {ADDRESS} in phase 1 .* more than it expects", r"arrive.*, 2;"),
    case("too few arrivals", f"{init(33)}{ARRIVE}\n<HERE>\n{wait()}", "", f"@%p1 {ARRIVE}", "deadlock",
         f"warp 0 \\(32 lanes\\) waits for {ADDRESS} in phase 0 \\(32 of 33 arrivals, 1 missing\\) at "
         "PTX line", None),
    case("bytes that never come", f"{init()}<HERE>\n{wait()}", f"@%p1 {EXPECT.format(64)}",
         f"@%p1 {EXPECT.format(64)}\n{COPY}", "deadlock",
         f"{ADDRESS} in phase 0 \\(1 of 1 arrivals, 64 transaction bytes to come\\) at PTX line", None),
    case("more bytes than expected", f"{init()}<HERE>\n{COPY}\n{wait()}", f"@%p1 {EXPECT.format(32)}",
         f"@%p1 {EXPECT.format(64)}", "barrier",
         f"transaction underflow at {ADDRESS} in phase 0 \\(1 of 1 arrivals, 32 transaction bytes more than "
         "were expected\\)", r"cp\.async\.bulk"),
    case("too many bytes expected", f"{init()}<HERE>", "mov.b32 %r9, 2000000;\n"
         "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], %r9;", f"@%p1 {ARRIVE}", "barrier",
         "2000000 pending transaction bytes at .* at most 2\\^20-1", "expect_tx"),
    case("exit with pending transactions", f"{init()}@%p1 {EXPECT.format(64)}\n<HERE>", "",
         f"{COPY}\n{wait()}",
         "exit",
         f"the CTA ends with {ADDRESS} in phase 0 .* 64 transaction bytes to come.*; last changed at PTX "
         "line \\d+: @%p1 mbarrier.arrive.expect_tx", None),
    case("exit under a copy", f"{init()}@%p1 {EXPECT.format(64)}\n{COPY}\n<HERE>", "", wait(), "exit",
         "the CTA ends while 1 asynchronous copies still use its shared memory, the first issued at PTX line "
         r"\d+: @%p1 cp.async.bulk.shared", None, least=3),
    case("exit under a store", f"{FILL}\n@%p1 {BULK_STORE} [%rd2], [box], 64;\n@%p1 {COMMIT}\n<HERE>", "",
         "cp.async.bulk.wait_group.read 0;", "exit",
         r"asynchronous copies still use .* at PTX line \d+: @%p1 cp.async.bulk.global", None, least=3),
    case("a phase that ends unseen", RING, "", wait("bar+8", "%r13", 1).join(["and.b32 %r13, %r10, 1;\n",
         ""]),
         "barrier", "overtakes a waiter: warp 1, which waits at (this instruction|PTX line \\d+: "
         "mbarrier.try_wait.*), (has|did) not see.* the end of phase \\d+, and the parity", r"_, \[bar\];",
         threads=64, least=4),
    case("phases that end before anybody waits", init() + HALF.format(first=f"@%p1 {ARRIVE}\n<HERE>",
         second=f"{DELAY}{wait()}"), f"@%p1 {ARRIVE}", "", "deadlock",
         f"{ADDRESS} in phase 2 \\(0 of 1 arrivals, 1 missing\\), of which phases 0 to 1 ended before it "
         "looked, at PTX line", None, threads=64),
    case("a state that is too old",
         f"{init()}@!%p1 bra END;\nmbarrier.arrive.shared::cta.b64 %rd20, [bar];\n<HERE>\n"
         "mbarrier.test_wait.shared::cta.b64 %p9, [bar], %rd20;\nEND:", ARRIVE, "mov.b32 %r9, 0;", "barrier",
         f"a wait with a state of phase 0 at {ADDRESS} in phase 2", "test_wait"),
    case("a store over an mbarrier", f"{init()}<HERE>", "st.shared.b32 [bar+4], %r1;",
         "st.shared.b32 [bar+8], %r1;",
         "barrier", r"write to shared memory at 0x1404, which is an mbarrier", r"st\.sh"),
    case("an atomic on an mbarrier", f"{init()}st.shared.b32 [bar+8], %r1;\n<HERE>",
         "atom.shared.add.u32 %r9, [bar], %r1;", "atom.shared.add.u32 %r9, [bar+8], %r1;", "barrier",
         "shared memory at 0x1400, which is an mbarrier", r"atom\.sh"),
    case("a copy over an mbarrier", f"{init()}@%p1 {EXPECT.format(64)}\n<HERE>\n{wait()}",
         f"@%p1 {BULK_LOAD} [bar+-48], [%rd1], 64, [bar];", f"@%p1 {BULK_LOAD} [bar+-64], [%rd1], 64, [bar];",
         "barrier", "write to shared memory at 0x1400, which is an mbarrier", r"cp\.async\.bulk"),
    case("a read of an mbarrier", f"{init()}st.shared.b64 [bar+8], %rd1;\n<HERE>",
         "ld.shared.b64 %rd9, [bar];",
         "ld.shared.b64 %rd9, [bar+8];", "barrier", "read of shared memory at 0x1400, which is an mbarrier",
         r"ld\.sh"),
    case("use before init", "<HERE>\nbar.sync 0;", ARRIVE, init(32) + ARRIVE, "barrier",
         "no mbarrier has been initialised at shared 0x1400", "arrive"),
    case("use behind inval", f"{init()}@%p1 mbarrier.inval.shared::cta.b64 [bar];\n@%p1 <HERE>", ARRIVE,
         "st.shared.b64 [bar], %rd1;", "barrier", "no mbarrier has been initialised", "arrive"),
    case("init of a live one", f"{init()}<HERE>\n@%p1 mbarrier.init.shared::cta.b64 [bar], 7;", "",
         "@%p1 mbarrier.inval.shared::cta.b64 [bar];", "barrier",
         f"mbarrier.init of {ADDRESS} .*, which is valid and was not invalidated", r"init.*, 7;"),
    case("init misaligned", "@%p1 <HERE>", "mbarrier.init.shared::cta.b64 [box+4], 1;",
         "mbarrier.init.shared::cta.b64 [box+8], 1;", "alignment", "no multiple of 8", "init"),
    case("init for nobody", "@%p1 <HERE>", "mbarrier.init.shared::cta.b64 [box], 0;",
         "mbarrier.init.shared::cta.b64 [box], 1;", "barrier", "cannot expect 0 arrivals", "init"),
    case("inval while waited for", init() + HALF.format(first="<HERE>", second=wait()),
         f"{DELAY}\n@%p1 mbarrier.inval.shared::cta.b64 [bar];",
         f"{DELAY}\n@%p1 {ARRIVE}", "barrier", f"mbarrier.inval of {ADDRESS} .* while threads wait",
         "inval", threads=64),
    case("initialisation that the async proxy may not see",
         f"mov.b32 %r59, 1;\n@%p1 mbarrier.init.shared::cta.b64 [bar], %r59;\n<HERE>\nbar.sync 0;\n"
         f"@%p1 {EXPECT.format(64)}\n{COPY}\n{wait()}", "", "fence.mbarrier_init.release.cluster;", "barrier",
         "to complete at .*, whose initialisation by warp 0 is not fenced", r"cp\.async\.bulk"),
    case("initialisation that another warp fences", "setp.eq.u32 %p3, %r1, 32;\nmov.b32 %r59, 1;\n"
         f"@%p3 mbarrier.init.shared::cta.b64 [bar], %r59;\nsetp.ge.u32 %p4, %r1, 32;\n<HERE>\nbar.sync 0;\n"
         f"@%p1 {EXPECT.format(64)}\n{COPY}\n{wait()}",
         "@!%p4 fence.proxy.async.shared::cta;", "@%p4 fence.proxy.async.shared::cta;", "barrier",
         "whose initialisation by warp 1 is not fenced", r"cp\.async\.bulk", threads=64),
    case("named barrier with different counts",
         "and.b32 %r9, %r1, 32;\n<HERE>\nadd.u32 %r9, %r9, 64;\nbar.sync 1, %r9;",
         "", "mov.b32 %r9, 0;", "barrier", r"barrier 1 for \d+ threads, where others wait at it for",
         r"bar\.sync 1", threads=64),
    case("named barrier for too many threads",
         HALF.format(first="bar.arrive 3, 64;\n<HERE>", second="bar.sync 3, 64;"), "bar.sync 5, 64;",
         "", "deadlock", r"waits for barrier 5 \(32 of 64 threads are there\) at PTX line", None, threads=64),
    case("named barrier for part of a warp", "<HERE>", "bar.sync 1, 33;", "bar.sync 1, 32;", "barrier",
         "barrier 1 for 33 threads: expected a multiple of 32", r"bar\.sync"),
    case("named barrier that there is not", "<HERE>", "bar.sync 16;", "bar.sync 15;", "barrier",
         "barrier 16: there are 16", r"bar\.sync"),
    case("cluster barrier twice without a wait", "barrier.cluster.arrive.aligned;\n<HERE>",
         "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;", "barrier",
         "arrives twice",
         r"arrive\.relaxed"),
]  # fmt: skip
CASES = [
    replace(each, ctas=2) if each.name == "cluster barrier twice without a wait" else each for each in CASES
]


@both(CASES)
def test_barriers(check, planted):
    check(planted)

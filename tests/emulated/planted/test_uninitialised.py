"""Reads of shared and global memory that nobody wrote, by every instruction that reads it."""

from __future__ import annotations

from emulated.planted.planting import (
    BULK_LOAD,
    BULK_STORE,
    COMMIT,
    LOAD,
    STORE,
    Planted,
    both,
    init,
    wait,
)

FRESH = r"read of fresh: the byte at 0x\w+ \(offset {}\) was never written"
SHARED = r"read of shared memory: the byte at 0x\w+ \(offset {}\) was never written"
BULK = f"{init()}@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;\n"
TENSOR = f"{init()}mov.b32 %r24, 0;\n@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;\n"
DRAIN = f"\n@%p1 {COMMIT}\ncp.async.bulk.wait_group 0;"
GLOBAL_FILL = "st.global.b32 [%rd7], %r1;\nbar.warp.sync -1;"
GLOBAL_FILL_ASYNC = f"{GLOBAL_FILL}\nfence.proxy.async;"
FILL = "st.shared.b32 [%r3], %r1;\nbar.sync 0;"
FILL_ASYNC = "st.shared.b32 [%r3], %r1;\nfence.proxy.async.shared::cta;\nbar.sync 0;"
BOX = "mov.b32 %r20, box;\nand.b32 %r21, %r2, 28;\nshl.b32 %r21, %r21, 2;\nadd.u32 %r20, %r20, %r21;\n"


def case(name, code, line, mended, message, bug=""):
    return Planted(name, code, bug, mended, "uninitialised", message, line)


CASES = [
    case("ld.global", "<HERE>\nld.global.b32 %r9, [%rd7];", r"ld\.g", GLOBAL_FILL, FRESH.format(0)),
    case("ld generic", "<HERE>\nld.b32 %r9, [%rd7];", r"ld\.b32", GLOBAL_FILL, FRESH.format(0)),
    case("half of a word", "<HERE>\nld.global.b32 %r9, [%rd2];", r"ld\.g", "st.global.b32 [%rd2], %r1;",
         FRESH.format(2), bug="st.global.b16 [%rd2], %h1;"),
    case("atom.global", "<HERE>\natom.global.add.u32 %r9, [%rd7], %r1;", r"atom\.g", GLOBAL_FILL,
         FRESH.format(0)),
    case("red.global", "<HERE>\nred.global.add.u32 [%rd7], %r1;", r"red\.g", GLOBAL_FILL, FRESH.format(0)),
    case("cp.async source", "<HERE>\ncp.async.ca.shared.global [%r3], [%rd7], 4;\ncp.async.wait_all;",
         r"cp\.async\.ca", GLOBAL_FILL, r"cp.async reads bytes at 0x\w+ that were never written"),
    case("bulk load source", f"{BULK}<HERE>\n@%p1 {BULK_LOAD} [box], [%rd2], 64, [bar];\n{wait()}",
         r"async\.bulk\.sh",
         GLOBAL_FILL_ASYNC, FRESH.format(0)),
    case("tensor load source", f"{TENSOR}<HERE>\n@%p1 {LOAD} [box], [%rd4, {{%r24, %r24}}], [bar];\n{wait()}",
         r"async\.bulk\.tensor", GLOBAL_FILL_ASYNC, FRESH.format(0)),
    case("what a bulk reduction adds to", f"""{FILL_ASYNC}
    <HERE>
    @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd2], [box], 64;{DRAIN}""",
         r"cp\.reduce", GLOBAL_FILL_ASYNC, FRESH.format(0)),
    case("ld.shared", "<HERE>\nld.shared.b32 %r9, [%r3];", r"ld\.sh", FILL, SHARED.format(0)),
    case("ld generic from shared memory",
         "mov.u64 %rd20, box;\ncvta.shared.u64 %rd21, %rd20;\n<HERE>\nld.b32 %r9, [%rd21];", r"ld\.b32", FILL,
         SHARED.format(0)),
    case("atom.shared", "<HERE>\natom.shared.add.u32 %r9, [%r3], %r1;", r"atom\.sh", FILL, SHARED.format(0)),
    case("ldmatrix", f"{BOX}<HERE>\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r9}}, [%r20];", "ldmatrix",
         FILL,
         SHARED.format(0)),
    case("bulk store source", f"<HERE>\n@%p1 {BULK_STORE} [%rd2], [box], 64;{DRAIN}", r"async\.bulk\.g",
         FILL_ASYNC,
         SHARED.format(0)),
    case("tensor store source",
         f"mov.b32 %r24, 0;\n<HERE>\n@%p1 {STORE} [%rd4, {{%r24, %r24}}], [box];{DRAIN}",
         r"async\.bulk\.tensor", FILL_ASYNC, SHARED.format(0)),
    case("a load before its barrier says so", f"""{BULK}
    @%p1 {BULK_LOAD} [box], [%rd1], 64, [bar];
    <HERE>
    ld.shared.b32 %r9, [box+60];
    {wait(n=2)}""", r"ld\.sh", wait(n=1), SHARED.format(60)),
    case("local memory", ".local .align 8 .b8 stack[16];\n<HERE>\nld.local.b32 %r9, [stack+4];", r"ld\.local",
         "st.local.b32 [stack+4], %r1;", "read of local memory"),
]  # fmt: skip


@both(CASES)
def test_bytes_that_nobody_wrote(check, planted):
    check(planted)

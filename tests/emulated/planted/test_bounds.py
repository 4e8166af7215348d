"""Accesses out of bounds or misaligned, in every state space and by every instruction that has any."""

from __future__ import annotations

from emulated.planted.planting import (
    BULK_LOAD,
    BULK_STORE,
    COMMIT,
    FILL,
    LOAD,
    SHARED,
    STORE,
    Planted,
    both,
    init,
    wait,
)

CONST = SHARED + "\n.const .align 8 .u32 table[2] = {333, 444};"
LOCAL = ".local .align 8 .b8 stack[16];\nmov.u64 %rd40, stack;\ncvta.local.u64 %rd41, %rd40;\n" \
    "st.local.b64 [stack], %rd1;\nst.local.b64 [stack+8], %rd1;\n"  # fmt: skip
PARAM = "mov.u64 %rd43, p0;\ncvta.param.u64 %rd44, %rd43;\n"
SHARED_GENERIC = (
    "mov.u64 %rd46, box;\ncvta.shared.u64 %rd45, %rd46;\nst.shared.b32 [%r3], %r1;\nbar.sync 0;\n"
)
TABLE = "mov.u64 %rd47, table;\ncvta.const.u64 %rd48, %rd47;\n"


def past(name, before, bug, mended, message, line, shared=SHARED, after=""):
    return Planted(f"{name} out of bounds", f"{before}<HERE>\n{after}", bug, mended, "bounds", message, line,
                   shared=shared)  # fmt: skip


def odd(name, before, bug, mended, message, line, shared=SHARED, after=""):
    return Planted(f"{name} misaligned", f"{before}<HERE>\n{after}", bug, mended, "alignment", message, line,
                   shared=shared)  # fmt: skip


END = "0 bytes past the end of data"
PAST_SHARED = "past its end: shared memory has"
BOX = "mov.b32 %r20, box;\nand.b32 %r21, %r2, 124;\nshl.b32 %r21, %r21, 2;\nadd.u32 %r20, %r20, %r21;\n"
QUAD = "{%r30, %r31, %r32, %r33}"
BULK = f"{init()}@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;\n"
TENSOR = f"{init()}mov.b32 %r24, 0;\n@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;\n"
DRAIN = f"@%p1 {COMMIT}\ncp.async.bulk.wait_group 0;"
COPIED = "cp.async.wait_all;"
CLEAR = "st.shared.v4.b32 [%r20], {%r1, %r1, %r1, %r1};\nbar.sync 0;\n"
CASES = [
    # global memory
    past("ld.global", "", "ld.global.b32 %r9, [%rd1+256];", "ld.global.b32 %r9, [%rd1+252];", END, r"ld\.g"),
    past("ld.global of a null pointer", "mov.u64 %rd9, 0;\n", "ld.global.b32 %r9, [%rd9];",
         "ld.global.b32 %r9, [%rd1];", "a null pointer", r"ld\.g"),
    past("a vector that straddles the end", "", "ld.param.v2.b64 {%rd9, %rd10}, [p4];",
         "ld.param.v2.b64 {%rd9, %rd10}, [p2];", "8 bytes past its end: kernel parameters", r"ld\.param\.v2"),
    past("st.global", "", "st.global.b32 [%rd1+-4], %r1;", "st.global.b32 [%rd1], %r1;", "4-byte write",
         r"st\.g"),
    past("ld generic", "", "ld.b32 %r9, [%rd1+256];", "ld.b32 %r9, [%rd1+252];", END, r"ld\.b32"),
    past("st generic", "", "st.b32 [%rd1+256], %r1;", "st.b32 [%rd1+252], %r1;", END, r"st\.b32"),
    past("atom.global", "", "atom.global.add.u32 %r9, [%rd1+256], %r1;",
         "atom.global.add.u32 %r9, [%rd1], %r1;",
         END, r"atom\.g"),
    past("red.global", "", "red.global.add.u32 [%rd1+256], %r1;", "red.global.add.u32 [%rd1], %r1;", END,
         r"red\.g"),
    odd("ld.global", "", "ld.global.b32 %r9, [%rd1+2];", "ld.global.b32 %r9, [%rd1+4];", "multiple of 4",
        r"ld\.g"),
    odd("ld.global.v4", "", f"ld.global.v4.b32 {QUAD}, [%rd1+8];", f"ld.global.v4.b32 {QUAD}, [%rd1+16];",
        "multiple of 16", r"ld\.g"),
    odd("st.global", "", "st.global.b64 [%rd1+4], %rd1;", "st.global.b64 [%rd1+8], %rd1;", "multiple of 8",
        r"st\.g"),
    odd("st generic", "", "st.b64 [%rd1+4], %rd1;", "st.b64 [%rd1+8], %rd1;", "multiple of 8", r"st\.b64"),
    odd("atom.global", "", "atom.global.add.u32 %r9, [%rd1+2], %r1;", "atom.global.add.u32 %r9, [%rd1], %r1;",
        "multiple of 4", r"atom\.g"),
    odd("red.global", "", "red.global.add.u64 [%rd1+4], %rd1;", "red.global.add.u64 [%rd1+8], %rd1;",
        "multiple of 8", r"red\.g"),
    # shared memory
    past("ld.shared", "mov.b32 %r20, 0;\n", "ld.shared.b32 %r9, [%r20];", "st.shared.b32 [box], %r1;",
         "1024 bytes before its beginning", r"ld\.sh"),
    past("st.shared", "", "st.shared.b32 [bar+32], %r1;", "st.shared.b32 [bar+28], %r1;", PAST_SHARED,
         r"st\.sh"),
    past("st generic to shared memory", SHARED_GENERIC, "st.b32 [%rd45+4128], %r1;",
         "st.b32 [%rd45+4124], %r1;",
         PAST_SHARED, r"st\.b32 \["),
    past("atom.shared", "", "atom.shared.or.b32 %r9, [bar+32], %r1;",
         "st.shared.b32 [bar], %r1;\natom.shared.or.b32 %r9, [bar], %r1;", PAST_SHARED, r"atom\.sh"),
    odd("ld.shared", "st.shared.b32 [%r3], %r1;\nbar.sync 0;\n", "ld.shared.b32 %r9, [box+2];",
        "ld.shared.b32 %r9, [box+4];", "access to shared memory .* multiple of 4", r"ld\.sh"),
    odd("st.shared", "", "st.shared.v2.b32 [box+4], {%r1, %r1};", "st.shared.v2.b32 [box+8], {%r1, %r1};",
        "access to shared memory .* multiple of 8", r"st\.sh"),
    odd("atom.shared", "st.shared.b32 [%r3], %r1;\nbar.sync 0;\n", "atom.shared.or.b32 %r9, [box+2], %r1;",
        "atom.shared.or.b32 %r9, [box+4], %r1;", "multiple of 4", r"atom\.sh"),
    past("ldmatrix", BOX + CLEAR,
         "add.u32 %r20, %r20, 4096;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r20];",
         "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r20];", PAST_SHARED, "ldmatrix"),
    odd("ldmatrix", BOX + CLEAR,
        "add.u32 %r20, %r20, 8;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r20];",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r20];", "multiple of 16", "ldmatrix"),
    past("stmatrix", BOX,
         "add.u32 %r20, %r20, 4096;\nstmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%r1};",
         "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%r1};", PAST_SHARED, "stmatrix"),
    odd("stmatrix", BOX, "add.u32 %r20, %r20, 8;\nstmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%r1};",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r20], {%r1};", "multiple of 16", "stmatrix"),
    # local, parameter and constant memory
    past("ld.local", LOCAL, "ld.local.b32 %r9, [stack+16];", "ld.local.b32 %r9, [stack+12];",
         "local memory at 0x10, of which a thread has 16 bytes", r"ld\.local"),
    past("st.local", LOCAL, "st.local.b32 [stack+16], %r1;", "st.local.b32 [stack+12], %r1;",
         "of which a thread has 16", r"st\.local.*\+16"),
    past("st generic to local memory", LOCAL, "st.b32 [%rd41+16], %r1;", "st.b32 [%rd41+12], %r1;",
         "of which a thread has 16", r"st\.b32"),
    odd("ld.local", LOCAL, "ld.local.b64 %rd9, [stack+4];", "ld.local.b64 %rd9, [stack+8];",
        "access to local memory .* multiple of 8", r"ld\.local"),
    past("ld.param", "", "ld.param.b64 %rd9, [p4+8];", "ld.param.b64 %rd9, [p4];",
         "kernel parameters has 40 bytes", r"ld\.param.*p4\+8"),
    past("ld generic of parameters", PARAM, "ld.b64 %rd9, [%rd44+40];", "ld.b64 %rd9, [%rd44+32];",
         "kernel parameters has 40 bytes", r"ld\.b64"),
    odd("ld.param", "", "ld.param.b64 %rd9, [p0+4];", "ld.param.b64 %rd9, [p0+8];",
        "access to kernel parameters .* multiple of 8", r"ld\.param.*p0\+4"),
    past("ld.const", TABLE, "ld.const.b32 %r9, [table+8];", "ld.const.b32 %r9, [table+4];",
         "constant memory has 8 bytes", r"ld\.const", shared=CONST),
    past("ld generic of constants", TABLE, "ld.b32 %r9, [%rd48+8];", "ld.b32 %r9, [%rd48+4];",
         "constant memory has 8 bytes", r"ld\.b32", shared=CONST),
    odd("ld.const", TABLE, "ld.const.b32 %r9, [table+2];", "ld.const.b32 %r9, [table+4];",
        "access to constant memory .* multiple of 4", r"ld\.const", shared=CONST),
    # copies
    past("cp.async source", "", "cp.async.ca.shared.global [%r3], [%rd1+256], 4;",
         "cp.async.ca.shared.global [%r3], [%rd1+252], 4;", END, r"cp\.async\.ca", after=COPIED),
    past("cp.async destination", "", "cp.async.ca.shared.global [bar+32], [%rd1], 4;",
         "cp.async.ca.shared.global [bar+28], [%rd1], 4;", PAST_SHARED, r"cp\.async\.ca", after=COPIED),
    odd("cp.async", "", "cp.async.cg.shared.global [box], [%rd1+8], 16;",
        "cp.async.cg.shared.global [box], [%rd1+16], 16;", "no multiple", r"cp\.async\.cg", after=COPIED),
    past("bulk load source", BULK, f"@%p1 {BULK_LOAD} [box], [%rd1+208], 64, [bar];",
         f"@%p1 {BULK_LOAD} [box], [%rd1+192], 64, [bar];", "bulk copy at .* 16 bytes past its end: data",
         r"cp\.async\.bulk", after=wait()),
    past("bulk load destination", BULK, f"@%p1 {BULK_LOAD} [box+8192], [%rd1], 64, [bar];",
         f"@%p1 {BULK_LOAD} [box+4032], [%rd1], 64, [bar];", PAST_SHARED, r"cp\.async\.bulk", after=wait()),
    odd("bulk load", BULK, f"@%p1 {BULK_LOAD} [box], [%rd1+8], 64, [bar];",
        f"@%p1 {BULK_LOAD} [box], [%rd1+16], 64, [bar];", "a bulk copy at .* multiple of 16",
        r"cp\.async\.bulk", after=wait()),
    odd("bulk size", BULK, f"@%p1 {BULK_LOAD} [box], [%rd1], 72, [bar];",
        f"@%p1 {BULK_LOAD} [box], [%rd1], 64, [bar];", "a bulk copy of 72 bytes", r"cp\.async\.bulk",
        after=wait()),
    past("bulk store destination", FILL, f"@%p1 {BULK_STORE} [%rd2+208], [box], 64;",
         f"@%p1 {BULK_STORE} [%rd2+192], [box], 64;", "bulk copy at .* 16 bytes past its end: fresh",
         r"cp\.async\.bulk\.g", after=DRAIN),
    past("bulk store source", FILL, f"@%p1 {BULK_STORE} [%rd2], [box+8192], 64;",
         f"@%p1 {BULK_STORE} [%rd2], [box], 64;", PAST_SHARED, r"cp\.async\.bulk\.g", after=DRAIN),
    odd("bulk store", FILL, f"@%p1 {BULK_STORE} [%rd2+8], [box], 64;",
        f"@%p1 {BULK_STORE} [%rd2+16], [box], 64;",
        "a bulk copy at .* multiple of 16", r"cp\.async\.bulk\.g", after=DRAIN),
    past("bulk reduction", FILL,
         "@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1+208], [box], 64;",
         "@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1+192], [box], 64;",
         "bulk copy at .* 16 bytes past its end: data", r"cp\.reduce", after=DRAIN),
    past("tensor load destination", TENSOR, f"@%p1 {LOAD} [box+8192], [%rd3, {{%r24, %r24}}], [bar];",
         f"@%p1 {LOAD} [box], [%rd3, {{%r24, %r24}}], [bar];", PAST_SHARED, r"cp\.async\.bulk", after=wait()),
    Planted("tensor load destination misaligned", TENSOR + "<HERE>\n" + wait(),
            f"@%p1 {LOAD} [box+64], [%rd3, {{%r24, %r24}}], [bar];",
            f"@%p1 {LOAD} [box+128], [%rd3, {{%r24, %r24}}], [bar];", "tensor map",
            "shared memory that is a multiple of 128", r"cp\.async\.bulk"),
    past("tensor store source", FILL + "\nmov.b32 %r24, 0;\n",
         f"@%p1 {STORE} [%rd4, {{%r24, %r24}}], [box+8192];",
         f"@%p1 {STORE} [%rd4, {{%r24, %r24}}], [box];", PAST_SHARED, r"cp\.async\.bulk", after=DRAIN),
]  # fmt: skip


@both(CASES)
def test_bounds_and_alignment(check, planted):
    check(planted)


def tensor(name, copy, setup, after, label):
    """A map that says there are more rows than the allocation has: 4 rows of `room`'s map moved 2 rows on."""
    move = "tensormap.replace.tile.global_address.global.b1024.b64 [%rd5], {};"
    code = f"""{setup}
    mov.b32 %r24, 0;
    add.u64 %rd20, {label[0]}, 192;
    @%p1 <HERE>
    fence.proxy.tensormap::generic.release.gpu;
    bar.warp.sync -1;
    fence.proxy.tensormap::generic.acquire.gpu [%rd5], 128;
    {copy}
    {after}
    """
    return Planted(name, code, move.format("%rd20"), move.format(label[0]), "bounds",
                   f"tensor copy at .* past its end: {label[1]}", r"cp\.async\.bulk\.tensor")  # fmt: skip


MAPPED = [
    tensor("tensor load past the end", f"@%p1 {LOAD} [box], [%rd5, {{%r24, %r24}}], [bar];", TENSOR, wait(),
           ("%rd1", "data")),
    tensor("tensor store past the end", f"@%p1 {STORE} [%rd5, {{%r24, %r24}}], [box];", FILL, DRAIN,
           ("%rd2", "fresh")),
]  # fmt: skip


@both(MAPPED)
def test_tensor_maps_that_promise_more_than_there_is(check, planted):
    check(planted)

"""Tensor maps that are edited under copies that use them, used before an edit is published, or are none."""

from __future__ import annotations

from emulated.planted.planting import (
    COMMIT,
    FILL,
    LOAD,
    PUBLISH,
    STORE,
    Planted,
    both,
    init,
    wait,
)

# The map in `room`, by way of shared memory at box+1024, is changed from 4 rows to 1 and published.
EDIT = f"""
    mov.b32 %r20, box;
    add.u32 %r20, %r20, 1024;
    add.u32 %r21, %r20, %r2;
    add.u64 %rd20, %rd3, %rd8;
    ld.global.b32 %r22, [%rd20];
    st.shared.b32 [%r21], %r22;
    bar.warp.sync -1;
    mov.b32 %r23, 1;
    @%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r20], 1, %r23;
    bar.warp.sync -1;
    {PUBLISH} [%rd5], [%r20], 128;
"""
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%rd5], 128;"
RELEASE = "fence.proxy.tensormap::generic.release.gpu;"
REPLACE = "@%p1 tensormap.replace.tile.global_dim.global.b1024.b32 [%rd5], 1, %r23;"
USE = f"""
    mov.b32 %r24, 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
    @%p1 {LOAD} [box], [%rd5, {{%r24, %r24}}], [bar];
"""
SECOND = USE.replace("[box]", "[box+512]")
PUT = f"@%p1 {STORE} [%rd5, {{%r24, %r24}}], [box];\n    @%p1 {COMMIT}"
IN_FLIGHT = (
    r"the tensor map at 0x\w+ is written while a copy that uses it is in flight, issued by warp 0 of CTA 0"
)
NOT_ACQUIRED = (
    r"has written in this grid, is used by CTA 0 without fence.proxy.tensormap::generic.acquire since"
)
NOT_RELEASED = r"has written in this grid, is used by CTA 0 without having been released"


def rewritten(name, edit, line, setup=""):
    """A load through the map in `room` is still on its way when `edit` changes the map, or has completed."""
    return Planted(
        f"rewritten under a load by {name}",
        f"{init()}{setup}{USE}\n<HERE>\n{wait(n=2)}",
        edit,
        f"{wait(n=1)}\n{edit}",
        "tensor map",
        f"{IN_FLIGHT} at PTX line \\d+: @%p1 cp.async.bulk.tensor.2d.shared::cta",
        line,
    )


def written(name, edit):
    """Something that writes the map in `room` and releases nothing."""
    return Planted(
        f"written by {name} without a release",
        f"{init()}\nmov.b32 %r23, 1;\nld.global.b32 %r25, [%rd5+32];\n{edit}\n<HERE>\n"
        f"{ACQUIRE}\n{USE}\n{wait()}",
        "",
        RELEASE,
        "tensor map",
        NOT_RELEASED,
        r"cp\.async\.bulk\.tensor",
    )


def by_another_cta(name, first, then, message):
    """CTA 0 runs `first` and then CTA 1 `then`, a use of the map in `room`; <HERE> is in one of them."""
    return Planted(
        name,
        f"""{init()}
    mov.u32 %r27, %ctaid.x;
    setp.ne.u32 %p3, %r27, 0;
    @%p3 bra.uni USER;
    {first}
    mov.b32 %r28, 1;
    @%p1 st.release.gpu.global.b32 [%rd1], %r28;
    ret;
USER:
    ld.acquire.gpu.global.b32 %r28, [%rd1];
    setp.ne.u32 %p4, %r28, 1;
    @%p4 bra USER;
    {then}
    {USE}
    {wait()}
    """,
        "",
        ACQUIRE if "<HERE>" in then else RELEASE,
        "tensor map",
        message.replace("CTA 0", "CTA 1"),
        r"cp\.async\.bulk\.tensor",
        ctas=2,
        options={"cooperative": True},
    )


MAP_STORE = "@%p1 st.global.b32 [%rd5+32], %r25;"
SECOND_HALF = "ld.global.b32 %r25, [%rd5+96];\n@%p1 st.global.b32 [%rd5+96], %r25;"
ATOMIC = "@%p1 atom.global.or.b32 %r26, [%rd5+32], 0;"
CASES = [
    rewritten("tensormap.cp_fenceproxy", EDIT, "tensormap.cp_fenceproxy"),
    rewritten("tensormap.replace", f"{REPLACE}", r"replace.*\.global\.b1024", "mov.b32 %r23, 1;"),
    rewritten("a store", "@%p1 st.global.b32 [%rd5+124], %r1;", r"st\.global"),
    rewritten("an atomic", ATOMIC, r"atom\.global"),
    Planted(
        "rewritten under a store",
        f"{FILL}\nmov.b32 %r24, 0;\n{PUT}\n<HERE>\n{EDIT}\n@%p1 cp.async.bulk.wait_group 0;",
        "",
        "@%p1 cp.async.bulk.wait_group.read 0;\nbar.warp.sync -1;",
        "tensor map",
        f"{IN_FLIGHT} at PTX line \\d+: @%p1 cp.async.bulk.tensor.2d.global",
        "tensormap.cp_fenceproxy",
    ),
    Planted(
        "published and not acquired",
        f"{init()}{EDIT}\n<HERE>\n{USE}\n{wait()}",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd3], 128;",
        ACQUIRE,
        "tensor map",
        f"warp 0 of CTA 0 at PTX line \\d+: tensormap.cp_fenceproxy.* {NOT_ACQUIRED}",
        r"cp\.async\.bulk\.tensor",
    ),
    Planted(
        "acquired before it was published",
        f"{init()}\n{ACQUIRE}\n{EDIT}\n<HERE>\n{USE}\n{wait()}",
        "",
        ACQUIRE,
        "tensor map",
        NOT_ACQUIRED,
        r"cp\.async\.bulk\.tensor",
    ),
    Planted(
        "acquired before a release of something else",
        f"{init()}{EDIT}\n<HERE>\n{RELEASE}\n{USE}\n{wait()}",
        "",
        ACQUIRE,
        "tensor map",
        NOT_ACQUIRED,
        r"cp\.async\.bulk\.tensor",
    ),
    Planted(
        "edited twice and acquired once",
        f"{init()}{EDIT}\n{ACQUIRE}\n{USE}\n{wait(n=1)}\n{EDIT}\n<HERE>\n{SECOND}\n{wait(parity=1, n=2)}",
        "",
        ACQUIRE,
        "tensor map",
        NOT_ACQUIRED,
        r"cp\.async\.bulk\.tensor.*box\+512",
    ),
    Planted(
        "used by a store without an acquire",
        f"{FILL}{EDIT}\n<HERE>\nmov.b32 %r24, 0;\n{PUT}\n@%p1 cp.async.bulk.wait_group 0;",
        "",
        ACQUIRE,
        "tensor map",
        NOT_ACQUIRED,
        r"cp\.async\.bulk\.tensor",
    ),
    by_another_cta("acquired by another CTA only", f"{EDIT}\n{ACQUIRE}", "<HERE>", NOT_ACQUIRED),
    by_another_cta(
        "released by another CTA only",
        f"ld.global.b32 %r25, [%rd5+32];\n{MAP_STORE}\n<HERE>",
        f"{RELEASE}\n{ACQUIRE}",
        NOT_RELEASED,
    ),
    written("a store", MAP_STORE),
    written("a store to its second half", SECOND_HALF),
    written("a store, another map being published,", MAP_STORE + EDIT.replace("[%rd5]", "[%rd3]")),
    written("tensormap.replace", REPLACE),
    written("an atomic", ATOMIC),
    Planted(
        "never written",
        f"{init()}\nmov.u64 %rd30, %rd5;\n<HERE>\n{USE}\n{wait()}".replace("[%rd5,", "[%rd30,"),
        "mov.u64 %rd30, %rd2;",
        "",
        "uninitialised",
        r"the tensor map at 0x\w+ was never wholly written",
        r"cp\.async\.bulk\.tensor",
    ),
    Planted(
        "at an address that no map may have",
        f"{init()}\nmov.u64 %rd30, %rd5;\n<HERE>\n{USE}\n{wait()}".replace("[%rd5,", "[%rd30,"),
        "add.u64 %rd30, %rd5, 16;",
        "prefetch.tensormap [%rd5];",
        "alignment",
        r"a tensor map at 0x\w+, which is no multiple of 64",
        r"cp\.async\.bulk\.tensor",
    ),
    Planted(
        "edited at an address that no map may have",
        "mov.b32 %r23, 1;\n@%p1 <HERE>",
        "tensormap.replace.tile.global_dim.global.b1024.b32 [%rd5+64], 1, %r23;",
        "tensormap.replace.tile.global_dim.global.b1024.b32 [%rd5], 1, %r23;",
        "alignment",
        "a tensor map to edit at .* no multiple of 128",
        "tensormap.replace",
    ),
    Planted(
        "bytes that are no map",
        f"{init()}\nmov.u64 %rd30, %rd5;\n<HERE>\n{USE}\n{wait()}".replace("[%rd5,", "[%rd30,"),
        "mov.u64 %rd30, %rd1;",
        "",
        "tensor map",
        "by an asynchronous operation",
        r"cp\.async\.bulk\.tensor",
    ),
]  # fmt: skip


@both(CASES)
def test_tensor_maps(check, planted):
    check(planted)

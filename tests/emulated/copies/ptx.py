"""The kernels that cases run: one CTA of one warp for each case, parametrised by a record in a table.

`box` is filled from the arena, lane 0 runs what the kernel is about, and `box` goes back to the arena whole.
"""

from __future__ import annotations

from functools import lru_cache

from emulated.copies import case, mbarrier_scripts
from emulated.copies.case import (
    BOX,
    COORDS,
    DIMS,
    FIELDS,
    FILL,
    INTERLEAVE,
    MASK,
    NEW_ADDRESS,
    RANK,
    RECORD_BYTES,
    SHARED_BYTES,
    STEPS,
    STRIDES,
    SWIZZLE,
    TYPE,
)

OPERATIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
# Types that cp.reduce.async.bulk has for global memory (PTX ISA).
BULK_REDUCTIONS = {
    "add": ("u32", "s32", "u64", "f16", "bf16", "f32", "f64"),
    "min": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "max": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
}
CP_ASYNC = (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16))

_HEADER = f"""
.version 8.7
.target sm_90a
.address_size 64
.shared .align 1024 .b8 box[{SHARED_BYTES}];
.shared .align 128 .b8 edited[128];
.shared .align 8 .b64 bar;
"""

_KERNEL = """
.visible .entry {name}(.param .u64 {name}_table, .param .u32 {name}_first){directive}
{{
    .reg .pred %p<64>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<64>;
    ld.param.u64 %rd1, [{name}_table];
    ld.param.u32 %r1, [{name}_first];
    mov.u32 %r2, %ctaid.x;
    add.u32 %r1, %r1, %r2;
    mul.wide.u32 %rd2, %r1, {record};
    add.u64 %rd1, %rd1, %rd2;
    mov.u32 %r3, %tid.x;
    ld.global.u32 %r4, [%rd1+{DUMP}];
    ld.global.u64 %rd3, [%rd1+{SHARED_IN}];
    ld.global.u64 %rd4, [%rd1+{SHARED_OUT}];
    ld.global.u64 %rd5, [%rd1+{RESULT}];
    mov.u32 %r5, box;
    shl.b32 %r6, %r3, 4;
FILL:
    setp.ge.u32 %p1, %r6, %r4;
    @%p1 bra FILLED;
    cvt.u64.u32 %rd6, %r6;
    add.u64 %rd7, %rd3, %rd6;
    ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%rd7];
    add.u32 %r7, %r5, %r6;
    st.shared.v4.u32 [%r7], {{%r10, %r11, %r12, %r13}};
    add.u32 %r6, %r6, 512;
    bra FILL;
FILLED:
    setp.eq.u32 %p2, %r3, 0;
    ld.global.u64 %rd8, [%rd1+{MAP}];
    ld.global.u64 %rd9, [%rd1+{GLOBAL}];
    ld.global.u32 %r8, [%rd1+{OFFSET}];
    add.u32 %r8, %r5, %r8;
    ld.global.u32 %r9, [%rd1+{SIZE}];
    ld.global.u32 %r14, [%rd1+{EXTRA}];
{coordinates}
{setup}
    fence.proxy.async;
    bar.sync 0;
{body}
    bar.sync 0;
    shl.b32 %r6, %r3, 4;
DUMP:
    setp.ge.u32 %p1, %r6, %r4;
    @%p1 bra DUMPED;
    cvt.u64.u32 %rd6, %r6;
    add.u64 %rd7, %rd4, %rd6;
    add.u32 %r7, %r5, %r6;
    ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r7];
    st.global.v4.u32 [%rd7], {{%r10, %r11, %r12, %r13}};
    add.u32 %r6, %r6, 512;
    bra DUMP;
DUMPED:
    ret;
}}
"""
_BARRIER = """
    @%p2 mbarrier.init.shared::cta.b64 [bar], 1;
    fence.mbarrier_init.release.cluster;"""
# Until the barrier's first phase ends, or for some 10 ms: a copy of other bytes than expected never ends it.
# What hardware then has in the barrier tells how many were missing.
_WAIT = """
    mov.u32 %r20, 0;
    mov.u32 %r21, 2000;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 0, %r21;
    @%p3 bra COMPLETE;
    add.u32 %r20, %r20, 1;
    setp.lt.u32 %p4, %r20, 5000;
    @%p4 bra WAIT;
COMPLETE:
    selp.u32 %r22, 1, 2, %p3;
    st.global.u32 [%rd5], %r22;
    nanosleep.u32 1000;
    ld.global.u32 %r23, [%rd1+{RAW}];
    setp.eq.u32 %p4, %r23, 0;
    @%p4 bra LEAVE;
    ld.shared.b64 %rd20, [bar];
    st.global.b64 [%rd5+8], %rd20;"""
_FENCE = "    fence.proxy.tensormap::generic.acquire.gpu [%rd8], 128;"
_EXPECT = "    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r9;"
_GROUP = "    cp.async.bulk.commit_group;\n    cp.async.bulk.wait_group 0;"
# Offsets in a record, which the texts above have by name.
_NAMES = {name: value for name, value in vars(case).items() if name.isupper() and isinstance(value, int)}


def _kernel(
    name: str, body: str, *, rank: int = 0, setup: str = _BARRIER, alone: bool = True, directive: str = ""
) -> str:
    """`alone`: only lane 0 runs the body. `directive` stands behind the parameters."""
    coordinates = "\n".join(f"    ld.global.b32 %r{40 + i}, [%rd1+{COORDS + 4 * i}];" for i in range(rank))
    if alone:
        body = f"    @!%p2 bra LEAVE;\n{body}\nLEAVE:"
    return _KERNEL.format(
        name=name,
        record=RECORD_BYTES,
        coordinates=coordinates,
        setup=setup,
        body=body,
        directive=directive,
        **_NAMES,
    )


def _at(rank: int) -> str:
    return f"[%rd8, {{{', '.join(f'%r{40 + i}' for i in range(rank))}}}]"


def _load(rank: int) -> str:
    copy = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"{_EXPECT}\n    {copy} [%r8], {_at(rank)}, [bar];\n{_WAIT.format(**_NAMES)}"


def _tensor_kernels() -> dict[str, str]:
    found = {}
    for rank in range(1, 6):
        found[f"load_{rank}d"] = _kernel(f"load_{rank}d", f"{_FENCE}\n{_load(rank)}", rank=rank)
        store = f"    cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group {_at(rank)}, [%r8];"
        name = f"store_{rank}d"
        found[name] = _kernel(name, f"{_FENCE}\n{store}\n{_GROUP}", rank=rank)
        fetch = f"    cp.async.bulk.prefetch.tensor.{rank}d.L2.global {_at(rank)};"
        found[f"prefetch_{rank}d"] = _kernel(f"prefetch_{rank}d", f"{_FENCE}\n{fetch}", rank=rank)
        for operation in OPERATIONS:
            name = f"reduce_{operation}_{rank}d"
            reduce = f"    cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{operation}.bulk_group"
            found[name] = _kernel(name, f"{_FENCE}\n{reduce} {_at(rank)}, [%r8];\n{_GROUP}", rank=rank)
    return found


def _bulk_kernels() -> dict[str, str]:
    mbarrier = "mbarrier::complete_tx::bytes"
    wait = _WAIT.format(**_NAMES)
    bodies = {
        "bulk_load": f"{_EXPECT}\n    cp.async.bulk.shared::cluster.global.{mbarrier}"
        f" [%r8], [%rd9], %r9, [bar];\n{wait}",
        # From the beginning of box to `extra` bytes behind it.
        "bulk_within": f"{_EXPECT}\n    add.u32 %r24, %r5, %r14;\n"
        f"    cp.async.bulk.shared::cluster.shared::cta.{mbarrier} [%r24], [%r8], %r9, [bar];\n{wait}",
        "bulk_store": "    cp.async.bulk.global.shared::cta.bulk_group [%rd9], [%r8], %r9;\n" + _GROUP,
        "bulk_prefetch": "    cp.async.bulk.prefetch.L2.global [%rd9], %r9;",
    }
    for operation, kinds in BULK_REDUCTIONS.items():
        for kind in kinds:
            word = ".noftz" if operation == "add" and kind in ("f16", "bf16") else ""
            reduce = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}{word}.{kind}"
            bodies[f"bulk_{operation}_{kind}"] = f"    {reduce} [%rd9], [%r8], %r9;\n{_GROUP}"
    mapped = (
        "    mapa.shared::cluster.u32 %r24, %r24, 0;\n    mov.u32 %r25, bar;\n"
        "    mapa.shared::cluster.u32 %r25, %r25, 0;\n    cp.async"
    )
    found = {name: _kernel(name, body) for name, body in bodies.items()}
    within = bodies["bulk_within"].replace("%r9, [bar];", "%r9, [%r25];").replace("    cp.async", mapped, 1)
    directive = "\n.reqnctapercluster 1, 1, 1"
    found["bulk_within_mapped"] = _kernel("bulk_within_mapped", within)
    found["bulk_within_cluster"] = _kernel("bulk_within_cluster", bodies["bulk_within"], directive=directive)
    found["bulk_within_both"] = _kernel("bulk_within_both", within, directive=directive)
    return found


def _cp_async_kernels() -> dict[str, str]:
    """Each lane copies to 16 bytes of its own, from `size` bytes of its own; the source of lane i has
    (i + extra) % (size + 1) bytes."""
    found = {}
    for cache, size in CP_ASYNC:
        name = f"cp_async_{cache}_{size}"
        body = f"""
    add.u32 %r24, %r3, %r14;
    rem.u32 %r24, %r24, {size + 1};
    shl.b32 %r25, %r3, 4;
    add.u32 %r25, %r8, %r25;
    mul.wide.u32 %rd21, %r3, {size};
    add.u64 %rd21, %rd9, %rd21;
    cp.async.{cache}.shared.global [%r25], [%rd21], {size}, %r24;
    cp.async.commit_group;
    cp.async.wait_group 0;"""
        found[name] = _kernel(name, body, alone=False)
    return found


def _replace_kernels() -> dict[str, str]:
    """Fields of the map, as MASK says, are replaced in shared memory; the map goes back to where it was, and
    a load goes through it."""
    indexed = {"box_dim": (BOX, 5), "global_dim": (DIMS, 5), "element_stride": (STEPS, 5)}
    limits = {"elemtype": (TYPE, 13), "interleave_layout": (INTERLEAVE, 3), "swizzle_mode": (SWIZZLE, 4)}
    limits["fill_mode"] = (FILL, 2)
    found = {}
    for rank in range(1, 6):
        lines = [
            "    shl.b32 %r25, %r3, 2;",
            "    cvt.u64.u32 %rd21, %r25;",
            "    add.u64 %rd21, %rd8, %rd21;",
            "    ld.global.u32 %r26, [%rd21];",
            "    mov.u32 %r27, edited;",
            "    add.u32 %r28, %r27, %r25;",
            "    st.shared.u32 [%r28], %r26;",
            "    bar.sync 0;",
            "    @!%p2 bra EDITED;",
            f"    ld.global.u32 %r29, [%rd1+{MASK}];",
        ]

        def put(field: str, number: int, load: str, text: str, lines: list[str] = lines) -> None:
            lines.append(f"    and.b32 %r30, %r29, {1 << FIELDS.index(field)};")
            lines.append("    setp.ne.u32 %p5, %r30, 0;")
            lines.append(f"    {load}")
            lines.append(f"    @%p5 tensormap.replace.tile.{field}.shared::cta.b1024.{text};")

        address = f"ld.global.u64 %rd22, [%rd1+{NEW_ADDRESS}];"
        put("global_address", 0, address, "b64 [%r27], %rd22")
        put("rank", 0, f"ld.global.u32 %r31, [%rd1+{RANK}];", "b32 [%r27], %r31")
        for field, (at, count) in indexed.items():
            for i in range(min(count, rank)):
                put(field, i, f"ld.global.u32 %r31, [%rd1+{at + 4 * i}];", f"b32 [%r27], {i}, %r31")
        for i in range(rank - 1):
            put(
                "global_stride",
                i,
                f"ld.global.u64 %rd22, [%rd1+{STRIDES + 8 * i}];",
                f"b64 [%r27], {i}, %rd22",
            )
        for field, (at, count) in limits.items():
            lines.append(f"    and.b32 %r30, %r29, {1 << FIELDS.index(field)};")
            lines.append("    setp.ne.u32 %p5, %r30, 0;")
            lines.append(f"    ld.global.u32 %r31, [%rd1+{at}];")
            for value in range(count):
                lines.append(f"    setp.eq.and.u32 %p6, %r31, {value}, %p5;")
                lines.append(
                    f"    @%p6 tensormap.replace.tile.{field}.shared::cta.b1024.b32 [%r27], {value};"
                )
        publish = (
            "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"
            " [%rd8], [%r27], 128;"
        )
        lines += ["EDITED:", "    bar.sync 0;", f"    {publish}", "    bar.sync 0;"]
        lines += ["    @!%p2 bra LEAVE;", _FENCE, _load(rank), "LEAVE:"]
        name = f"replace_{rank}d"
        found[name] = _kernel(name, "\n".join(lines), rank=rank, alone=False)
    return found


def _mbarrier_kernels() -> dict[str, str]:
    return {
        name: _kernel(name, body, setup="")
        for name, body in (
            (f"mbarrier_{seed}", mbarrier_scripts.script(seed)[0]) for seed in range(mbarrier_scripts.COUNT)
        )
    }


@lru_cache(maxsize=1)
def kernels() -> dict[str, str]:
    """PTX of every kernel, by name."""
    return {
        **_tensor_kernels(),
        **_bulk_kernels(),
        **_cp_async_kernels(),
        **_replace_kernels(),
        **_mbarrier_kernels(),
    }


@lru_cache(maxsize=64)
def module(names: tuple[str, ...]) -> str:
    """A PTX module of some kernels."""
    return _HEADER + "".join(kernels()[name] for name in names)

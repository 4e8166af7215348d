"""PTX of forms: one kernel for each, several kernels to a module."""

from __future__ import annotations

from collections.abc import Sequence

from .forms import PREDICATES, Form, width

THREADS = 128
MEMORY_BYTES = 64  # global and shared memory of each thread's own

_REGISTERS = {16: "%h", 32: "%r", 64: "%rd"}


def layout(kinds: Sequence[str], count: int) -> tuple[list[int], int]:
    """Where the arrays of operands or results begin in their buffer, and its size in bytes."""
    starts, at = [], 0
    for kind in kinds:
        starts.append(at)
        at += -(-count * width(kind) // 8 // 256) * 256
    return starts, at


def module(forms: Sequence[Form], count: int, target: str = "sm_90a") -> str:
    """A module with kernels form0, form1, ... for `count` threads each, a multiple of THREADS."""
    header = f".version 9.0\n.target {target}\n.address_size 64\n\n"
    return header + "\n".join(_kernel(form, f"form{at}", count) for at, form in enumerate(forms))


def result_bytes(form: Form, count: int) -> tuple[list[int], int]:
    """Starts of the result arrays, and the size of the buffer with the threads' memory behind them."""
    starts, size = layout(form.results, count)
    return starts, size + (MEMORY_BYTES * count if "memory}" in form.code else 0)


def _place(kind: str, number: int) -> str:
    return f"%p{number}" if kind in PREDICATES else f"{_REGISTERS[width(kind)]}{number}"


def _kernel(form: Form, name: str, count: int) -> str:
    sources, _ = layout(form.operands, count)
    targets, end = layout(form.results, count)
    places = {f"a{n}": _place(kind, n) for n, kind in enumerate(form.operands)}
    places |= {f"d{n}": _place(kind, n + 32) for n, kind in enumerate(form.results)}
    shared = "box}" in form.code
    lines = ["ld.param.u64 %in, [operands];", "ld.param.u64 %out, [results];"]
    lines += ["mov.u32 %index, %ctaid.x;", "mov.u32 %t0, %tid.x;"]
    lines += [f"mad.lo.u32 %index, %index, {THREADS}, %t0;", "and.b32 %my_lane, %t0, 31;"]
    if shared:
        lines += ["mov.u32 %box, box;", f"mad.lo.u32 %box, %t0, {MEMORY_BYTES}, %box;"]
        lines += [f"mul.lo.u32 %t1, %my_lane, {MEMORY_BYTES};", "sub.u32 %warp_box, %box, %t1;"]
    for bits in sorted({width(kind) for kind in form.operands}):
        lines += [
            f"mul.wide.u32 %from{bits}, %index, {bits // 8};",
            f"add.u64 %from{bits}, %from{bits}, %in;",
        ]
    for n, (kind, start) in enumerate(zip(form.operands, sources, strict=True)):
        place = places[f"a{n}"]
        if kind in PREDICATES:
            lines += [f"ld.global.b32 %t1, [%from32+{start}];", f"setp.ne.u32 {place}, %t1, 0;"]
        else:
            lines.append(f"ld.global.b{width(kind)} {place}, [%from{width(kind)}+{start}];")
    if "memory}" in form.code:
        lines += [f"mul.wide.u32 %memory, %index, {MEMORY_BYTES};", "add.u64 %memory, %memory, %out;"]
        lines += [f"add.u64 %memory, %memory, {end};"]
        lines += [f"mul.wide.u32 %q0, %my_lane, {MEMORY_BYTES};", "sub.u64 %warp_memory, %memory, %q0;"]
    if "@" in form.code:  # a guarded result needs a value for the other lanes
        for n, kind in enumerate(form.results):
            place = places[f"d{n}"]
            lines.append(
                f"setp.ne.u32 {place}, 0, 0;" if kind in PREDICATES else f"mov.b{width(kind)} {place}, 0;"
            )
    special = {n: f"%{n}" for n in ("memory", "box", "warp_memory", "warp_box")}
    if form.operands:
        special["source"] = f"%from{width(form.operands[0])}"
    lines.append(_filled(form.code, places | special))
    for bits in sorted({width(kind) for kind in form.results}):
        lines += [f"mul.wide.u32 %to{bits}, %index, {bits // 8};", f"add.u64 %to{bits}, %to{bits}, %out;"]
    for n, (kind, start) in enumerate(zip(form.results, targets, strict=True)):
        place = places[f"d{n}"]
        if kind in PREDICATES:
            lines.append(f"selp.b32 %t1, 1, 0, {place};")
            place = "%t1"
        lines.append(f"st.global.b{width(kind)} [%to{width(kind)}+{start}], {place};")
    declared = [".reg .pred %p<64>;", ".reg .b16 %h<64>;", ".reg .b32 %r<64>;", ".reg .b64 %rd<64>;"]
    declared += [".reg .b32 %t<8>;", ".reg .b64 %q<8>;", ".reg .pred %c<4>;"]
    declared += [
        ".reg .b32 %index, %my_lane, %box, %warp_box;",
        ".reg .b64 %in, %out, %memory, %warp_memory;",
    ]
    declared += [".reg .b64 %from16, %from32, %from64, %to16, %to32, %to64;"]
    if shared:
        declared.append(f".shared .align 128 .b8 box[{THREADS * MEMORY_BYTES}];")
    body = "\n".join(f"    {line}" for line in (*declared, *lines, "ret;"))
    parameters = ".param .u64 operands, .param .u64 results"
    return f".visible .entry {name}({parameters})\n{{\n{body}\n}}\n"


def _filled(code: str, places: dict[str, str]) -> str:
    """The code with its places filled; other braces, those of PTX vectors, stay."""
    for name, place in places.items():
        code = code.replace(f"{{{name}}}", place)
    return code

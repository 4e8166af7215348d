"""Generated PTX that runs one instruction in many threads: operands in, results out."""

from __future__ import annotations

import numpy as np

from emulated.kernels import Machine, kernel

_WIDTH = {"b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}
_NAMES = {"b16": "%h", "b32": "%r", "b64": "%rd", "f32": "%f", "f64": "%d"}
THREADS = 96


def run_lanes(code, operands, results, *, seed=0, threads=THREADS, target="sm_120a"):
    """Run `code` in every thread and give its results.

    `operands`: (register type, uint array (threads,)) each; they are in registers 1, 2, ... of their type.
    `results`: register types; the first result is expected in register 11 of its type, the next in 12, and so
    on; they begin as zero.
    Predicate %p1 is true in every third thread.
    """
    machine = Machine()
    lines = ["mov.u32 %r60, %tid.x;", "cvt.u64.u32 %rd60, %r60;"]
    offset, content = 0, []
    for number, (kind, values) in enumerate(operands, 1):
        width = _WIDTH[kind]
        content.append(np.array(values, f"u{width}").view(np.uint8))
        offset = -(-offset // 16) * 16
        lines += [
            f"mad.lo.s64 %rd61, %rd60, {width}, %rd62;",
            f"ld.global.b{8 * width} {_NAMES[kind]}{number}, [%rd61+{offset}];",
        ]
        content.append(np.zeros(-len(content[-1]) % 16, np.uint8))
        offset += threads * width
    address = machine.upload(np.concatenate(content) if content else np.zeros(1, np.uint8), "operands")
    stores, at = [], 0
    places = []
    for number, kind in enumerate(results, 11):
        width = _WIDTH[kind]
        lines.append(f"mov.b{8 * width} {_NAMES[kind]}{number}, 0;")
        stores += [
            f"mad.lo.s64 %rd61, %rd60, {width}, %rd63;",
            f"st.global.b{8 * width} [%rd61+{at}], {_NAMES[kind]}{number};",
        ]
        places.append((at, width))
        at += -(-threads * width // 16) * 16
    out = machine.memory.allocate(at, "results")
    third = ["rem.u32 %r61, %r60, 3;", "setp.eq.u32 %p1, %r61, 0;"]
    setup = [f"mov.u64 %rd62, {address};", f"mov.u64 %rd63, {out};"]
    body = "\n".join([*setup, *lines, *third, code, *stores])
    machine.run(kernel(body, target=target), 1, threads, seed=seed)
    return [machine.download(out + start, (threads,), f"u{width}") for start, width in places]

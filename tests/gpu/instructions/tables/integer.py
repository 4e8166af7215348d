"""Integer arithmetic (PTX ISA 9.7.1)."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form, simple

TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")


def forms() -> Iterator[Form]:
    for kind in TYPES:
        bits, pair = int(kind[1:]), f"{kind} {kind}"
        for op in ("add", "sub", "min", "max", "mul.lo", "mul.hi"):
            yield simple(f"{op}.{kind}", pair, kind)
        for op in ("div", "rem"):  # PTX leaves a division by zero open
            yield simple(f"{op}.{kind}", f"{kind} nonzero_{kind}", kind)
        yield simple(f"mad.lo.{kind}", f"{pair} {kind}", kind)
        yield simple(f"mad.hi.{kind}", f"{pair} {kind}", kind)
        yield simple(f"sad.{kind}", f"{pair} {kind}", kind)
        if bits < 64:
            wide = f"{kind[0]}{2 * bits}"
            yield simple(f"mul.wide.{kind}", pair, wide)
            yield simple(f"mad.wide.{kind}", f"{pair} {wide}", wide)
        if kind[0] == "s":
            yield simple(f"abs.{kind}", kind, kind)
            yield simple(f"neg.{kind}", kind, kind)
    for op in ("add", "sub"):
        yield simple(f"{op}.sat.s32", "s32 s32", "s32")
    for op in ("min", "max"):
        yield simple(f"{op}.relu.s32", "s32 s32", "s32")
    for kind in ("u32", "s32"):
        yield simple(f"mul24.lo.{kind}", f"{kind} {kind}", kind)
        yield simple(f"mad24.lo.{kind}", f"{kind} {kind} {kind}", kind)
        for other in ("u32", "s32"):
            result = "s32" if "s32" in (kind, other) else "u32"
            yield simple(f"dp4a.{kind}.{other}", f"{kind} {other} {result}", result)

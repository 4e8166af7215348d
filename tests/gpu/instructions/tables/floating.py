"""Floating-point arithmetic that rounds once, and what only moves bits (PTX ISA 9.7.3 to 9.7.5)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from ..forms import Form, simple

MODES = ("rn", "rz", "rm", "rp")
HALVES = ("f16", "f16x2", "bf16", "bf16x2")
CLASSES = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")


def flags(*names: str) -> Iterator[str]:
    """Every selection of modifiers, in the order given, each with its dot."""
    for size in range(len(names) + 1):
        for chosen in combinations(names, size):
            yield "".join(f".{name}" for name in chosen)


def forms() -> Iterator[Form]:
    yield from _singles()
    yield from _doubles()
    for kind in HALVES:
        yield from _half(kind)
    for kind in ("f32", "f64"):
        for name in CLASSES:
            yield simple(f"testp.{name}.{kind}", kind, "pred")
        yield simple(f"copysign.{kind}", f"{kind} {kind}", kind)


def _singles() -> Iterator[Form]:
    for mode in ("", *(f".{m}" for m in MODES)):
        for extra in flags("ftz", "sat"):
            for op in ("add", "sub", "mul"):
                yield simple(f"{op}{mode}{extra}.f32", "f32 f32", "f32")
            if mode:
                for op in ("fma", "mad"):
                    yield simple(f"{op}{mode}{extra}.f32", "f32 f32 f32", "f32", relation="cancel")
        if mode:
            for extra in flags("ftz"):
                yield simple(f"div{mode}{extra}.f32", "f32 f32", "f32")
                yield simple(f"rcp{mode}{extra}.f32", "f32", "f32")
                yield simple(f"sqrt{mode}{extra}.f32", "f32", "f32")
    for op in ("min", "max"):
        for extra in flags("ftz", "NaN", "xorsign.abs"):
            yield simple(f"{op}{extra}.f32", "f32 f32", "f32")
    for op in ("neg", "abs"):
        for extra in flags("ftz"):
            yield simple(f"{op}{extra}.f32", "f32", "f32")


def _doubles() -> Iterator[Form]:
    for mode in ("", *(f".{m}" for m in MODES)):
        for op in ("add", "sub", "mul"):
            yield simple(f"{op}{mode}.f64", "f64 f64", "f64")
        if mode:
            yield simple(f"fma{mode}.f64", "f64 f64 f64", "f64", relation="cancel")
            yield simple(f"mad{mode}.f64", "f64 f64 f64", "f64", relation="cancel")
            yield simple(f"div{mode}.f64", "f64 f64", "f64")
            yield simple(f"rcp{mode}.f64", "f64", "f64")
            yield simple(f"sqrt{mode}.f64", "f64", "f64")
    for op in ("min", "max"):
        yield simple(f"{op}.f64", "f64 f64", "f64")
    for op in ("neg", "abs"):
        yield simple(f"{op}.f64", "f64", "f64")


def _half(kind: str) -> Iterator[Form]:
    pair = f"{kind} {kind}"
    brain = kind.startswith("b")
    for mode in ("", ".rn"):
        for extra in flags(*(() if brain else ("ftz", "sat"))):
            for op in ("add", "sub", "mul"):
                yield simple(f"{op}{mode}{extra}.{kind}", pair, kind)
    for extra in ("", ".relu") if brain else ("", ".ftz", ".sat", ".relu", ".ftz.sat", ".ftz.relu"):
        yield simple(f"fma.rn{extra}.{kind}", f"{pair} {kind}", kind, relation="cancel")
    for op in ("min", "max"):
        for extra in flags(*(() if brain else ("ftz",)), "NaN", "xorsign.abs"):
            yield simple(f"{op}{extra}.{kind}", pair, kind)
    for op in ("neg", "abs"):
        for extra in ("",) if brain else ("", ".ftz"):
            yield simple(f"{op}{extra}.{kind}", kind, kind)

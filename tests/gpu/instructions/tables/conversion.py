"""cvt and cvt.pack (PTX ISA, "cvt", "cvt.pack"). What only SM 10.0 and later has is in `coverage.EXEMPT`."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form, simple
from .floating import MODES, flags

INTEGERS = tuple(f"{kind}{bits}" for bits in (8, 16, 32, 64) for kind in "us")
INTEGRAL = ("rni", "rzi", "rmi", "rpi")
FLOATS = ("f16", "bf16", "f32", "f64")
# every value of the source is one of the destination
WIDENING = (("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32"))


def forms() -> Iterator[Form]:
    yield from _integers()
    for source in FLOATS:
        for to in INTEGERS:
            if source == "bf16" and to in ("u8", "s8"):
                continue
            for mode in INTEGRAL:
                for extra in flags(*{"f32": ("ftz", "sat"), "bf16": ()}.get(source, ("sat",))):
                    yield simple(f"cvt.{mode}{extra}.{to}.{source}", source, to)
    for source in INTEGERS:
        for to in FLOATS:
            if to == "bf16" and source in ("u8", "s8"):
                continue
            for mode in MODES:
                extras = {"f32": flags("ftz", "sat"), "bf16": flags()}.get(to, flags("sat"))
                for extra in extras:
                    yield simple(f"cvt.{mode}{extra}.{to}.{source}", source, to)
    yield from _floats()
    yield from _packed()


def _integers() -> Iterator[Form]:
    for to in INTEGERS:
        for source in INTEGERS:
            yield simple(f"cvt.{to}.{source}", source, to)
            if not holds(to, source):
                yield simple(f"cvt.sat.{to}.{source}", source, to)
    # a result narrower than its register is extended by the sign of its type
    for to in ("u8", "s8", "u16", "s16"):
        for register in ("b32", "b64"):
            yield simple(f"cvt.{to}.s32", "s32", register, note=f"into .{register}")


def holds(to: str, source: str) -> bool:
    """Whether every value of an integer type is one of another: there is no .sat then."""
    bits, source_bits = int(to[1:]), int(source[1:])
    if to[0] == source[0]:
        return bits >= source_bits
    return to[0] == "s" and bits > source_bits


def _floats() -> Iterator[Form]:
    for to in FLOATS:
        for source in FLOATS:
            ftz = ("ftz",) if "f32" in (to, source) else ()
            sat = () if to == "bf16" or source == "bf16" else ("sat",)
            for extra in flags(*ftz, *sat):
                if to == source:
                    modes: tuple[str, ...] = ("", *(f".{m}" for m in INTEGRAL))
                elif (to, source) in WIDENING:
                    modes = ("",)
                else:
                    modes = tuple(f".{m}" for m in MODES)
                for mode in modes:
                    yield simple(f"cvt{mode}{extra}.{to}.{source}", source, to)
    for mode in ("rn", "rz"):
        for extra in flags("relu", "satfinite"):
            if extra:
                for to in ("f16", "bf16"):
                    yield simple(f"cvt.{mode}{extra}.{to}.f32", "f32", to)
            if "satfinite" not in extra:  # those with it need SM 10.0
                yield simple(f"cvt.{mode}{extra}.tf32.f32", "f32", "tf32")
    for extra in flags("satfinite"):
        yield simple(f"cvt.rna{extra}.tf32.f32", "f32", "tf32")


def _packed() -> Iterator[Form]:
    for to in ("f16x2", "bf16x2"):
        for mode in ("rn", "rz"):
            for extra in flags("relu", "satfinite"):
                yield simple(f"cvt.{mode}{extra}.{to}.f32", "f32 f32", to)
    for to in ("e4m3x2", "e5m2x2"):
        for extra in flags("relu"):
            yield simple(f"cvt.rn.satfinite{extra}.{to}.f32", "f32 f32", to)
            yield simple(f"cvt.rn.satfinite{extra}.{to}.f16x2", "f16x2", to)
            yield simple(f"cvt.rn{extra}.f16x2.{to}", to, "f16x2")
    for to in ("u16", "s16"):
        yield simple(f"cvt.pack.sat.{to}.s32", "s32 s32", "b32")
    for to in ("u8", "s8"):
        yield simple(f"cvt.pack.sat.{to}.s32.b32", "s32 s32 b32", "b32")

"""Comparison and selection (PTX ISA 9.7.6)."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form, simple

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
UNSIGNED = ("lo", "ls", "hi", "hs")
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")


def comparisons(kind: str) -> tuple[str, ...]:
    """The comparisons of a type."""
    if kind[0] == "b":
        return ("eq", "ne")
    return ORDERED + (UNSIGNED if kind[0] == "u" else UNORDERED if kind[0] == "f" else ())


def forms() -> Iterator[Form]:
    for kind in (*INTEGERS, *BITS, "f32", "f64"):
        for how in comparisons(kind):
            yield simple(f"setp.{how}.{kind}", f"{kind} {kind}", "pred")
            if kind == "f32":
                yield simple(f"setp.{how}.ftz.{kind}", f"{kind} {kind}", "pred")
            for combine in ("and", "or", "xor"):
                yield _combined(f"setp.{how}.{combine}.{kind}", kind, "")
        for combine in ("and", "or", "xor"):
            yield _combined(f"setp.eq.{combine}.{kind}", kind, "!")
        for result in ("u32", "s32", "f32"):
            for how in ("eq", "lt" if kind[0] != "b" else "ne"):
                yield simple(f"set.{how}.{result}.{kind}", f"{kind} {kind}", result)
                code = f"set.{how}.xor.{result}.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}};"
                yield Form(f"set.{how}.xor.{result}.{kind}", code, (kind, kind, "pred"), (result,))
            if kind == "f32":
                yield simple(f"set.gtu.ftz.{result}.f32", "f32 f32", result)
        yield simple(f"selp.{kind}", f"{kind} {kind} pred", kind)
        yield simple(f"slct.{kind}.s32", f"{kind} {kind} s32", kind)
        yield simple(f"slct.{kind}.f32", f"{kind} {kind} f32", kind)


def _combined(opcode: str, kind: str, negated: str) -> Form:
    code = f"{opcode} {{d0}}|{{d1}}, {{a0}}, {{a1}}, {negated}{{a2}};"
    note = " with the complement" if negated else ""
    return Form(f"{opcode} pair{note}", code, (kind, kind, "pred"), ("pred", "pred"))

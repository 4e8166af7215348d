"""Logic, shifts and bit fields (PTX ISA 9.7.8 and the bit-field part of 9.7.1)."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form, simple

# a few that compilers write, and enough others that every row of a table is seen as 0 and as 1
TABLES = (
    0x00,
    0x01,
    0x0F,
    0x1E,
    0x33,
    0x3C,
    0x55,
    0x5A,
    0x80,
    0x96,
    0xAA,
    0xC0,
    0xCA,
    0xE8,
    0xF8,
    0xFE,
    0xFF,
)


def forms() -> Iterator[Form]:
    for kind in ("pred", "b16", "b32", "b64"):
        for op in ("and", "or", "xor"):
            yield simple(f"{op}.{kind}", f"{kind} {kind}", kind)
        yield simple(f"not.{kind}", kind, kind)
        if kind != "pred":
            yield simple(f"cnot.{kind}", kind, kind)
            yield simple(f"shl.{kind}", f"{kind} amount", kind)
    for table in TABLES:
        yield simple("lop3.b32", "b32 b32 b32", "b32", after=f", {table:#x}", note=f"table {table:#04x}")
    for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"):
        yield simple(f"shr.{kind}", f"{kind} amount", kind)
        for amount in (0, 5, int(kind[1:]) - 1, int(kind[1:]), 200):
            after = f", {amount}"
            yield simple(f"shr.{kind}", kind, kind, after=after, note=f"by {amount}")
            if kind[0] == "b":
                yield simple(f"shl.{kind}", kind, kind, after=after, note=f"by {amount}")
    for way in ("l", "r"):
        for mode in ("wrap", "clamp"):
            yield simple(f"shf.{way}.{mode}.b32", "b32 b32 amount", "b32")
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        yield simple(f"prmt.b32{mode}", "b32 b32 b32", "b32")
    for bits in (32, 64):
        yield simple(f"brev.b{bits}", f"b{bits}", f"b{bits}")
        yield simple(f"clz.b{bits}", f"b{bits}", "u32")
        yield simple(f"popc.b{bits}", f"b{bits}", "u32")
        yield simple(f"bfi.b{bits}", f"b{bits} b{bits} position position", f"b{bits}")
        for sign in "us":
            kind = f"{sign}{bits}"
            yield simple(f"bfe.{kind}", f"{kind} position position", kind)
            yield simple(f"bfind.{kind}", kind, "u32")
            yield simple(f"bfind.shiftamt.{kind}", kind, "u32")
    for mode in ("wrap", "clamp"):
        for kind in ("u32", "s32"):
            yield simple(f"szext.{mode}.{kind}", f"{kind} amount", kind)

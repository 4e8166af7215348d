"""Integer arithmetic with a carry (PTX ISA 9.7.2): each instruction that takes a carry behind one that makes
it."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form


def forms() -> Iterator[Form]:
    for kind in ("u32", "s32", "u64", "s64"):
        for op, then in (("add", "addc"), ("sub", "subc")):
            last = f"{then}.{kind} {{d1}}, {{a2}}, {{a3}};"
            chain = f"{op}.cc.{kind} {{d0}}, {{a0}}, {{a1}};\n"
            yield Form(f"{op}.cc.{kind}", chain + f"{then}.{kind} {{d1}}, 0, 0;", (kind,) * 2, (kind,) * 2)
            yield Form(f"{then}.{kind}", chain + last, (kind,) * 4, (kind,) * 2)
            middle = f"{then}.cc.{kind} {{d1}}, {{a2}}, {{a3}};\n"
            code = chain + middle + f"{then}.{kind} {{d2}}, {{a4}}, {{a5}};"
            yield Form(f"{then}.cc.{kind}", code, (kind,) * 6, (kind,) * 3)
        for half in ("lo", "hi"):
            first = f"mad.{half}.cc.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}};\n"
            yield Form(
                f"mad.{half}.cc.{kind}", first + f"addc.{kind} {{d1}}, 0, 0;", (kind,) * 3, (kind,) * 2
            )
            # the carry of an addition of the largest numbers reaches the instruction in half of the threads
            carry = f"add.cc.{kind} {{d1}}, {{a0}}, {{a1}};\n"
            code = carry + f"madc.{half}.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}};"
            yield Form(f"madc.{half}.{kind}", code, (kind,) * 3, (kind,) * 2)
            code = carry + f"madc.{half}.cc.{kind} {{d0}}, {{a0}}, {{a1}}, {{a2}};\naddc.{kind} {{d2}}, 0, 0;"
            yield Form(f"madc.{half}.cc.{kind}", code, (kind,) * 3, (kind,) * 3)

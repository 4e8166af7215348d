"""Exchange between the lanes of a warp (PTX ISA 9.7.9 shfl, 9.7.13 vote, match, redux, elect, activemask).

With a member mask other than all lanes, the others jump over the instruction.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form

MASKS = (0xFFFFFFFF, 0x0000FFFF, 0xFF00FF00, 0x80000001, 0x12345678)


def _masked(mask: int, code: str) -> str:
    """The code for the lanes of a mask only, `{mask}` being the mask."""
    code = code.replace("{mask}", f"{mask:#x}")
    if mask == 0xFFFFFFFF:
        return code
    test = f"mov.u32 %t2, {mask:#x};\nshr.u32 %t2, %t2, %my_lane;\n"
    test += "and.b32 %t2, %t2, 1;\nsetp.eq.u32 %c0, %t2, 0;\n"
    return f"{test}@%c0 bra SKIP;\n{code}\nSKIP:"


def _forms(opcode: str, code: str, operands: tuple[str, ...], results: tuple[str, ...]) -> Iterator[Form]:
    for mask in MASKS:
        yield Form(f"{opcode} mask {mask:#010x}", _masked(mask, code), operands, results)


def _of_own_half() -> str:
    """A value of 0 where bfly reaches from the upper half of the lanes into the lower one, which the member
    mask leaves out: "results are undefined if a thread sources a register from an inactive thread or a thread
    that is not in membermask" (PTX ISA, "shfl.sync"). The predicate stays compared: lane, b and c decide it.
    """
    return "\nand.b32 %t3, {a1}, 16;\nsetp.ne.u32 %c1, %t3, 0;\n@%c1 mov.b32 {d0}, 0;"


def forms() -> Iterator[Form]:
    for mode in ("up", "down", "bfly", "idx"):
        opcode = f"shfl.sync.{mode}.b32"
        code = f"{opcode} {{d0}}|{{d1}}, {{a0}}, {{a1}}, {{a2}}, -1;"
        yield Form(f"{opcode} any", code, ("b32", "lane", "segment"), ("b32", "pred"))
        clamp = 0 if mode == "up" else 31
        for step in (1, 16, 31):
            code = f"{opcode} {{d0}}, {{a0}}, {step}, {clamp}, -1;"
            yield Form(f"{opcode} by {step}", code, ("b32",), ("b32",))
        # segments of 16 lanes: those of one half do not read the other
        code = f"{opcode} {{d0}}|{{d1}}, {{a0}}, {{a1}}, {clamp | 0x1000}, {{mask}};"
        for mask in (0x0000FFFF, 0xFFFF0000):
            defined = _of_own_half() if (mode, mask) == ("bfly", 0xFFFF0000) else ""
            text = _masked(mask, code + defined)
            yield Form(f"{opcode} half {mask:#010x}", text, ("b32", "lane"), ("b32", "pred"))
    for mode in ("all", "any", "uni"):
        yield from _forms(
            f"vote.sync.{mode}.pred",
            f"vote.sync.{mode}.pred {{d0}}, {{a0}}, {{mask}};",
            ("choice",),
            ("pred",),
        )
        code = f"vote.sync.{mode}.pred {{d0}}, !{{a0}}, {{mask}};"
        yield from _forms(f"vote.sync.{mode}.pred of a complement", code, ("choice",), ("pred",))
    code = "vote.sync.ballot.b32 {d0}, {a0}, {mask};"
    yield from _forms("vote.sync.ballot.b32", code, ("choice",), ("b32",))
    for op, kinds in (("add", "us"), ("min", "us"), ("max", "us"), ("and", "b"), ("or", "b"), ("xor", "b")):
        for kind in kinds:
            opcode = f"redux.sync.{op}.{kind}32"
            yield from _forms(opcode, f"{opcode} {{d0}}, {{a0}}, {{mask}};", (f"{kind}32",), (f"{kind}32",))
    for bits in (32, 64):
        yield from _forms(
            f"match.any.sync.b{bits}",
            f"match.any.sync.b{bits} {{d0}}, {{a0}}, {{mask}};",
            (f"few{bits}",),
            ("b32",),
        )
        code = f"match.all.sync.b{bits} {{d0}}|{{d1}}, {{a0}}, {{mask}};"
        yield from _forms(f"match.all.sync.b{bits}", code, (f"same{bits}",), ("b32", "pred"))
        yield from _forms(f"match.all.sync.b{bits} of few", code, (f"few{bits}",), ("b32", "pred"))
    yield from _forms("elect.sync", "elect.sync {d0}|{d1}, {mask};", ("b32",), ("b32", "pred"))
    yield Form("activemask.b32", "activemask.b32 {d0};", ("b32",), ("b32",))
    code = "st.shared.b32 [{box}], {a0};\nbar.warp.sync {mask};\nld.shared.b32 {d0}, [{warp_box}];"
    for mask in (0xFFFFFFFF, 0x0000FFFF):
        yield Form(f"bar.warp.sync mask {mask:#010x}", _masked(mask, code), ("b32",), ("b32",))

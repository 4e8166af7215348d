"""atom and red (PTX ISA 9.7.13): one address for each lane, and one for the 32 lanes of a warp where the
order does not show in the result.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form, width

# operation -> types
TYPES = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b32", "b64"),
}
SPACES = ((".global", "memory"), (".shared", "box"), (".shared::cta", "box"), ("", "memory"))
# a float sum of whole numbers has no order
COLLIDING = {"f32": "whole32", "f64": "whole64"}


def forms() -> Iterator[Form]:
    for space, place in SPACES:
        for op, kinds in TYPES.items():
            for kind in kinds:
                # relations between operands make the comparison of cas succeed now and then
                yield _own(f"atom{space}.{op}.{kind}", place, kind, 2 if op == "cas" else 1)
                if op not in ("exch", "cas"):
                    yield _own(f"red{space}.{op}.{kind}", place, kind, 1)
                    yield _colliding(f"red{space}.{op}.{kind}", place, kind)
                    yield _colliding(f"atom{space}.{op}.{kind}", place, kind)
    for words in ("relaxed.gpu.global", "acquire.cta.global", "release.sys.global", "acq_rel.gpu.global"):
        yield _own(f"atom.{words}.add.u32", "memory", "u32", 1)
    for words in ("relaxed.gpu.global", "release.sys.global"):
        yield _own(f"red.{words}.max.s32", "memory", "s32", 1)


def _space(place: str) -> str:
    return "global" if "memory" in place else "shared"


def _own(opcode: str, place: str, kind: str, sources: int) -> Form:
    """Every lane's own address: the old value, if the instruction gives it, and the new one."""
    returns = opcode.startswith("atom")
    words = ", ".join(f"{{a{n + 1}}}" for n in range(sources))
    code = f"st.{_space(place)}.b{width(kind)} [{{{place}}}], {{a0}};\n"
    code += f"{opcode} {'{d1}, ' if returns else ''}[{{{place}}}], {words};\n"
    code += f"ld.{_space(place)}.b{width(kind)} {{d0}}, [{{{place}}}];"
    return Form(opcode, code, (kind,) * (sources + 1), (kind,) * (1 + returns))


def _colliding(opcode: str, place: str, kind: str) -> Form:
    """The 32 lanes of a warp at one address: the value in the end. Whole numbers where sums would round."""
    operand = COLLIDING.get(kind, kind)
    returns = opcode.startswith("atom")
    if ".inc." in opcode or ".dec." in opcode:
        operand = f"same{width(kind)}"  # one limit for all lanes, or the order would show
    code = "setp.eq.u32 %c0, %my_lane, 0;\n"
    code += f"@%c0 st.{_space(place)}.b{width(kind)} [{{warp_{place}}}], {{a0}};\nbar.warp.sync -1;\n"
    target = f"{'%t2' if width(kind) == 32 else '%q2'}, " if returns else ""
    code += f"{opcode} {target}[{{warp_{place}}}], {{a1}};\nbar.warp.sync -1;\n"
    code += f"ld.{_space(place)}.b{width(kind)} {{d0}}, [{{warp_{place}}}];"
    return Form(f"{opcode} colliding", code, (operand, operand), (kind,))

"""What a form of an instruction is: PTX with places for operands and results, and the rule of comparison."""

from __future__ import annotations

from dataclasses import dataclass, field

from .rules import Bits, Rule

# kind of operand or result -> bits of the register that holds it
WIDTHS = {
    **{f"{kind}{bits}": max(bits, 16) for kind in "usb" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "tf32": 32, "f16x2": 32, "bf16x2": 32},
    **{"e4m3x2": 16, "e5m2x2": 16, "pred": 32},
    # special ranges of ordinary registers
    **{"amount": 32, "position": 32, "segment": 32, "lane": 32, "few32": 32, "few64": 64, "whole32": 32},
    **{"same32": 32, "same64": 64, "whole64": 64, "choice": 32},
    **{f"nonzero_{kind}{bits}": bits for kind in "us" for bits in (16, 32, 64)},
}

# kinds that are in predicate registers in the kernel, and 0 or 1 in memory
PREDICATES = ("pred", "choice")


def width(kind: str) -> int:
    """Bits of the register of a kind; `mma:TYPE:SET` are packed multiplicands or accumulators."""
    return 32 if kind.startswith("mma:") else WIDTHS[kind]


@dataclass(frozen=True)
class Form:
    """One form of one instruction.

    `name`: the opcode, then words that tell forms of one opcode apart. `code`: PTX in which `{a0}`, `{a1}`,
    ... are the operands and `{d0}`, ... the results, in registers of the widths of `operands` and `results`;
    `{memory}` is the 64-bit address of 64 bytes of global memory of the thread's own, `{box}` the 32-bit
    address of 64 bytes of shared memory of the thread's own, `{warp_memory}` and `{warp_box}` those of lane
    0, `{source}` the 64-bit address of the first operand, in memory that no kernel writes. %t, %q and %c are
    32-bit, 64-bit and predicate registers for the rest, %my_lane the lane.
    """

    name: str
    code: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    rule: Rule = field(default_factory=Bits)
    # relation between operands that random ones rarely have: see `operands.relate`
    relation: str = ""

    @property
    def opcode(self) -> str:
        return self.name.split()[0]


def simple(
    opcode: str,
    operands: str,
    result: str,
    *,
    after: str = "",
    note: str = "",
    rule: Rule | None = None,
    **more: str,
) -> Form:
    """`opcode result, operands...after;` with `operands` as words."""
    kinds = tuple(operands.split())
    sources = ", ".join(f"{{a{at}}}" for at in range(len(kinds)))
    code = f"{opcode} {{d0}}, {sources}{after};"
    return Form(f"{opcode} {note}".strip(), code, kinds, (result,), rule or Bits(), **more)

"""What the parser makes of PTX text: modules, kernels, variables, instructions and their operands.

Names are resolved: an operand that is a register is the Register itself, whatever scope its name came from,
and a label is the index of the instruction that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

# Bits of every scalar type (PTX ISA, "Fundamental Types").
TYPE_BITS = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 128,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
    "f16x2": 32,
    "bf16x2": 32,
    "u16x2": 32,
    "s16x2": 32,
    "f32x2": 64,
    "tf32": 32,
    "e4m3x2": 16,
    "e5m2x2": 16,
    "e2m3x2": 16,
    "e3m2x2": 16,
    "ue8m0x2": 16,
    "e2m1x2": 8,
    **{f"{kind}x4": 32 for kind in ("e4m3", "e5m2", "e2m3", "e3m2")},
    "e2m1x4": 16,
}


@dataclass(frozen=True, slots=True)
class Register:
    """A virtual register; `index` is unique in its kernel."""

    name: str
    type: str
    index: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant. `bits` is None for an integer, else the width of the IEEE-754 pattern in `value`."""

    value: int
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as %tid.x or %laneid."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, plus an offset in bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Label:
    """The target of a branch: index of an instruction of the kernel (its length for "after the last")."""

    name: str
    target: int


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor copy."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Operand, ...] | None = None


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`"""

    elements: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """`d|p`: a destination and a second, predicate destination."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Negated:
    """`!p`"""

    register: Register


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`: a destination that is thrown away."""


@dataclass(frozen=True, slots=True)
class Group:
    """`(a, b)`: the arguments or results of a call."""

    elements: tuple[Operand, ...]


Operand: TypeAlias = (
    Register | Immediate | Special | Symbol | Label | Address | Vector | Pair | Negated | Sink | Group
)


@dataclass(slots=True)
class Instruction:
    """One instruction. `opcode` is its dotted name in words: ("ld", "global", "b32")."""

    index: int
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    line: int
    text: str

    def has(self, word: str) -> bool:
        """Whether a modifier is there."""
        return word in self.opcode


@dataclass(slots=True)
class Variable:
    """A variable in a state space. `size` is in bytes, 0 for an extern array of unknown length.

    `initial` holds (element type, values) of the initialiser, None without one; a value is an integer, an
    IEEE-754 pattern, or the Symbol whose address goes there.
    """

    name: str
    space: str
    type: str
    align: int
    size: int
    initial: tuple[Immediate | Symbol, ...] | None = None
    extern: bool = False


@dataclass(slots=True)
class Kernel:
    """An `.entry`, or a `.func`, which may have results. `directives` holds the performance directives, such
    as {"maxntid": (384, 1, 1)}.
    """

    name: str
    line: int
    parameters: list[Variable] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    tables: dict[str, tuple[int, ...]] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    results: list[Variable] = field(default_factory=list)


@dataclass(slots=True)
class Module:
    """A PTX text. `functions` are the `.func`s by name, None for those without a body."""

    version: tuple[int, int] = (0, 0)
    target: tuple[str, ...] = ()
    address_size: int = 64
    variables: dict[str, Variable] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    functions: dict[str, Kernel | None] = field(default_factory=dict)

"""Classes of PTX instructions for the counters, and which of them surely take an issue slot.

A class is the chapter module that an instruction belongs to ("integer", "logic", "mbarrier"), but for what
is worth telling apart: memory accesses by operation and state space ("ld.shared"), matrix instructions and
data movement by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ptx.ir import TYPE_BITS, Instruction
from ..registry import Entry
from ..spaces import space_of

MEMORY = ("ld", "ldu", "st", "atom", "red")
_BY_NAME = ("matrix", "data_movement")
CONTROL = "control"

# PTX instructions of which ptxas makes at least one instruction each time they are executed. It is free to
# drop, merge, hoist or fold all others: moves, conversions of addresses, predicates and branches, integer
# arithmetic (into LEA, LOP3, IMAD and addressing), mul and add of floats (into FFMA), loads of parameters and
# constants (into operands) and fences that need nothing. Waits run as often as it takes. In the shipped main
# loops SASS has as many MMAs and LDSMs as the PTX (64 and 24 for 128x128x128), and 33 others for its 70.
_SURE = frozenset(
    {
        *("mma", "ldmatrix", "stmatrix", "movmatrix"),
        *(f"{name}.{space}" for name in MEMORY for space in ("global", "shared", "local", "generic")),
        *("copy", "bulk_copy", "bulk_reduce", "tensor_map_edit"),
    }
)
_SURE_OPCODES = frozenset({"shfl", "vote", "redux", "match", "elect", "fma"})
_WAITS = frozenset({"try_wait", "test_wait", "wait_group", "wait_all"})


@dataclass(frozen=True, slots=True)
class Mma:
    """What a `mma.sync` computes. `name` is shape, kind and types; `form` says at which rate of a device it
    runs: "plain" or "block_scaled" for FP8 and narrower, "nvfp4", or the type of A for the rest."""

    name: str
    form: str
    multiply_adds: int


def class_of(i: Instruction, entry: Entry | None) -> str:
    """The class of an instruction; `entry` is its handler's, None for what ends a basic block."""
    if entry is None:
        return CONTROL
    name = i.opcode[0]
    if name in MEMORY and "async" not in i.opcode:
        return f"{name}.{space_of(i)}"
    family = entry.handler.__module__.rpartition(".")[2]
    return name if family in _BY_NAME else family


def surely_issues(i: Instruction, kind: str) -> bool:
    """Whether executing an instruction of class `kind` takes an issue slot whatever ptxas does."""
    if _WAITS.intersection(i.opcode):
        return False
    if kind == "barriers":
        return i.opcode[0] in ("bar", "barrier")
    return kind in _SURE or kind == "mbarrier" or i.opcode[0] in _SURE_OPCODES


def may_wait(i: Instruction) -> bool:
    """Whether an instruction waits for, or asks after, others."""
    if i.opcode[0] in ("bar", "barrier"):
        return "sync" in i.opcode[1:3] or "red" in i.opcode[1:3]
    return bool(_WAITS.intersection(i.opcode))


def access_bytes(i: Instruction) -> int:
    """Bytes for each thread of a load, store or atomic operation."""
    count = next((int(word[1:]) for word in i.opcode if word in ("v2", "v4", "v8")), 1)
    return count * TYPE_BITS[i.opcode[-1]] // 8


def mma_of(i: Instruction) -> Mma | None:
    """What an instruction multiplies, None where it is no `mma.sync`."""
    if i.opcode[:2] != ("mma", "sync"):
        return None
    words = i.opcode
    shape = next(word for word in words if word[0] == "m" and word[1].isdigit())
    kind = next((word.removeprefix("kind::") for word in words if word.startswith("kind::")), None)
    layout = words.index("col")
    _, a, b = words[layout + 1 : layout + 4]
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    if "block_scale" in words:
        form = "nvfp4" if kind in ("mxf4", "mxf4nvf4") else "block_scaled"
    else:
        form = "plain" if kind == "f8f6f4" or a in ("e4m3", "e5m2") else a
    name = ".".join(word for word in (shape, kind, a, b) if word)
    return Mma(name, form, int(m) * int(n) * int(k))

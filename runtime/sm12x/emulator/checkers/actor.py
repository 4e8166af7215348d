"""Who executes now, and which instruction: for observers of memory, which see addresses only."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..ptx.ir import Instruction
from ..warp import Split

if TYPE_CHECKING:
    from ..asynchronous import Issuer
    from ..memory import Array, GlobalMemory
    from ..warp import Warp


@dataclass(frozen=True, slots=True)
class Actor:
    """Lanes of a warp, and the instruction that they execute (None where it is not known): now, or when they
    issued the asynchronous operation that takes its step now.
    """

    warp: Warp
    lanes: tuple[int, ...]
    instruction: Instruction | None
    issuer: Issuer | None

    def __str__(self) -> str:
        where = f"warp {self.warp.index} of CTA {self.warp.cta.index}"
        return f"{where} at {line(self.instruction)}"


def line(instruction: Instruction | None) -> str:
    """An instruction as messages name it."""
    if instruction is None:
        return "an unknown line"
    return f"PTX line {instruction.line}: {instruction.text}"


def now(memory: GlobalMemory) -> Actor:
    """Who executes now. Only to be asked while a kernel runs, below a segment's function or a step of an
    operation.
    """
    acting = memory.acting
    if isinstance(acting, Split):
        instruction = _executing(acting.warp)
        return Actor(acting.warp, tuple(_lanes(acting, instruction).tolist()), instruction, None)
    return Actor(acting.warp, (acting.lane,), acting.instruction, acting)


def _lanes(split: Split, instruction: Instruction | None) -> Array:
    """The lanes of a split that execute an instruction: those that its guard lets."""
    if instruction is None or instruction.guard is None:
        return split.lanes
    flags = split.warp.registers[instruction.guard.index] != instruction.guard_negated
    return np.flatnonzero(flags & split.mask)


def _executing(warp: Warp) -> Instruction | None:
    """The instruction whose source runs: the frame of its segment is below us on the stack."""
    program = warp.cta.grid.program
    at = program.executing(sys._getframe(1))
    return program.kernel.instructions[at] if at >= 0 else None

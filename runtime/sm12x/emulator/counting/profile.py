"""What the counters want to know of a kernel's instructions before it runs, found once for each program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .. import cfg
from . import instruction_classes as classes

if TYPE_CHECKING:
    from ..compiler import Program
    from ..ptx.ir import Kernel


class Profile:
    """Of each instruction by its index: `classes`, and `mmas` where it is one. `spans`: the instructions of
    each segment; of each segment how many are `issued`, how many `sure` to be, and its multiply-adds by form.
    `main_loop`: instructions of the innermost loops that have an MMA.
    """

    def __init__(self, program: Program) -> None:
        code = program.kernel.instructions
        self.classes = [classes.class_of(i, entry) for i, entry in zip(code, program.entries, strict=True)]
        mmas = [classes.mma_of(i) for i in code]
        self.mmas = {at: mma for at, mma in enumerate(mmas) if mma is not None}
        self.spans = [program.instructions_of(segment) for segment in range(program.segments)]
        sure = [classes.surely_issues(i, kind) for i, kind in zip(code, self.classes, strict=True)]
        self.issued = np.array([len(span) for span in self.spans])
        self.sure = np.array([sum(sure[at] for at in span) for span in self.spans])
        self.multiply_adds = {
            form: np.array([self._multiply_adds(span, form) for span in self.spans])
            for form in sorted({mma.form for mma in self.mmas.values()})
        }
        self.main_loop = _main_loop(program.kernel, self.mmas.keys()) if self.mmas else frozenset()

    def _multiply_adds(self, span: range, form: str) -> int:
        found = (self.mmas.get(at) for at in span)
        return sum(mma.multiply_adds for mma in found if mma is not None and mma.form == form)


def _main_loop(kernel: Kernel, mmas: Iterable[int]) -> frozenset[int]:
    """Instructions of the loops around MMAs with no smaller such loop in them: the loop over tiles of a
    persistent kernel has an MMA too.
    """
    blocks = cfg.build(kernel)
    block_of = {at: n for n, block in enumerate(blocks) for at in range(block.start, block.stop)}
    with_mma = {block_of[at] for at in mmas}
    loops = _innermost(blocks, set(range(len(blocks))), with_mma)
    return frozenset(at for n in loops for at in range(blocks[n].start, blocks[n].stop))


def _innermost(blocks: list[cfg.Block], nodes: set[int], marked: set[int]) -> set[int]:
    """Blocks of the innermost loops, of those that lie within `nodes`, around a marked block."""
    found: set[int] = set()
    left = marked & nodes
    while left:
        block = left.pop()
        loop = _reached(blocks, nodes, block, forward=True) & _reached(blocks, nodes, block, forward=False)
        left -= loop
        # Without the blocks that it is entered by, what still goes around is a loop in it.
        entries = {n for n in loop if any(p not in loop for p in blocks[n].predecessors)}
        found |= (_innermost(blocks, loop - entries, marked) if entries else set()) or loop
    return found


def _reached(blocks: list[cfg.Block], nodes: set[int], start: int, *, forward: bool) -> set[int]:
    """Blocks within `nodes` that a way of at least one step leads to from `start`; backward, comes from."""
    found: set[int] = set()
    stack = [start]
    while stack:
        block = blocks[stack.pop()]
        for n in block.successors if forward else block.predecessors:
            if n in nodes and n not in found:
                found.add(n)
                stack.append(n)
    return found

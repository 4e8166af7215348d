"""Control flow of a kernel: basic blocks and where divergent lanes meet again.

Lanes that part at a branch meet at its immediate post-dominator: the first instruction that every path from
the branch to the end of the kernel comes by.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import EmulatorError
from .ptx.ir import Instruction, Kernel, Label, Register, Symbol

_ENDS = {"ret", "exit", "trap"}
_BRANCHES = {"bra", "brx"}


@dataclass(slots=True)
class Block:
    """Instructions `start` to `stop` (exclusive) of the kernel. The block after the last one stands for its
    end.

    `reconverge` is the block where lanes meet that part at the end of this one.
    """

    start: int
    stop: int
    successors: tuple[int, ...] = ()
    predecessors: list[int] = field(default_factory=list)
    reconverge: int = -1


def targets(kernel: Kernel, instruction: Instruction) -> tuple[int, ...]:
    """Instruction indices that a branch may jump to."""
    if instruction.opcode[0] == "brx":
        table = instruction.operands[1]
        if not isinstance(table, Symbol) or table.name not in kernel.tables:
            raise EmulatorError("brx needs a .branchtargets table", instruction.text, instruction.line)
        return kernel.tables[table.name]
    label = instruction.operands[0]
    if isinstance(label, Register) or not isinstance(label, Label):
        raise EmulatorError("the target is not a label", instruction.text, instruction.line)
    return (label.target,)


def ends_block(instruction: Instruction) -> bool:
    """Whether control may leave the straight line behind this instruction."""
    return instruction.opcode[0] in _ENDS or instruction.opcode[0] in _BRANCHES


def build(kernel: Kernel) -> list[Block]:
    """The basic blocks of a kernel in text order, and an empty one for its end."""
    code = kernel.instructions
    leaders = {0, len(code)}
    for instruction in code:
        if ends_block(instruction):
            leaders.add(instruction.index + 1)
            if instruction.opcode[0] in _BRANCHES:
                leaders.update(targets(kernel, instruction))
    starts = sorted(leaders)
    block_at = {start: index for index, start in enumerate(starts)}
    blocks = [Block(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    end = len(blocks) - 1
    for index, block in enumerate(blocks[:-1]):
        last = code[block.stop - 1]
        following: list[int] = []
        if last.opcode[0] in _BRANCHES:
            following += [block_at[target] for target in targets(kernel, last)]
        elif last.opcode[0] in _ENDS:
            following.append(end)
        if last.guard is not None or not ends_block(last):
            following.append(index + 1)
        block.successors = tuple(dict.fromkeys(following))
        for successor in block.successors:
            blocks[successor].predecessors.append(index)
    _post_dominators(blocks)
    return blocks


def _post_dominators(blocks: list[Block]) -> None:
    """Fill in `reconverge`: dominators of the reversed graph (Cooper, Harvey, Kennedy)."""
    end = len(blocks) - 1
    order: list[int] = []  # post-order of the reversed graph from the end
    seen = {end}
    stack: list[tuple[int, int]] = [(end, 0)]
    while stack:
        at, child = stack[-1]
        if child < len(blocks[at].predecessors):
            stack[-1] = (at, child + 1)
            following = blocks[at].predecessors[child]
            if following not in seen:
                seen.add(following)
                stack.append((following, 0))
        else:
            stack.pop()
            order.append(at)
    number = {block: position for position, block in enumerate(order)}
    immediate = {end: end}

    def meet(a: int, b: int) -> int:
        while a != b:
            while number[a] < number[b]:
                a = immediate[a]
            while number[b] < number[a]:
                b = immediate[b]
        return a

    changed = True
    while changed:
        changed = False
        for at in reversed(order[:-1]):
            known = [s for s in blocks[at].successors if s in immediate]
            found = known[0]
            for other in known[1:]:
                found = meet(found, other)
            if immediate.get(at) != found:
                immediate[at] = found
                changed = True
    for at, found in immediate.items():
        # Lanes that part for good, or in a loop without an end, never meet.
        blocks[at].reconverge = -1 if found == end else found

"""Reading SASS: instructions, control flow, and which instructions share a loop.

A loop is a strongly connected component of the control-flow graph, so that code which the assembler moved out
of line belongs to the loop it runs in, and two warp roles that only share an entry do not share a loop.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import BuildError

_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
_OTHER_SECTION = re.compile(r"^\s*\.section\s")
_LABEL = re.compile(r"^(\S+):\s*$")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);(.*)$")
_TARGET = re.compile(r"`\(([^)\s]+)\)")
_BRANCH_TARGETS = re.compile(r'BRANCH_TARGETS\s+([^"]+)"')
_BARRIER = re.compile(r"\bB(\d+)\b")

MMA = ("QMMA", "HMMA", "IMMA", "OMMA", "DMMA", "QGMMA", "HGMMA", "IGMMA")
_BRANCHES = ("BRA", "JMP")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
_CALLS = ("CALL",)
_ENDS = ("EXIT", "RET", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction. ``opcode`` is the mnemonic with its modifiers, ``name`` the part before the first
    dot.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    comment: str

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def is_mma(self) -> bool:
        return self.name in MMA

    @property
    def is_local(self) -> bool:
        """Whether it reads or writes local memory."""
        return self.name in ("LDL", "STL")

    def __str__(self) -> str:
        words = (f"/*{self.address:04x}*/", self.predicate, self.opcode, self.operands)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Kernel:
    """The code of one function: instructions in order of address, and its labels as indices into them."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def loops(self) -> list[list[Instruction]]:
        """The instructions of every loop, functions that it calls included, in order of address."""
        successors = self.successors()
        found = []
        for component in loops_among(set(range(len(successors))), successors):
            members = self._with_callees(component, successors)
            found.append([self.instructions[index] for index in sorted(members)])
        return sorted(found, key=lambda loop: loop[0].address)

    def shortest_cycle(self, index: int) -> list[Instruction]:
        """The instructions on the shortest way from an instruction round to itself, in order, it last: in
        the innermost loop that it lies in. Empty where it lies in no loop."""
        successors = self.successors()
        came_from = dict.fromkeys(successors[index], index)
        waiting = list(came_from)
        for at in waiting:  # breadth first: it grows meanwhile
            if at == index:
                break
            for following in successors[at]:
                if following not in came_from:
                    came_from[following] = at
                    waiting.append(following)
        if index not in came_from:
            return []
        path = [index]
        while (before := came_from[path[-1]]) != index:
            path.append(before)
        return [self.instructions[each] for each in reversed(path)]

    def _targets(self, index: int) -> list[int]:
        instruction = self.instructions[index]
        names = _TARGET.findall(instruction.operands)
        listed = _BRANCH_TARGETS.search(instruction.operands + instruction.comment)
        if listed:
            names += [name.strip() for name in listed.group(1).split(",")]
        unknown = [name for name in names if name not in self.labels]
        if unknown or not names:
            raise BuildError(f"{self.name}: where does this go? {instruction}")
        return [self.labels[name] for name in names]

    def successors(self) -> list[set[int]]:
        """Control flow, instruction by instruction. A call goes to the instruction after it."""
        count = len(self.instructions)
        successors: list[set[int]] = [set() for _ in range(count)]
        for index, instruction in enumerate(self.instructions):
            name = instruction.name
            falls_through = True
            if name in _BRANCHES:
                successors[index].update(self._targets(index))
                # "BRA.U !UP0, `(...)" and "BRA.DIV UR4, `(...)" carry their condition as an operand
                falls_through = bool(instruction.predicate) or not instruction.operands.startswith("`")
            elif name in _INDIRECT:
                successors[index].update(self._targets(index))
                falls_through = bool(instruction.predicate)
            elif name in _ENDS:
                falls_through = bool(instruction.predicate)
            elif name == "WARPSYNC" and "`" in instruction.operands:
                successors[index].update(self._targets(index))
            elif name == "BSYNC":
                falls_through = bool(instruction.predicate)
            if falls_through and index + 1 < count:
                successors[index].add(index + 1)
        self._add_reconvergence(successors)
        return successors

    def _add_reconvergence(self, successors: list[set[int]]) -> None:
        """A BSYNC goes to where the BSSY that armed its barrier said: follow barriers from BSSY to BSYNC."""
        arrived: list[dict[str, set[int]]] = [defaultdict(set) for _ in self.instructions]
        waiting = [index for index, instruction in enumerate(self.instructions) if instruction.name == "BSSY"]
        while waiting:
            index = waiting.pop()
            instruction = self.instructions[index]
            leaving = arrived[index]
            if instruction.name in ("BSSY", "BSYNC"):
                barrier = _BARRIER.search(instruction.operands)
                if barrier is None:
                    raise BuildError(f"{self.name}: which barrier? {instruction}")
                if instruction.name == "BSSY":
                    leaving = {**leaving, barrier.group(1): set(self._targets(index))}
                else:
                    successors[index] |= arrived[index].get(barrier.group(1), set())
            for successor in successors[index]:
                changed = False
                for name, targets in leaving.items():
                    if not targets <= arrived[successor][name]:
                        arrived[successor][name] |= targets
                        changed = True
                if changed:
                    waiting.append(successor)

    def _with_callees(self, component: Iterable[int], successors: list[set[int]]) -> set[int]:
        members = set(component)
        calls = [index for index in members if self.instructions[index].name in _CALLS]
        while calls:
            call = calls.pop()
            reached = [target for target in self._targets(call) if target not in members]
            while reached:
                index = reached.pop()
                if index not in members:
                    members.add(index)
                    reached.extend(successors[index])
                    if self.instructions[index].name in _CALLS:
                        calls.append(index)
        return members


def loops_among(nodes: set[int], successors: list[set[int]]) -> list[set[int]]:
    """The loops among ``nodes``: strongly connected components that can be gone round."""
    inside = [successors[node] & nodes if node in nodes else set() for node in range(len(successors))]
    return [
        component
        for component in _components(inside)
        if len(component) > 1 or next(iter(component)) in inside[next(iter(component))]
    ]


def _components(successors: list[set[int]]) -> list[set[int]]:
    """Strongly connected components (Tarjan, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    on_stack: set[int] = set()
    stack: list[int] = []
    components = []
    for root in range(len(successors)):
        if root in order:
            continue
        work = [(root, iter(sorted(successors[root])))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, children = work[-1]
            for child in children:
                if child not in order:
                    order[child] = low[child] = len(order)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(sorted(successors[child]))))
                    break
                if child in on_stack:
                    low[node] = min(low[node], order[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = set()
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.add(member)
                        if member == node:
                            break
                    components.append(component)
    return components


def parse(listing: str) -> list[Kernel]:
    """The kernels of what ``nvdisasm -c`` printed. Raises BuildError where it holds no code."""
    kernels = []
    name: str | None = None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}

    def close() -> None:
        if name is not None:
            if not instructions:
                raise BuildError(f"{name}: no instruction in the disassembly")
            kernels.append(Kernel(name, tuple(instructions), labels))

    for line in listing.splitlines():
        section = _SECTION.match(line)
        if section or _OTHER_SECTION.match(line):
            close()
            name, instructions, labels = (section.group(1) if section else None), [], {}
            continue
        if name is None:
            continue
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
            continue
        found = _INSTRUCTION.search(line)
        if found:
            address, predicate, opcode, operands, comment = found.groups()
            instructions.append(
                Instruction(
                    int(address, 16), (predicate or "").strip(), opcode, operands.strip(), comment.strip()
                )
            )
    close()
    if not kernels:
        raise BuildError("no code in the disassembly")
    return kernels


def disassemble(nvdisasm: Path, cubin: Path) -> Kernel:
    """The one kernel of a cubin. Raises BuildError where nvdisasm fails or the cubin has more than one."""
    done = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"nvdisasm {cubin.name} failed (exit {done.returncode}): {done.stderr}")
    kernels = parse(done.stdout)
    if len(kernels) != 1:
        raise BuildError(
            f"{cubin.name} should hold one kernel, it holds {[kernel.name for kernel in kernels]}"
        )
    return kernels[0]


def mma_problems(kernel: Kernel, *, mma: str, target: str) -> list[str]:
    """Sentences on what is wrong with a GEMM kernel's main loop: the wrong MMA, or local memory beside one.

    ``mma`` is the variant's policy: "unit_scale" wants QMMA.SF alone, "plain" wants QMMA without .SF. On
    sm_90a, which has no FP8 mma.sync datapath, it is HMMA in either case.
    """
    problems = []
    looped = [instruction for loop in kernel.loops() if any(i.is_mma for i in loop) for instruction in loop]
    if not any(instruction.is_mma for instruction in looped):
        problems.append(f"{kernel.name}: no loop holds an MMA")
    for instruction in kernel.instructions:
        if instruction.is_mma and not _right_mma(instruction.opcode, mma, target):
            problems.append(f"{kernel.name}: wrong MMA for {mma} on {target}: {instruction}")
    local = [str(instruction) for instruction in looped if instruction.is_local]
    if local:
        problems.append(f"{kernel.name}: local memory in a loop with an MMA: {'; '.join(local)}")
    return problems


def _right_mma(opcode: str, mma: str, target: str) -> bool:
    if target == "sm_90a":
        return opcode.startswith("HMMA.")
    if mma == "unit_scale":
        return opcode.startswith("QMMA.SF.")
    if mma == "plain":
        return opcode.startswith("QMMA.") and not opcode.startswith("QMMA.SF.")
    raise BuildError(f"unknown MMA policy {mma!r}")


def waits_on_grid(kernel: Kernel) -> bool:
    """Whether the code holds the wait of programmatic dependent launch."""
    return any(instruction.name == "ACQBULK" for instruction in kernel.instructions)


def launches_dependents(kernel: Kernel) -> bool:
    """Whether the code holds the trigger of programmatic dependent launch."""
    return any(instruction.name == "PREEXIT" for instruction in kernel.instructions)

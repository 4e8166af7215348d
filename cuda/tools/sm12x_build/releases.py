"""Whether a kernel waits for its fragments before it hands their stage of shared memory back to TMA.

An arrival at an mbarrier overtakes the LDSMs before it, and TMA then writes over what they have yet to read.
An LDSM is over once an instruction that reads one of its registers has issued: one has to stand in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .sass import Instruction, Kernel

LOAD = "LDSM"
_RELEASE = re.compile(r"SYNCS\.ARRIVE\.TRANS64\.(RED\.)?A1T0$")
_REGISTER = re.compile(r"\bR(\d+)\b")
_DESTINATION = re.compile(r"R(\d+)$")
_PREDICATE = re.compile(r"\bU?P\d\b")
_ONLY_PREDICATE = re.compile(r"!?U?P[\dTR]$")
# Their first register is a source, as that of comparisons (all that end in SETP).
_WITHOUT_DESTINATION = ("BAR", "BRX", "CALL", "FCHK", "JMX", "NANOSLEEP", "R2P", "RET", "WARPSYNC")
_MMA_SOURCES = {"HMMA.16816.F32": (4, 2, 4), "QMMA.16832.F32": (4, 2, 4)}  # registers of A, B and C
_PAIR = frozenset({"64", "U64", "S64", "F64", "WIDE"})


def is_release(instruction: Instruction) -> bool:
    """Whether it arrives once at an mbarrier and transfers nothing, as readers of a stage do."""
    return _RELEASE.match(instruction.opcode) is not None


def early_releases(kernel: Kernel) -> list[str]:
    """A sentence for each arrival that a path reaches from an LDSM with none of its registers read.

    Each LDSM is followed along every path of the control flow, round loops too, until an instruction reads
    one of its registers. A register that was written again no longer counts, so a load that nobody reads
    makes the next arrival early. A predicated read counts for an arrival, or a load, under the same
    predicate, unless an instruction in between names that one.

    Assumed: the scoreboard makes a reader wait (ptxas sets it for every LDSM); an arrival hands back all that
    was loaded before it, from whatever stage (a load for the next stage ahead of it would be a false alarm);
    functions that are called neither read fragments nor arrive. Of operands whose width is not known here the
    first register counts as read: that can raise a false alarm, and hides nothing.
    """
    successors = kernel.successors()
    return [
        f"{kernel.name}: {arrival} overtakes {load}"
        for index, load in enumerate(kernel.instructions)
        if load.name == LOAD
        for arrival in _arrivals_before_a_read(kernel, successors, index)
    ]


def _arrivals_before_a_read(kernel: Kernel, successors: list[set[int]], load: int) -> list[Instruction]:
    """The first such arrival on each path from the LDSM at index `load`, by address."""
    loading = kernel.instructions[load]
    found = set()
    # On a path: registers that still hold what was loaded, and predicates under which it has been read (or
    # never was loaded).
    held = frozenset(_written(loading))
    read_under = frozenset([_opposite(loading.predicate)] if loading.predicate else [])
    waiting = [(index, held, read_under) for index in successors[load]]
    seen = set(waiting)
    while waiting:
        index, held, read_under = waiting.pop()
        instruction = kernel.instructions[index]
        if not held.isdisjoint(_read(instruction)):
            read_under |= {instruction.predicate}
            if "" in read_under or _opposite(instruction.predicate) in read_under:
                continue
        if is_release(instruction) and instruction.predicate not in read_under:
            found.add(index)
            continue
        if read_under:
            named = _PREDICATE.findall(instruction.operands)
            if "PR" in instruction.operands:  # all of them
                named = ["P"]
            read_under = frozenset(p for p in read_under if not any(name in p for name in named))
        held -= set(_written(instruction))
        for successor in successors[index]:
            state = (successor, held, read_under)
            if state not in seen:
                seen.add(state)
                waiting.append(state)
    return [kernel.instructions[index] for index in sorted(found)]


def _opposite(predicate: str) -> str:
    return predicate.replace("@!", "@") if "!" in predicate else predicate.replace("@", "@!")


def _split(instruction: Instruction) -> tuple[int | None, list[str]]:
    """The first destination register, if there is one, and the operands after it."""
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    while operands and _ONLY_PREDICATE.match(operands[0]):
        del operands[0]
    if instruction.name.endswith("SETP") or instruction.name in _WITHOUT_DESTINATION:
        return None, operands
    destination = _DESTINATION.match(operands[0]) if operands else None
    if destination is None:
        return None, operands
    return int(destination.group(1)), operands[1:]


def _read(instruction: Instruction) -> Iterator[int]:
    """Registers that it reads."""
    _, sources = _split(instruction)
    opcode = instruction.opcode.replace("QMMA.SF.", "QMMA.")
    widths = next((known for start, known in _MMA_SOURCES.items() if opcode.startswith(start)), ())
    for place, operand in enumerate(sources):
        width = widths[place] if place < len(widths) else 1
        for register in _REGISTER.findall(operand):
            yield from range(int(register), int(register) + width)


def _written(instruction: Instruction) -> range:
    """Registers that it writes; rather one too many than one too few."""
    first, _ = _split(instruction)
    if first is None:
        return range(0)
    modifiers = instruction.opcode.split(".")[1:]
    if "256" in modifiers:
        width = 8
    elif instruction.is_mma or instruction.name == LOAD or "128" in modifiers:
        width = 4
    elif instruction.name == "SHF":  # .U64 is its source
        width = 1
    else:
        pair = instruction.name.startswith("D") or not _PAIR.isdisjoint(modifiers)
        width = 2 if pair or (instruction.name == "CS2R" and "32" not in modifiers) else 1
    return range(first, first + width)

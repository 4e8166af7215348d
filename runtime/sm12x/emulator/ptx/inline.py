"""Calls of functions with a body: the body is put in place of the call (PTX ISA, "call", "Function
Declarations and Definitions").

Registers and local variables of a function are the same in all of its copies in a kernel: a thread is in one
of them at a time, since recursion is refused. Arguments and results are `.param` variables of the caller, in
local memory; the function's own names for them stand for those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..errors import EmulatorError
from . import ir

INSTRUCTION_LIMIT = 2_000_000  # of a kernel with its functions


@dataclass(slots=True)
class _Copy:
    """One copy of a function's body, or the kernel itself. `names` are its arguments' and results'."""

    function: ir.Kernel
    names: dict[str, str]
    registers: dict[int, ir.Register]
    prefix: str  # of branch tables
    at: dict[int, int] = field(default_factory=dict)  # where each instruction went, and what follows it

    @property
    def end(self) -> int:
        """Where a return goes on."""
        return self.at[len(self.function.instructions)]


@dataclass(slots=True)
class _Inliner:
    module: ir.Module
    whole: ir.Kernel
    # Instructions with the copy that they are of, and that which they go around where not None.
    code: list[tuple[_Copy, ir.Instruction, _Copy | None]] = field(default_factory=list)
    registers: dict[str, dict[int, ir.Register]] = field(default_factory=dict)
    copies: list[_Copy] = field(default_factory=list)
    active: list[str] = field(default_factory=list)

    def expand(self, copy: _Copy) -> None:
        self.copies.append(copy)
        self.active.append(copy.function.name)
        for i in copy.function.instructions:
            copy.at[i.index] = len(self.code)
            callee = None if i.opcode[0] != "call" else self.module.functions.get(_callee(i))
            if callee is None:
                self.code.append((copy, i, None))
            else:
                self._call(copy, i, callee)
            if len(self.code) > INSTRUCTION_LIMIT:
                raise EmulatorError(f"{self.whole.name} with all that it calls is too long", i.text, i.line)
        copy.at[len(copy.function.instructions)] = len(self.code)
        self.active.pop()

    def _call(self, copy: _Copy, i: ir.Instruction, callee: ir.Kernel) -> None:
        if callee.name in self.active:
            raise EmulatorError(f"recursion of {callee.name} is not implemented", i.text, i.line)
        results, arguments = _arguments(i)
        if len(results) != len(callee.results) or len(arguments) != len(callee.parameters):
            raise EmulatorError(f"{callee.name} takes other arguments", i.text, i.line)
        names = {}
        for given, formal in zip((*results, *arguments), (*callee.results, *callee.parameters), strict=True):
            if not isinstance(given, ir.Symbol) or given.offset or formal.space != "param":
                raise EmulatorError("call is not implemented but with .param variables", i.text, i.line)
            names[formal.name] = copy.names.get(given.name, given.name)
        if callee.name not in self.registers:
            first = len(self.whole.registers)
            made = {
                register.index: replace(register, index=first + register.index)
                for register in callee.registers
            }
            self.whole.registers += made.values()
            self.registers[callee.name] = made
            formal_names = {formal.name for formal in (*callee.results, *callee.parameters)}
            self.whole.variables.update(
                {name: variable for name, variable in callee.variables.items() if name not in formal_names}
            )
        inner = _Copy(callee, names, self.registers[callee.name], f"{len(self.copies)}:")
        if i.guard is not None:  # a call of some lanes: the others go around it
            around = replace(i, opcode=("bra",), operands=(), guard_negated=not i.guard_negated)
            self.code.append((copy, around, inner))
        self.expand(inner)

    def finish(self) -> ir.Kernel:
        """Give every instruction its place, its registers and its targets."""
        for copy in self.copies:
            for name, targets in copy.function.tables.items():
                self.whole.tables[copy.prefix + name] = tuple(copy.at[target] for target in targets)
        for index, (copy, i, around) in enumerate(self.code):
            self.whole.instructions.append(self._moved(index, copy, i, around))
        return self.whole

    def _moved(self, index: int, copy: _Copy, i: ir.Instruction, around: _Copy | None) -> ir.Instruction:
        guard = None if i.guard is None else copy.registers.get(i.guard.index, i.guard)
        opcode, operands = i.opcode, i.operands
        if around is not None:
            operands = (ir.Label("", around.end),)
        elif opcode[0] == "ret" and copy.prefix:
            opcode, operands = ("bra",), (ir.Label("", copy.end),)
        else:
            operands = tuple(_changed(operand, self._substitution(copy)) for operand in operands)
            if opcode[0] == "brx" and isinstance(operands[1], ir.Symbol):
                operands = (operands[0], ir.Symbol(copy.prefix + operands[1].name))
        return replace(i, index=index, opcode=opcode, operands=operands, guard=guard)

    @staticmethod
    def _substitution(copy: _Copy) -> Callable[[ir.Operand], ir.Operand]:
        def change(operand: ir.Operand) -> ir.Operand:
            if isinstance(operand, ir.Register):
                return copy.registers.get(operand.index, operand)
            if isinstance(operand, ir.Symbol):
                return ir.Symbol(copy.names.get(operand.name, operand.name), operand.offset)
            if isinstance(operand, ir.Label):
                return ir.Label(operand.name, copy.at[operand.target])
            return operand

        return change


def inline(kernel: ir.Kernel, module: ir.Module) -> ir.Kernel:
    """A kernel without calls of functions that have a body; the same one where it has none.

    Raises EmulatorError for recursion, for calls through a pointer, and for arguments in registers.
    """
    if not any(i.opcode[0] == "call" for i in kernel.instructions):
        return kernel
    whole = replace(
        kernel, registers=list(kernel.registers), variables=dict(kernel.variables), instructions=[], tables={}
    )
    inliner = _Inliner(module, whole)
    inliner.expand(_Copy(kernel, {}, {}, ""))
    found = inliner.finish()
    for i in found.instructions:
        _localise(i, found)
    return found


def _callee(i: ir.Instruction) -> str:
    names = [o.name for o in i.operands if isinstance(o, ir.Symbol)]
    if not names or len([o for o in i.operands if not isinstance(o, ir.Group)]) != 1:
        raise EmulatorError("call through a pointer is not implemented", i.text, i.line)
    return names[0]


def _arguments(i: ir.Instruction) -> tuple[tuple[ir.Operand, ...], tuple[ir.Operand, ...]]:
    """Results and arguments of a call."""
    at = next(n for n, operand in enumerate(i.operands) if isinstance(operand, ir.Symbol))
    before, after = i.operands[:at], i.operands[at + 1 :]
    return (
        before[0].elements if before and isinstance(before[0], ir.Group) else (),
        after[0].elements if after and isinstance(after[0], ir.Group) else (),
    )


def _localise(i: ir.Instruction, kernel: ir.Kernel) -> None:
    """Loads and stores of arguments and results become those of the local memory that they are in."""
    for operand in i.operands:
        base = operand.base if isinstance(operand, ir.Address) else None
        variable = kernel.variables.get(base.name) if isinstance(base, ir.Symbol) else None
        if variable is not None and variable.space == "local":
            i.opcode = tuple("local" if word in ("param", "param::func") else word for word in i.opcode)


def _changed(operand: ir.Operand, change: Callable[[ir.Operand], ir.Operand]) -> ir.Operand:
    """An operand with `change` made to every register, symbol and label in it."""
    if isinstance(operand, ir.Address):
        base = change(operand.base)
        assert isinstance(base, (ir.Register, ir.Symbol, ir.Immediate))
        where = operand.coordinates
        if where is not None:
            where = tuple(_changed(each, change) for each in where)
        return ir.Address(base, operand.offset, where)
    if isinstance(operand, ir.Vector):
        return ir.Vector(tuple(_changed(each, change) for each in operand.elements))
    if isinstance(operand, ir.Group):
        return ir.Group(tuple(_changed(each, change) for each in operand.elements))
    if isinstance(operand, ir.Pair):
        return ir.Pair(_changed(operand.first, change), _changed(operand.second, change))
    if isinstance(operand, ir.Negated):
        register = change(operand.register)
        assert isinstance(register, ir.Register)
        return ir.Negated(register)
    return change(operand)

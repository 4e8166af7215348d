"""Names inside a kernel: registers, labels and branch tables of nested blocks (PTX ISA, "Scoping")."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from . import ir

_NUMBERED = re.compile(r"^(.*?)(\d+)$")


@dataclass(frozen=True, slots=True)
class Unresolved(ir.Sink):
    """A name that is no register, variable or special register: a label, maybe of a line to come."""

    name: str = ""
    line: int = 0


class Scope:
    """One `{ ... }` of a kernel. Registers of a range (`%r<9>`) come into being when they are first used."""

    def __init__(self, kernel: ir.Kernel, parent: Scope | None) -> None:
        self.kernel = kernel
        self.parent = parent
        self.ranges: dict[str, tuple[str, int]] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.unresolved: list[int] = []  # instructions with operands that wait for a label
        self._registers: dict[str, ir.Register] = {}
        self._variables: dict[str, str] = {}  # of calls: the kernel's names for them

    def declare(self, name: str, kind: str) -> ir.Register:
        register = ir.Register(name, kind, len(self.kernel.registers))
        self.kernel.registers.append(register)
        self._registers[name] = register
        return register

    def register(self, name: str) -> ir.Register | None:
        """The register of that name, here or further out."""
        scope: Scope | None = self
        numbered = _NUMBERED.match(name)
        while scope is not None:
            found = scope._registers.get(name)
            if found is not None:
                return found
            if numbered is not None and numbered[1] in scope.ranges:
                kind, count = scope.ranges[numbered[1]]
                if int(numbered[2]) < count:
                    return scope.declare(name, kind)
            scope = scope.parent
        return None

    def declare_variable(self, variable: ir.Variable) -> None:
        """A variable of the kernel. Those in `.param` space are the arguments of calls, which have the same
        names in many blocks: each gets a name of its own, and a place in local memory.
        """
        variables = self.kernel.variables
        if variable.space == "param":
            given = f"{self.kernel.name}:{variable.name}:{len(variables)}"
            self._variables[variable.name] = given
            variable = replace(variable, name=given, space="local")
        variables[variable.name] = variable

    def variable(self, name: str) -> str | None:
        """The kernel's name for a variable of that name, here or further out."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope._variables:
                return scope._variables[name]
            scope = scope.parent
        return name if name in self.kernel.variables else None

    def close(self) -> Unresolved | None:
        """Resolve what is known at the end of the block and hand the rest to the parent; returns a name
        nobody has.
        """
        for name, targets in self.tables.items():
            for target in targets:
                if self._label(target) is None:
                    return Unresolved(target, self.kernel.line)
            self.kernel.tables[name] = tuple(self._label(target) or 0 for target in targets)
        for index in self.unresolved:
            instruction = self.kernel.instructions[index]
            operands = tuple(self._resolve(operand) for operand in instruction.operands)
            instruction.operands = operands
            missing = next((o for o in operands if isinstance(o, Unresolved)), None)
            if missing is None:
                continue
            if self.parent is None:
                return missing
            self.parent.unresolved.append(index)
        return None

    def _label(self, name: str) -> int | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None

    def _resolve(self, operand: ir.Operand) -> ir.Operand:
        if isinstance(operand, Unresolved):
            if operand.name in self.labels:
                return ir.Label(operand.name, self.labels[operand.name])
            if operand.name in self.tables:
                return ir.Symbol(operand.name)
        return operand

"""PTX text to a Module (PTX ISA, "Syntax", "State Spaces, Types, and Variables", "Directives").

The parser knows the grammar and the names in scope, not the instructions: those are the families' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..errors import EmulatorError
from . import ir
from .lexer import Token
from .reader import Reader
from .scope import Scope, Unresolved
from .specials import SPECIAL_REGISTERS

_SPACES = {"global", "const", "shared", "local", "param"}
_LINKAGE = {"visible", "extern", "weak", "common"}
# Directives with numbers that say how a kernel is to be launched or compiled.
_PERFORMANCE = {
    *("maxnreg", "maxntid", "reqntid", "minnctapersm", "maxnctapersm", "noreturn", "abi_preserve"),
    *("reqnctapercluster", "maxclusterrank", "explicitcluster", "blocksareclusters"),
}


def parse(text: str) -> ir.Module:
    """The module that a PTX text declares.

    Raises EmulatorError with the line where the text is not PTX, or uses a part of it that is not read here.
    """
    return _Parser(text).module()


class _Parser(Reader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._module = ir.Module()
        self._kernel: ir.Kernel | None = None
        self._scope: Scope | None = None

    def _separated(self, item: Callable[[], ir.Operand], end: str) -> tuple[ir.Operand, ...]:
        """Items with commas between them, up to the mark `end`, which is taken."""
        found: list[ir.Operand] = []
        while not self._accept(end):
            if found:
                self._expect(",")
            found.append(item())
        return tuple(found)

    # Modules

    def module(self) -> ir.Module:
        while self._token.kind != "end":
            self._module_statement()
        return self._module

    def _module_statement(self) -> None:
        token = self._next()
        name = token.text[1:] if token.kind == "directive" else token.text
        if name == "version":
            major, _, minor = self._next().text.partition(".")
            self._module.version = (int(major), int(minor or 0))
        elif name == "target":
            words = [self._word()]
            while self._accept(","):
                words.append(self._word())
            self._module.target = tuple(words)
        elif name == "address_size":
            self._module.address_size = self._integer()
            if self._module.address_size != 64:
                raise self._error("only 64-bit addresses are emulated", token)
        elif name in ("file", "loc", "pragma", "alias"):
            self._skip_line(token)
        elif name == "section":
            while not self._accept("{"):
                self._next()
            self._skip_block()
        elif token.kind == "directive" and (name in _LINKAGE or name in _SPACES or name in ("entry", "func")):
            self._at -= 1
            self._declaration()
        elif name != ";":
            raise self._error(f"not a PTX directive: {token.text!r}", token)

    def _declaration(self) -> None:
        linkage = set()
        while self._token.text[1:] in _LINKAGE:
            linkage.add(self._next().text[1:])
        word = self._token.text[1:]
        if word == "entry":
            self._next()
            self._entry()
        elif word == "func":
            self._next()
            self._function()
        else:
            for variable in self._variables("extern" in linkage):
                self._module.variables[variable.name] = variable

    def _function(self) -> None:
        function = ir.Kernel("", self._token.line)
        self._kernel, self._scope = function, Scope(function, None)
        function.results = self._formal(self._scope)
        function.name = self._word()
        function.parameters = self._formal(self._scope)
        self._module.functions.setdefault(function.name, None)
        while self._token.text not in ("{", ";"):
            self._next()
        if self._next().text == "{":
            self._block(self._scope)
            self._module.functions[function.name] = function
        self._kernel, self._scope = None, None

    def _formal(self, scope: Scope) -> list[ir.Variable]:
        """`(.param .type name, ...)`, or nothing: parameters or results."""
        found: list[ir.Variable] = []
        if not self._accept("("):
            return found
        while not self._accept(")"):
            space = self._next().text[1:]
            align, lanes, kind = self._variable_type()
            variable = self._variable(space, kind, align, lanes, False)
            found.append(variable)
            if space == "reg":
                scope.declare(variable.name, kind)
            else:
                scope.kernel.variables[variable.name] = variable
            self._accept(",")
        return found

    # Variables

    def _variables(self, extern: bool) -> list[ir.Variable]:
        """`.space [.align n] [.v2|.v4] .type name[n] [= init], ... ;`, the semicolon included."""
        space = self._next().text[1:]
        align, lanes, kind = self._variable_type()
        found = [self._variable(space, kind, align, lanes, extern)]
        while self._accept(","):
            found.append(self._variable(space, kind, align, lanes, extern))
        self._expect(";")
        return found

    def _variable_type(self) -> tuple[int | None, int, str]:
        align, lanes, kind = None, 1, ""
        while self._token.kind == "directive":
            word = self._next().text[1:]
            if word == "align":
                align = self._integer()
            elif word in ("v2", "v4", "v8"):
                lanes = int(word[1:])
            elif word in ir.TYPE_BITS:
                kind = word
            elif word != "ptr" and word not in _SPACES and word != "attribute":
                raise self._error(f"not a PTX type: .{word}")
            if word == "attribute":
                self._expect("(")
                while not self._accept(")"):
                    self._next()
        return align, lanes, kind

    def _variable(self, space: str, kind: str, align: int | None, lanes: int, extern: bool) -> ir.Variable:
        name = self._word()
        element = max(1, ir.TYPE_BITS[kind] // 8)
        count = lanes
        while self._accept("["):
            count *= 0 if self._token.text == "]" else self._integer()
            self._expect("]")
        initial = self._initializer() if self._accept("=") else None
        if count == 0 and initial is not None:
            count = len(initial)
        return ir.Variable(name, space, kind, align or element * lanes, element * count, initial, extern)

    def _initializer(self) -> tuple[ir.Immediate | ir.Symbol, ...]:
        found: list[ir.Immediate | ir.Symbol] = []
        depth = 0
        while True:
            if self._accept("{"):
                depth += 1
            elif self._accept("}"):
                depth -= 1
            elif self._token.kind == "word":
                found.append(self._initial_symbol())
            elif not self._accept(","):
                negative = self._accept("-")
                value = self._number(self._next())
                found.append(ir.Immediate(-value.value, value.bits) if negative else value)
            if depth == 0:
                return tuple(found)

    def _initial_symbol(self) -> ir.Symbol:
        name = self._word()
        if name == "generic":
            self._expect("(")
            name = self._word()
            self._expect(")")
        return ir.Symbol(name, self._integer() if self._accept("+") else 0)

    # Kernels

    def _entry(self) -> None:
        kernel = ir.Kernel(self._word(), self._token.line)
        self._kernel, self._scope = kernel, Scope(kernel, None)
        kernel.parameters = self._formal(self._scope)
        while self._token.kind == "directive":
            self._kernel_directive(kernel)
        if self._accept(";"):
            return
        self._expect("{")
        self._block(self._scope)
        self._module.kernels[kernel.name] = kernel
        self._kernel, self._scope = None, None

    def _kernel_directive(self, kernel: ir.Kernel) -> None:
        token = self._next()
        name = token.text[1:]
        if name == "pragma":
            return self._skip_line(token)
        if name not in _PERFORMANCE:
            raise self._error(f"not a directive of a kernel: {token.text!r}", token)
        numbers = []
        while self._token.kind == "number":
            numbers.append(self._integer())
            self._accept(",")
        kernel.directives[name] = tuple(numbers)

    def _block(self, scope: Scope) -> None:
        """The statements of a `{ ... }` whose opening brace has been taken."""
        self._scope = scope
        while not self._accept("}"):
            self._statement(scope)
        problem = scope.close()
        if problem is not None:
            raise EmulatorError(
                f"no register, variable or label is named {problem.name!r}", None, problem.line
            )
        self._scope = scope.parent

    def _statement(self, scope: Scope) -> None:
        token = self._token
        if token.kind == "end":
            raise self._error(f"kernel {scope.kernel.name} is not closed")
        if token.kind == "directive":
            self._kernel_statement(scope)
        elif token.text == "{":
            self._next()
            self._block(Scope(scope.kernel, scope))
        elif token.text == ";":
            self._next()
        elif token.kind == "word" and self._tokens[self._at + 1].text == ":":
            self._at += 2
            if self._token.text in (".branchtargets", ".calltargets", ".callprototype"):
                self._table(token.text, scope)
            else:
                scope.labels[token.text] = len(scope.kernel.instructions)
        else:
            self._instruction(scope)

    def _kernel_statement(self, scope: Scope) -> None:
        token = self._token
        name = token.text[1:]
        if name == "reg":
            self._next()
            self._registers(scope)
        elif name in _SPACES:
            for variable in self._variables(False):
                scope.declare_variable(variable)
        elif name in ("pragma", "loc", "file"):
            self._skip_line(self._next())
        else:
            raise self._error(f"not a statement: {token.text!r}", token)

    def _registers(self, scope: Scope) -> None:
        _, lanes, kind = self._variable_type()
        if lanes != 1 or not kind:
            raise self._error("vector registers are not emulated")
        while True:
            name = self._word()
            if self._accept("<"):
                scope.ranges[name] = (kind, self._integer())
                self._expect(">")
            else:
                scope.declare(name, kind)
            if not self._accept(","):
                break
        self._expect(";")

    def _table(self, name: str, scope: Scope) -> None:
        directive = self._next()
        if directive.text != ".branchtargets":
            raise self._error(f"{directive.text} is not emulated", directive)
        targets = [self._word()]
        while self._accept(","):
            targets.append(self._word())
        self._expect(";")
        scope.tables[name] = targets

    # Instructions and operands

    def _instruction(self, scope: Scope) -> None:
        kernel = scope.kernel
        first = self._token
        guard, negated = None, False
        if self._accept("@"):
            negated = self._accept("!")
            found = scope.register(self._word())
            if found is None:
                raise self._error("a guard must be a predicate register", first)
            guard = found
        opcode = self._word()
        operands = self._separated(self._operand, ";")
        text = self._text[first.start : self._tokens[self._at - 1].start]
        index = len(kernel.instructions)
        words = tuple(opcode.split("."))
        kernel.instructions.append(
            ir.Instruction(index, words, operands, guard, negated, first.line, " ".join(text.split()))
        )
        if any(isinstance(operand, Unresolved) for operand in operands):
            scope.unresolved.append(index)

    def _operand(self) -> ir.Operand:
        operand = self._simple_operand()
        if self._accept("|"):
            return ir.Pair(operand, self._simple_operand())
        return operand

    def _simple_operand(self) -> ir.Operand:
        token = self._next()
        if token.kind == "number":
            return self._number(token)
        if token.kind == "word":
            return self._named(token)
        if token.text == "-":
            value = self._number(self._next())
            if value.bits is not None:  # a negative literal: its sign bit, not its pattern's negation
                return replace(value, value=value.value ^ 1 << value.bits - 1)
            return ir.Immediate(-value.value)
        if token.text == "!":
            register = self._named(self._next())
            if not isinstance(register, ir.Register):
                raise self._error("'!' needs a predicate register", token)
            return ir.Negated(register)
        if token.text == "{":
            return ir.Vector(self._separated(self._operand, "}"))
        if token.text == "(":
            return ir.Group(self._separated(self._operand, ")"))
        if token.text == "[":
            return self._address()
        raise self._error(f"not an operand: {token.text!r}", token)

    def _named(self, token: Token) -> ir.Operand:
        name = token.text
        if name == "_":
            return ir.Sink()
        assert self._scope is not None
        register = self._scope.register(name)
        if register is not None:
            return register
        if name in SPECIAL_REGISTERS:
            return ir.Special(name)
        if name in ("WARP_SZ",):
            return ir.Immediate(32)
        if name.startswith("%"):
            raise self._error(f"no register is named {name!r}", token)
        variable = self._scope.variable(name)
        if variable is not None or name in self._module.variables:
            offset = self._integer() if self._accept("+") else 0
            return ir.Symbol(variable or name, offset)
        if name in self._module.functions:
            return ir.Symbol(name)
        return Unresolved(name, token.line)

    def _address(self) -> ir.Address:
        base = self._simple_operand()
        if isinstance(base, Unresolved) or not isinstance(base, (ir.Register, ir.Symbol, ir.Immediate)):
            raise self._error("not an address")
        offset, coordinates = 0, None
        if self._token.text in "+-":
            self._accept("+")  # "[%r1+-8]" has both signs
            offset = self._integer()
        if self._accept(","):
            vector = self._simple_operand()
            if not isinstance(vector, ir.Vector):
                raise self._error("expected the coordinates of a tensor copy")
            coordinates = vector.elements
        self._expect("]")
        return ir.Address(base, offset, coordinates)

"""Python source for one segment of a kernel: what the handlers of the families write to.

Two functions come of each segment: one for a warp whose 32 lanes are all active, without any masks, and one
for the rest. In both, `w` is the Warp, `s` the Split (lanes that run together) and `R` the list of the warp's
registers. A register is a (32,) array that is never written in place, so that a move is a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import EmulatorError
from .layout import Layout
from .ptx import ir
from .ptx.specials import SPECIAL_REGISTERS

# NumPy types by the names that the source uses.
DTYPES: dict[str, Any] = {
    **{f"u{n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"i{n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    "f4": np.dtype("f4"),
    "f8": np.dtype("f8"),
    "u16": np.dtype([("low", "u8"), ("high", "u8")]),
    "pred": np.dtype(bool),
}


def container(kind: str) -> str:
    """The NumPy type that holds a register of a PTX type: bool, 16, 32 or 64 unsigned bits, or two halves of
    64 each.
    """
    bits = ir.TYPE_BITS[kind]
    if kind == "pred":
        return "pred"
    return "u2" if bits <= 16 else f"u{bits // 8}"


@dataclass(frozen=True, slots=True)
class Source:
    """An operand as Python source, seen as unsigned bits `u`, two's complement `s` or IEEE-754 `f`."""

    u: str
    s: str
    f: str


class Emitter:
    """Collects the source of one function of one segment. `full`: for a warp with all 32 lanes active."""

    def __init__(
        self,
        layout: Layout,
        namespace: dict[str, Any],
        *,
        full: bool,
        truncate_bits: int | None,
        constants: dict[int, int],
    ) -> None:
        self.layout = layout
        self.constants = constants  # by index, of registers that never hold anything else
        self.full = full
        self.truncate_bits = truncate_bits
        self.lines: list[str] = []
        self.owners: list[int] = []  # the instruction of each line
        self._namespace = namespace
        self._names: dict[int, str] = namespace.setdefault("__names__", {})
        self._indent = ""
        self._instruction: ir.Instruction | None = None
        self._temporaries = 0
        self._guard: str | None = None
        self._guarded_block = False
        self._batch: _Batch | None = None

    # Instructions

    def begin(self, instruction: ir.Instruction) -> None:
        """Before the handler of an instruction: evaluates its guard, and what was put off and it needs."""
        if self._batch is not None and self._batch.touches(instruction):
            self.flush()
        self._instruction = instruction
        self._guard, self._guarded_block, self._indent = None, False, ""
        if instruction.guard is not None:
            flag = f"R[{instruction.guard.index}]"
            flag = f"~{flag}" if instruction.guard_negated else flag
            self.line(f"g = {flag}" if self.full else f"g = {flag} & s.mask")
            self._guard = "g"

    def end(self) -> None:
        self._indent = ""

    @property
    def instruction(self) -> ir.Instruction:
        assert self._instruction is not None
        return self._instruction

    @property
    def mask(self) -> str | None:
        """Source of the bool (32,) array of lanes that execute the instruction; None where all do."""
        return self._guard or (None if self.full else "s.mask")

    def set_mask(self, name: str) -> None:
        """From here on the instruction is executed by the lanes of another bool (32,) array."""
        self._guard = name

    def lanes(self) -> str:
        """Source of the indices of the lanes that execute the instruction, "None" where all do.

        What is emitted behind it runs only where there are any.
        """
        if self._guard is None:
            return "None" if self.full else "s.lanes"
        if not self._guarded_block:
            self.line(f"n = flatnonzero({self._guard})")
            self.line("if n.size:")
            self._indent, self._guarded_block = "    ", True
        return "n"

    def error(self, why: str) -> EmulatorError:
        name = ".".join(self.instruction.opcode)
        return EmulatorError(
            f"{name} is not implemented: {why}", self.instruction.text, self.instruction.line
        )

    # Lines and names

    def line(self, text: str) -> None:
        self.lines.append(self._indent + text)
        self.owners.append(self._instruction.index if self._instruction is not None else -1)

    def temporary(self) -> str:
        self._temporaries += 1
        return f"t{self._temporaries}"

    def bind(self, value: Any) -> str:
        """A name for a Python object in the function's namespace."""
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"b{len(self._names)}"
            self._namespace[name] = value
        return name

    def constant(self, dtype: str, value: int | float | bool) -> str:
        """A name for a (32,) array that has `value` in every lane; integers are cut to the type's width."""
        kind = DTYPES[dtype]
        if kind.kind in "ui" and isinstance(value, int):
            bits = np.array([value & (1 << 8 * kind.itemsize) - 1], f"u{kind.itemsize}")
            item = bits.view(kind)
        else:
            item = np.array([value], kind)
        name = f"k_{dtype}_{item.tobytes().hex()}"
        if name not in self._namespace:
            array = np.full(32, item[0], kind)
            array.flags.writeable = False
            self._namespace[name] = array
        return name

    # Operands

    def value(self, operand: ir.Operand, kind: str) -> Source:
        """An operand read as PTX type `kind`."""
        dtype = container(kind)
        if isinstance(operand, ir.Register):
            return self._register(operand, kind)
        if isinstance(operand, ir.Immediate):
            return self._immediate(operand, kind)
        if isinstance(operand, ir.Symbol):
            return self._pattern(dtype, self.layout.address(operand.name) + operand.offset)
        if isinstance(operand, ir.Special):
            return self._special(operand, kind)
        if isinstance(operand, ir.Negated):
            text = f"~R[{operand.register.index}]"
            return Source(text, text, text)
        raise self.error(f"operand {operand}")

    def _register(self, register: ir.Register, kind: str) -> Source:
        text, have, want = f"R[{register.index}]", container(register.type), container(kind)
        if have != want:
            if "pred" in (have, want) or ir.TYPE_BITS[register.type] < ir.TYPE_BITS[kind]:
                raise self.error(f"register {register.name} is .{register.type}, not .{kind}")
            text = f"{text}.astype({want})"
        if ir.TYPE_BITS[kind] == 8:
            return Source(f"({text} & {self.constant('u2', 255)})", f"{text}.astype(i1)", text)
        return self._seen(text, want)

    @staticmethod
    def _seen(text: str, dtype: str) -> Source:
        width = dtype[1:]
        return Source(text, f"{text}.view(i{width})", f"{text}.view(f{width})")

    def _pattern(self, dtype: str, value: int) -> Source:
        if dtype == "pred":
            name = self.constant("pred", value != 0)
            return Source(name, name, name)
        width = int(dtype[1:])
        text = self.constant(dtype, value)
        signed = self.constant(f"i{width}", value)
        if width == 2:
            return Source(text, signed, text)
        pattern = np.array([value & (1 << 8 * width) - 1], dtype).view(f"f{width}")
        name = f"k_f{width}_{pattern.tobytes().hex()}"
        if name not in self._namespace:
            array = np.full(32, pattern[0], f"f{width}")
            array.view(f"u{width}")[:] = value & (1 << 8 * width) - 1  # np.full may quieten a NaN
            array.flags.writeable = False
            self._namespace[name] = array
        return Source(text, signed, name)

    def _immediate(self, operand: ir.Immediate, kind: str) -> Source:
        value, bits = operand.value, ir.TYPE_BITS[kind]
        if operand.bits == 64 and kind in ("f32", "f16", "bf16"):
            if kind != "f32":
                raise self.error("a literal of a 16-bit floating-point type")
            number = np.array([value], np.uint64).view(np.float64).astype(np.float32)
            value = int(number.view(np.uint32)[0])
        elif operand.bits is not None and operand.bits > bits:
            raise self.error(f"a {operand.bits}-bit literal for type .{kind}")
        if bits > 64:
            raise self.error(f"a literal of type .{kind}")
        if bits == 8:
            value &= 255
        return self._pattern(container(kind), value)

    def _special(self, operand: ir.Special, kind: str) -> Source:
        own = SPECIAL_REGISTERS[operand.name]
        text = f"w.special[{operand.name!r}]"
        if operand.name in (
            "%clock",
            "%clock_hi",
            "%clock64",
            "%globaltimer",
            "%globaltimer_lo",
            "%globaltimer_hi",
        ):
            text = f"w.read_clock({operand.name!r})"
        have, want = container(own), container(kind)
        if have != want:
            text = f"{text}.astype({want})"
        return self._seen(text, want)

    def address(self, operand: ir.Operand) -> str:
        """Source of the (32,) uint32 or uint64 array of addresses that `[...]` stands for."""
        if not isinstance(operand, ir.Address):
            raise self.error("expected an address")
        base = operand.base
        if isinstance(base, ir.Register):
            dtype = container(base.type)
            if dtype not in ("u4", "u8"):
                raise self.error(f"an address in a .{base.type} register")
            if operand.offset == 0:
                return f"R[{base.index}]"
            return f"(R[{base.index}] + {self.constant(dtype, operand.offset)})"
        if isinstance(base, ir.Symbol):
            return self.constant("u8", self.layout.address(base.name) + base.offset + operand.offset)
        return self.constant("u8", base.value + operand.offset)

    # Results

    def _widened(self, register: ir.Register, kind: str, text: str) -> str:
        """A result of type `kind` as the register holds it: sign- or zero-extended (PTX ISA, "Operand Size
        Exceeding Instruction-Type Size").
        """
        have, want = container(kind), container(register.type)
        if ir.TYPE_BITS[kind] == 8 and kind == "s8":
            return f"{text}.astype(i1).astype(i{want[1:]}).view({want})"
        if have == want:
            return text
        if "pred" in (have, want) or DTYPES[want].itemsize < DTYPES[have].itemsize:
            raise self.error(f"a .{kind} result in register {register.name} of type .{register.type}")
        if kind[0] == "s":
            return f"{text}.view(i{have[1:]}).astype(i{want[1:]}).view({want})"
        return f"{text}.astype({want})"

    def assign(self, operand: ir.Operand, kind: str, text: str) -> None:
        """Give a register, in the active lanes, the value of `text`: a (32,) array as `kind`'s container."""
        if isinstance(operand, ir.Sink):
            return
        if not isinstance(operand, ir.Register):
            raise self.error(f"destination {operand}")
        text = self._widened(operand, kind, text)
        mask = self.mask
        at = f"R[{operand.index}]"
        self.line(f"{at} = {text}" if mask is None else f"{at} = where({mask}, {text}, {at})")

    def put(self, operand: ir.Operand, kind: str, text: str, lanes: str) -> None:
        """As `assign`, for an array with one element for each of `lanes`."""
        if isinstance(operand, ir.Sink):
            return
        if not isinstance(operand, ir.Register):
            raise self.error(f"destination {operand}")
        at = f"R[{operand.index}]"
        if lanes == "None":
            self.line(f"{at} = {self._widened(operand, kind, text)}")
        else:
            self.line(f"{at} = merge({at}, {lanes}, {self._widened(operand, kind, text)})")

    # Calls

    def call(self, function: Callable[..., Any], *arguments: str, result: bool = False) -> str:
        """Call `function(w, s, lanes, *arguments)`, which does something that others see; `result` keeps what
        it gives.
        """
        lanes = self.lanes()
        text = f"{self.bind(function)}({', '.join(('w', 's', lanes, *arguments))})"
        if not result:
            self.line(text)
            return "None"
        name = self.temporary()
        self.line(f"{name} = {text}")
        return name

    def observe(self, space: str, address: str) -> None:
        """Have the launch's counters, where it has any, take note of an access that is about to be made."""
        if space in ("global", "shared", "generic"):
            lanes = self.lanes()
            call = f"access({self.instruction.index}, {lanes}, {address})"
            self.line(f"if w.cta.grid.counts is not None: w.cta.grid.counts.{call}")

    def wait_call(self, function: Callable[..., Any], *arguments: str) -> str:
        """As `call`, of a function that may give a Wait; the segment then ends here, to run again later."""
        name = self.call(function, *arguments, result=True)
        self.line(f"if {name}.__class__ is Wait: return {name}")
        return name

    # Batches: MMAs that do not depend on each other become one call.

    def batch(
        self, key: object, function: Callable[..., Any], inputs: Iterable[str], outputs: list[ir.Operand]
    ) -> None:
        """Put off `function(w, [inputs, ...])` -> one sequence of arrays for each `outputs`, until something
        needs one.

        Calls with the same key are joined. The inputs are read here; the function must depend on nothing
        else.
        """
        registers = [o for o in outputs if isinstance(o, ir.Register)]
        if len(registers) != len(outputs):
            raise self.error("a destination that is no register")
        if self._batch is not None and self._batch.key != key:
            self.flush()
        if self._batch is None:
            self._batch = _Batch(key, function)
        name = self.temporary()
        self.line(f"{name} = ({', '.join(inputs)})")
        self._batch.calls.append((name, registers))
        self._batch.pending.update(register.index for register in registers)

    def flush(self) -> None:
        """Emit what `batch` has put off."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        self._indent = ""
        name = self.temporary()
        self.line(f"{name} = {self.bind(batch.function)}(w, ({', '.join(c for c, _ in batch.calls)},))")
        for at, (_, registers) in enumerate(batch.calls):
            targets = ", ".join(f"R[{register.index}]" for register in registers)
            self.line(f"{targets} = {name}[{at}]")


class _Batch:
    def __init__(self, key: object, function: Callable[..., Any]) -> None:
        self.key = key
        self.function = function
        self.calls: list[tuple[str, list[ir.Register]]] = []
        self.pending: set[int] = set()

    def touches(self, instruction: ir.Instruction) -> bool:
        if instruction.guard is not None and instruction.guard.index in self.pending:
            return True
        return any(register.index in self.pending for register in registers_of(instruction.operands))


def registers_of(operands: Iterable[ir.Operand]) -> Iterator[ir.Register]:
    """All registers that operands name."""
    for operand in operands:
        if isinstance(operand, ir.Register):
            yield operand
        elif isinstance(operand, ir.Negated):
            yield operand.register
        elif isinstance(operand, ir.Pair):
            yield from registers_of((operand.first, operand.second))
        elif isinstance(operand, (ir.Vector, ir.Group)):
            yield from registers_of(operand.elements)
        elif isinstance(operand, ir.Address):
            yield from registers_of((operand.base, *(operand.coordinates or ())))

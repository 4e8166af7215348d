"""A kernel compiled to Python functions, one for each segment, when it is first run.

A segment is a piece of a basic block: it begins where control may arrive, or with an instruction that may
have to wait, and ends behind an instruction that others can see. Its function gives the next segment, -1
where the split has parted or ended, or a Wait.
"""

from __future__ import annotations

from functools import cached_property, partial
from types import CodeType, FrameType
from typing import Any

import numpy as np

from . import cfg, families
from .counting.profile import Profile
from .emitter import DTYPES, Emitter, container, registers_of
from .errors import EmulatorError, Fault, Violation
from .layout import Layout
from .memory import Region
from .ptx.ir import Immediate, Instruction, Kernel, Register
from .registry import Entry, lookup
from .warp import Split, Wait, Warp, diverge, gather, leave, merge

_HELPERS: dict[str, Any] = {
    **DTYPES,
    "where": np.where,
    "count_nonzero": np.count_nonzero,
    "flatnonzero": np.flatnonzero,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "full_like": np.full_like,
    "Wait": Wait,
    "merge": merge,
    "diverge": diverge,
    "gather": gather,
    "leave": leave,
}


class Program:
    """A kernel that can run. `full` and `masked` are the functions of its segments, for warps with and
    without all lanes active.

    Raises EmulatorError at once for an instruction that is not implemented.
    """

    def __init__(
        self, kernel: Kernel, layout: Layout, constants: Region, truncate_bits: int | None = None
    ) -> None:
        families.load()
        self.kernel = kernel
        self.layout = layout
        self.constants = constants  # the module's .const space
        self.truncate_bits = truncate_bits
        self.uses_tensor_maps = any("tensor" in each.opcode for each in kernel.instructions)
        self.register_kinds = [container(register.type) for register in kernel.registers]
        # Whether CTAs may take other CTAs out of the launch (clusterlaunchcontrol).
        self.cancels = any(
            i.opcode[:2] == ("clusterlaunchcontrol", "try_cancel") for i in kernel.instructions
        )
        self.entries: list[Entry | None] = [
            None if cfg.ends_block(instruction) else lookup(instruction)
            for instruction in kernel.instructions
        ]
        self._constants = _constant_registers(kernel)
        self._namespace: dict[str, Any] = dict(_HELPERS)
        self._segment()
        for segment in range(len(self._starts)):
            self._source(segment, True)  # refuses what is not implemented
        self.full: list[Any] = [partial(self._first, at, True) for at in range(len(self._starts))]
        self.masked: list[Any] = [partial(self._first, at, False) for at in range(len(self._starts))]
        self._owners: dict[CodeType, list[int]] = {}

    def _segment(self) -> None:
        """Cut the blocks into segments; the last segment is the end of the kernel."""
        code = self.kernel.instructions
        blocks = cfg.build(self.kernel)
        starts: list[int] = []
        stops: list[int] = []
        first: dict[int, int] = {}  # segment of a block
        meets: list[int] = []
        for number, block in enumerate(blocks):
            first[number] = len(starts)
            start = block.start
            for at in range(block.start + 1, block.stop):
                entry, before = self.entries[at], self.entries[at - 1]
                # brx is run again for the lanes that do not go where the first one goes, and nothing with it.
                waits = entry.blocks if entry is not None else code[at].opcode[0] == "brx"
                if waits or (before is not None and before.yields):
                    starts.append(start)
                    stops.append(at)
                    meets.append(-1)
                    start = at
            starts.append(start)
            stops.append(block.stop)
            meets.append(block.reconverge)
        self._starts, self._stops = starts, stops
        self._meets = [first[meet] if meet >= 0 else -1 for meet in meets]
        self.end = len(starts) - 1
        at_instruction = {blocks[number].start: self._beyond(segment) for number, segment in first.items()}
        self._targets = {
            instruction.index: tuple(at_instruction[t] for t in cfg.targets(self.kernel, instruction))
            for instruction in code
            if instruction.opcode[0] in ("bra", "brx")
        }

    def _beyond(self, segment: int) -> int:
        """The segment, or the end of the kernel where all that it does is to end."""
        instruction = self.instruction_at(segment)
        ends = (
            instruction is not None and instruction.guard is None and instruction.opcode[0] in ("ret", "exit")
        )
        return self.end if ends else segment

    def instruction_at(self, segment: int) -> Instruction | None:
        """The first instruction of a segment; None for the end of the kernel."""
        at = self._starts[segment]
        return self.kernel.instructions[at] if at < len(self.kernel.instructions) else None

    @cached_property
    def profile(self) -> Profile:
        """What the counters want to know of the instructions."""
        return Profile(self)

    @property
    def segments(self) -> int:
        return len(self._starts)

    def instructions_of(self, segment: int) -> range:
        """Indices of the instructions of a segment."""
        return range(self._starts[segment], self._stops[segment])

    # Compiling

    def _first(self, segment: int, full: bool, warp: Warp, registers: list[Any], split: Split) -> Any:
        """Stands for a function until it is first called."""
        function = self._compile(segment, full)
        (self.full if full else self.masked)[segment] = function
        return function(warp, registers, split)

    def source(self, segment: int, *, full: bool) -> str:
        """The Python source of a segment, to look at."""
        return self._source(segment, full)[0]

    def _source(self, segment: int, full: bool) -> tuple[str, list[int]]:
        emitter = Emitter(
            self.layout,
            self._namespace,
            full=full,
            truncate_bits=self.truncate_bits,
            constants=self._constants,
        )
        stop = self._stops[segment]
        ended = False
        if not full and any(map(_is_aligned, self.kernel.instructions[self._starts[segment] : stop])):
            emitter.begin(self.kernel.instructions[self._starts[segment]])
            emitter.line(f"x = gather(s, {segment})")
            emitter.line("if x is not None: return x")
        for at in range(self._starts[segment], stop):
            instruction, entry = self.kernel.instructions[at], self.entries[at]
            if entry is None:
                emitter.flush()
                emitter.begin(instruction)
                ended = self._terminate(emitter, instruction, segment)
            else:
                emitter.begin(instruction)
                entry.handler(instruction, emitter)
            emitter.end()
        emitter.flush()
        if segment == self.end:
            emitter.line("return leave(s)")
        elif not ended:
            emitter.line(f"return {segment + 1}")
        text = "def segment(w, R, s):\n" + "".join(f"    {line}\n" for line in emitter.lines)
        return text, emitter.owners

    def _compile(self, segment: int, full: bool) -> Any:
        text, owners = self._source(segment, full)
        names = self._namespace
        # The text is made here, of names and numbers only; no part of the PTX gets into it.
        exec(compile(text, f"<{self.kernel.name} segment {segment}>", "exec"), names)
        function = names.pop("segment")
        self._owners[function.__code__] = owners
        return function

    def _terminate(self, emitter: Emitter, instruction: Instruction, segment: int) -> bool:
        """Emit what ends a block; says whether nothing can follow."""
        kind, following = instruction.opcode[0], self._beyond(segment + 1)
        if kind == "trap":
            emitter.call(_trap)
            return False
        if kind == "brx":
            self._terminate_indexed(emitter, instruction, segment)
            return True
        target = self._targets[instruction.index][0] if kind == "bra" else self.end
        if instruction.guard is None or target == following:  # either way, no lanes part
            emitter.line(f"return {target}")
            return True
        meet = self._meets[segment]
        emitter.line("n = count_nonzero(g)")
        emitter.line(f"if n == 0: return {following}")
        emitter.line(f"if n == s.count: return {target}")
        if instruction.has("uni"):
            emitter.line(f"{emitter.bind(_not_uniform)}(s)")
        emitter.line(f"return diverge(s, g, {target}, {following}, {meet})")
        return True

    def _terminate_indexed(self, emitter: Emitter, instruction: Instruction, segment: int) -> None:
        if instruction.guard is not None:
            raise emitter.error("a guard")
        choose = partial(_indexed, self._targets[instruction.index], self._meets[segment])
        emitter.line(f"return {emitter.bind(choose)}(s, {emitter.value(instruction.operands[0], 'u32').u})")

    def _owner(self, code: CodeType, line: int) -> int | None:
        """The index of the instruction that a line of a segment's function comes from, -1 where it is of
        none; None for other functions.
        """
        owners = self._owners.get(code)
        return None if owners is None else owners[min(max(line - 2, 0), len(owners) - 1)]

    def executing(self, frame: FrameType | None) -> int:
        """The index of the instruction that runs, seen from a frame that it called; -1 where none does."""
        while frame is not None:
            found = self._owner(frame.f_code, frame.f_lineno)
            if found is not None:
                return found
            frame = frame.f_back
        return -1

    # Errors

    def blame(self, error: BaseException, split: Split) -> EmulatorError:
        """The EmulatorError for what a segment's function raised, with the instruction that did it."""
        instruction = None
        trace = error.__traceback__
        while trace is not None:
            at = self._owner(trace.tb_frame.f_code, trace.tb_lineno)
            if at is not None and at >= 0:
                instruction = self.kernel.instructions[at]
            trace = trace.tb_next
        if isinstance(error, EmulatorError) and (error.line is not None or error.violation is not None):
            return error
        text = instruction.text if instruction is not None else None
        line = instruction.line if instruction is not None else None
        if isinstance(error, Fault):
            warp = split.warp
            violation = Violation(
                error.kind,
                error.message,
                line,
                text,
                warp.cta.index,
                warp.index,
                error.lanes or _lanes_of(split),
            )
            return EmulatorError(error.message, text, line, violation=violation)
        return EmulatorError(f"{type(error).__name__}: {error}", text, line)


def _constant_registers(kernel: Kernel) -> dict[int, int]:
    """Registers, by index, that one unconditional `mov` of an integer is the only thing to write: nvcc puts
    operands there that PTX wants to be constants. Whatever stands first in an instruction counts as written.
    """
    written: dict[int, int | None] = {}
    for i in kernel.instructions:
        value = None
        if i.opcode[0] == "mov" and i.guard is None and isinstance(i.operands[0], Register):
            source = i.operands[1]
            value = source.value if isinstance(source, Immediate) and source.bits is None else None
        for register in registers_of(i.operands[:1]):
            written[register.index] = None if register.index in written else value
    return {index: value for index, value in written.items() if value is not None}


def _is_aligned(instruction: Instruction) -> bool:
    """Whether all lanes of a warp have to execute the instruction together."""
    words = instruction.opcode
    return "aligned" in words or (words[0] == "bar" and words[1] != "warp")


def _lanes_of(split: Split) -> tuple[int, ...]:
    return tuple(split.lanes.tolist())


def _trap(_warp: Warp, _split: Split, _lanes: Any) -> None:
    raise Fault("trap", "the kernel trapped")


def _not_uniform(_split: Split) -> None:
    raise Fault("divergence", "lanes disagree about a branch that is marked .uni")


def _indexed(targets: tuple[int, ...], meet: int, split: Split, index: Any) -> int:
    """brx.idx: go where each lane's index says; where lanes disagree, part the first target's from the rest,
    which come back here for their own.
    """
    chosen = index[split.lanes]
    if int(chosen.max()) >= len(targets):
        raise Fault("branch", f"brx.idx with index {int(chosen.max())} into {len(targets)} targets")
    first = int(chosen[0])
    same = split.mask & (index == np.uint32(first))
    if np.count_nonzero(same) == split.count:
        return targets[first]
    return diverge(split, same, targets[first], split.pc, meet)

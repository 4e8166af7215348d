"""Which function translates which instruction.

A family registers a handler for a dotted beginning of an opcode; the longest one that fits wins:

    @instruction("cp.async.bulk.tensor", yields=True)
    def cp_async_bulk_tensor(i, e): ...

A handler gets the Instruction and the Emitter of the segment that is being compiled, and emits Python source.
It raises `unsupported(...)` for a form that is not implemented: nothing is ever skipped in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import EmulatorError
from .ptx.ir import Instruction

if TYPE_CHECKING:
    from .emitter import Emitter

Handler = Callable[[Instruction, "Emitter"], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """A handler. `blocks`: the instruction may have to wait, so a segment begins with it. `yields`: others
    see what it does, so that a segment ends behind it and another warp may run in between.
    """

    handler: Handler
    blocks: bool
    yields: bool


_entries: dict[tuple[str, ...], Entry] = {}


def instruction(*names: str, blocks: bool = False, yields: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler for dotted beginnings of opcodes."""

    def register(handler: Handler) -> Handler:
        for name in names:
            key = tuple(name.split("."))
            if key in _entries:
                raise ValueError(f"two handlers for {name}")
            _entries[key] = Entry(handler, blocks, yields)
        return handler

    return register


def lookup(found: Instruction) -> Entry:
    """The entry for an instruction. Raises EmulatorError where there is none."""
    words = found.opcode
    for length in range(len(words), 0, -1):
        entry = _entries.get(words[:length])
        if entry is not None:
            return entry
    raise unsupported(found)


def unsupported(found: Instruction, why: str = "") -> EmulatorError:
    """The error for an instruction, or a form of one, that the emulator does not implement."""
    name = ".".join(found.opcode)
    return EmulatorError(f"{name} is not implemented" + (f": {why}" if why else ""), found.text, found.line)


def implemented() -> list[str]:
    """The dotted beginnings of all opcodes that have a handler, sorted."""
    return sorted(".".join(key) for key in _entries)

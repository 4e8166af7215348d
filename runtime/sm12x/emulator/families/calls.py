"""Calls of the functions that the CUDA driver provides: vprintf and __assertfail (CUDA programming guide,
"Formatted Output", "Assertion"). Calls of functions with a body never come here: `ptx.inline`.

What a kernel prints goes to Python's sys.stdout at once, lane by lane, in the order in which warps come by.
"""

from __future__ import annotations

import re
import struct
import sys
from typing import Any

import numpy as np

from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Group, Instruction, Operand, Symbol
from ..registry import instruction, unsupported
from ..spaces import LOADS, STORES
from ..warp import LANES, Split, Warp

_STRING_LIMIT = 4096
# %[flags][width][.precision][size]conversion
_CONVERSION = re.compile(r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+)?)?(hh|h|ll|l|j|z|t|L)?([diouxXeEfFgGcspn%])")


@instruction("call", yields=True)
def call(i: Instruction, e: Emitter) -> None:
    name = next((operand.name for operand in i.operands if isinstance(operand, Symbol)), "")
    function = _FUNCTIONS.get(name)
    if function is None:
        raise unsupported(i, f"{name} has no body in this module")
    groups = [operand for operand in i.operands if isinstance(operand, Group)]
    result = groups[0] if isinstance(i.operands[0], Group) else None
    places = [_place(i, e, operand) for operand in groups[-1].elements]
    to = None if result is None else _place(i, e, result.elements[0])

    def run(w: Warp, _s: Split, lanes: Array | None) -> None:
        for lane in (LANES if lanes is None else lanes).tolist():
            answer = function(w, lane, places)
            if to is not None:
                values = np.full(32, answer & 0xFFFFFFFF, np.uint32)
                STORES["local"](w, np.array([lane]), np.full(32, to, np.uint64), values, 4, 1)

    e.call(run)


def _place(i: Instruction, e: Emitter, operand: Operand) -> int:
    """Where an argument or result lies in local memory."""
    if not isinstance(operand, Symbol):
        raise unsupported(i, "an argument that is no .param variable")
    return e.layout.address(operand.name) + operand.offset


def _load(w: Warp, lane: int, address: int, width: int, space: str = "generic") -> int:
    """An integer in memory as one lane sees it."""
    found: Any = LOADS[space](w, np.array([lane]), np.full(32, address, np.uint64), width, 1)
    return int(found[0])


def _string(w: Warp, lane: int, address: int) -> str:
    """The text at a generic address, up to its zero byte."""
    found = bytearray()
    while len(found) < _STRING_LIMIT:
        byte = _load(w, lane, address + len(found), 1)
        if byte == 0:
            break
        found.append(byte)
    return found.decode("utf-8", "replace")


def _vprintf(w: Warp, lane: int, places: list[int]) -> int:
    """Returns the number of arguments, as CUDA's does."""
    form = _string(w, lane, _load(w, lane, places[0], 8, "local"))
    arguments = _Arguments(w, lane, _load(w, lane, places[1], 8, "local"))
    sys.stdout.write(_CONVERSION.sub(arguments.formatted, form))
    return arguments.count


class _Arguments:
    """The buffer of a vprintf: values one behind the other, each at a multiple of its size."""

    def __init__(self, w: Warp, lane: int, address: int) -> None:
        self._warp, self._lane, self._at = w, lane, address
        self.count = 0

    def _next(self, width: int) -> int:
        self._at = -(-self._at // width) * width
        value = _load(self._warp, self._lane, self._at, width)
        self._at += width
        self.count += 1
        return value

    def _signed(self, width: int) -> int:
        value = self._next(width)
        return value - (1 << 8 * width) if value >> 8 * width - 1 else value

    def formatted(self, found: re.Match[str]) -> str:
        """What stands in place of one conversion."""
        flags, width, precision, size, kind = found.groups()
        if kind == "%":
            return "%"
        if kind == "n":
            raise Fault("print", "printf with %n")
        numbers = [self._signed(4) if text == "*" else text for text in (width, precision)]
        form = f"%{flags}{'' if numbers[0] is None else numbers[0]}"
        form += "." if found.group().find(".") >= 0 else ""
        form += "" if numbers[1] is None else str(numbers[1])
        wide = 8 if size in ("l", "ll", "j", "z", "t") else 4
        if kind in "di":
            return (form + "d") % self._signed(wide)
        if kind in "ouxX":
            return (form + kind.replace("u", "d")) % self._next(wide)
        if kind == "c":
            return (form + "c") % chr(self._next(4) & 255)
        if kind == "s":
            return (form + "s") % _string(self._warp, self._lane, self._next(8))
        if kind == "p":
            return (form + "s") % hex(self._next(8))
        number: float = struct.unpack("<d", self._next(8).to_bytes(8, "little"))[0]
        return (form + kind) % number


def _assertfail(w: Warp, lane: int, places: list[int]) -> int:
    message, file, function = (_string(w, lane, _load(w, lane, places[at], 8, "local")) for at in (0, 1, 3))
    line = _load(w, lane, places[2], 4, "local")
    raise Fault("assert", f"assertion `{message}` failed in {function}, {file}:{line}", (lane,))


_FUNCTIONS = {"vprintf": _vprintf, "__assertfail": _assertfail}

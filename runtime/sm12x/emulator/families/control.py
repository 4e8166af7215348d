"""Instructions about the execution of a kernel itself. Branches and returns are the compiler's."""

from __future__ import annotations

from typing import Any

from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Immediate, Instruction
from ..registry import instruction, unsupported
from ..spaces import aligned
from ..warp import Split, Warp


@instruction("setmaxnreg.inc.sync.aligned", "setmaxnreg.dec.sync.aligned")
def setmaxnreg(i: Instruction, e: Emitter) -> None:
    """Registers per thread have no limit here; that the count is a legal one is checked."""
    count = i.operands[0]
    if not isinstance(count, Immediate) or i.opcode[-1] != "u32":
        raise unsupported(i)
    if not 24 <= count.value <= 256 or count.value % 8:
        raise unsupported(i, "the count must be a multiple of 8 from 24 to 256")
    e.call(_aligned)


def _aligned(_w: Warp, s: Split, lanes: Array | None) -> None:
    aligned(s, lanes)


@instruction("griddepcontrol.wait", blocks=True)
def griddepcontrol_wait(i: Instruction, e: Emitter) -> None:
    """Nothing to wait for unless the launch is one of a chain that may overlap."""
    e.wait_call(_wait_for_grid)


def _wait_for_grid(w: Warp, _s: Split, lanes: Array | None) -> Any:
    dependency = w.cta.grid.dependency
    return None if dependency is None else dependency.wait(w, lanes)


@instruction("griddepcontrol.launch_dependents", yields=True)
def griddepcontrol_launch(i: Instruction, e: Emitter) -> None:
    e.call(_launch_dependents)


def _launch_dependents(w: Warp, _s: Split, lanes: Array | None) -> None:
    dependency = w.cta.grid.dependency
    if dependency is not None:
        dependency.trigger(w.cta, w, lanes)


@instruction("nanosleep", yields=True)
def nanosleep(i: Instruction, e: Emitter) -> None:
    """Lets others run: there is no time."""


@instruction("pmevent")
def pmevent(i: Instruction, e: Emitter) -> None:
    """An event for a profiler, of which there is none."""


@instruction("brkpt")
def brkpt(i: Instruction, e: Emitter) -> None:
    e.call(_breakpoint)


def _breakpoint(_w: Warp, _s: Split, _lanes: Array | None) -> None:
    raise Fault("trap", "the kernel came to a breakpoint")

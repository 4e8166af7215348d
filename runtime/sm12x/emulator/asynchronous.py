"""Asynchronous operations: what has been issued and not yet done.

An operation works in steps that the scheduler takes, late and in an order of its own. Until its step comes,
nothing of it has happened: a copy reads its source, and its tensor map, when it completes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .cta import Cta
from .errors import EmulatorError, Fault, Violation
from .ptx.ir import Instruction
from .warp import Split, Warp


@dataclass(slots=True, eq=False)
class Issuer:
    """Which thread issued an operation, for reports."""

    instruction: Instruction
    warp: Warp
    lane: int
    early: bool = field(init=False)  # before the thread's griddepcontrol.wait

    def __post_init__(self) -> None:
        dependency = self.warp.cta.grid.dependency
        self.early = dependency is not None and not dependency.is_after(self.warp, (self.lane,))

    @property
    def cta(self) -> Cta:
        return self.warp.cta

    def error(self, fault: Fault) -> EmulatorError:
        i = self.instruction
        message = f"{fault.message}, by an asynchronous operation"
        violation = Violation(
            fault.kind, message, i.line, i.text, self.cta.index, self.warp.index, (self.lane,)
        )
        return EmulatorError(message, i.text, i.line, violation=violation)


class Operation:
    """One operation: `steps` happen one after the other, with anything in between."""

    __slots__ = ("_steps", "issuer")

    def __init__(self, issuer: Issuer, *steps: Callable[[], None]) -> None:
        self.issuer = issuer
        self._steps = list(steps)

    def step(self) -> bool:
        """Take the next step; whether more are left. Raises EmulatorError where it breaks a rule."""
        step = self._steps.pop(0)
        self.issuer.cta.grid.memory.acting = self.issuer
        try:
            step()
        except Fault as fault:
            raise self.issuer.error(fault) from fault
        except ValueError as error:  # a tensor map that is none, coordinates that do not fit it
            raise self.issuer.error(Fault("tensor map", str(error))) from error
        return bool(self._steps)


@dataclass(slots=True)
class Group:
    """Operations that a thread waits for together: how many still have to read, and to complete."""

    reading: int = 0
    running: int = 0


@dataclass(slots=True)
class Copy:
    """One `cp.async`, and what is to happen when it is done."""

    done: bool = False
    followers: list[Callable[[], None]] = field(default_factory=list)

    def finish(self) -> None:
        self.done = True
        for follower in self.followers:
            follower()


@dataclass(slots=True)
class ThreadGroups:
    """Groups of one thread and one kind (bulk or not): those committed, oldest first, and the one that is
    open. `copies` are its `cp.async`s that may not be done.
    """

    open: Group = field(default_factory=Group)
    committed: list[Group] = field(default_factory=list)
    queue: list[Split] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = Group()

    def pending(self, most: int, *, reading: bool) -> bool:
        """Whether any but the `most` latest groups has not read its sources, or not completed: a wait has to
        go on.
        """
        older = self.committed[: max(0, len(self.committed) - most)]
        if any(group.reading if reading else group.running for group in older):
            return True
        while self.committed and not self.committed[0].running:
            del self.committed[0]
        return False


def thread_groups(warp: Warp, lane: int, kind: str) -> ThreadGroups:
    """The groups of a thread; `kind` is "bulk" or "copy"."""
    found = warp.groups.get((lane, kind))
    if found is None:
        found = warp.groups[lane, kind] = ThreadGroups()
    return found

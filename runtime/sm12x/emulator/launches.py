"""Launches through the driver interface: cuLaunchKernelEx's arguments, and launches that are held back
because the next one of their stream may begin before they end.

A launch is held back when it is made by cuLaunchKernelEx, or its kernel executes
griddepcontrol.launch_dependents. It runs, with those behind it that have the attribute of programmatic
launch, at the next call that is no such launch of the same stream and that waits for kernels or touches
memory: another launch, a copy, a memset, a free, a synchronisation. What it does wrong is raised from there.
Any other kernel has ended when cuLaunchKernel returns; a programmatic launch behind it finds it complete.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..launch_config import (
    CLUSTER_DIMENSION,
    COOPERATIVE,
    IGNORE,
    PRIORITY,
    PROGRAMMATIC_STREAM_SERIALIZATION,
    LaunchConfig,
)
from . import session
from .chain import Link, launch_chain
from .compiler import Program
from .memory import GlobalMemory


def read_config(config: Any) -> LaunchConfig:
    """What a pointer to a CUlaunchConfig, or a byref, points to."""
    address = ctypes.cast(config, ctypes.c_void_p).value
    if not address:
        raise ValueError("config: expected a pointer to a CUlaunchConfig, got a null pointer")
    return LaunchConfig.from_address(address)


@dataclass(slots=True)
class Attributes:
    """What the attributes of a launch ask for."""

    programmatic: bool = False
    cooperative: bool = False


def read_attributes(config: LaunchConfig) -> Attributes | None:
    """The attributes of a launch; None where it has one that is not supported."""
    found = Attributes()
    for attribute in config.attributes[: config.count] if config.count else ():
        value = attribute.value
        if attribute.id == PROGRAMMATIC_STREAM_SERIALIZATION:
            found.programmatic = value[0] != 0
        elif attribute.id == COOPERATIVE:
            found.cooperative = value[0] != 0
        elif attribute.id == CLUSTER_DIMENSION:
            if list(value[:3]) != [1, 1, 1]:
                return None
        elif attribute.id not in (IGNORE, PRIORITY):
            return None
    return found


def triggers(program: Program) -> bool:
    """Whether a kernel lets the next one begin before it ends."""
    return any(i.opcode[:2] == ("griddepcontrol", "launch_dependents") for i in program.kernel.instructions)


@dataclass(slots=True)
class Held:
    """A launch that has not run, with all that was in force when it was made."""

    link: Link
    stream: int
    variant: str
    symbol: str
    arch: str
    session: session.Session | None


@dataclass(slots=True)
class Queue:
    """The launches that are held back, all of one stream."""

    memory: GlobalMemory
    held: list[Held] = field(default_factory=list)

    def continues(self, stream: int, attributes: Attributes) -> bool:
        """Whether a launch may begin before those that are held back end."""
        return bool(self.held) and attributes.programmatic and self.held[-1].stream == stream

    def finish(self) -> None:
        """Run what is held back. Raises EmulatorError, and forgets the rest."""
        held, self.held = self.held, []
        if not held:
            return
        start = time.perf_counter()
        results = launch_chain([each.link for each in held], memory=self.memory)
        seconds = time.perf_counter() - start
        for each, result in zip(held, results, strict=True):
            if each.session is not None:
                link = each.link
                each.session.launches.append(
                    session.Launch(
                        *(each.variant, each.symbol, each.arch, link.grid, link.block, link.shared_bytes),
                        *(seconds, result),
                    )
                )


def progress_of(running: session.Session | None, variant: str) -> Callable[[int], None] | None:
    """Whoever of a session watches the segments of a launch run."""
    return None if running is None or running.progress is None else partial(running.progress, variant)


def failure_of(running: session.Session | None, variant: str) -> Callable[[], None] | None:
    """Tells a session that this kernel of it did not run to its end."""

    def failed() -> None:
        assert running is not None
        running.failed = variant

    return None if running is None else failed

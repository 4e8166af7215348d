"""How the emulator runs, and what it has run: `sm12x.emulator.use`."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, SupportsIndex

from . import devices
from .counting.touched import Touched

if TYPE_CHECKING:
    from .counting.counters import Counters
    from .launch import LaunchResult


@dataclass(frozen=True, slots=True)
class Options:
    """Which device is emulated, and how.

    device: "rtx5090", "rtxpro6000", "gb10" or "h200".
    sms: SMs that it has; None for all. Persistent kernels have one CTA for each SM, so that fewer make a
      large problem faster to emulate, and each CTA's share larger.
    seed: decides in which order warps run and asynchronous operations complete.
    resident: CTAs that are let in at a time, in the order of their indices; None leaves it to the seed: all
      of a grid, one, two, or half of them (`launch.residents`). CUDA promises that CTAs are there together
      only for cooperative launches, where all always are; a kernel that needs more than one fails under some
      seeds, so that a number of at least the grid's is only good for finding out why.
    truncate_bits: significant bits to which the sums of MMAs with FP32 accumulators are cut, as hardware is
      reported to with 22; None for sums that are exact but for one rounding.
    races: whether accesses of shared memory that nothing orders are violations, however they went.
    counters: whether launches come with counters (`Launch.result.counters`); that takes a little time.
    """

    device: str = devices.DEFAULT
    sms: int | None = None
    seed: int = 0
    resident: int | None = None
    truncate_bits: int | None = None
    races: bool = True
    counters: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.device, str):
            raise TypeError(f"device: expected one of {', '.join(devices.GPUS)}, got {self.device!r}")
        gpu = devices.find(self.device)
        for name in ("sms", "seed", "resident", "truncate_bits"):
            value = getattr(self, name)
            if value is not None or name == "seed":
                object.__setattr__(self, name, _whole(name, value))
        if self.sms is not None and not 1 <= self.sms <= gpu.sm_count:
            raise ValueError(f"sms: expected 1 to {gpu.sm_count} for {gpu.key}, got {self.sms}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        if self.resident is not None and self.resident < 1:
            raise ValueError(f"resident: expected at least 1, got {self.resident}")
        for name in ("races", "counters"):
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex) or value not in (False, True):
                raise ValueError(f"{name}: expected 0 or 1, got {value!r}")
        if self.truncate_bits is not None and not 1 <= self.truncate_bits <= 24:
            raise ValueError(f"truncate_bits: expected 1 to 24, got {self.truncate_bits}")


def _whole(name: str, value: SupportsIndex) -> int:
    """An integer of any type, NumPy's included, as Python's: generators take no other."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel that ran. `seconds` is what emulating it took, together with those that it may overlap, and
    says nothing about a GPU; `result` is what the emulator counted."""

    variant: str
    symbol: str
    arch: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    seconds: float
    result: LaunchResult

    @property
    def counters(self) -> Counters | None:
        """What the launch did, where `Options.counters` asked for it."""
        return self.result.counters


@dataclass(slots=True)
class Session:
    """Options, and the launches that ran to their end with them, in their order. `failed` is the variant
    whose kernel did not, None where all did. `progress` is called now and then with the variant that runs and
    the segments of its program that have run. `touched` knows the bytes of global memory that all launches
    together loaded and stored, of those with counters."""

    options: Options
    launches: list[Launch] = field(default_factory=list)
    failed: str | None = None
    progress: Callable[[str, int], None] | None = None
    touched: Touched = field(default_factory=Touched)


_active: ContextVar[Session | None] = ContextVar("sm12x emulator session", default=None)


def active() -> Session | None:
    """The session of the innermost `use`, None outside of any."""
    return _active.get()


def options() -> Options:
    """The options in force: those of the session, else those of the environment.

    SM12X_EMULATOR_DEVICE, _SMS, _SEED, _RESIDENT, _TRUNCATE_BITS and _RACES (0 or 1). Raises ValueError
    naming the variable.
    """
    session = _active.get()
    if session is not None:
        return session.options
    given: dict[str, Any] = {}
    for name in (each.name for each in fields(Options) if each.name != "counters"):  # nobody would see them
        variable = f"SM12X_EMULATOR_{name.upper()}"
        text = os.environ.get(variable)
        if not text:
            continue
        try:
            given[name] = text if name == "device" else int(text)
        except ValueError:
            raise ValueError(f"{variable}: expected an integer, got {text!r}") from None
    try:
        return Options(**given)
    except ValueError as error:
        name, _, reason = str(error).partition(":")
        raise ValueError(f"SM12X_EMULATOR_{name.upper()}:{reason}") from None


@contextmanager
def use(**changes: Any) -> Iterator[Session]:
    """Have the emulator run with other options within the block, in this thread or task.

    `changes` are fields of `Options`; what is not named stays as it was outside. Yields the Session, which
    fills with the launches. Raises TypeError for a name that is no option and for a value of a wrong type,
    ValueError for one out of its range.
    """
    unknown = set(changes) - {each.name for each in fields(Options)}
    if unknown:
        raise TypeError(f"{min(unknown)}: expected an option of the emulator")
    session = Session(replace(options(), **changes))
    token = _active.set(session)
    try:
        yield session
    finally:
        _active.reset(token)

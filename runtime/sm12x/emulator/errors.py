"""What the emulator raises and reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """Something a kernel did that the PTX ISA does not allow.

    `kind` is a short word ("bounds", "alignment", "uninitialised", "barrier", "deadlock", "divergence", ...);
    `line` is the line of the PTX text, `instruction` its text; `cta` the linear index in the grid, `warp` the
    index in the CTA, `lanes` the lanes that did it. What is not known is None or empty.
    """

    kind: str
    message: str
    line: int | None = None
    instruction: str | None = None
    cta: int | None = None
    warp: int | None = None
    lanes: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = []
        if self.cta is not None:
            where.append(f"CTA {self.cta}")
        if self.warp is not None:
            where.append(f"warp {self.warp}")
        if self.lanes:
            where.append(f"lanes {_ranges(self.lanes)}" if len(self.lanes) > 1 else f"lane {self.lanes[0]}")
        if self.line is not None:
            where.append(f"PTX line {self.line}: {self.instruction}")
        return f"{self.kind}: {self.message}" + (f" ({', '.join(where)})" if where else "")


class EmulatorError(RuntimeError):
    """The PTX could not be read, or a kernel could not be run on.

    Attributes: `message` is the reason alone, `instruction` and `line` the PTX text and its line (None where
    no instruction is to blame), `violation` the Violation where the kernel broke a rule, None where the
    emulator lacks something.
    """

    def __init__(
        self,
        message: str,
        instruction: str | None = None,
        line: int | None = None,
        *,
        violation: Violation | None = None,
    ) -> None:
        if violation is not None:
            text = str(violation)
        elif line is not None:
            text = (
                f"{message} (PTX line {line}: {instruction})"
                if instruction
                else f"{message} (PTX line {line})"
            )
        else:
            text = message
        super().__init__(text)
        self.message = message
        self.instruction = instruction
        self.line = line
        self.violation = violation


class Fault(Exception):
    """A violation found below the level that knows which instruction runs; the run loop makes it an
    EmulatorError.

    `lanes` are indices of lanes in the warp, empty where no lane is special.
    """

    def __init__(self, kind: str, message: str, lanes: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.lanes = lanes


def _ranges(lanes: tuple[int, ...]) -> str:
    """Lane numbers as ranges: (0, 1, 2, 7) -> "0-2, 7"."""
    found: list[list[int]] = []
    for lane in sorted(lanes):
        if found and lane == found[-1][1] + 1:
            found[-1][1] = lane
        else:
            found.append([lane, lane])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in found)

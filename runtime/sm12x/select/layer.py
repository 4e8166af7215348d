"""Which kernels an expert layer runs: two GEMMs, and whether the rows of the second are quantised on their
way in or by a launch of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..manifest import Manifest
from .model import Choice
from .problem import Problem
from .ranking import describe, select
from .rates import RATES, dram

FP8 = "float8_e4m3fn"


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """An expert layer and how many rows it has, in numbers that the host knows.

    `rows`: routes of all tokens, at most as many as rows of this device's experts; `expected_rows`: what of
    them this device may expect. `static`: the scale of the second GEMM's rows is known before, so that the
    first one writes e4m3. `dtype`: that of the tokens and the result.
    """

    experts: int
    hidden: int
    intermediate: int
    gated: bool
    static: bool
    dtype: str
    arch: str
    rows: int
    expected_rows: int
    weighted: bool

    def up(self, rows: int) -> Problem:
        """The first GEMM, on so many rows."""
        return Problem(
            kind="packed",
            groups=self.experts,
            a=FP8,
            b=FP8,
            out=FP8 if self.static else self.dtype,
            arch=self.arch,
            rows=rows,
            n=self.intermediate * (2 if self.gated else 1),
            k=self.hidden,
            gathers=True,
            role="up",
            gated=self.gated,
        )

    def down(self, rows: int, *, quantises: bool) -> Problem:
        """The second GEMM, on so many rows; `quantises`: on their way in."""
        return Problem(
            kind="packed",
            groups=self.experts,
            a=FP8,
            b=FP8,
            out=self.dtype,
            arch=self.arch,
            rows=rows,
            n=self.hidden,
            k=self.intermediate,
            weighted=self.weighted,
            role="down" if quantises else "gemm",
        )


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The kernels of a layer. `quantises_apart`: a launch between the GEMMs quantises the second's rows."""

    up: Choice
    down: Choice
    quantises_apart: bool

    @property
    def us(self) -> float:
        """Microseconds that the model expects of the GEMMs; not of a launch between them."""
        return self.up.us + self.down.us


def quantising_us(problem: LayerProblem, sms: int) -> float:
    """Microseconds of a launch that quantises the rows of the second GEMM: its start, and its bytes."""
    values = problem.expected_rows * problem.intermediate
    return RATES[problem.arch].next_launch + 3.0 * values / dram(problem.arch, sms) / 1e3


def select_layer(problem: LayerProblem, manifest: Manifest, sms: int) -> tuple[LayerChoice, list[str]]:
    """The kernels of a layer on a device of `sms` SMs, and the ranked lists that they come from, as text.

    Raises ValueError where no kernel fits, KeyError for an architecture without rates.
    """
    rows = problem.expected_rows
    lists = []

    def ranked(gemm: Problem) -> list[Choice]:
        variants = manifest.gemms("fp8_packed" if gemm.role == "gemm" else None, gemm.role)
        choices = select(gemm, variants, sms)
        lists.append(describe(gemm, choices))
        return choices

    ups = ranked(problem.up(rows))
    plain = ranked(problem.down(rows, quantises=False))
    quantising = [] if problem.static else ranked(problem.down(rows, quantises=True))
    if not ups or not (plain or quantising):
        raise ValueError(
            f"x: no kernel of an expert layer for {problem.dtype} on {problem.arch}"
            f"{'' if problem.gated else ', without gates'}"
        )
    return LayerChoice(ups[0], *_down(problem, plain, quantising, sms)), lists


def _down(
    problem: LayerProblem, plain: Sequence[Choice], quantising: Sequence[Choice], sms: int
) -> tuple[Choice, bool]:
    if not quantising:
        return plain[0], not problem.static
    if plain and plain[0].us + quantising_us(problem, sms) < quantising[0].us:
        return plain[0], True
    return quantising[0], False


def with_all_rows(problem: LayerProblem, choice: LayerChoice) -> tuple[Problem, Problem]:
    """The two GEMMs with every row that there may be, which is what their grids are made for."""
    down = problem.down(problem.rows, quantises=choice.down.variant.role == "down")
    return problem.up(problem.rows), down

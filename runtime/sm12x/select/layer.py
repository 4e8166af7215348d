"""Which kernels an expert layer runs: one that does all of it, or two GEMMs, and whether the rows of the
second are quantised on their way in or by a launch of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..abi import SM12X_LAYER_ROUTES, SM12X_LAYER_STRIPS, SM12X_MOST_COUNTED_EXPERTS
from ..manifest import Manifest, Variant
from .model import Choice
from .problem import Problem, takes_runs
from .ranking import can_count, describe, select
from .rates import RATES, dram

FP8 = "float8_e4m3fn"
# The factor by which quantising rows apart must be faster to be worth a launch more: host time, and a gap.
APART_GAINS = 1.05
# Up to so many routes of all tokens, and rows that an expert may expect, and for h so narrow, a layer is
# one launch: it takes 3 or 4 % longer than four then, and saves the host three of them. Microseconds on an
# H200 with one and with four, 2026-11-24_layer_h200_3.json: gemma-4-26B-A4B (I 704) 25.6 and 24.7 at 1 token
# of 8 routes, 37.3 and 35.7 at 2; Qwen3-30B-A3B (I 768) 22.4 and 21.5, 34.4 and 31.1. In a graph the host has
# nothing to save: it gets four where all 8 routes are expected here. Fewer were not timed; with none of them
# here one launch takes 5.0, four 7.2. The kernel itself takes more routes and any width, but holds a row's
# codes for all its pieces only up to 768 of them.
MOST_WHOLE_ROUTES = 8
MOST_WHOLE_ROWS = 2
MOST_WHOLE_WIDTH = 768


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """An expert layer and how many rows it has, in numbers that the host knows.

    `rows`: routes of all tokens, at most as many as rows of this device's experts; `expected_rows`: what of
    them this device may expect. `static`: the scale of the second GEMM's rows is known before, so that the
    first one writes e4m3; `static_input`: that of the tokens is. `weighted`: router weights are on the
    result, not on the input. `dtype`: that of the tokens and the result.
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
    static_input: bool = False

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
            early=True,
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
            early=True,
        )


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The kernels of a layer. `quantises_apart`: a launch between the GEMMs quantises the second's rows.
    `whole`: the kernel that does all of the layer, instead of the others; `several_in_graphs`: but not in a
    CUDA graph, where those of several launches give the same bits and are faster."""

    up: Choice
    down: Choice
    quantises_apart: bool
    whole: Variant | None = None
    several_in_graphs: bool = False

    @property
    def us(self) -> float:
        """Microseconds that the model expects of the GEMMs; not of a launch between them."""
        return self.up.us + self.down.us


def quantising_us(problem: LayerProblem, sms: int) -> float:
    """Microseconds of a launch that quantises the rows of the second GEMM: its start, and its bytes."""
    values = problem.expected_rows * problem.intermediate
    return RATES[problem.arch].next_launch + 3.0 * values / dram(problem.arch, sms) / 1e3


def select_layer(problem: LayerProblem, held: Manifest, sms: int) -> tuple[LayerChoice, list[str]]:
    """The kernels of a layer on a device of `sms` SMs, and the ranked lists that they come from, as text.

    Layers with nearly as many rows get the same: calls of every length would else each be ranked anew.
    Raises ValueError where no kernel fits, KeyError for an architecture without rates.
    """
    rounded = replace(problem, rows=_rounded(problem.rows), expected_rows=_rounded(problem.expected_rows))
    choice, lists = found = _select(rounded, held, sms)
    whole, reason = _whole(problem, held)
    if not reason:
        return found
    if whole is None:
        return choice, [*lists, f"sm12x select: {reason}"]
    several = problem.expected_rows >= MOST_WHOLE_ROUTES and _same_bits(choice, whole)
    reason += "; in a CUDA graph several launches" if several else ""
    return replace(choice, whole=whole, several_in_graphs=several), [*lists, f"sm12x select: {reason}"]


def _rounded(rows: int) -> int:
    # Up, to four significant bits from 256 rows on.
    step = 1 << max(0, rows.bit_length() - 4)
    return rows if rows < 256 else -(-rows // step) * step


@lru_cache(maxsize=1024)
def _select(problem: LayerProblem, held: Manifest, sms: int) -> tuple[LayerChoice, list[str]]:
    lists = []

    def ranked(expected: Problem, whole: Problem) -> list[Choice]:
        variants = held.gemms("fp8_packed" if expected.role == "gemm" else None, expected.role)
        choices = [
            choice
            for choice in select(expected, variants, sms)
            if not counts_units(choice) or can_count(whole, choice.variant, choice.least_units, sms)
        ]
        lists.append(describe(expected, choices))
        return choices

    rows, most = problem.expected_rows, problem.rows
    ups = ranked(problem.up(rows), problem.up(most))
    plain, quantising = (
        ranked(problem.down(rows, quantises=quantises), problem.down(most, quantises=quantises))
        if not (quantises and problem.static)
        else []
        for quantises in (False, True)
    )
    if not ups or not (plain or quantising):
        raise ValueError(
            f"x: no kernel of an expert layer for {problem.dtype} on {problem.arch}"
            f"{'' if problem.gated else ', without gates'}"
        )
    return LayerChoice(ups[0], *_down(problem, plain, quantising, sms)), lists


def fits_whole(problem: LayerProblem, variant: Variant) -> str | None:
    """None where `variant`, of the role "layer", can do all of the layer, else why not."""
    most_hidden = 16 * SM12X_LAYER_STRIPS
    for stands, why in (
        (variant.gated != problem.gated, f"is for weights {'with' if variant.gated else 'without'} gates"),
        (problem.dtype not in variant.outs, f"gives {' or '.join(variant.outs)}, not {problem.dtype}"),
        (problem.arch not in variant.targets, f"has no cubin for {problem.arch}"),
        (problem.static_input, "takes no a1_scale"),
        (problem.static, "takes no a2_scale"),
        (not problem.weighted, "takes no router weights on the input"),
        (
            problem.rows > SM12X_LAYER_ROUTES,
            f"takes {SM12X_LAYER_ROUTES} routes at most, not {problem.rows}",
        ),
        (
            problem.experts > SM12X_MOST_COUNTED_EXPERTS,
            f"takes {SM12X_MOST_COUNTED_EXPERTS} experts at most, not {problem.experts}",
        ),
        (problem.hidden > most_hidden, f"takes H of {most_hidden} at most, not {problem.hidden}"),
    ):
        if stands:
            return why
    return None


def _whole(problem: LayerProblem, held: Manifest) -> tuple[Variant | None, str]:
    """The kernel that does all of the layer, and why it does or none does; no words where there is none."""
    reasons = []
    rows = problem.expected_rows / problem.experts
    for variant in held.gemms(role="layer"):
        if variant.gated != problem.gated:
            continue
        why = fits_whole(problem, variant)
        if why is None and problem.rows > MOST_WHOLE_ROUTES:
            why = f"is not for more than {MOST_WHOLE_ROUTES} routes, got {problem.rows}"
        elif why is None and rows > MOST_WHOLE_ROWS:
            why = f"is not for more than {MOST_WHOLE_ROWS} rows of an expert, expected {rows:.1f}"
        elif why is None and problem.intermediate > MOST_WHOLE_WIDTH:
            why = f"is not for I of more than {MOST_WHOLE_WIDTH}, got {problem.intermediate}"
        if why is None:
            return variant, (
                f"one launch for all of the layer, {variant.key}: {problem.rows} of at most "
                f"{MOST_WHOLE_ROUTES} routes, {rows:.1f} rows of an expert expected, of at most "
                f"{MOST_WHOLE_ROWS}"
            )
        reasons.append(f"{variant.key} {why}")
    return None, "several launches: " + "; ".join(reasons) if reasons else ""


def _same_bits(choice: LayerChoice, whole: Variant) -> bool:
    """Whether several launches give the bits that the launch for all of the layer gives: the same tiles,
    with K whole."""
    return all(
        each.variant.tile == whole.tile and each.variant.role != "gemm" and not each.least_units
        for each in (choice.up, choice.down)
    )


def counts_units(choice: Choice) -> bool:
    """Whether the kernel counts units of work in 32 bits: all but whole tiles in turns."""
    return choice.least_units > 0 or takes_runs(choice.variant)


def _down(
    problem: LayerProblem, plain: Sequence[Choice], quantising: Sequence[Choice], sms: int
) -> tuple[Choice, bool]:
    if not quantising:
        return plain[0], not problem.static
    if plain and APART_GAINS * (plain[0].us + quantising_us(problem, sms)) < quantising[0].us:
        return plain[0], True
    return quantising[0], False


def with_all_rows(problem: LayerProblem, choice: LayerChoice) -> tuple[Problem, Problem]:
    """The two GEMMs with every row that there may be, which is what their grids are made for."""
    down = problem.down(problem.rows, quantises=choice.down.variant.role == "down")
    return problem.up(problem.rows), down

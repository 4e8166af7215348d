"""Forcing the kernels of an expert layer, and where its stages lie in the workspace. Needs no torch.

`sm12x.fused_moe` has no argument for either: within `kernels`, what `select_layer` answers is replaced, and
what `lay_out` answers is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from forced import Forced

from sm12x.manifest import Manifest, Variant, default
from sm12x.ops import moe_chain, moe_plan, moe_whole
from sm12x.ops.moe_workspace import Layout, WholeLayout
from sm12x.select import Choice, Problem, fits, select
from sm12x.select.layer import LayerChoice, LayerProblem, fits_whole
from sm12x.select.layer import select_layer as choose_freely

_fused_moe: Any = import_module("sm12x.ops.fused_moe")  # the package's attribute of that name is the function
_lay_out_really, _lay_out_whole_really = moe_chain.lay_out, moe_whole.lay_out_whole
# The chain that a launch for all of a layer gives the bits of: K whole, tiles of 8 tokens.
UP_OF_WHOLE = {True: "fp8_up_gated_128x8x128_swap", False: "fp8_up_128x8x128_swap"}
DOWN_OF_WHOLE = "fp8_down_128x8x128_swap"


@dataclass
class Made:
    """The kernels and the workspace of everything that was prepared to be launched, in order: a WholeLayout
    where the choice has `whole`."""

    choices: list[LayerChoice] = field(default_factory=list)
    layouts: list[Any] = field(default_factory=list)


def _both_modes(arch: str, family: str, role: str) -> list[Forced]:
    found = [v for v in default().gemms(family, role) if arch in v.targets]
    found.sort(key=lambda v: (v.token_tile, v.key))
    return [Forced(v, split) for v in found for split in (False, True)]


def ups(arch: str, gated: bool) -> list[Forced]:
    """Every kernel of the first GEMM, K whole and split."""
    return [each for each in _both_modes(arch, "fp8_up", "up") if each.variant.gated == gated]


def downs(arch: str, static: bool) -> list[Forced]:
    """Every kernel of the second GEMM, K whole and split: those of fp8_packed, whose rows are quantised
    before, and where the scale is not static those of fp8_down, which quantise them."""
    apart = _both_modes(arch, "fp8_packed", "gemm")
    return apart if static else apart + _both_modes(arch, "fp8_down", "down")


def wholes(arch: str) -> dict[bool, Variant]:
    """The kernels that do all of a layer, by whether they have gates; empty where there are none."""
    return {v.gated: v for v in default().gemms(role="layer") if arch in v.targets}


def chain_of_whole(gated: bool) -> tuple[Forced, Forced]:
    """The kernels of both GEMMs whose results a launch for all of a layer has, bit for bit."""
    known = default().variants
    return Forced(known[UP_OF_WHOLE[gated]], False), Forced(known[DOWN_OF_WHOLE], False)


def _choice(problem: Problem, each: Forced, sms: int) -> Choice:
    why = fits(problem, each.variant)
    if why is not None:
        raise ValueError(f"{each.name} cannot be forced: it {why}")
    for choice in select(problem, [each.variant], sms):
        if (choice.least_units > 0) == each.split:
            return choice
    # K of a single tile: there is nothing to split, but it runs.
    return Choice(each.variant, int(each.split), 0.0, {}, "forced")


def _whole(problem: LayerProblem, held: Manifest) -> Variant:
    reasons = []
    for variant in held.gemms(role="layer"):
        why = fits_whole(problem, variant)
        if why is None:
            return variant
        reasons.append(f"{variant.key} {why}")
    raise ValueError(f"one launch for all of a layer cannot be forced: {'; '.join(reasons) or 'no kernel'}")


@contextmanager
def kernels(
    up: Forced | None = None, down: Forced | None = None, whole: bool | None = None
) -> Iterator[Made]:
    """Layers that are planned within the block run these kernels, or those of `select_layer` for None. One
    thread at a time. Plans of `FusedMoE` objects that were called before keep theirs.

    `whole`: True for one launch that does all of the layer, in graphs too, False for several, which a kernel
    of either GEMM means too, None for what `select_layer` says. Planning raises ValueError where the layer
    cannot have them.
    """
    if whole and (up is not None or down is not None):
        raise ValueError("whole: expected None or False where kernels of a GEMM are forced")
    made = Made()

    def choose(problem: LayerProblem, held: Manifest, sms: int) -> tuple[LayerChoice, list[str]]:
        choice, lists = choose_freely(problem, held, sms)
        rows = problem.expected_rows
        if whole:
            choice = replace(choice, whole=_whole(problem, held), several_in_graphs=False)
        elif whole is False or up is not None or down is not None:
            choice = replace(choice, whole=None, several_in_graphs=False)
        if up is not None:
            choice = replace(choice, up=_choice(problem.up(rows), up, sms))
        if down is not None:
            quantises = down.variant.role == "down"
            gemm = _choice(problem.down(rows, quantises=quantises), down, sms)
            choice = replace(choice, down=gemm, quantises_apart=not quantises and not problem.static)
        made.choices.append(choice)
        return choice, lists

    def lay_out(*arguments: Any, **named: Any) -> Layout:
        made.layouts.append(_lay_out_really(*arguments, **named))
        return made.layouts[-1]

    def lay_out_whole(*arguments: Any, **named: Any) -> WholeLayout:
        made.layouts.append(_lay_out_whole_really(*arguments, **named))
        return made.layouts[-1]

    before = moe_plan.select_layer, moe_chain.lay_out, moe_whole.lay_out_whole, _fused_moe._plans
    moe_plan.select_layer, moe_chain.lay_out = choose, lay_out  # type: ignore[assignment]
    moe_whole.lay_out_whole, _fused_moe._plans = lay_out_whole, {}  # type: ignore[assignment]
    try:
        yield made
    finally:
        moe_plan.select_layer, moe_chain.lay_out, moe_whole.lay_out_whole, _fused_moe._plans = before

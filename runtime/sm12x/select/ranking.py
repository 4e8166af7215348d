"""The ranked list: every variant that fits, with K whole and split, best first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..manifest import Variant
from .model import Choice, measure, split_k, whole_k
from .problem import Problem, expected_groups, fits, takes_runs, units_upper_bound
from .rates import FAMILIES

TOO_MANY_UNITS = 2**32  # kernels count units times CTAs in 32 bits, but for tiles in turns
SPLIT_GAINS = 1.005  # the factor that split-K must be faster by to be worth a workspace


def select(problem: Problem, variants: Iterable[Variant], device_sm_count: int) -> list[Choice]:
    """Variants that fit `problem`, best first, on a device of `device_sm_count` SMs; empty where none fits.
    A variant that can split K is there twice where that makes sense: with K whole (`least_units` 0), and
    with the best `least_units`; before K whole only where it promises `SPLIT_GAINS`. To force a variant, give
    only that one.

    Raises KeyError for an architecture without rates.
    """
    groups = expected_groups(problem)
    choices = []
    for variant in variants:
        if fits(problem, variant) is not None:
            continue
        work = measure(problem, groups, variant)
        if not takes_runs(variant) or can_count(problem, variant, 0, device_sm_count):
            choices.append(whole_k(problem, work, variant, device_sm_count))
        splits = [
            split_k(problem, work, variant, device_sm_count, least)
            for least in least_units(problem, variant, device_sm_count)
        ]
        if splits:
            # Among equals the one that splits least where there is less work than expected.
            choices.append(min(splits, key=lambda choice: (choice.us, -choice.least_units)))
    return sorted(
        choices,
        key=lambda choice: (worth(choice.us, choice.least_units), choice.variant.key, choice.least_units),
    )


def worth(us: float, least_units: int) -> float:
    """What the ranked list goes by: microseconds, and for split-K `SPLIT_GAINS` times as many."""
    return us * SPLIT_GAINS if least_units else us


def least_units(problem: Problem, variant: Variant, sms: int) -> list[int]:
    """The `least_units` worth a try: powers of two up to a whole tile; empty where K cannot be split."""
    if not FAMILIES[variant.family].splits:
        return []
    k_tiles = -(-problem.k // variant.tile[2])
    if not can_count(problem, variant, 1, sms):
        return []
    return [1 << power for power in range(k_tiles.bit_length()) if 1 << power < k_tiles]


def can_count(problem: Problem, variant: Variant, least_units: int, sms: int) -> bool:
    """Whether the kernel's 32-bit counts hold the units of the call times `sms` CTAs."""
    return units_upper_bound(problem, variant, least_units) * sms < TOO_MANY_UNITS


def describe(problem: Problem, choices: Sequence[Choice]) -> str:
    """The ranked list as lines of text."""
    if problem.kind == "list":
        rows = [m for m, _, _ in problem.shapes]
        what = f"list of {problem.groups} groups, {sum(rows)} rows, at most {max(rows, default=0)} in one"
    elif problem.kind == "masked":
        hint = f" expected {problem.expected_rows}" if problem.expected_rows else ""
        what = f"masked max_m={problem.max_rows}{hint} E={problem.groups} N={problem.n} K={problem.k}"
    else:
        what = f"packed M={problem.rows} E={problem.groups} N={problem.n} K={problem.k}"
    with_ = "".join(
        f", {text}"
        for text, there in (("row_index", problem.gathers), ("row_weight", problem.weighted))
        if there
    )
    lines = [f"sm12x select: {what}{with_}, {problem.a} x {problem.b} -> {problem.out} on {problem.arch}"]
    for rank, choice in enumerate(choices, 1):
        split = f" split-K {choice.least_units}" if choice.least_units else ""
        terms = " ".join(f"{name} {us:.1f}" for name, us in choice.terms.items() if us)
        lines.append(f"  {rank}. {choice.variant.key}{split}: {choice.us:.1f} us ({terms}); {choice.reason}")
    return "\n".join(lines)

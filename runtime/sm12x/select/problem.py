"""What a call is, in numbers that the host knows, and which variants can run it."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma, log, sqrt

from ..manifest import Variant
from .rates import FAMILIES

KINDS = ("packed", "masked", "list")
STRIP = 8  # output features that runs are cut into; of gates and ups, twice as many rows of weights
MOST_SIZES = 128  # different sizes of a group that the model looks at


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of `groups` experts.

    `kind` "packed": `rows` rows over experts of (n, k); nobody on the host knows how many each has.
    "masked": experts of (n, k) with at most `max_rows` rows each; `expected_rows` is the caller's hint of how
    many a group has, 0 for none. "list": `shapes` holds (m, n, k) of every group, and n, k are 0.
    `gathers`: rows are read through a row index. `weighted`: rows of the result are multiplied by row_weight.
    `role`: that of the kernel, "gemm", or "up" and "down" for the two GEMMs of an expert layer; `gated`: of
    "up", whether half of the n rows of weights are gates. `early`: weights are loaded before the launch in
    front has ended.
    """

    kind: str
    groups: int
    a: str
    b: str
    out: str
    arch: str
    rows: int = 0
    n: int = 0
    k: int = 0
    shapes: tuple[tuple[int, int, int], ...] = ()
    gathers: bool = False
    weighted: bool = False
    max_rows: int = 0
    expected_rows: int = 0
    role: str = "gemm"
    gated: bool = False
    early: bool = False


@dataclass(frozen=True, slots=True)
class Groups:
    """`count` groups of (rows, n, k), as the model expects them: a mean, so not a whole number."""

    rows: int
    n: int
    k: int
    count: float


def fits(problem: Problem, variant: Variant) -> str | None:
    """None where `variant` can run `problem`, else why not."""
    if variant.role != problem.role:
        return f"is a {variant.role} kernel"
    if variant.gated != problem.gated:
        return f"is for weights {'with' if variant.gated else 'without'} gates"
    family = FAMILIES.get(variant.family)
    if family is None:
        return f"is of the family {variant.family}, which grouped GEMMs do not use"
    for side, have, want in (("a", variant.a, problem.a), ("b", variant.b, problem.b)):
        if have != want:
            return f"{side} is {have}, not {want}"
    if problem.out not in variant.outs:
        return f"out is {' or '.join(variant.outs)}, not {problem.out}"
    if problem.kind not in family.kinds:
        return f"takes {' and '.join(family.kinds)} calls, not {problem.kind} ones"
    if problem.gathers and not family.gathers:
        return "takes no row_index"
    if problem.weighted and not family.weights_rows:
        return "takes no row_weight"
    if problem.arch not in variant.targets:
        return f"has no cubin for {problem.arch}"
    return None


def takes_runs(variant: Variant) -> bool:
    """Whether `variant` divides whole k-ranges into runs of feature strips, not into tiles in turns."""
    return variant.swap_ab and FAMILIES[variant.family].runs


def strip_of(variant: Variant) -> int:
    """Rows of weights that no run of `variant` parts."""
    return 2 * STRIP if variant.gated else STRIP


def tiles_upper_bound(problem: Problem, variant: Variant) -> int:
    """Output tiles that the call can have at most, from what the host knows; exact for a list call."""
    token, feature = variant.token_tile, variant.feature_tile
    if problem.kind == "list":
        return sum(-(-m // token) * -(-n // feature) for m, n, _ in problem.shapes)
    return _token_tiles_upper_bound(problem, token) * -(-problem.n // feature)


def units_upper_bound(problem: Problem, variant: Variant, least_units: int) -> int:
    """What CTAs share out among themselves, at most: k-tiles with `least_units` (split-K), else strips of
    features for each tile of tokens, or tiles. There is no use for more CTAs than that."""
    if least_units:
        return tiles_upper_bound(problem, variant) * -(-problem.k // variant.tile[2])
    if takes_runs(variant):
        return _token_tiles_upper_bound(problem, variant.token_tile) * -(-problem.n // strip_of(variant))
    return tiles_upper_bound(problem, variant)


def _token_tiles_upper_bound(problem: Problem, token: int) -> int:
    if problem.kind == "masked":
        return problem.groups * -(-problem.max_rows // token)
    return min(problem.groups, problem.rows) + problem.rows // token


def expected_active(rows: int, groups: int) -> float:
    """Experts that get a row when every row picks one of `groups` evenly."""
    if rows == 0 or groups == 0:
        return 0.0
    return groups * (1.0 - (1.0 - 1.0 / groups) ** rows)


def expected_groups(problem: Problem) -> list[Groups]:
    """The groups that have rows. A list call knows them. Elsewhere every row picks an expert evenly: a group
    has a binomial number of rows; masked, `expected_rows` of them (half of `max_rows` without the hint) in
    the mean and never more than `max_rows`."""
    if problem.kind == "list":
        return [Groups(m, n, k, 1.0) for m, n, k in problem.shapes if m and n]
    rows = problem.rows
    if problem.kind == "masked":
        mean = min(problem.expected_rows or (problem.max_rows + 1) // 2, problem.max_rows)
        rows = mean * problem.groups
    sizes = _binomial(rows, problem.groups)
    if problem.kind == "masked":
        clipped: dict[int, float] = {}
        for size, count in sizes.items():
            size = min(size, problem.max_rows)
            clipped[size] = clipped.get(size, 0.0) + count
        sizes = clipped
    return [Groups(size, problem.n, problem.k, count) for size, count in sizes.items()]


def _binomial(rows: int, groups: int) -> dict[int, float]:
    # Expected number of groups by their rows, those without any left out. Many sizes: every step-th.
    if rows == 0 or groups == 0:
        return {}
    if groups == 1:
        return {rows: 1.0}
    share = 1.0 / groups
    mean = rows * share
    spread = 6.0 * sqrt(mean) + 6.0
    first, last = max(0, int(mean - spread)), min(rows, int(mean + spread))
    step = -(-(last - first + 1) // MOST_SIZES)
    chance = {
        size: exp(
            lgamma(rows + 1)
            - lgamma(size + 1)
            - lgamma(rows - size + 1)
            + size * log(share)
            + (rows - size) * log(1.0 - share)
        )
        for size in range(first, last + 1, step)
    }
    total = sum(chance.values())
    return {size: groups * part / total for size, part in chance.items() if size}

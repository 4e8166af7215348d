"""Which variant runs a problem: a pure function from a description to a ranked list with reasons.

No GPU, no arrays, no state. `fits` is the one statement of what a variant can do; `select` ranks what fits by
the clocks that a small model expects, each term of which is named in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from .manifest import Variant


@dataclass(frozen=True, slots=True)
class Problem:
    """One call. `kind` "packed": `rows` over `groups` experts of (n, k), nobody on the host knows how many
    each has. "masked": up to `max_rows` in each group, of which the caller expects `expected_rows` (0: does
    not say), and rows is 0. "list": `shapes` holds (m, n, k) of every group, and rows, n, k are 0. `gathers`:
    rows come through a row_index. `weighted`: rows of the result are multiplied by a row_weight."""

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


@dataclass(frozen=True, slots=True)
class Rates:
    """What one SM gets done per clock: bytes from DRAM (its share), bytes from L2 into shared memory, FP8
    multiply-adds; and the clocks that a tile costs besides (pipeline fill, epilogue, tensor-map update)."""

    dram: float
    l2: float
    mma: float
    tile_clocks: float


# sm_90a: DRAM and MMA measured on an H200 (DESIGN section 2), the twin converts FP8 to FP16 first. L2 and the
# clocks per tile are assumed. sm_120a, sm_121a: bandwidth over SMs at 2.4 GHz for an RTX 5090 and a GB10,
# block-scaled MMA at 2048 FLOP per clock; nothing of it measured by us.
RATES = {
    "sm_90a": Rates(dram=17.4, l2=25.0, mma=800.0, tile_clocks=1500.0),
    "sm_120a": Rates(dram=4.4, l2=20.0, mma=1024.0, tile_clocks=1500.0),
    "sm_121a": Rates(dram=2.4, l2=20.0, mma=1024.0, tile_clocks=1500.0),
}
OVERLAP = 0.1  # the part of the shorter terms that does not hide behind the longest one


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant and the clocks that the model expects of it. Terms: `dram` unique bytes, `l2` tile loads with
    weights re-read for every token tile, `mma` padded multiply-adds, `tiles` fixed cost; the last three over
    whole waves. `least_units`: 0 where CTAs take whole tiles, else split-K in runs of at least so many
    k-tiles."""

    variant: Variant
    clocks: float
    terms: dict[str, float]
    reason: str
    least_units: int = 0


def fits(problem: Problem, variant: Variant) -> str | None:
    """None where `variant` can run `problem`, else why not."""
    if variant.role != "gemm":
        return f"is a {variant.role} kernel"
    for side, have, want in (("a", variant.a, problem.a), ("b", variant.b, problem.b)):
        if have != want:
            return f"{side} is {have}, not {want}"
    if problem.out not in variant.outs:
        return f"out is {' or '.join(variant.outs)}, not {problem.out}"
    if variant.family == "fp8_packed":
        if problem.kind == "list":
            return "takes one array of weights, not a list of groups"
    elif problem.kind == "masked":
        return "does not take masked rows (rows=)"
    elif problem.gathers:
        return "does not gather rows (row_index)"
    elif problem.weighted:
        return "does not weight rows (row_weight)"
    if problem.arch not in variant.targets:
        return f"has no cubin for {problem.arch}"
    return None


def select(problem: Problem, variants: Iterable[Variant], device_sm_count: int) -> list[Choice]:
    """Variants that fit `problem`, best first, on a device of `device_sm_count` SMs; empty where none fits.

    Raises KeyError for an architecture without rates.
    """
    rates = RATES[problem.arch]
    choices = [_estimate(problem, v, device_sm_count, rates) for v in variants if fits(problem, v) is None]
    return sorted(choices, key=lambda choice: (choice.clocks, choice.variant.key))


def can_split(problem: Problem, variant: Variant, device_sm_count: int) -> bool:
    """Whether split-K can run `problem`: the kernel counts units (k-tiles of all tiles) times CTAs in 32
    bits."""
    if variant.family != "fp8_packed":
        return False
    units = tiles_upper_bound(problem, variant) * -(-problem.k // variant.tile[2])
    return units * device_sm_count < 2**32


def tiles_upper_bound(problem: Problem, variant: Variant) -> int:
    """Output tiles that the call can have at most, from what the host knows; exact for a list call."""
    token, feature = variant.token_tile, variant.feature_tile
    if problem.kind == "list":
        return sum(-(-m // token) * -(-n // feature) for m, n, _ in problem.shapes)
    if problem.kind == "masked":
        return problem.groups * -(-problem.max_rows // token) * -(-problem.n // feature)
    return (min(problem.groups, problem.rows) + problem.rows // token) * -(-problem.n // feature)


def describe(problem: Problem, choices: Sequence[Choice]) -> str:
    """The ranked list as lines of text."""
    if problem.kind == "list":
        rows = [m for m, _, _ in problem.shapes]
        what = f"list of {problem.groups} groups, {sum(rows)} rows, at most {max(rows, default=0)} in one"
    else:
        rows_of = f"M={problem.rows}" if problem.kind == "packed" else f"max_m={problem.max_rows}"
        what = f"{problem.kind} {rows_of} E={problem.groups} N={problem.n} K={problem.k}"
    lines = [f"sm12x select: {what}, {problem.a} x {problem.b} -> {problem.out} on {problem.arch}"]
    for rank, choice in enumerate(choices, 1):
        terms = " ".join(f"{name} {clocks:.0f}" for name, clocks in choice.terms.items())
        lines.append(f"  {rank}. {choice.variant.key}: {choice.clocks:.0f} clocks ({terms}); {choice.reason}")
    return "\n".join(lines)


def _estimate(problem: Problem, variant: Variant, sms: int, rates: Rates) -> Choice:
    token, feature = variant.token_tile, variant.feature_tile
    tile_clocks = rates.tile_clocks
    if problem.kind == "list":
        shapes = [(m, n, k, -(-m // token), -(-n // feature)) for m, n, k in problem.shapes if m]
        active = float(len(shapes))
        rows = float(sum(m for m, *_ in shapes))
        token_tiles = float(sum(x for *_, x, _ in shapes))
        tiles = float(sum(x * y for *_, x, y in shapes))
        loads = float(sum(x * y * (token + feature) * k for _, _, k, x, y in shapes))
        step = variant.token_step or token
        padded = float(sum(-(-m // step) * step * y * feature * k for m, _, k, _, y in shapes))
        unique = float(sum(n * k + m * (k + 2 * n) for m, n, k, _, _ in shapes))
    else:
        if problem.kind == "masked":
            active = float(problem.groups)
            rows = active * min(problem.max_rows, problem.expected_rows or problem.max_rows)
        else:
            active = expected_active(problem.rows, problem.groups)
            rows = float(problem.rows)
        # Rows of an expert spread around their mean: half a tile more than the mean's share, at least one.
        token_tiles = active * max(1.0, rows / active / token + 0.5) if active else 0.0
        tiles = token_tiles * ceil(problem.n / feature)
        loads = tiles * (token + feature) * problem.k
        computed = token_tiles * token
        if variant.token_step:
            computed = min(
                computed,
                active * max(1.0, rows / active / variant.token_step + 0.5) * variant.token_step
                if active
                else 0.0,
            )
        padded = computed * ceil(problem.n / feature) * feature * problem.k
        unique = active * problem.n * problem.k + rows * (problem.k + 2 * problem.n)
        if variant.family != "fp8_packed":
            tile_clocks *= 3.0  # its preparation kernel and descriptors
    # SMs work in waves: the last one is as long as the others however few tiles it has.
    waves = ceil(tiles / sms) if tiles else 0
    stretch = waves * sms / tiles if tiles else 0.0
    terms = {
        "dram": unique / (rates.dram * sms),
        "l2": loads * stretch / (rates.l2 * sms),
        "mma": padded * stretch / (rates.mma * sms),
        "tiles": waves * tile_clocks,
    }
    longest = max(terms, key=lambda name: terms[name])
    clocks = (1.0 - OVERLAP) * terms[longest] + OVERLAP * sum(terms.values())
    reread = token_tiles / active if active else 0.0
    reason = (
        f"bound by {longest}: {rows / active if active else 0.0:.1f} rows per active expert in token "
        f"tiles of {token}, "
        f"weights read {reread:.2f} times, {waves} waves on {sms} SMs"
    )
    splits = tiles < 2 * sms and can_split(problem, variant, sms)
    return Choice(variant, clocks, terms, reason, 4 if splits else 0)


def expected_active(rows: int, groups: int) -> float:
    """Experts that get a row when every row picks one of `groups` evenly."""
    if rows == 0 or groups == 0:
        return 0.0
    return groups * (1.0 - (1.0 - 1.0 / groups) ** rows)

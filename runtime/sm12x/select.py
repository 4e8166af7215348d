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
    each has. `kind` "list": `shapes` holds (m, n, k) of every group, and rows, n, k are 0."""

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
    whole waves."""

    variant: Variant
    clocks: float
    terms: dict[str, float]
    reason: str


def fits(problem: Problem, variant: Variant) -> str | None:
    """None where `variant` can run `problem`, else why not."""
    if variant.role != "gemm":
        return f"is a {variant.role} kernel"
    for side, have, want in (
        ("a", variant.a, problem.a),
        ("b", variant.b, problem.b),
        ("out", variant.out, problem.out),
    ):
        if have != want:
            return f"{side} is {have}, not {want}"
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


def tiles_upper_bound(problem: Problem, variant: Variant) -> int:
    """Output tiles that the call can have at most, from what the host knows; exact for a list call."""
    token, feature = variant.token_tile, variant.feature_tile
    if problem.kind == "list":
        return sum(-(-m // token) * -(-n // feature) for m, n, _ in problem.shapes)
    return (min(problem.groups, problem.rows) + problem.rows // token) * -(-problem.n // feature)


def describe(problem: Problem, choices: Sequence[Choice]) -> str:
    """The ranked list as lines of text."""
    if problem.kind == "list":
        rows = [m for m, _, _ in problem.shapes]
        what = f"list of {problem.groups} groups, {sum(rows)} rows, at most {max(rows, default=0)} in one"
    else:
        what = f"packed M={problem.rows} E={problem.groups} N={problem.n} K={problem.k}"
    lines = [f"sm12x select: {what}, {problem.a} x {problem.b} -> {problem.out} on {problem.arch}"]
    for rank, choice in enumerate(choices, 1):
        terms = " ".join(f"{name} {clocks:.0f}" for name, clocks in choice.terms.items())
        lines.append(f"  {rank}. {choice.variant.key}: {choice.clocks:.0f} clocks ({terms}); {choice.reason}")
    return "\n".join(lines)


def _estimate(problem: Problem, variant: Variant, sms: int, rates: Rates) -> Choice:
    token, feature = variant.token_tile, variant.feature_tile
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
    # SMs work in waves: the last one is as long as the others however few tiles it has.
    waves = ceil(tiles / sms) if tiles else 0
    stretch = waves * sms / tiles if tiles else 0.0
    terms = {
        "dram": unique / (rates.dram * sms),
        "l2": loads * stretch / (rates.l2 * sms),
        "mma": padded * stretch / (rates.mma * sms),
        "tiles": waves * rates.tile_clocks,
    }
    longest = max(terms, key=lambda name: terms[name])
    clocks = (1.0 - OVERLAP) * terms[longest] + OVERLAP * sum(terms.values())
    reread = token_tiles / active if active else 0.0
    reason = (
        f"bound by {longest}: {rows / active if active else 0.0:.1f} rows per active expert in token "
        f"tiles of {token}, "
        f"weights read {reread:.2f} times, {waves} waves on {sms} SMs"
    )
    return Choice(variant, clocks, terms, reason)


def expected_active(rows: int, groups: int) -> float:
    """Experts that get a row when every row picks one of `groups` evenly."""
    if rows == 0 or groups == 0:
        return 0.0
    return groups * (1.0 - (1.0 - 1.0 / groups) ** rows)

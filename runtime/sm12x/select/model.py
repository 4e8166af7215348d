"""How long a variant takes: stated terms in microseconds, from numbers that the host knows.

    launch   launches in a CUDA graph (one; with a preparation kernel more), the kernel's start and end, and
             with a row index its first look-up
    setup    what each expert that the busiest CTA turns to keeps its loads waiting (ptr_array: rewriting
             tensor maps, or quantising all of its rows first); where a run of strips crosses from one expert
             to the next, its two short pieces
    dram     unique bytes over what the SMs with work can pull: the device's rate, or the ceiling of each SM;
             and part of what lies past K in the last k-tile
    smem     bytes into shared memory, weights once for every tile of tokens: at L2's rate for all SMs
             together, or at one SM's ceiling for the busiest
    gather   the busiest CTA's token rows, copied 16 bytes at a time by one warp, and what handing each k-tile
             over takes it, or quantised on the way by two warps: anew for each piece, or once for each expert
             where they hold the codes; 0 where TMA brings them
    mma      multiply-adds of the busiest CTA: padded tiles, useful k-blocks, what a k-tile costs besides
    tiles    the end of each tile of the busiest CTA: draining, epilogue
    split    split-K: parts handed in and added up

dram, smem, gather and the MMA warps (mma + tiles) go on at the same time:

    us = launch + setup + split + longest + overlap * (sum of the four - longest)

What the busiest CTA has depends on the schedule (sm12x/kernel/packed_scheduler.hpp). Tiles in turns: the
tiles over the SMs, rounded up. Runs of feature strips: an equal share of all strips, or of those of one tile
of tokens where these are few, up to a strip. Split-K: an equal share, up to a k-tile. The terms say what that
costs; where a few SMs saturate DRAM it is little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..manifest import Variant
from .problem import Groups, Problem, strip_of, takes_runs, units_upper_bound
from .rates import FAMILIES, dram, family_of, rates_of

MMA_M, MMA_K = 16, 32  # of one MMA instruction
OUT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant, how it divides the work, and the microseconds that the model expects of it.

    `least_units` 0: every CTA computes whole k-ranges; else split-K with at least so many k-tiles a CTA.
    `terms` as the module's docstring says. `reason`: what the time is made of, in words.
    """

    variant: Variant
    least_units: int
    us: float
    terms: dict[str, float]
    reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a variant has to do for a problem: sums over all groups; expected values, so not whole numbers.

    `active` groups; `hollow`: bytes past K of a copy of all weights; `units`: k-tiles of all tiles; `strips`
    of features of all groups; `strip_units`: those times each group's tiles of tokens. `unique`: bytes that
    DRAM moves. `weights` and `tokens`: bytes to shared memory, tile by tile. `macs`: multiply-adds, padding
    included. `operands`: bytes of weights there.
    """

    active: float
    rows: float
    hollow: float
    token_tiles: float
    tiles: float
    units: float
    strips: float
    strip_units: float
    unique: float
    weights: float
    tokens: float
    macs: float
    operands: float


@dataclass(frozen=True, slots=True)
class Busiest:
    """The CTA with the most work: its `share` of all weights, `mma_share` of all multiply-adds and `tokens`,
    bytes of token rows; `experts` that it turns to; `cut`: k-tiles of 128 features that its run cuts,
    wherever runs do not keep to a tile of tokens; `visits`: tiles (or pieces of them) that it ends, of
    `values` values; `k_tiles` that it multiplies. Besides: `all_tokens` of all CTAs, and `reading`, DRAM's
    microseconds, `split`, split-K's, and `how` the work is divided.
    """

    how: str = "nothing to do"
    share: float = 0.0
    mma_share: float = 0.0
    tokens: float = 0.0
    experts: float = 0.0
    cut: float = 0.0
    visits: float = 0.0
    values: float = 0.0
    k_tiles: float = 0.0
    all_tokens: float = 0.0
    reading: float = 0.0
    split: float = 0.0


def measure(problem: Problem, groups: Sequence[Groups], variant: Variant) -> Work:
    """The work of `variant` for `problem`, whose groups `expected_groups` gives."""
    skips_k, out_bytes = FAMILIES[variant.family].skips_k, OUT_BYTES[problem.out]
    token, feature, tile_k = variant.token_tile, variant.feature_tile, variant.tile[2]
    step = variant.token_step or token
    strip = strip_of(variant)
    padded_to = strip if takes_runs(variant) else feature
    sums = [0.0] * 13
    for group in groups:
        count, rows, n, k = group.count, group.rows, group.n, group.k
        token_tiles = -(-rows // token)
        k_tiles = -(-k // tile_k)
        computed_k = -(-k // MMA_K) * MMA_K if skips_k else k_tiles * tile_k
        computed_rows = -(-rows // step) * step
        computed_n = -(-n // padded_to) * padded_to
        tiles = token_tiles * -(-n // feature)
        strips = -(-n // strip)
        written = n // 2 if variant.gated else n
        for at, value in enumerate(
            (
                1,
                rows,
                n * (k_tiles * tile_k - k),
                token_tiles,
                tiles,
                tiles * k_tiles,
                strips,
                strips * token_tiles,
                n * k + rows * (k + out_bytes * written),
                token_tiles * n * k,
                tiles * token * k,
                computed_rows * computed_n * computed_k,
                token_tiles * computed_n * computed_k,
            )
        ):
            sums[at] += count * value
    return Work(*sums)


def whole_k(problem: Problem, work: Work, variant: Variant, sms: int) -> Choice:
    """`variant` where nothing is split along K: tiles in turns, or runs of feature strips."""
    if not work.tiles:
        busiest = Busiest()
    elif takes_runs(variant):
        busiest = of_runs(problem, work, variant, sms)
    else:
        busiest = of_turns(problem, work, variant, sms)
    return _choice(problem, work, variant, sms, busiest, 0)


def split_k(problem: Problem, work: Work, variant: Variant, sms: int, least_units: int) -> Choice:
    """`variant` with a k-tile as the unit of work: CTAs take equal runs of at least `least_units`."""
    busiest = of_split(problem, work, variant, sms, least_units) if work.tiles else Busiest()
    return _choice(problem, work, variant, sms, busiest, least_units)


def of_turns(problem: Problem, work: Work, variant: Variant, sms: int) -> Busiest:
    """The busiest CTA where CTA c of G takes tiles c, c + G, c + 2G, ..."""
    ceiling, device = _ceiling(problem), dram(problem.arch, sms)
    waves = ceil(work.tiles / sms)
    full = work.tiles // sms * sms
    rest = work.tiles - full
    tile_bytes = work.unique / work.tiles
    reading = full * tile_bytes / device
    if rest:
        reading += tile_bytes * max(rest / device, 1.0 / ceiling)
    share = waves / work.tiles
    return Busiest(
        how=f"{work.tiles:.0f} tiles in turns on {min(sms, ceil(work.tiles))} SMs, at most {waves} each",
        share=share,
        mma_share=share,
        tokens=share * work.tokens,
        experts=min(waves, work.active),
        visits=waves,
        values=variant.token_tile * variant.feature_tile,
        k_tiles=share * work.units,
        all_tokens=work.tokens,
        reading=reading / 1e3,
    )


def of_runs(problem: Problem, work: Work, variant: Variant, sms: int) -> Busiest:
    """The busiest CTA where strips of features of all experts are cut into equal runs."""
    ctas = max(1, min(sms, units_upper_bound(problem, variant, 0)))
    token_tiles = work.token_tiles / work.active
    of_a_tile = _ctas_of_a_tile(work.token_tiles, ctas)
    if of_a_tile:
        runs = of_a_tile * max(1, round(work.token_tiles))
        units = float(ceil(work.strips / work.active / of_a_tile - 1e-9))
    else:
        runs = max(1, min(ctas, int(work.strip_units)))
        units = work.strip_units / runs
    strips = max(1, ceil(units / token_tiles - 1e-9))
    share = min(1.0, strips * token_tiles / work.strip_units)
    # Runs lie one after another along the experts: as many stretches inside one expert as there are experts
    # and cuts, unless they keep to a tile of tokens.
    experts = 1.0 if of_a_tile else min(1.0 + (work.active - 1.0) / runs, float(strips))
    stretch = ceil(strips / experts)
    # Pieces of at most a tile. Of each the warps take atoms of two strips in turns.
    strip = strip_of(variant)
    most = variant.feature_tile // strip
    pieces = ceil(stretch / most)
    piece = stretch / pieces
    warps = min(max(1, variant.mma_warps), max(1, variant.feature_tile // MMA_M))
    uneven = ceil(piece * strip / MMA_M / warps) * warps * (MMA_M // strip) / piece
    visits = experts * pieces * token_tiles
    tokens = visits * variant.token_tile * problem.k
    return Busiest(
        how=f"{work.strips:.0f} strips in runs on {runs} SMs, at most {strips} each",
        share=share,
        mma_share=share * uneven,
        tokens=tokens,
        experts=experts,
        cut=0.0
        if of_a_tile or work.active <= 1.0
        else work.units / work.tiles * variant.feature_tile / 128.0,
        visits=visits,
        values=variant.token_tile * piece * strip,
        k_tiles=visits * work.units / work.tiles,
        all_tokens=min(runs, work.strips) * tokens,  # a run inside one strip's units has nothing
        reading=_reading(problem, work, share, sms),
    )


def _ctas_of_a_tile(token_tiles: float, ctas: int) -> int:
    # Where tiles of tokens are few, each gets equally many CTAs, if few stay idle; 0: runs are all equal.
    tiles = max(1, round(token_tiles))
    each = ctas // tiles
    return each if 4 * tiles <= ctas and 16 * each * tiles >= 15 * ctas else 0


def of_split(problem: Problem, work: Work, variant: Variant, sms: int, least_units: int) -> Busiest:
    """The busiest CTA where the k-tiles of all tiles are cut into equal runs."""
    runs = max(1, min(sms, int(work.units / least_units)))
    run = ceil(work.units / runs)
    k_tiles = work.units / work.tiles
    share = run / work.units
    # A run that begins anywhere in a tile ends one tile more than its length, unless it begins at its start.
    visits = min(run / k_tiles + 1.0 - 1.0 / k_tiles, work.tiles)
    values = variant.token_tile * variant.feature_tile
    # A CTA hands in two parts at most, and adds up those of one tile.
    parts = 2.0 + min(float(runs), k_tiles / run + 1.0)
    return Busiest(
        how=f"{work.units:.0f} k-tiles split over {runs} SMs, {run} each",
        share=share,
        mma_share=share,
        tokens=share * work.tokens,
        experts=min(visits, 1.0 + (work.active - 1.0) / runs),
        visits=visits,
        values=values,
        k_tiles=run,
        all_tokens=work.tokens,
        reading=_reading(problem, work, share, sms),
        split=rates_of(problem.arch, problem.early).fix_up + parts * 4.0 * values / _ceiling(problem) / 1e3,
    )


def _ceiling(problem: Problem) -> float:
    # Bytes per nanosecond that one SM pulls at most.
    rates = rates_of(problem.arch, problem.early)
    return rates.sm * rates.clock


def _reading(problem: Problem, work: Work, share: float, sms: int) -> float:
    # Microseconds of DRAM where all CTAs have the busiest one's share, or nothing.
    return work.unique * max(1.0 / dram(problem.arch, sms), share / _ceiling(problem)) / 1e3


def _choice(
    problem: Problem,
    work: Work,
    variant: Variant,
    sms: int,
    busiest: Busiest,
    least_units: int,
) -> Choice:
    rates, family = rates_of(problem.arch, problem.early), family_of(variant.family, problem.early)
    launches = 0
    if family.prepared:
        launches = -(-problem.groups // family.prepared) if problem.kind == "list" else 1
    clocks = busiest.mma_share * (work.macs / rates.mma + work.operands * rates.operand)
    clocks += busiest.k_tiles * rates.k_tile
    # Pingpong: the other MMA group multiplies meanwhile, except behind the last tile.
    ends = min(1.0, busiest.visits) if variant.schedule == "pingpong" else busiest.visits
    loads = max(
        (work.weights + busiest.all_tokens) / (rates.l2 * sms),
        (busiest.share * work.weights + busiest.tokens) / rates.sm,
    )
    gather = 0.0
    if problem.gathers:
        gather = busiest.tokens / 16.0 * rates.gathered + busiest.k_tiles * rates.handed
    hold = 0.0
    if family.quantises:
        values = busiest.tokens
        # A CTA takes an expert's tiles of tokens in turns: the codes of one are held, of two neither's.
        one_tile = work.token_tiles <= 1.2 * work.active
        held = variant.token_tile == family.held_rows and problem.k <= family.held_k
        if held and not least_units and one_tile:
            values = min(values, busiest.experts * variant.token_tile * problem.k)
            hold = family.hold
        gather = values / 16.0 * rates.quantised
    thousand_clocks = rates.clock * 1e3
    terms = {
        "launch": rates.launch
        + launches * rates.next_launch
        + family.start
        + (rates.lookup if problem.gathers else 0.0),
        "setup": busiest.experts * (family.setup + hold) + busiest.cut * family.cut,
        "dram": busiest.reading * (1.0 + family.hollow * work.hollow / max(work.unique, 1.0)),
        "smem": loads / thousand_clocks,
        "gather": gather / thousand_clocks,
        "mma": clocks / thousand_clocks,
        "tiles": ends * (family.tile + busiest.values * rates.value / thousand_clocks),
        "split": busiest.split,
    }
    concurrent = {name: terms[name] for name in ("dram", "smem", "gather")}
    concurrent["mma"] = terms["mma"] + terms["tiles"]
    longest = max(concurrent, key=lambda name: concurrent[name])
    us = terms["launch"] + terms["setup"] + terms["split"] + concurrent[longest]
    us += rates.overlap * (sum(concurrent.values()) - concurrent[longest])
    active = work.active or 1.0
    reason = (
        f"bound by {longest}: {work.rows / active:.1f} rows per active expert in token tiles of "
        f"{variant.token_tile}, weights read {work.token_tiles / active:.2f} times, {busiest.how}"
    )
    return Choice(variant, least_units, us, terms, reason)

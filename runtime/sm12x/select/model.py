"""How long a variant takes: stated terms in microseconds, from numbers that the host knows.

    launch   launches in a CUDA graph (one; with a preparation kernel more), the kernel's start and end, and
             with a row index its first look-up
    setup    what each expert that the busiest CTA turns to keeps its loads waiting (ptr_array: rewriting
             tensor maps)
    dram     unique bytes over what the SMs with work can pull: the device's rate, or the ceiling of each SM
    smem     bytes into shared memory, weights once for every tile of tokens: at L2's rate for all SMs
             together, or at one SM's ceiling for the busiest
    gather   the busiest CTA's token rows, copied 16 bytes at a time by one warp; 0 without a row index
    mma      multiply-adds of the busiest CTA: padded tiles, useful k-blocks, what a k-tile costs besides
    tiles    the end of each tile of the busiest CTA: draining, epilogue
    split    split-K: parts handed in and added up

dram, smem, gather and the MMA warps (mma + tiles) go on at the same time:

    us = launch + setup + split + longest + overlap * (sum of the four - longest)

The busiest CTA of whole tiles has the number of tiles over the number of SMs, rounded up: that is the
imbalance, and each term says what it costs. Where a few SMs saturate DRAM, tiles left over cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..manifest import Variant
from .problem import Groups, Problem
from .rates import FAMILIES, RATES, Family, Rates, dram

MMA_K = 32  # of one MMA instruction
OUT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant, how it divides the work, and the microseconds that the model expects of it.

    `least_units` 0: whole tiles; else split-K with at least so many k-tiles a CTA. `terms` as the module's
    docstring says. `reason`: what the time is made of, in words.
    """

    variant: Variant
    least_units: int
    us: float
    terms: dict[str, float]
    reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a variant has to do for a problem, over all tiles; expected values, so not whole numbers.

    `units`: k-tiles of all tiles. `unique`: bytes that DRAM moves. `loads`: bytes to shared memory, `tokens`
    of them token rows. `macs`: multiply-adds, padding included. `operands`: bytes of weights in them.
    """

    active: float
    rows: float
    token_tiles: float
    tiles: float
    units: float
    unique: float
    loads: float
    tokens: float
    macs: float
    operands: float


def measure(problem: Problem, groups: Sequence[Groups], variant: Variant) -> Work:
    """The work of `variant` for `problem`, whose groups `expected_groups` gives."""
    skips_k, out_bytes = FAMILIES[variant.family].skips_k, OUT_BYTES[problem.out]
    token, feature, tile_k = variant.token_tile, variant.feature_tile, variant.tile[2]
    step = variant.token_step or token
    sums = [0.0] * 10
    for group in groups:
        count, rows, n, k = group.count, group.rows, group.n, group.k
        token_tiles = -(-rows // token)
        feature_tiles = -(-n // feature)
        k_tiles = -(-k // tile_k)
        computed_k = -(-k // MMA_K) * MMA_K if skips_k else k_tiles * tile_k
        computed_rows = -(-rows // step) * step
        tiles = token_tiles * feature_tiles
        tokens = tiles * token * k
        for at, value in enumerate(
            (
                1,
                rows,
                token_tiles,
                tiles,
                tiles * k_tiles,
                n * k + rows * (k + out_bytes * n),
                token_tiles * n * k + tokens,
                tokens,
                computed_rows * feature_tiles * feature * computed_k,
                tiles * feature * computed_k,
            )
        ):
            sums[at] += count * value
    return Work(*sums)


def whole_tiles(problem: Problem, work: Work, variant: Variant, sms: int) -> Choice:
    """`variant` with a tile as the unit of work: CTAs take them in turns."""
    rates, family = RATES[problem.arch], FAMILIES[variant.family]
    most = ceil(work.tiles)  # a CTA each where there are fewer than SMs
    waves = ceil(work.tiles / sms)
    share = waves / work.tiles if work.tiles else 0.0
    full = work.tiles // sms * sms
    rest = work.tiles - full
    ceiling = rates.sm * rates.clock
    device = dram(problem.arch, sms)
    tile_bytes = work.unique / work.tiles if work.tiles else 0.0
    reading = full * tile_bytes / min(device, sms * ceiling)
    if rest:
        reading += tile_bytes * max(rest / device, 1.0 / ceiling)
    terms = _terms(problem, variant, work, share, reading / 1e3, waves, rates, family, device, sms)
    terms["split"] = 0.0
    how = f"{work.tiles:.0f} whole tiles on {min(sms, most)} SMs, at most {waves} each"
    return _choice(variant, 0, terms, rates, work, how)


def split_k(problem: Problem, work: Work, variant: Variant, sms: int, least_units: int) -> Choice:
    """`variant` with a k-tile as the unit of work: CTAs take equal runs of at least `least_units`."""
    rates, family = RATES[problem.arch], FAMILIES[variant.family]
    runs = max(1, min(sms, int(work.units / least_units)))
    run = max(1, ceil(work.units / runs))
    k_tiles = work.units / work.tiles if work.tiles else 1.0
    ceiling = rates.sm * rates.clock
    device = dram(problem.arch, sms)
    share = run / work.units if work.units else 0.0
    reading = work.unique * max(1.0 / device, share / ceiling)
    # A run that begins anywhere in a tile touches its own length and one tile more.
    touched = run / k_tiles + 1.0
    terms = _terms(problem, variant, work, share, reading / 1e3, touched, rates, family, device, sms)
    # A CTA hands in two parts at most, and adds up those of one tile.
    parts = min(float(runs), k_tiles / run + 1.0)
    part_bytes = 4.0 * variant.token_tile * variant.feature_tile
    terms["split"] = rates.fix_up + (2.0 + parts) * part_bytes / ceiling / 1e3 if work.units else 0.0
    how = f"{work.units:.0f} k-tiles split over {runs} SMs, {run} each"
    return _choice(variant, least_units, terms, rates, work, how)


def _terms(
    problem: Problem,
    variant: Variant,
    work: Work,
    share: float,
    reading: float,
    visits: float,
    rates: Rates,
    family: Family,
    device: float,
    sms: int,
) -> dict[str, float]:
    # `share` of all work on the busiest CTA, in `visits` tiles.
    thousand_clocks = rates.clock * 1e3
    launches = 0
    if family.prepared:
        launches = -(-problem.groups // family.prepared) if problem.kind == "list" else 1
    launch = rates.launch + launches * rates.next_launch + family.start
    gather = 0.0
    if problem.gathers:
        launch += rates.lookup
        gather = share * work.tokens / 16.0 * rates.gathered / thousand_clocks
    clocks = share * (work.macs / rates.mma + work.operands * rates.operand + work.units * rates.k_tile)
    ends = 1.0 if variant.schedule == "pingpong" else visits  # the other MMA group multiplies meanwhile
    values = variant.token_tile * variant.feature_tile
    return {
        "launch": launch,
        "setup": min(visits, work.active) * family.setup,
        "dram": reading,
        "smem": work.loads * max(1.0 / (rates.l2 * sms), share / rates.sm) / thousand_clocks,
        "gather": gather,
        "mma": clocks / thousand_clocks,
        "tiles": ends * (family.tile + values * rates.value / thousand_clocks) if work.tiles else 0.0,
    }


def _choice(
    variant: Variant, least_units: int, terms: dict[str, float], rates: Rates, work: Work, how: str
) -> Choice:
    concurrent = {name: terms[name] for name in ("dram", "smem", "gather")}
    concurrent["mma"] = terms["mma"] + terms["tiles"]
    longest = max(concurrent, key=lambda name: concurrent[name])
    us = terms["launch"] + terms["setup"] + terms["split"] + concurrent[longest]
    us += rates.overlap * (sum(concurrent.values()) - concurrent[longest])
    active = work.active or 1.0
    reason = (
        f"bound by {longest}: {work.rows / active:.1f} rows per active expert in token tiles of "
        f"{variant.token_tile}, weights read {work.token_tiles / active:.2f} times, {how}"
    )
    return Choice(variant, least_units, us, terms, reason)

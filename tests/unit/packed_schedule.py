"""What the CTAs of a packed kernel do, one by one: sm12x/kernel/packed_scheduler.hpp in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import ceil

from sm12x.manifest import Variant

STRIP = 8


@dataclass
class Cta:
    """`visits`: tiles, or pieces of them, that it ends; `weights`: strips that it reads, once for every tile
    of tokens; `rounds`: strips that its slowest warp multiplies, two at a time; `k_tiles` that it takes."""

    visits: int = 0
    weights: int = 0
    rounds: int = 0
    k_tiles: int = 0
    experts: set[int] = field(default_factory=set)


def starts_of_runs(tiles: int, strips: int, ctas: int) -> list[int]:
    """Where the run of each CTA begins, and behind them the end: `tiles` of tokens, each of `strips`."""
    units = tiles * strips
    if tiles and 4 * tiles <= ctas and 16 * (ctas // tiles) * tiles >= 15 * ctas:
        each = ctas // tiles
        return [min(run // each * strips + run % each * strips // each, units) for run in range(ctas + 1)]
    inverse = (2**32 - 1) // ctas + 1
    return [min(run * units * inverse >> 32, units) for run in range(ctas + 1)]


def pieces(strips: int, most: int) -> list[int]:
    """The pieces that a run's part in one group comes in, at most `most` strips each."""
    found = []
    while strips:
        piece = strips if strips <= most else (strips + 1) // 2 if strips < 2 * most else most
        found.append(piece)
        strips -= piece
    return found


def parts(
    rows: Sequence[int], n: int, token_tile: int, feature_tile: int, ctas: int
) -> list[list[tuple[int, list[int]]]]:
    """For every CTA, where strips of features are cut into equal runs: the groups that it turns to, each
    with the strips of its pieces there; a CTA takes all tiles of tokens of a piece. `rows` of each group."""
    strips, most = -(-n // STRIP), feature_tile // STRIP
    tiles = [-(-m // token_tile) for m in rows]
    starts = [0, *accumulate(tall * strips for tall in tiles)]
    ends = starts_of_runs(sum(tiles), strips, ctas)
    found = []
    group = 0
    for begin, end in pairwise(ends):
        taken = []
        while group < len(tiles) and starts[group] < end:
            # A run that begins or ends inside a strip's units begins or ends behind it.
            first, last = max(0, begin - starts[group]), min(end, starts[group + 1]) - starts[group]
            if first < last:
                taken.append((group, pieces(-(-last // tiles[group]) - -(-first // tiles[group]), most)))
            if starts[group + 1] > end:
                break
            group += 1
        found.append(taken)
    return found


def runs(rows: Sequence[int], n: int, variant: Variant, ctas: int) -> list[Cta]:
    """Every CTA's work where strips of features are cut into equal runs; `rows` of each group."""
    found = []
    for taken in parts(rows, n, variant.token_tile, variant.feature_tile, ctas):
        work = Cta()
        for group, sizes in taken:
            tall = -(-rows[group] // variant.token_tile)
            work.visits += tall * len(sizes)
            work.weights += tall * sum(sizes)
            work.rounds += tall * sum(2 * ceil(ceil(size / 2) / variant.mma_warps) for size in sizes)
            if sizes:
                work.experts.add(group)
        found.append(work)
    return found


def split(rows: Sequence[int], n: int, k_tiles: int, variant: Variant, ctas: int, least: int) -> list[Cta]:
    """Every CTA's work where the k-tiles of all tiles are cut into equal runs."""
    tiles = [
        expert
        for expert, m in enumerate(rows)
        for _ in range(-(-m // variant.token_tile) * -(-n // variant.feature_tile))
    ]
    units = len(tiles) * k_tiles
    count = max(1, min(ctas, units // least))
    found = []
    for cta in range(count):
        begin, end = cta * units // count, (cta + 1) * units // count
        work = Cta(k_tiles=end - begin)
        for tile in range(begin // k_tiles, -(-end // k_tiles)):
            work.visits += 1
            work.experts.add(tiles[tile])
        found.append(work)
    return found

"""What the CTAs of a packed kernel do, one by one: sm12x/kernel/packed_scheduler.hpp in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
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


def runs(rows: list[int], n: int, variant: Variant, ctas: int) -> list[Cta]:
    """Every CTA's work where strips of features are cut into equal runs; `rows` of each group."""
    strips, most = -(-n // STRIP), variant.feature_tile // STRIP
    tiles = [-(-m // variant.token_tile) for m in rows]
    ends = starts_of_runs(sum(tiles), strips, ctas)
    found = []
    for begin, end in pairwise(ends):
        work, start = Cta(), 0
        for expert, tall in enumerate(tiles):
            first = max(0, begin - start)
            last = min(tall * strips, end - start)
            start += tall * strips
            if first >= last or not tall:
                continue
            for size in pieces(-(-last // tall) - -(-first // tall), most):
                work.visits += tall
                work.weights += tall * size
                work.rounds += tall * 2 * ceil(ceil(size / 2) / variant.mma_warps)
                work.experts.add(expert)
        found.append(work)
    return found


def split(rows: list[int], n: int, k_tiles: int, variant: Variant, ctas: int, least: int) -> list[Cta]:
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

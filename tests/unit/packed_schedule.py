"""What the CTAs of a packed kernel do, one by one: sm12x/kernel/packed_scheduler.hpp in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from sm12x.manifest import Variant

STRIP = 16


@dataclass
class Cta:
    """`visits`: tiles, or pieces of them, that it ends; `weights`: strips that it reads, once for every tile
    of tokens; `rounds`: strips that its slowest warp multiplies; `k_tiles` that it takes."""

    visits: int = 0
    weights: int = 0
    rounds: int = 0
    k_tiles: int = 0
    experts: set[int] = field(default_factory=set)


def runs(rows: list[int], n: int, variant: Variant, ctas: int) -> list[Cta]:
    """Every CTA's work where strips of features are cut into equal runs; `rows` of each group."""
    strips, most = -(-n // STRIP), variant.feature_tile // STRIP
    tiles = [-(-m // variant.token_tile) for m in rows]
    units = sum(tiles) * strips
    count = max(1, min(ctas, units))
    found = []
    for cta in range(count):
        begin, end = cta * units // count, (cta + 1) * units // count
        length = max(1, end - begin)
        # Pieces of equal size, all of a CTA's laid out for the same number of strips.
        piece = -(-length // -(-length // most))
        work, start = Cta(), 0
        for expert, tall in enumerate(tiles):
            first = max(0, begin - start)
            last = min(tall * strips, end - start)
            start += tall * strips
            if first >= last or not tall:
                continue
            at, to = -(-first // tall), -(-last // tall)
            while at < to:
                left = to - at
                pieces = -(-left // piece)
                size = -(-left // pieces)
                work.visits += tall
                work.weights += tall * size
                work.rounds += tall * -(-size // variant.mma_warps)
                work.experts.add(expert)
                at += size
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

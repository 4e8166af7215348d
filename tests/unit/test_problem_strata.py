"""Random problems for the GPU: strata are what they say, and a run's share of a variant has every edge."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gpu import problem_strata
from gpu.problem_strata import FACTS, GROUPS, MOST_WEIGHTS, STRATA, Tile, draw, facts, token_tiles

TILES = [
    *(Tile(t, 128, 128) for t in (8, 16, 32, 64, 128)),
    *(Tile(8, 64, 128), Tile(16, 128, 64), Tile(64, 128, 128)),
]
SHARE = 4 * len(STRATA)  # of 10,000 problems, what each of 20 forced variants gets at least


@pytest.fixture
def seed() -> int:
    value = random.randrange(2**32)
    print(f"seed {value}")
    return value


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("sms", [132, 170, 48])
def test_every_stratum_is_what_it_says(tile: Tile, sms: int, seed: int) -> None:
    met = set()
    for number in range(len(STRATA)):
        spec = draw(tile, number + len(STRATA) * (seed % 7), seed + number, sms)
        layout, (least, most), k_class, waves = STRATA[spec.stratum]
        met.add(spec.stratum)
        found = facts(spec, tile, sms)
        assert spec.layout == layout
        assert least <= spec.rows.size <= most
        assert (spec.rows >= 0).all()
        assert spec.rows.any()
        assert waves in found, (waves, token_tiles(spec.rows, tile), spec.n)
        tails = {"one block": 16, "all but one block": tile.k - 16, "half": tile.k // 2, "whole": 0}
        if k_class in tails:
            assert spec.k % tile.k == tails[k_class]
        assert spec.k % 16 == 0
        assert spec.n % 8 == 0
        assert spec.k > 0 < spec.n
        assert spec.rows.size * spec.n * spec.k <= max(MOST_WEIGHTS, spec.rows.size * spec.n * tile.k)
    assert len(met) == len(STRATA)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_variants_share_of_a_run_has_every_fact(tile: Tile, seed: int) -> None:
    counts = dict.fromkeys(FACTS, 0)
    for number in range(SHARE):
        for fact in facts(draw(tile, number, seed + number, 132), tile, 132):
            counts[fact] += 1
    assert min(counts.values()) >= 5, counts


def test_a_seed_draws_the_same_problem_again(seed: int) -> None:
    first, second = (draw(TILES[0], 17, seed, 132) for _ in range(2))
    assert str(first) == str(second)
    assert np.array_equal(first.rows, second.rows)
    assert str(draw(TILES[0], 17, seed + 1, 132)) != str(first)


def test_sizes_suit_a_run_of_10000(seed: int) -> None:
    """Float64 products of all problems have to fit into minutes, and each into memory."""
    macs, largest = 0, 0
    specs = [draw(tile, n, seed + n, 132) for tile in TILES for n in range(len(STRATA))]
    for spec in specs:
        macs += int(spec.rows.sum()) * spec.n * spec.k
        largest = max(largest, int(spec.rows.sum()) * spec.n)
    assert macs / len(specs) < 4e9
    assert largest < 1 << 27
    assert {size for size, _ in GROUPS} == {1, 33, 129, 301}
    assert problem_strata.LAYOUTS == ("contiguous", "gather", "masked")

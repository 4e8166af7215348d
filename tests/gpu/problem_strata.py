"""Shapes of random problems of the family fp8_packed, drawn so that every variant meets its edges.

A stratum is a layout, a class of group counts, a class of K and whether the tiles fill more than one wave;
problem number i of a variant is of stratum i * STEP % STRATA. Within it everything is random: rows of each
group come from the edges of the variant's tile. Needs no torch, so that unit tests can look at what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from sm12x.validation.cases import A_SCALE_MODES, B_SCALE_MODES, BIASES

LAYOUTS = ("contiguous", "gather", "masked")
OUTS = ("bfloat16", "float16", "float32")
# (least, most) groups; the scheduler reads 32 groups to a vote and 128 to a window.
GROUPS = ((1, 32), (33, 128), (129, 300), (301, 1024))
K_CLASSES = ("one block", "all but one block", "half", "whole", "other")
WAVES = ("one wave", "more than one wave")
STRATA = tuple(product(LAYOUTS, GROUPS, K_CLASSES, WAVES))
STEP = 37  # no divisor in common with them: so neighbours differ in everything
K_BLOCK = 16  # K is a multiple of it
MOST_WEIGHTS = 1 << 25  # bytes of b
MOST_FEATURE_TILES = 24


@dataclass(frozen=True)
class Tile:
    """A variant's tile: rows, output features and K of it."""

    tokens: int
    features: int
    k: int


@dataclass(frozen=True)
class Spec:
    """A problem but for its data, which `seed` gives."""

    stratum: int
    seed: int
    layout: str
    rows: NDArray[np.int64]
    n: int
    k: int
    out: str
    modes: tuple[str, str]
    bias: str | None
    weighted: bool
    pads: tuple[int, int, int]
    out_pad: int
    out_gap: int
    form: int
    workspace: bool

    def __str__(self) -> str:
        extra = f" bias={self.bias}" * bool(self.bias) + " weighted" * self.weighted
        return (
            f"{self.layout} E={self.rows.size} M={int(self.rows.sum())} N={self.n} K={self.k} {self.out} "
            f"scales={self.modes}{extra} pads={self.pads} stratum={self.stratum} seed={self.seed}"
        )


def draw(tile: Tile, number: int, seed: int, sm_count: int) -> Spec:
    """Problem `number` of a variant with this tile, on a device of so many SMs."""
    rng = np.random.default_rng(seed)
    stratum = number * STEP % len(STRATA)
    layout, (least, most), k_class, waves = STRATA[stratum]
    rows = _draw_rows(int(rng.integers(least, most + 1)), tile, rng)
    feature_tiles = int(rng.integers(1, 4))
    if waves == "one wave":
        feature_tiles = 1
        rows = _at_most(rows, tile, sm_count, rng)
    else:
        tiles = token_tiles(rows, tile)
        wanted = sm_count // max(tiles, 1) + 1
        feature_tiles = min(max(feature_tiles, wanted), MOST_FEATURE_TILES)
        if tiles * feature_tiles <= sm_count:  # too few rows: give one group what is missing
            missing = sm_count // feature_tiles + 1 - tiles
            rows[rng.integers(rows.size)] += missing * tile.tokens
    tail = int(rng.choice((8, tile.features - 8, tile.features, 8 * rng.integers(1, tile.features // 8 + 1))))
    n = (feature_tiles - 1) * tile.features + tail
    return Spec(
        stratum=stratum,
        seed=seed,
        layout=layout,
        rows=rows,
        n=n,
        k=_draw_k(k_class, tile, rows.size * n, rng),
        out=str(rng.choice(OUTS)),
        modes=(
            str(rng.choice(("value", "token", "expert"))),
            str(rng.choice(("value", "expert", "channel"))),
        ),
        bias=BIASES[rng.integers(len(BIASES))],
        weighted=bool(rng.random() < 0.5),
        pads=(16 * int(rng.integers(3)), 16 * int(rng.integers(2)), int(rng.integers(3))),
        out_pad=8 * int(rng.integers(3)),
        out_gap=int(rng.integers(2)),
        form=int(rng.integers(1 << 16)),
        workspace=bool(rng.random() < 0.8),
    )


def token_tiles(rows: NDArray[np.int64], tile: Tile) -> int:
    return int((-(-rows // tile.tokens)).sum())


def _draw_rows(groups: int, tile: Tile, rng: np.random.Generator) -> NDArray[np.int64]:
    """Most groups of few have rows at the tile's edges; most of many have none or hardly any."""
    t = tile.tokens
    edges = np.array((1, t - 1, t, t + 1, 2 * t - 1, 2 * t, 2 * t + 1))
    rows = np.where(rng.random(groups) < 0.6, rng.choice(edges, groups), rng.integers(0, t + 1, groups))
    if groups > 32:
        empty, edgy = (0.4, 0.6) if groups <= 128 else (0.7, 0.3)
        rows = np.where(rng.random(groups) < edgy, rows, rng.integers(0, 4, groups))
        rows[rng.random(groups) < empty] = 0
    elif rng.random() < 0.5:
        rows[rng.random(groups) < 0.25] = 0
    if not rows.any():
        rows[rng.integers(groups)] = rng.choice(edges)
    return rows.astype(np.int64)


def _at_most(rows: NDArray[np.int64], tile: Tile, tiles: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`rows` with random groups emptied until they are at most so many tiles."""
    order = rng.permutation(rows.size)
    kept = np.cumsum(-(-rows[order] // tile.tokens)) <= tiles
    rows[order[~kept]] = 0
    return rows


def _draw_k(k_class: str, tile: Tile, weight_rows: int, rng: np.random.Generator) -> int:
    blocks = tile.k // K_BLOCK
    tail = {
        "one block": 1,
        "all but one block": blocks - 1,
        "half": blocks // 2,
        "whole": blocks,
        "other": int(rng.integers(1, blocks + 1)),
    }[k_class]
    least = tail * K_BLOCK
    room = (min(2048, MOST_WEIGHTS // weight_rows) - least) // tile.k
    # As many short reductions as long ones.
    return least + tile.k * int(rng.integers(0, max(0, min(room, int(rng.choice((1, 3, 16))))) + 1))


def facts(spec: Spec, tile: Tile, sm_count: int) -> set[str]:
    """What a problem is a case of; a run has to have every fact of FACTS for every variant."""
    rows = spec.rows[spec.rows > 0]
    found = {
        *(spec.layout, spec.out, f"a_scale {spec.modes[0]}", f"b_scale {spec.modes[1]}"),
        *(f"bias {spec.bias}", "weighted" if spec.weighted else "not weighted"),
    }
    tests = {
        "a row past a tile": (rows % tile.tokens == 1).any(),
        "a row short of a tile": (rows % tile.tokens == tile.tokens - 1).any(),
        "whole tiles of rows": (rows % tile.tokens == 0).any(),
        "several tiles of rows in a group": (rows > tile.tokens).any(),
        "an empty group": rows.size < spec.rows.size,
        "K one block past a tile": spec.k % tile.k == K_BLOCK,
        "K one block short of a tile": spec.k % tile.k == tile.k - K_BLOCK,
        "K half a tile": spec.k % tile.k == tile.k // 2,
        "K whole tiles": spec.k % tile.k == 0,
        "K of several tiles": spec.k > tile.k,
        "N a tail of 8": spec.n % tile.features == 8,
        "N whole tiles": spec.n % tile.features == 0,
        "more than 32 groups": spec.rows.size > 32,
        "more than 128 groups": spec.rows.size > 128,
        "more than one wave": token_tiles(spec.rows, tile) * -(-spec.n // tile.features) > sm_count,
        "one wave": token_tiles(spec.rows, tile) * -(-spec.n // tile.features) <= sm_count,
    }
    return found | {name for name, is_so in tests.items() if is_so}


FACTS = (
    *LAYOUTS,
    *OUTS,
    *(f"a_scale {mode}" for mode in A_SCALE_MODES),
    *(f"b_scale {mode}" for mode in B_SCALE_MODES),
    *(f"bias {kind}" for kind in BIASES),
    *("weighted", "not weighted", "a row past a tile", "a row short of a tile", "whole tiles of rows"),
    *("several tiles of rows in a group", "an empty group", "K one block past a tile"),
    *("K one block short of a tile", "K half a tile", "K whole tiles", "K of several tiles"),
    *("N a tail of 8", "N whole tiles", "more than 32 groups", "more than 128 groups"),
    *("more than one wave", "one wave"),
)

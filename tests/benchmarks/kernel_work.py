"""What a grouped GEMM kernel has to do for a call, by counting tiles: multiply-adds, bytes, issue slots.

For calls too large to emulate. The formulas are those of the kernels' schedules; what the emulator counts on
small problems has to agree with them (`tests/emulated/test_counters_packed.py`), and `packed_counters.py`
takes the issue slots of a tile from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sm12x import abi
from sm12x.emulator.counting.counters import Counters, Work
from sm12x.manifest import Variant
from unit import packed_schedule

PACKED, PTR_ARRAY = "fp8_packed", "fp8_ptr_array"
STRIP = packed_schedule.STRIP  # features that a swapped packed kernel divides its work by
ATOM = 16  # features of an MMA
BLOCK_K = 32  # depth of an MMA
FORM = "block_scaled"


@dataclass(frozen=True)
class Issue:
    """PTX instructions of which a machine instruction is left for sure: of a CTA, of one of its tiles, and of
    a k-tile of that."""

    cta: float
    tile: float
    k_tile: float


@dataclass(frozen=True)
class Call:
    """Rows of each group, output features, depth; `out_bytes` of an element of D."""

    rows: tuple[int, ...]
    n: int
    k: int
    out_bytes: int = 2

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    @property
    def active(self) -> int:
        """Groups with rows."""
        return sum(rows > 0 for rows in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Of the problem itself."""
        return self.total_rows * self.n * self.k

    @property
    def least_loaded(self) -> int:
        """Bytes that any kernel loads: weights of groups with rows, activations, scales per channel and per
        token, offsets; each once."""
        offsets = 4 * (len(self.rows) + 1)
        return self.active * self.n * (self.k + 4) + self.total_rows * (self.k + 4) + offsets

    @property
    def least_stored(self) -> int:
        """Bytes of the output."""
        return self.total_rows * self.n * self.out_bytes


def up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def tokens_computed(variant: Variant, rows: int) -> int:
    """Tokens that the tiles of a group of `rows` compute."""
    return up(rows, variant.token_step or variant.token_tile)


def takes_runs(variant: Variant) -> bool:
    """Whether CTAs take runs of strips of features: swapped kernels of the packed family."""
    return variant.family == PACKED and variant.swap_ab


def pieces_of_ctas(variant: Variant, call: Call, ctas: int) -> list[list[tuple[int, list[int]]]]:
    """For every CTA of a kernel that takes runs: rows of the groups that it turns to, and the features of its
    pieces there that MMAs compute, which is in sixteens."""
    return _pieces(call, variant.token_tile, variant.feature_tile, ctas)


@lru_cache(maxsize=256)
def _pieces(call: Call, token_tile: int, feature_tile: int, ctas: int) -> list[list[tuple[int, list[int]]]]:
    return [
        [(call.rows[group], [up(STRIP * size, ATOM) for size in sizes]) for group, sizes in taken]
        for taken in packed_schedule.parts(call.rows, call.n, token_tile, feature_tile, ctas)
    ]


def multiply_adds(variant: Variant, call: Call, ctas: int, *, split: bool = False) -> int:
    """Of all MMAs that a kernel issues. The packed family computes pieces in sixteens of features where
    operands are swapped (tiles, with `split`), and k-blocks of 32 that hold something; the other family whole
    tiles."""
    packed = variant.family == PACKED
    depth = up(call.k, BLOCK_K if packed else variant.tile[2])
    if takes_runs(variant) and not split:
        return sum(_of_cta(variant, taken) for taken in pieces_of_ctas(variant, call, ctas)) * depth
    features = up(call.n, ATOM if takes_runs(variant) else variant.feature_tile)
    return sum(tokens_computed(variant, rows) for rows in call.rows) * features * depth


def _of_cta(variant: Variant, taken: list[tuple[int, list[int]]]) -> int:
    return sum(tokens_computed(variant, rows) * sum(features) for rows, features in taken)


def tiles(variant: Variant, call: Call, ctas: int) -> int:
    """Tiles of the output, or pieces of them that CTAs take in runs."""
    if takes_runs(variant):
        return sum(
            -(-rows // variant.token_tile) * len(features)
            for taken in pieces_of_ctas(variant, call, ctas)
            for rows, features in taken
        )
    of_tokens = sum(-(-rows // variant.token_tile) for rows in call.rows)
    return of_tokens * -(-call.n // variant.feature_tile)


def busiest_share(variant: Variant, call: Call, ctas: int) -> float:
    """The part of a call's multiply-adds that the CTA with the most of them has. Swapped packed kernels take
    runs of strips, all others whole tiles in turns."""
    if takes_runs(variant):
        each = [_of_cta(variant, taken) for taken in pieces_of_ctas(variant, call, ctas)]
        return max(each) / sum(each) if any(each) else 0.0
    units = tiles(variant, call, ctas)
    return -(-units // ctas) / units if units else 0.0


def tma_load_bytes(variant: Variant, call: Call, ctas: int) -> int:
    """Bytes that TMA asks L2 for: weights once for each tile of tokens, whole tiles of tokens once for each
    tile of features, or piece. Exact where all tiles of tokens are full and no run of strips begins or ends
    within a strip."""
    of_tokens = sum(-(-rows // variant.token_tile) for rows in call.rows)
    return (of_tokens * call.n + tiles(variant, call, ctas) * variant.token_tile) * call.k


def derived_counters(variant: Variant, call: Call, ctas: int, issue: Issue) -> Counters:
    """What the emulator would count of a call, as far as a floor needs it. In the family fp8_ptr_array that
    is with the group arrays and the tensor maps that it writes, and without the preparation kernel's
    instructions."""
    total = multiply_adds(variant, call, ctas)
    share = busiest_share(variant, call, ctas)
    k_tiles = -(-call.k // variant.tile[2])
    of_tiles = tiles(variant, call, ctas) * (issue.tile + k_tiles * issue.k_tile)
    stored = call.least_stored
    if variant.family == PTR_ARRAY:
        stored += abi.group_arrays_bytes(len(call.rows)) + ctas * variant.workspace_per_cta
    return Counters(
        work=Work(surely_issued=round(ctas * issue.cta + of_tiles), multiply_adds={FORM: total}),
        busiest_cta=Work(
            surely_issued=round(issue.cta + share * of_tiles), multiply_adds={FORM: round(share * total)}
        ),
        unique_bytes={"loaded": call.least_loaded, "stored": stored},
    )


def fit_issue(k_tiles: tuple[int, int], one: float, deeper: float, wider: float) -> Issue:
    """From the instructions counted of one CTA: one tile of `k_tiles[0]` k-tiles, one of `k_tiles[1]`, and
    two tiles of the former."""
    k_tile = (deeper - one) / (k_tiles[1] - k_tiles[0])
    tile = wider - one - k_tiles[0] * k_tile
    return Issue(one - tile - k_tiles[0] * k_tile, tile, k_tile)


def even_rows(groups: int, rows: int) -> tuple[int, ...]:
    """The same rows for each group."""
    return tuple(np.full(groups, rows).tolist())

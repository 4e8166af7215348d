"""What a grouped GEMM kernel has to do for a call, by counting tiles: multiply-adds, bytes, issue slots.

For calls too large to emulate. The formulas are those of the kernels' schedules; what the emulator counts on
small problems has to agree with them (`tests/emulated/test_counters_packed.py`), and `packed_counters.py`
takes the issue slots of a tile from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sm12x import abi
from sm12x.emulator.counting.counters import Counters, Work
from sm12x.manifest import Variant

PACKED, PTR_ARRAY = "fp8_packed", "fp8_ptr_array"
STRIP = 8  # features that swapped packed kernels share their work by
ATOM = 16  # features that an MMA of theirs computes
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


def multiply_adds(variant: Variant, call: Call) -> int:
    """Of the MMAs that a kernel issues, at least. The packed family computes the features that are there
    where operands are swapped, and k-blocks of 32 that hold something; the other family whole tiles. Exact
    but for swapped packed kernels, which compute a strip more where a piece of work has an odd number of
    them."""
    packed = variant.family == PACKED
    features = up(call.n, ATOM if packed and variant.swap_ab else variant.feature_tile)
    depth = up(call.k, BLOCK_K if packed else variant.tile[2])
    return sum(tokens_computed(variant, rows) for rows in call.rows) * features * depth


def most_multiply_adds(variant: Variant, call: Call, ctas: int) -> int:
    """Of the MMAs that a kernel issues, at most: a strip more for every piece of work that there may be."""
    least = multiply_adds(variant, call)
    if variant.family != PACKED or not variant.swap_ab:
        return least
    # A CTA's part of a group is cut into tiles, or where it is less than two into halves.
    pieces = 2 * (ctas + 1) + -(-call.n // variant.feature_tile)
    tokens = sum(tokens_computed(variant, rows) for rows in call.rows)
    return least + pieces * STRIP * tokens * up(call.k, BLOCK_K)


def tiles(variant: Variant, call: Call) -> int:
    """Tiles of the output."""
    of_tokens = sum(-(-rows // variant.token_tile) for rows in call.rows)
    return of_tokens * -(-call.n // variant.feature_tile)


def busiest_share(variant: Variant, call: Call, ctas: int) -> float:
    """The part of a call's tiles that the CTA with the most of them has. Swapped packed kernels take equal
    runs of strips, all others whole tiles in turns."""
    units = tiles(variant, call)
    if variant.family == PACKED and variant.swap_ab:
        units = sum(-(-rows // variant.token_tile) for rows in call.rows) * (up(call.n, STRIP) // STRIP)
    return -(-units // ctas) / units if units else 0.0


def tma_load_bytes(variant: Variant, call: Call) -> int:
    """Bytes that TMA asks L2 for: weights once for each tile of tokens, whole tiles of tokens once for each
    tile of features. Exact where all tiles are full and no run of strips begins or ends within one."""
    of_tokens = sum(-(-rows // variant.token_tile) for rows in call.rows)
    tokens = of_tokens * variant.token_tile * -(-call.n // variant.feature_tile)
    return (of_tokens * call.n + tokens) * call.k


def derived_counters(variant: Variant, call: Call, ctas: int, issue: Issue) -> Counters:
    """What the emulator would count of a call, as far as a floor needs it. In the family fp8_ptr_array that
    is with the group arrays and the tensor maps that it writes, and without the preparation kernel's
    instructions."""
    total = multiply_adds(variant, call)
    share = busiest_share(variant, call, ctas)
    k_tiles = -(-call.k // variant.tile[2])
    of_tiles = tiles(variant, call) * (issue.tile + k_tiles * issue.k_tile)
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

"""The cases that every variant is run through: rows per group at the tile's edges, and the nine scale
combinations.

Shared by ``python -m sm12x validate`` (NumPy reference) and by tests/gpu (float64 reference on the GPU), so
that both run the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROW_PATTERNS = (
    "no_rows",
    "one_row",
    "tile_minus_1",
    "tile",
    "tile_plus_1",
    "half_a_tile",
    "uneven",
    "empty_first",
    "empty_last",
    "all_but_one_empty",
)
GROUP_COUNTS = (1, 33, 128, 257)
REDUCTIONS = (16, 704, 2816)
BIASES: tuple[str | None, ...] = (None, "float32", "bfloat16", "float16")

A_SCALE_MODES = ("value", "token", "expert")
B_SCALE_MODES = ("value", "expert", "channel")
SCALE_MODES = tuple((a, b) for a in A_SCALE_MODES for b in B_SCALE_MODES)


def rows_per_group(pattern: str, num_groups: int, tile: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of each group, shape (num_groups,), for one of ROW_PATTERNS and a kernel with ``tile`` tokens."""
    uniform = {"no_rows": 0, "one_row": 1, "tile_minus_1": tile - 1, "tile": tile, "tile_plus_1": tile + 1}
    if pattern in uniform:
        return np.full(num_groups, uniform[pattern], dtype=np.int64)
    if pattern == "half_a_tile":  # some kernels compute only half of a tile that is at most half full
        half = tile // 2
        return np.resize(np.array([half - 1, half, half + 1, tile + half, tile + half + 1]), num_groups)
    # What a router leaves: many groups with few rows, some empty, a few of several tiles.
    rows = rng.geometric(1.0 / (1 + tile // 4), size=num_groups).astype(np.int64) - 1
    rows[rng.integers(num_groups)] = 2 * tile + 3
    if pattern == "uneven":
        return rows
    if pattern == "empty_first":
        rows[: max(1, num_groups // 8)] = 0
    elif pattern == "empty_last":
        rows[-max(1, num_groups // 8) :] = 0
    elif pattern == "all_but_one_empty":
        rows[:] = 0
        rows[rng.integers(num_groups)] = tile + 5
    else:
        raise ValueError(f"pattern: expected one of {', '.join(ROW_PATTERNS)}, got {pattern!r}")
    return rows


def offsets_of(rows: NDArray[np.int64], first_row: int = 0) -> NDArray[np.int64]:
    """Row offsets, shape (num_groups + 1,), of groups that lie one after another from ``first_row`` on."""
    offsets = np.empty(rows.size + 1, dtype=np.int64)
    offsets[0] = first_row
    np.cumsum(rows, out=offsets[1:])
    offsets[1:] += first_row
    return offsets


def random_e4m3_bits(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random finite float8_e4m3fn bit patterns: every exponent, subnormals and both zeros included, no
    NaN.
    """
    codes = rng.integers(0, 254, size=shape, dtype=np.uint8)
    return (codes + (codes >= 127)).astype(np.uint8)  # leaves out 0x7f and 0xff, the two NaNs


@dataclass(frozen=True)
class Scales:
    """Scales of one call as float32 arrays in the shapes that grouped_gemm documents; a float where one value
    is meant.
    """

    a: NDArray[np.float32] | float | None
    b: NDArray[np.float32] | float | None

    def per_row(self, rows: NDArray[np.int64], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The two factors spread out: a as (M, 1), b as (E, n) or (E, 1), float64. ``rows``: rows of each
        group.
        """
        total, groups = int(rows.sum()), rows.size
        if self.a is None or isinstance(self.a, float):
            a = np.full((total, 1), 1.0 if self.a is None else self.a)
        elif self.a.ndim == 3:
            a = np.repeat(self.a.astype(np.float64).reshape(groups), rows)[:, None]
        else:
            flat = self.a.astype(np.float64).reshape(-1)
            a = np.broadcast_to(flat[:, None], (total, 1)) if flat.size == 1 else flat[:, None]
        if self.b is None or isinstance(self.b, float):
            b = np.full((groups, 1), 1.0 if self.b is None else self.b)
        else:
            flat = self.b.astype(np.float64).reshape(-1)
            b = flat.reshape(groups, -1) if flat.size > 1 else np.full((groups, 1), flat[0])
        return a, b


def _random_scale(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    # Both signs and several binades; small enough that float16 outputs of full-range e4m3 operands stay
    # finite.
    magnitude = rng.uniform(0.5, 1.5, size=shape) * np.exp2(
        -rng.integers(6, 11, size=shape).astype(np.float64)
    )
    signed: NDArray[np.float32] = (magnitude * rng.choice([-1.0, 1.0], size=shape)).astype(np.float32)
    return signed


def make_scales(
    modes: tuple[str, str], total_rows: int, groups: int, n: int, form: int, rng: np.random.Generator
) -> Scales:
    """Random scales for one of SCALE_MODES. ``form`` rotates through the shapes and kinds that mean the
    same.
    """
    a_mode, b_mode = modes
    a: NDArray[np.float32] | float | None
    b: NDArray[np.float32] | float | None
    if a_mode == "value":
        a = _random_scale((1,), rng)
        a = (float(a[0]), a, a.reshape(1, 1))[form % 3]
    elif a_mode == "token":
        # A single row cannot be told from one value and need not be: both mean the same number.
        a = _random_scale((total_rows, 1) if form % 2 else (total_rows,), rng)
    else:
        a = _random_scale((groups, 1, 1), rng)
    if b_mode == "value":
        b = _random_scale((1,), rng)
        b = (float(b[0]), b, b.reshape(1, 1))[(form // 3) % 3]
    elif b_mode == "expert":
        b = _random_scale((groups, 1) if form % 2 else (groups,), rng)
    else:
        b = _random_scale((groups, n, 1) if form % 2 else (groups, n), rng)
    return Scales(a, b)

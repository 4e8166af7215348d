"""Shipped kernels of the family fp8_packed on an emulated device: every variant, whole and split, rows
packed, gathered and masked, under several schedules, with NaN in all neighbouring memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from emulated.kernels import Machine
from emulated.packed_case import encode_map
from sm12x import abi, manifest
from sm12x.reference import check

E4M3 = ml_dtypes.float8_e4m3fn
NAN, POISON = 0x7F, 0xA5  # e4m3's NaN around inputs, a pattern around outputs
OUTS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
VARIANTS = [v.key for v in manifest.default().gemms("fp8_packed")]
GUARD = 2  # rows of the output before and behind it
SCHEDULES = 3


@dataclass(frozen=True)
class Problem:
    """Rows of each group (a negative one: an offset that decreases by so many), features, depth, CTAs."""

    rows: tuple[int, ...]
    n: int
    k: int
    ctas: int
    layout: str = "packed"  # or "gather", "masked"
    least_units: int = 0
    out: str = "bfloat16"
    wide: bool = False  # 64-bit bounds and indices


PROBLEMS = {
    "edges": Problem((9, 0, 33, 1), 264, 400, 3),
    "split": Problem((9, 0, 33, 1), 264, 400, 4, least_units=1, out="float16"),
    "parts": Problem((3,), 128, 2064, 9, least_units=1),
    "few": Problem((1, 0, 5), 416, 208, 9, wide=True),
    "gather": Problem((9, 0, 37, 1), 136, 272, 3, "gather", out="float16"),
    "gather split": Problem((3, 0, 17), 136, 704, 7, "gather", 1, "float32", True),
    "masked": Problem((3, 0, 17, 70), 136, 320, 3, "masked", out="float32", wide=True),
    "masked split": Problem((3, 0, 17), 136, 704, 5, "masked", 1),
    "decreasing": Problem((4, -3, 9, -2, 7), 72, 144, 5),
}
GROUPS = Problem(tuple(int(n) for n in np.random.default_rng(4).integers(0, 3, 300)), 72, 144, 7)


@pytest.fixture
def seed():
    value = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {value}")
    return value


def fp8(rng, shape):
    return (rng.standard_normal(shape) * 2).astype(E4M3).view(np.uint8)


class Call:
    """A call of the kernel `variant` with everything it can have: scales per token and channel, a bias and
    row weights; rows of a and d lie apart."""

    def __init__(self, problem, variant, seed):
        self.p, self.v, self.rng, self.m = problem, variant, np.random.default_rng(seed), Machine()
        p, rng = problem, self.rng
        bounds = np.concatenate([[0], np.cumsum(p.rows)])
        self.total = max(int(bounds.max()), 1)
        self.offsets = np.maximum.accumulate(bounds)
        self.masked, self.gathers = p.layout == "masked", p.layout == "gather"
        self.most = max(p.rows) + 3
        self.out_rows = len(p.rows) * self.most if self.masked else self.total
        self.a_rows = max(1, self.out_rows // 2) if self.gathers else self.out_rows
        self.index = np.arange(self.out_rows)
        if self.gathers:
            self.index = rng.integers(0, self.a_rows, self.out_rows)
            self.index[[0, -1]] = -1, self.a_rows  # outside: such rows are zero
        self.bounds = np.asarray(p.rows) if self.masked else bounds
        self.stride_a, self.stride_d = p.k + 48, p.n + 16
        self.a = np.full((self.a_rows + 1, self.stride_a), NAN, np.uint8)
        self.a[: self.a_rows, : p.k] = fp8(rng, (self.a_rows, p.k))
        if self.masked:
            for group, count in enumerate(p.rows):
                self.a[group * self.most + count : (group + 1) * self.most] = NAN
        self.b = fp8(rng, (len(p.rows), p.n, p.k))
        self.a_scale = (rng.random(self.a_rows) + 0.5).astype(np.float32)
        if self.gathers:
            self.a_scale[np.setdiff1d(np.arange(self.a_rows), self.index)] = np.nan
        self.b_scale = (rng.random((len(p.rows), p.n)) + 0.5).astype(np.float32)
        self.bias = (rng.standard_normal((len(p.rows), p.n)) * 50).astype(np.float32)
        self.weight = (rng.random(self.out_rows) + 0.5).astype(np.float32)

    def run(self, seed):
        """The output (rows, n), after a check that nothing else was written and the counters are zero."""
        p, m, v = self.p, self.m, self.v
        element = np.dtype(OUTS[p.out]).itemsize
        poisoned = np.full((self.out_rows + 2 * GUARD, self.stride_d * element), POISON, np.uint8)
        out = m.upload(poisoned, "the output")
        whole = np.int64 if p.wide else np.int32
        a, b = m.upload(self.a, "a"), m.upload(self.b, "b")
        params = abi.sm12x_packed_params(
            a=a,
            d=out + GUARD * self.stride_d * element,
            bounds=m.upload(self.bounds.astype(whole), "the bounds"),
            row_index=m.upload(self.index.astype(whole), "the index") if self.gathers else 0,
            a_scale=m.upload(self.a_scale, "a_scale"),
            b_scale=m.upload(self.b_scale, "b_scale"),
            bias=m.upload(self.bias, "bias"),
            row_weight=m.upload(self.weight, "row_weight"),
            rows=self.most if self.masked else self.total,
            a_rows=self.a_rows,
            stride_a=self.stride_a,
            stride_d=self.stride_d,
            stride_d_group=self.most * self.stride_d if self.masked else 0,
            stride_b_scale=p.n,
            stride_bias=p.n,
            n=p.n,
            k=p.k,
            num_groups=len(p.rows),
            row_layout=abi.SM12X_ROWS_MASKED if self.masked else abi.SM12X_ROWS_PACKED,
            bounds_are_64_bit=int(p.wide),
            row_index_is_64_bit=int(p.wide),
            a_scale_mode=abi.SM12X_SCALE_VECTOR,
            b_scale_mode=abi.SM12X_SCALE_VECTOR,
            bias_type=abi.SM12X_BIAS_FLOAT32,
            out_type=abi.OUT_TYPES[p.out],
            least_units=p.least_units,
        )
        if p.least_units:
            params.partials = m.memory.allocate(p.ctas * v.workspace_per_cta, "the partials")
            params.counters = m.upload(np.zeros(p.ctas * v.mma_warps, np.uint32), "the counters")
        rows = (self.most, len(p.rows)) if self.masked else (self.a_rows, 1)
        shape_a, strides_a = (p.k, *rows), (self.stride_a, self.stride_a * rows[0])
        # With a row index there is no map of a; the kernel must not look at it.
        maps = bytes(128) if self.gathers else encode_map(v, "a", a, shape_a, strides_a)
        for size in range(v.weight_maps):
            maps += encode_map(v, "b", b, (p.k, p.n, len(p.rows)), (p.k, p.n * p.k), size)
        ctypes.memmove(ctypes.addressof(params), maps, len(maps))
        m.run_shipped(v.key, p.ctas, params, seed=seed)
        found = m.download(out, poisoned.shape, np.uint8)
        inside = found[GUARD:-GUARD, : p.n * element].copy()
        for rows_of_group in self.groups():
            found[GUARD + rows_of_group.start : GUARD + rows_of_group.stop, : p.n * element] = POISON
        assert (found == POISON).all(), "bytes outside of the output were written"
        if p.least_units:
            counters = m.download(params.counters, (p.ctas * v.mma_warps,), np.uint32)
            assert not counters.any(), "counters were left behind"
        return inside.view(OUTS[p.out])

    def groups(self):
        for group in range(len(self.p.rows)):
            first = group * self.most if self.masked else int(self.offsets[group])
            count = self.p.rows[group] if self.masked else int(self.offsets[group + 1]) - first
            yield slice(first, first + count)

    def worst(self, out):
        """The largest error over DESIGN section 7's bound."""
        inside = (self.index >= 0) & (self.index < self.a_rows)
        source = np.where(inside, self.index, 0)
        a = self.a[source, : self.p.k].view(E4M3).astype(np.float64)
        a[~inside] = 0
        scale = np.where(inside, self.a_scale[source], 0).astype(np.float64)
        worst = 0.0
        for group, rows in enumerate(self.groups()):
            b = self.b[group].view(E4M3).astype(np.float64)
            factor = scale[rows, None] * self.b_scale[group]
            weight, bias = self.weight[rows, None].astype(np.float64), self.bias[group].astype(np.float64)
            reference = ((a[rows] @ b.T) * factor + bias) * weight
            magnitude = ((np.abs(a[rows]) @ np.abs(b.T)) * factor + np.abs(bias)) * weight
            if rows.stop > rows.start:
                worst = max(worst, check(out[rows], reference, magnitude, self.p.k)[1])
        return worst


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("key", VARIANTS)
def test_every_variant_is_right_and_the_same_under_every_schedule(key, name, seed):
    call = Call(PROBLEMS[name], manifest.default().variants[key], seed)
    outs = [call.run(seed + schedule) for schedule in range(SCHEDULES if name in ("edges", "split") else 1)]
    assert call.worst(outs[0]) <= 1
    for other in outs[1:]:
        for rows in call.groups():
            assert outs[0][rows].tobytes() == other[rows].tobytes(), "the result depends on the schedule"


@pytest.mark.parametrize("least_units", [0, 1])
def test_more_groups_than_a_warp_reads_at_once(least_units, seed):
    """300 groups are three windows of the scheduler; some offsets decrease."""
    rows = list(GROUPS.rows)
    rows[130], rows[131] = 5, -4
    problem = Problem(tuple(rows), GROUPS.n, GROUPS.k, GROUPS.ctas, least_units=least_units)
    call = Call(problem, manifest.default().variants["fp8_packed_128x8x128_swap"], seed)
    assert call.worst(call.run(seed)) <= 1

"""The GEMM kernels of an expert layer on an emulated device, every variant: GEMM1 with its activation (family
fp8_up), GEMM2 that quantises its rows (fp8_down), whole and split, with NaN in all neighbouring memory.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from emulated.kernels import Machine
from emulated.packed_case import encode_map
from sm12x import abi, manifest
from sm12x.emulator import tensor_map
from sm12x.reference import check

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
FP16 = np.dtype(np.float16)
NAN, POISON = 0x7F, 0xA5  # e4m3's NaN behind inputs, a pattern around outputs
GUARD = 2  # rows of the output before and behind it
UPS = [v.key for v in manifest.default().gemms("fp8_up", "up")]
DOWNS = [v.key for v in manifest.default().gemms("fp8_down", "down")]
TYPES = {BF16: abi.SM12X_OUT_BFLOAT16, FP16: abi.SM12X_OUT_FLOAT16, E4M3: abi.SM12X_OUT_E4M3}
_SWIZZLE = {64: 2, 128: 3}


def fp8(rng, shape):
    return (rng.standard_normal(shape) * 2).astype(E4M3)


class Output:
    """Rows with poison around them and between them."""

    def __init__(self, m, rows, length, dtype, gap):
        self.m, self.rows, self.length, self.dtype = m, rows, length, dtype
        self.stride = length + gap
        self.shape = (rows + 2 * GUARD, self.stride * dtype.itemsize)
        self.address = m.upload(np.full(self.shape, POISON, np.uint8), "the output")
        self.first = self.address + GUARD * self.shape[1]

    def read(self):
        whole = self.m.download(self.address, self.shape, np.uint8)
        inside = whole[GUARD : GUARD + self.rows, : self.length * self.dtype.itemsize]
        found = inside.copy().view(self.dtype)
        inside[...] = POISON
        assert (whole == POISON).all(), "written outside of the output"
        return found


def split(m, gemm, variant, ctas, least_units):
    gemm.least_units = least_units
    if least_units:
        gemm.partials = m.memory.allocate(ctas * variant.workspace_per_cta, "the partials")
        gemm.counters = m.upload(np.zeros(ctas * variant.mma_warps, np.uint32), "the counters")


def counters_are_zero(m, gemm, variant, ctas):
    if gemm.counters:
        assert (m.download(gemm.counters, (ctas * variant.mma_warps,), np.uint32) == 0).all()


# GEMM1


@dataclass(frozen=True)
class Up:
    """`inner`: I; `pairs`: gates and ups alternate in w1."""

    rows: tuple[int, ...]
    inner: int
    k: int
    ctas: int
    kind: int = abi.SM12X_ACTIVATION_SILU
    out: np.dtype = BF16
    gathers: bool = True
    least_units: int = 0
    pairs: bool = False
    limit: float = math.inf
    wide: bool = False
    counts: bool = False  # rows, from the routes


UP_PROBLEMS = {
    "few": Up((1, 0, 5), 72, 208, 2, gathers=False),
    "gelu": Up((9, 0, 33, 1), 72, 272, 3, abi.SM12X_ACTIVATION_GELU, FP16),
    "split": Up((9, 0, 33, 1), 136, 400, 4, abi.SM12X_ACTIVATION_GELU_TANH, least_units=1, pairs=True),
    "static": Up((3, 0, 70), 136, 144, 3, abi.SM12X_ACTIVATION_RELU2, E4M3, gathers=False),
    "static split": Up((3, 0, 17), 72, 704, 7, out=E4M3, least_units=1, wide=True),
    "clamped": Up((1,) * 9, 40, 144, 4, pairs=True, limit=1.5),
    "counted": Up((1, 0, 5, 0, 2), 72, 144, 3, counts=True),
    "counted wide": Up((2, 0, 50) + (0, 1) * 80, 40, 80, 4, counts=True, wide=True),
    "one expert": Up((150,), 64, 80, 5, gathers=False),
}


def activated(problem, gate, up, alpha, beta):
    gate = np.minimum(gate, problem.limit)
    if problem.kind == abi.SM12X_ACTIVATION_SILU:
        found = gate / (1 + np.exp(-alpha * gate))
    elif problem.kind == abi.SM12X_ACTIVATION_GELU:
        found = gate * np.vectorize(lambda g: math.erfc(-g / math.sqrt(2)) / 2, otypes=[float])(gate)
    elif problem.kind == abi.SM12X_ACTIVATION_GELU_TANH:
        found = gate / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        found = np.maximum(gate, 0) ** 2
    if up is None:
        return found
    up = np.clip(up, -problem.limit, problem.limit)
    return found * (up + beta if problem.kind == abi.SM12X_ACTIVATION_SILU else up)


# Kernels without gates differ in little: a few problems show that.
UP_CASES = [
    (key, name)
    for key in UPS
    for name in UP_PROBLEMS
    if manifest.default().variants[key].gated or name in ("few", "static split", "one expert")
]


@pytest.mark.parametrize(("key", "name"), UP_CASES)
def test_gemm1_with_its_activation(rng, key, name):
    p, variant, m = UP_PROBLEMS[name], manifest.default().variants[key], Machine()
    experts, total = len(p.rows), sum(p.rows)
    offsets = np.concatenate([[0], np.cumsum(p.rows)])
    n = 2 * p.inner if variant.gated else p.inner
    tokens = max(1, total // 2) if p.gathers else total
    a = np.full((tokens + 1, p.k), NAN, np.uint8)
    a[:tokens] = fp8(rng, (tokens, p.k)).view(np.uint8)
    b = np.concatenate([fp8(rng, (experts * n, p.k)).view(np.uint8), np.full((1, p.k), NAN, np.uint8)])
    index = rng.integers(0, tokens, total) if p.gathers else np.arange(total)
    a_scale = ((rng.random(tokens) + 0.5) * 0.05).astype(np.float32)
    b_scale = ((rng.random((experts, n)) + 0.5) * 0.5).astype(np.float32)
    bias = rng.standard_normal((experts, n)).astype(np.float32)
    alpha, beta, d_scale = (np.float32(v) for v in (1.3, 0.25, 0.37))
    out = Output(m, total, p.inner, p.out, 16)
    maxima = m.upload(np.zeros(total + 2, np.uint32), "maxima")
    integer = np.int64 if p.wide else np.int32
    at_a, at_b = m.upload(a, "a"), m.upload(b, "b")
    pair, half = (2, 1) if p.pairs else (1, p.inner)
    params = abi.sm12x_up_params(
        row_maxima=0 if p.out == E4M3 else maxima + 4,
        d_scale=m.upload(np.array([d_scale])) if p.wide else 0,
        d_scale_value=d_scale,
        alpha=alpha,
        beta=beta,
        limit=p.limit,
        activation=p.kind,
        half_stride=half,
        pair_stride=pair,
    )
    gemm = params.gemm
    for field, value in {
        "a": at_a,
        "d": out.first,
        "bounds": 0 if p.counts else m.upload(offsets.astype(integer), "offsets"),
        "row_index": m.upload(index.astype(integer), "row_index") if p.gathers else 0,
        "a_scale": m.upload(a_scale, "a_scale"),
        "b_scale": m.upload(b_scale, "b_scale"),
        "bias": m.upload(bias, "bias"),
        "rows": total,
        "a_rows": tokens,
        "stride_a": p.k,
        "stride_d": out.stride,
        "stride_b_scale": n,
        "stride_bias": n,
        "n": n,
        "k": p.k,
        "num_groups": experts,
        "bounds_are_64_bit": int(p.wide),
        "row_index_is_64_bit": int(p.wide),
        "a_scale_mode": abi.SM12X_SCALE_VECTOR,
        "b_scale_mode": abi.SM12X_SCALE_VECTOR,
        "out_type": TYPES[p.out],
    }.items():
        setattr(gemm, field, value)
    if p.counts:
        _routes(m, params, rng, p)
    split(m, gemm, variant, p.ctas, p.least_units)
    maps = encode_map(variant, "a", at_a, (p.k, tokens, 1), (p.k, tokens * p.k))
    for size in range(variant.weight_maps):
        maps += _map_of_w1(variant, at_b, (p.k, n, experts), pair, half, size)
    ctypes.memmove(ctypes.addressof(params), maps, len(maps))
    m.run_shipped(key, p.ctas, params, seed=int(rng.integers(100)))

    found = out.read()
    ref, bound = np.zeros((total, p.inner)), np.zeros((total, p.inner))
    rows = a[index].view(E4M3).astype(np.float64)
    for expert in range(experts):
        part = slice(offsets[expert], offsets[expert + 1])
        w = b[expert * n : (expert + 1) * n].view(E4M3).astype(np.float64)
        scale = a_scale[index][part, None].astype(np.float64) * b_scale[expert]
        products = rows[part] @ w.T * scale + bias[expert]
        magnitude = np.abs(rows[part]) @ np.abs(w.T) * scale + np.abs(bias[expert])
        error = magnitude * 2.0**-20 * (p.k / 32 + 1)
        gates, ups = _halves(products, variant.gated, p)
        gate_error, up_error = _halves(error, variant.gated, p)
        ref[part] = activated(p, gates, ups, alpha, beta)
        # What the errors of gate and up make of the result, from both sides.
        for sign in (-1, 1):
            for other in (-1, 1):
                moved = None if ups is None else ups + other * up_error
                away = activated(p, gates + sign * gate_error, moved, alpha, beta)
                bound[part] = np.maximum(bound[part], np.abs(away - ref[part]))
    bound += np.abs(ref) * 2.0**-20 + 1e-30
    if p.out == E4M3:
        exact = np.clip(ref / np.float64(d_scale), -448, 448)
        low, high = (
            np.clip(exact + s * bound / np.float64(d_scale), -448, 448).astype(np.float32) for s in (-1, 1)
        )
        values = found.astype(np.float32)
        assert (values >= low.astype(E4M3).astype(np.float32)).all()
        assert (values <= high.astype(E4M3).astype(np.float32)).all()
    else:
        low, high = ((ref + s * bound).astype(np.float32).astype(p.out).astype(np.float64) for s in (-1, 1))
        assert ((found.astype(np.float64) >= low) & (found.astype(np.float64) <= high)).all()
        read = m.download(maxima, (total + 2,), np.uint32).view(np.float32)
        np.testing.assert_array_equal(read[1:-1], np.abs(found.astype(np.float32)).max(axis=1))
        assert read[0] == read[-1] == 0
    counters_are_zero(m, gemm, variant, p.ctas)


def _routes(m, params, rng, p):
    """Ids of global experts, in any order, that give the problem's rows, and some that give none."""
    experts = len(p.rows)
    expert_map = np.full(2 * experts, -1, np.int32)
    names = rng.permutation(2 * experts)[:experts]
    expert_map[names] = np.arange(experts)
    ids = np.repeat(names, p.rows)
    elsewhere = np.setdiff1d(np.arange(-3, 2 * experts + 3), names)
    ids = rng.permutation(np.concatenate([ids, rng.choice(elsewhere, 7)]))
    params.topk_ids = m.upload(ids.astype(np.int64 if p.wide else np.int32), "topk_ids")
    params.expert_map = m.upload(expert_map, "expert_map")
    params.routes, params.map_size, params.ids_are_64_bit = len(ids), len(expert_map), int(p.wide)


def _halves(columns, gated, p):
    if not gated:
        return columns, None
    return (columns[:, 0::2], columns[:, 1::2]) if p.pairs else (columns[:, : p.inner], columns[:, p.inner :])


def _map_of_w1(variant, address, shape, pair, half, size):
    k, n, experts = shape
    if not variant.gated:
        return encode_map(variant, "b", address, shape, (k, n * k), size)
    spec = variant.tensor_maps["b"]
    assert spec.rank == 5
    box = (spec.box[0], 8, 2, (spec.box[1] << size) // 16, 1)
    strides = (pair * k, half * k, 8 * pair * k, n * k)
    return tensor_map.encode_tiled(
        0, 5, address, (k, 8, 2, n // 16, experts), strides, box, [1] * 5, 0, _SWIZZLE[spec.swizzle], 0, 0
    )


# GEMM2


@dataclass(frozen=True)
class Down:
    rows: tuple[int, ...]
    n: int
    k: int
    ctas: int
    least_units: int = 0
    a: np.dtype = BF16
    out: np.dtype = BF16
    wide: bool = False


DOWN_PROBLEMS = {
    "few": Down((1, 0, 5), 136, 208, 2),
    "edges": Down((9, 0, 33, 1), 264, 400, 3, a=FP16, out=FP16, wide=True),
    "split": Down((9, 0, 33, 1), 264, 400, 4, 1, out=FP16),
    "parts": Down((3,), 128, 2064, 9, 1),
    "tail": Down((3, 0, 17), 136, 704, 7, 1),
    "one row each": Down((1,) * 8, 504, 192, 5),
    # Pieces of the same rows behind each other, tiles of other rows between them: codes that are held.
    "held": Down((13, 0, 30, 5), 400, 768, 2),
    "held tail": Down((12, 9), 528, 704, 1, a=FP16, out=FP16),
}


@pytest.mark.parametrize("name", DOWN_PROBLEMS)
@pytest.mark.parametrize("key", DOWNS)
def test_gemm2_quantises_its_rows(rng, key, name):
    p, variant, m = DOWN_PROBLEMS[name], manifest.default().variants[key], Machine()
    experts, total = len(p.rows), sum(p.rows)
    offsets = np.concatenate([[0], np.cumsum(p.rows)])
    stride = p.k + 8
    h = np.full((total + 1, stride), np.nan, p.a)
    values = rng.standard_normal((total, p.k)) * np.exp(2 * rng.standard_normal((total, 1)))
    h[:total, : p.k] = values.astype(p.a)
    if total > 2:
        h[1, : p.k] = (values[1] * 1e-5).astype(p.a)  # below the floor of the scale
        h[2, : p.k] = 0
    exact = h[:total, : p.k].astype(np.float32)
    maxima = np.abs(exact).max(axis=1)
    scale = np.maximum(maxima, np.float32(1 / 512)) / np.float32(448)
    codes = np.clip(exact / scale[:, None], -448, 448).astype(E4M3).astype(np.float64)
    b = np.concatenate([fp8(rng, (experts * p.n, p.k)).view(np.uint8), np.full((1, p.k), NAN, np.uint8)])
    b_scale = ((rng.random((experts, p.n)) + 0.5) * 0.5).astype(np.float32)
    bias = rng.standard_normal((experts, p.n)).astype(np.float32)
    weight = rng.random(total).astype(np.float32)
    out = Output(m, total, p.n, p.out, 8)
    at_b = m.upload(b, "b")
    params = abi.sm12x_down_params(row_maxima=m.upload(maxima, "maxima"), a_type=TYPES[p.a])
    gemm = params.gemm
    for field, value in {
        "a": m.upload(h, "h"),
        "d": out.first,
        "bounds": m.upload(offsets.astype(np.int64 if p.wide else np.int32), "offsets"),
        "b_scale": m.upload(b_scale, "b_scale"),
        "bias": m.upload(bias, "bias"),
        "row_weight": m.upload(weight, "row_weight"),
        "rows": total,
        "a_rows": total,
        "stride_a": stride,
        "stride_d": out.stride,
        "stride_b_scale": p.n,
        "stride_bias": p.n,
        "n": p.n,
        "k": p.k,
        "num_groups": experts,
        "bounds_are_64_bit": int(p.wide),
        "b_scale_mode": abi.SM12X_SCALE_VECTOR,
        "out_type": TYPES[p.out],
    }.items():
        setattr(gemm, field, value)
    split(m, gemm, variant, p.ctas, p.least_units)
    maps = b"".join(
        encode_map(variant, "b", at_b, (p.k, p.n, experts), (p.k, p.n * p.k), size)
        for size in range(variant.weight_maps)
    )
    at = abi.sm12x_packed_params.map_b.offset
    ctypes.memmove(ctypes.addressof(params) + at, maps, len(maps))
    m.run_shipped(key, p.ctas, params, seed=int(rng.integers(100)))

    found = out.read()
    for expert in range(experts):
        part = slice(offsets[expert], offsets[expert + 1])
        if part.start == part.stop:
            continue
        w = b[expert * p.n : (expert + 1) * p.n].view(E4M3).astype(np.float64)
        factor = scale[part, None].astype(np.float64) * b_scale[expert]
        ref = (codes[part] @ w.T * factor + bias[expert]) * weight[part, None]
        magnitude = (np.abs(codes[part]) @ np.abs(w.T) * factor + np.abs(bias[expert])) * weight[part, None]
        _, worst = check(found[part], ref, magnitude, p.k)
        assert worst <= 1
    counters_are_zero(m, gemm, variant, p.ctas)

"""The small kernels of an expert layer on an emulated device: routing, quantising rows, combining. What they
have to give is worked out here, route by route.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from emulated.kernels import Machine, ptx
from sm12x import abi, manifest

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
TYPES = {
    np.dtype(np.float32): abi.SM12X_OUT_FLOAT32,
    BF16: abi.SM12X_OUT_BFLOAT16,
    np.dtype(np.float16): abi.SM12X_OUT_FLOAT16,
}
UNWRITTEN = 0xA5


def scale_of(maximum):
    return np.maximum(np.float32(maximum), np.float32(1 / 512)) / np.float32(448)


def codes_of(values, scale):
    """Float32 quotients, saturated, as e4m3 codes."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.clip(values.astype(np.float32) / scale, -448, 448).astype(E4M3)


# Quantising


def quantize_params(m, x, *, mode, padding=16, source=0, count=0, static=0.0, weight=0):
    rows, k = x.shape
    stride = k + padding
    wide = np.zeros((max(rows, 1), k + 8), x.dtype)
    wide[:rows, :k] = x
    q = m.upload(np.full((max(rows, 1), stride), UNWRITTEN, np.uint8), "q")
    scale = m.upload(np.full(max(rows, 1) + 1, np.nan, np.float32), "scale")
    return abi.sm12x_quantize_params(
        x=m.upload(wide, "x"),
        q=q,
        scale=scale,
        source=source,
        weight=weight,
        rows=rows,
        stride_x=k + 8,
        stride_q=stride,
        k=k,
        x_type=TYPES[x.dtype],
        mode=mode,
        count=count,
        static_scale=static,
    )


def quantised(m, params):
    """Codes and scales that a launch wrote, and that it wrote nothing between the rows."""
    rows, k = params.rows, params.k
    q = m.download(params.q, (rows, params.stride_q), np.uint8)
    assert (q[:, k:] == UNWRITTEN).all()
    return q[:, :k].view(E4M3), m.download(params.scale, (rows + 1,), np.float32)


def same_codes(found, expected):
    """But for the sign of what is zero before: the exact remainder of -0 is +0, and so is the quotient."""
    found, expected = found.view(np.uint8), expected.view(np.uint8)
    return np.array_equal(found[expected != 0x80], expected[expected != 0x80]) and np.all(
        found[expected == 0x80] & 0x7F == 0
    )


def rows_of_all_sizes(rng, rows, k, dtype):
    x = rng.standard_normal((rows, k)) * np.exp(4 * rng.standard_normal((rows, 1)))
    return np.clip(x, -6e4, 6e4).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k", [16, 2816, 14336])
def test_rows_are_quantised_by_their_own_maxima(rng, dtype, k):
    m = Machine()
    x = rows_of_all_sizes(rng, 3, k, dtype)
    x[1] = 0
    params = quantize_params(m, x, mode=abi.SM12X_QUANTIZE_ROWS)
    m.run_shipped("quantize_fp8", 3, params, seed=1)
    q, scale = quantised(m, params)
    expected = scale_of(np.abs(x.astype(np.float32)).max(axis=1))
    np.testing.assert_array_equal(scale[:3], expected)
    assert np.isnan(scale[3])
    assert same_codes(q, codes_of(x, expected[:, None]))


def test_what_is_not_finite_is_quantised_as_a_division_has_it(rng):
    m = Machine()
    x = rows_of_all_sizes(rng, 3, 64, BF16)
    x[0, 5] = np.nan  # stays, and does not count for the maximum
    x[1, 7] = np.inf  # an infinite scale: zeros, and NaN where infinity is divided by it
    params = quantize_params(m, x, mode=abi.SM12X_QUANTIZE_ROWS)
    m.run_shipped("quantize_fp8", 3, params, seed=2)
    q, scale = quantised(m, params)
    with np.errstate(invalid="ignore"):
        expected = scale_of(np.nanmax(np.abs(x.astype(np.float32)), axis=1))
    np.testing.assert_array_equal(scale[:3], expected)
    assert np.isnan(q[0, 5].astype(np.float32))
    assert np.isnan(q[1, 7].astype(np.float32))
    assert same_codes(q[2], codes_of(x[2], expected[2]))
    finite = np.isfinite(x[1].astype(np.float32))
    assert (q[1][finite].astype(np.float32) == 0).all()


def test_given_maxima_of_rows_are_their_scales(rng):
    m = Machine()
    x = rows_of_all_sizes(rng, 4, 704, BF16)
    maxima = np.abs(x.astype(np.float32)).max(axis=1) * np.float32(2)
    params = quantize_params(m, x, mode=abi.SM12X_QUANTIZE_MAXIMA, source=m.upload(maxima, "maxima"))
    m.run_shipped("quantize_fp8", 4, params, seed=3)
    q, scale = quantised(m, params)
    np.testing.assert_array_equal(scale[:4], scale_of(maxima))
    assert same_codes(q, codes_of(x, scale_of(maxima)[:, None]))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_static_scale_divides_and_saturates(rng, on_device):
    m = Machine()
    x = rows_of_all_sizes(rng, 2, 128, np.dtype(np.float16))
    static = np.float32(rng.random() * 1e-3)
    source = m.upload(np.array([static]), "scale") if on_device else 0
    params = quantize_params(
        m, x, mode=abi.SM12X_QUANTIZE_STATIC, source=source, static=0.0 if on_device else static
    )
    m.run_shipped("quantize_fp8", 2, params, seed=4)
    q, scale = quantised(m, params)
    assert scale[0] == static
    assert np.isnan(scale[1:]).all()
    assert same_codes(q, codes_of(x, static))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_dynamic_scale_for_all_rows(rng, dtype):
    m = Machine()
    x = rows_of_all_sizes(rng, 5, 272, dtype)
    params = quantize_params(m, x, mode=abi.SM12X_QUANTIZE_TENSOR, count=3)
    params.source = m.memory.allocate(4 * 3, "maxima")
    maxima = abi.sm12x_maxima_params(
        x=params.x, maxima=params.source, rows=5, stride_x=params.stride_x, k=272, x_type=TYPES[dtype]
    )
    m.run_shipped("quantize_fp8_maxima", 3, maxima, seed=5)
    m.run_shipped("quantize_fp8", 5, params, seed=5)
    q, scale = quantised(m, params)
    expected = scale_of(np.abs(x.astype(np.float32)).max())
    assert scale[0] == expected
    assert same_codes(q, codes_of(x, expected))


def test_quotients_are_those_of_a_division(rng):
    """Markstein's sequence against IEEE division: values beside the ties of e4m3, scales of any mantissa."""
    m = Machine()
    rows, k = 64, 1024
    scale = scale_of(np.exp(rng.uniform(-6, 10, rows)))
    halves = (np.arange(1, 448 * 2) / 2)[rng.integers(0, 895, (rows, k))]
    near = (halves * scale[:, None].astype(np.float64)).astype(np.float32)
    near = np.nextafter(near, np.float32(rng.choice([-1, 1])) * np.float32(np.inf), dtype=np.float32)
    maxima = scale.astype(np.float64) * 448
    maxima = maxima.astype(np.float32)
    params = quantize_params(m, near, mode=abi.SM12X_QUANTIZE_MAXIMA, source=m.upload(maxima, "maxima"))
    m.run_shipped("quantize_fp8", rows, params, seed=6)
    q, found = quantised(m, params)
    assert same_codes(q, codes_of(near, found[:rows, None]))


# Routing


class Route:
    """A call of moe_route: ids (T, k), which local expert each means, and what the kernel wrote."""

    def __init__(self, ids, experts, *, expert_map=None, weights=None, x=None):
        self.ids, self.experts, self.map, self.weights, self.x = ids, experts, expert_map, weights, x
        self.tokens, self.top_k = ids.shape
        self.routes = ids.size

    def run(self, seed=0):
        m, n = Machine(), max(self.routes, 1)
        self.m = m
        ctas = max(1, -(-self.routes // abi.SM12X_ROUTES_PER_CTA))
        one = ctas == 1
        unwritten = np.full(n + 2, UNWRITTEN * 0x01010101, np.uint32)
        names = "row_index", "route_row", "row_weight", "row_maxima"
        self.outputs = {name: m.upload(unwritten, name) for name in names}
        self.offsets = m.upload(np.full(self.experts + 2, -7, np.int32), "offsets")
        params = abi.sm12x_route_params(
            topk_ids=m.upload(self.ids, "topk_ids"),
            topk_weights=0 if self.weights is None else m.upload(self.weights, "topk_weights"),
            expert_map=0 if self.map is None else m.upload(self.map, "expert_map"),
            offsets=self.offsets,
            counts=m.memory.allocate(ctas * self.experts * 4, "counts"),
            routes=self.routes,
            top_k=self.top_k,
            num_experts=self.experts,
            map_size=0 if self.map is None else len(self.map),
            ids_are_64_bit=int(self.ids.dtype == np.int64),
            phase=abi.SM12X_ROUTE_ALL if one else abi.SM12X_ROUTE_COUNT,
            route_ctas=ctas,
            **self.outputs,
        )
        if self.weights is None:
            params.row_weight = 0
        rows = 0
        if self.x is not None:
            params.tokens = quantize_params(m, self.x, mode=abi.SM12X_QUANTIZE_ROWS)
            rows = len(self.x)
        m.run_shipped("moe_route", ctas + rows, params, seed=seed)
        if not one:
            params.phase = abi.SM12X_ROUTE_PLACE
            m.run_shipped("moe_route", ctas, params, seed=seed)
        self.params = params
        return self

    def read(self, name, dtype):
        whole = self.m.download(self.outputs[name], (max(self.routes, 1) + 2,), np.uint32)
        assert (whole[self.routes :] == UNWRITTEN * 0x01010101).all(), f"{name}: written past its end"
        return whole[: self.routes].view(dtype)

    def check(self):
        local = []
        for given in self.ids.reshape(-1):
            found = int(given)
            if self.map is not None:
                found = int(self.map[found]) if 0 <= found < len(self.map) else -1
            local.append(found if 0 <= found < self.experts else -1)
        order = [r for e in range(self.experts) for r in range(self.routes) if local[r] == e]
        if self.routes > 2000:  # the same, faster
            order = sorted((r for r in range(self.routes) if local[r] >= 0), key=lambda r: local[r])
        offsets = self.m.download(self.offsets, (self.experts + 2,), np.int32)
        counts = np.bincount([e for e in local if e >= 0], minlength=self.experts)
        np.testing.assert_array_equal(offsets, [0, *np.cumsum(counts), -7])
        tail = self.routes - len(order)
        index = [r // self.top_k for r in order] + [-1] * tail
        np.testing.assert_array_equal(self.read("row_index", np.int32), index)
        row = np.full(self.routes, -1)
        row[order] = np.arange(len(order))
        np.testing.assert_array_equal(self.read("route_row", np.int32), row)
        if self.weights is not None:
            weight = [self.weights.reshape(-1)[r] for r in order] + [0] * tail
            np.testing.assert_array_equal(self.read("row_weight", np.float32), np.float32(weight))
        else:
            assert (self.read("row_weight", np.uint32) == UNWRITTEN * 0x01010101).all()
        assert (self.read("row_maxima", np.uint32) == 0).all()


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 8, 128), (0, 2, 8), (1, 1, 1), (5, 8, 7), (67, 8, 128), (130, 2, 300), (33, 6, 1024), (128, 8, 129)],
)
@pytest.mark.parametrize("wide", [False, True])
def test_routes_are_sorted_by_expert_and_stay_in_order(rng, tokens, top_k, experts, wide):
    ids = rng.integers(-1, experts + 1, (tokens, top_k)).astype(np.int64 if wide else np.int32)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    Route(ids, experts, weights=weights).run(seed=int(rng.integers(100))).check()


def test_an_expert_map_leaves_out_what_is_elsewhere(rng):
    expert_map = np.full(64, -1, np.int32)
    here = rng.permutation(64)[:9]
    expert_map[here] = rng.permutation(9)
    expert_map[int(rng.integers(64))] = 9  # past this device's experts
    ids = rng.integers(-2, 70, (50, 6)).astype(np.int64)
    Route(ids, 9, expert_map=expert_map).run().check()


def test_ids_of_64_bits_do_not_wrap(rng):
    ids = rng.integers(0, 4, (3, 2)).astype(np.int64)
    ids[1, 0] += 1 << 32
    Route(ids, 4).run().check()


def test_one_expert_may_take_everything(rng):
    Route(np.full((300, 3), 2, np.int32), 5).run().check()


def test_many_routes_are_counted_and_placed_in_two_launches(rng):
    tokens = abi.SM12X_ROUTES_PER_CTA // 4 * 2 + 37
    ids = rng.integers(-1, 40, (tokens, 4)).astype(np.int32)
    weights = rng.random((tokens, 4)).astype(np.float32)
    route = Route(ids, 40, weights=weights)
    assert route.routes > 2 * abi.SM12X_ROUTES_PER_CTA
    route.run().check()


def test_tokens_are_quantised_in_the_launch_that_sorts(rng):
    x = rows_of_all_sizes(rng, 9, 2832, BF16)
    route = Route(rng.integers(0, 16, (9, 4)).astype(np.int32), 16, x=x).run()
    route.check()
    q, scale = quantised(route.m, route.params.tokens)
    expected = scale_of(np.abs(x.astype(np.float32)).max(axis=1))
    np.testing.assert_array_equal(scale[:9], expected)
    assert same_codes(q, codes_of(x, expected[:, None]))


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_router_weights_on_the_input_are_rounded_to_its_type(rng, dtype):
    m = Machine()
    x = rows_of_all_sizes(rng, 4, 80, dtype)
    weight = rng.random(4).astype(np.float32)
    params = quantize_params(m, x, mode=abi.SM12X_QUANTIZE_ROWS, weight=m.upload(weight, "weights"))
    m.run_shipped("quantize_fp8", 4, params)
    q, scale = quantised(m, params)
    weighted = (x.astype(np.float32) * weight.astype(dtype).astype(np.float32)[:, None]).astype(dtype)
    expected = scale_of(np.abs(weighted.astype(np.float32)).max(axis=1))
    np.testing.assert_array_equal(scale[:4], expected)
    assert same_codes(q, codes_of(weighted, expected[:, None]))


# Combining


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "n"), [(1, 8, 2816), (3, 1, 16), (4, 11, 1040), (2, 2, 1024), (2, 40, 1040)]
)
def test_rows_of_a_token_are_added_in_the_order_of_its_routes(rng, dtype, tokens, top_k, n):
    m = Machine()
    count = tokens * top_k
    rows = (rng.standard_normal((count, n)) * 100).astype(dtype)
    wide = np.full((count, n + 8), np.nan, dtype)
    wide[:, :n] = rows
    route_row = rng.permutation(count).astype(np.int32)
    route_row[rng.random(count) < 0.3] = -1
    route_row[:top_k] = -1 if tokens > 3 else route_row[:top_k]  # a token without rows
    out = m.upload(np.full((tokens + 1, n + 16), UNWRITTEN, np.uint8).repeat(2, axis=1), "out")
    params = abi.sm12x_combine_params(
        rows=m.upload(wide, "rows"),
        out=out,
        route_row=m.upload(route_row, "route_row"),
        stride_rows=n + 8,
        stride_out=n + 16,
        tokens=tokens,
        top_k=top_k,
        n=n,
        type=TYPES[dtype],
    )
    variant = manifest.default().variants["moe_combine"]
    grid = (tokens, -(-n // 8 // variant.threads), 1)
    m.run(ptx("moe_combine"), grid, variant.threads, params)
    found = m.download(out, (tokens + 1, 2 * (n + 16)), np.uint8)
    for token in range(tokens):
        total = np.zeros(n, np.float32)
        for row in route_row[token * top_k : (token + 1) * top_k]:
            if row >= 0:
                total = total + rows[row].astype(np.float32)
        np.testing.assert_array_equal(found[token, : 2 * n].view(dtype), total.astype(dtype))
    found[:tokens, : 2 * n] = UNWRITTEN
    assert (found == UNWRITTEN).all()

"""The expert layer in NumPy against plain Python loops, and what its arguments mean."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import sm12x
from sm12x import reference
from unit.moe_cases import DTYPES, KINDS, WEIGHT_SCALES, random_layer, small_codes
from unit.moe_oracle import layer as slow_layer


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def agrees(ref, arrays, keywords):
    """Whether float64 results are those of the loops, to rounding errors of float64."""
    expected = np.array(slow_layer(*arrays, **keywords)).reshape(ref.shape)
    np.testing.assert_allclose(ref, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max(initial=0))


@pytest.mark.parametrize(("name", "gated"), KINDS)
@pytest.mark.parametrize("case", range(10))
def test_layer_is_that_of_plain_loops(name, gated, case, rng):
    """Every activation, with random routes, scales, biases, maps and roundings, against the definition."""
    arrays, keywords = random_layer(rng, kind=(name, gated))
    agrees(reference.fused_moe_float64(*arrays, **keywords), arrays, keywords)


@pytest.mark.parametrize("scales", [(a, b) for a in WEIGHT_SCALES for b in ("expert", "channel")])
def test_every_scale_of_weights_lands_on_its_axis(scales, rng):
    """Shapes where E, I and H are easily taken for each other included."""
    layer = {"tokens": 3, "experts": 16, "hidden": 16, "intermediate": 16, "kind": ("silu", False)}
    for pair in (scales, scales[::-1]):
        arrays, keywords = random_layer(rng, scales=pair, mapped=False, **layer)
        agrees(reference.fused_moe_float64(*arrays, **keywords), arrays, keywords)


@pytest.mark.parametrize("static", [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_scales_of_activations_are_dynamic_or_static_each_by_itself(static, dtype, rng):
    arrays, keywords = random_layer(rng, tokens=4, top_k=2, static=static, dtype=dtype, weight_on_input=False)
    agrees(reference.fused_moe_float64(*arrays, **keywords), arrays, keywords)
    stages = reference.fused_moe_stages(*arrays, **keywords)
    assert stages.s1.shape == ((1,) if static[0] else (4, 1))
    assert stages.s2.shape == ((1,) if static[1] else (len(stages.h), 1))
    assert stages.h.dtype == (np.float32 if static[1] else DTYPES[dtype])
    assert stages.out.dtype == DTYPES[dtype]


def test_every_stage_of_the_backend_keeps_its_bound(rng):
    """The float32 backend, stage by stage on what its own stages gave, codes and scales included."""
    for _ in range(40):
        arrays, keywords = random_layer(rng, hidden=16 * int(rng.integers(1, 12)))
        stages = reference.fused_moe_stages(*arrays, **keywords)
        w1, w2 = arrays[1:3]
        static = keywords.get("a2_scale")
        chosen = sm12x.ops.activation.activation(
            keywords["activation"],
            keywords["gated"],
            *(keywords.get(name) for name in ("alpha", "beta", "limit")),
        )
        first = reference.check_quantised(stages.x, stages.q1, stages.s1, static="a1_scale" in keywords)
        assert first.passed
        assert first.unequal_codes == 0
        given = (stages.q1, stages.s1, w1, stages.routing, chosen)
        weights = {"w1_scale": keywords["w1_scale"], "bias1": keywords.get("bias1")}
        assert reference.check_gemm1_stage(stages.h, *given, **weights) <= 1
        if static is not None:
            scale = float(np.float32(np.asarray(static).item()))
            assert reference.check_gemm1_stage(stages.q2, *given, **weights, a2_scale=scale) <= 1
        second = reference.check_quantised(stages.h, stages.q2, stages.s2, static=static is not None)
        assert second.passed
        assert second.unequal_codes == 0
        ratio = reference.check_gemm2_stage(
            *(stages.y, stages.q2, stages.s2, w2, stages.routing),
            w2_scale=keywords["w2_scale"],
            bias2=keywords.get("bias2"),
            weight_on_input=keywords["apply_router_weight_on_input"],
        )
        assert ratio <= 1
        assert reference.check_combine(stages.out, stages.y, stages.routing) == 0


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_whole_layer_is_near_the_float64_one(dtype, rng):
    """What is required of every backend: at most 2e-2 per token. Weights of one sign, as a router's are: with
    duplicate ids of both signs, outputs cancel and only their rounding errors are left."""
    arrays, keywords = random_layer(
        rng,
        tokens=16,
        top_k=4,
        experts=8,
        hidden=256,
        intermediate=256,
        dtype=dtype,
        kind=("silu", True),
        scales=("channel", "channel"),
        mapped=False,
        weight_on_input=False,
    )
    np.abs(arrays[3], out=arrays[3])
    out = sm12x.fused_moe(*arrays, **keywords)
    assert out.dtype == DTYPES[dtype]
    errors = reference.token_errors(out, reference.fused_moe_float64(*arrays, **keywords))
    assert errors.max() <= 2e-2
    assert errors.max() > 0


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_stages_add_up_to_the_composition_of_public_operations(dtype, rng):
    """`quantize_fp8`, `route`, `grouped_gemm`, activation, again, sum: the same bits."""
    arrays, keywords = random_layer(
        rng, tokens=5, kind=("silu", True), dtype=dtype, static=(False, False), weight_on_input=False
    )
    keywords.pop("limit", None)
    x, w1, w2, weights, ids = arrays
    q1, s1 = sm12x.quantize_fp8(x)
    routing = sm12x.route(ids, len(w1), topk_weights=weights, expert_map=keywords.get("expert_map"))
    rows = routing.offsets[-1]
    pre = sm12x.grouped_gemm(
        q1,
        w1,
        a_scale=s1,
        b_scale=keywords["w1_scale"],
        bias=keywords.get("bias1"),
        offsets=routing.offsets,
        row_index=routing.row_index[:rows],
        out_dtype="float32",
    )
    g, u = np.split(pre, 2, axis=1)
    q2, s2 = sm12x.quantize_fp8((g * (1 / (1 + np.exp(-g))) * u).astype(x.dtype))
    y = sm12x.grouped_gemm(
        q2,
        w2,
        a_scale=s2,
        b_scale=keywords["w2_scale"],
        bias=keywords.get("bias2"),
        offsets=routing.offsets,
        row_weight=routing.row_weight[:rows],
        out_dtype=dtype,
    )
    expected = np.zeros(x.shape, np.float32)
    for t, j in np.ndindex(ids.shape):  # j runs fastest: in the order of a token's routes
        if routing.route_row[t, j] >= 0:
            expected[t] += y[routing.route_row[t, j]].astype(np.float32)
    out = sm12x.fused_moe(*arrays, **keywords)
    np.testing.assert_array_equal(out, expected.astype(x.dtype))


def fixed(rng, **more):
    """A layer with nothing but silu."""
    plain = {"kind": ("silu", True), "static": (False, False), "mapped": False, "weight_on_input": False}
    return random_layer(rng, **{**plain, **more})


def test_invalid_and_duplicate_routes(rng):
    """A token without a valid route gives zeros, an id that comes twice counts twice; ids may be huge."""
    (x, w1, w2, weights, _), keywords = fixed(rng, tokens=5, top_k=2, experts=3)
    ids = np.array([[-1, -1], [3, 2**40], [-(2**40), 2**32], [1, 1], [2, -1]])
    ref = reference.fused_moe_float64(x, w1, w2, weights, ids, **keywords)
    out = sm12x.fused_moe(x, w1, w2, weights, ids, **keywords)
    assert not ref[:3].any()
    assert not out[:3].astype(np.float32).any()
    once = np.array([[1, -1]])
    for j in range(2):
        keep = weights[3:4] if j == 0 else weights[3:4, ::-1].copy()
        part = reference.fused_moe_float64(x[3:4], w1, w2, keep, once, **keywords)
        ref[3] -= part[0]
    assert np.abs(ref[3]).max() < 1e-12 * np.abs(part).max()
    assert np.isfinite(out.astype(np.float32)).all()
    assert out[3:].astype(np.float32).any(axis=1).all()


def test_expert_map_is_the_same_as_mapping_the_ids(rng):
    """Two maps that split the experts give parts that add up to the whole: expert parallelism."""
    (x, w1, w2, weights, _), keywords = fixed(
        rng, tokens=6, top_k=3, experts=6, scales=("channel", "expert"), biases=(True, True)
    )
    ids = rng.integers(0, 6, (6, 3)).astype(np.int32)
    whole = reference.fused_moe_float64(x, w1, w2, weights, ids, **keywords)
    names = ("w1_scale", "w2_scale", "bias1", "bias2")
    total = np.zeros_like(whole)
    order = rng.permutation(6)
    for mine in (order[:2], order[2:]):
        expert_map = np.full(6, -1, np.int32)
        expert_map[mine] = np.arange(len(mine))
        part = {**keywords, **{name: keywords[name][mine] for name in names}, "expert_map": expert_map}
        total += reference.fused_moe_float64(x, w1[mine], w2[mine], weights, ids, **part)
    np.testing.assert_allclose(total, whole, rtol=1e-12, atol=1e-12 * np.abs(whole).max())


@pytest.mark.parametrize("experts", [1, 7])
def test_one_expert_takes_everything(experts, rng):
    """All rows in one group, E = 1 included: a plain two-layer network."""
    (x, w1, w2, weights, ids), keywords = fixed(
        rng, tokens=5, top_k=1, experts=experts, biases=(False, False)
    )
    keywords.update(w1_scale=1e-3, w2_scale=1e-3)
    ids = np.full_like(ids, experts - 1)
    whole = reference.fused_moe_float64(x, w1, w2, weights, ids, **keywords)
    alone = reference.fused_moe_float64(x, w1[-1:], w2[-1:], weights, np.zeros_like(ids), **keywords)
    np.testing.assert_array_equal(whole, alone)
    assert whole.any(axis=1).all()
    agrees(whole, (x, w1, w2, weights, ids), keywords)


def test_no_tokens(rng):
    """T = 0 gives an empty result, and with `out` that one."""
    arrays, keywords = random_layer(rng, tokens=0, hidden=32)
    out = sm12x.fused_moe(*arrays, **keywords)
    assert out.shape == (0, 32)
    assert out.dtype == arrays[0].dtype
    assert sm12x.fused_moe(*arrays, **keywords, out=out) is out
    assert reference.fused_moe_float64(*arrays, **keywords).shape == (0, 32)


def test_both_layouts_of_swigluoai_are_one_layer(rng):
    """Interleaved rows of w1, its scale and its bias, against the gate before up: equal to the last bit."""
    (x, w1, w2, weights, ids), keywords = random_layer(
        rng,
        tokens=4,
        top_k=2,
        kind=("swigluoai", True),
        scales=("channel", "channel"),
        biases=(True, True),
        weight_on_input=False,
    )
    interleaved = reference.fused_moe_float64(x, w1, w2, weights, ids, **keywords)
    apart = {**keywords, "activation": "swigluoai_uninterleave"}
    half = np.r_[0 : w1.shape[1] : 2, 1 : w1.shape[1] : 2]
    apart.update({name: np.ascontiguousarray(keywords[name][:, half]) for name in ("w1_scale", "bias1")})
    split = reference.fused_moe_float64(x, np.ascontiguousarray(w1[:, half]), w2, weights, ids, **apart)
    np.testing.assert_array_equal(interleaved, split)
    swapped = reference.fused_moe_float64(x, w1, w2, weights, ids, **{**apart, "bias1": keywords["bias1"]})
    assert len(x) == 0 or (swapped != interleaved).any() or not interleaved.any()


def test_swigluoai_takes_its_defaults_where_nothing_is_given(rng):
    """alpha 1.702, beta 1 and limit 7, also where values are past the limit."""
    arrays, keywords = random_layer(rng, tokens=4, kind=("swigluoai", True), scales=("value", "value"))
    keywords["w1_scale"] = 0.05  # values of some tens
    for name in ("alpha", "beta", "limit"):
        keywords.pop(name, None)
    default = reference.fused_moe_float64(*arrays, **keywords)
    given = reference.fused_moe_float64(*arrays, **keywords, alpha=1.702, beta=1, limit=7)
    np.testing.assert_array_equal(default, given)
    agrees(default, arrays, keywords)


def test_limit_of_infinity_clamps_nothing(rng):
    arrays, keywords = random_layer(rng, tokens=4, kind=("silu", True))
    keywords.pop("limit", None)
    unlimited = reference.fused_moe_float64(*arrays, **keywords)
    np.testing.assert_array_equal(reference.fused_moe_float64(*arrays, **keywords, limit=np.inf), unlimited)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_router_weight_on_input(dtype, rng):
    """x times the weight, both rounded to x's dtype, is quantised; the result is not weighted again."""
    (x, w1, w2, weights, ids), keywords = random_layer(rng, tokens=5, dtype=dtype, weight_on_input=True)
    on_input = sm12x.fused_moe(x, w1, w2, weights, ids, **keywords)
    by_hand = (x.astype(np.float64) * weights.astype(x.dtype).astype(np.float64)).astype(np.float32)
    plain = {**keywords, "apply_router_weight_on_input": False}
    ones = np.ones_like(weights)
    np.testing.assert_array_equal(
        on_input, sm12x.fused_moe(by_hand.astype(x.dtype), w1, w2, ones, ids, **plain)
    )


def test_the_sum_is_in_the_order_of_the_routes(rng):
    """Large values that cancel, so that any other order gives another result."""
    y = np.array([[2.0**24], [1.0], [-(2.0**24)]], np.float32).astype(ml_dtypes.bfloat16)
    y = np.repeat(y, 16, axis=1)
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1]):
        expected = np.float32(0)
        for row in order:
            expected = np.float32(expected + y[row, 0].astype(np.float32))
        total = reference.moe.combine(y, np.array([order], np.int32))
        assert total.dtype == np.float32
        assert (total == expected).all()
    routing = sm12x.Routing(None, None, np.array([[0, 2, 1]], np.int32), None)
    assert reference.check_combine(np.ones((1, 16), ml_dtypes.bfloat16), y, routing) == 0
    assert reference.check_combine(np.zeros((1, 16), ml_dtypes.bfloat16), y, routing) == 16


def test_uint8_weights_and_a_given_out_give_the_same_bits(rng):
    """Weights by their bits with `dtype`, strided x and out, in any mix of integer types of ids."""
    arrays, keywords = random_layer(rng, tokens=5, hidden=32)
    x, w1, w2, weights, ids = arrays
    expected = sm12x.fused_moe(*arrays, **keywords)
    wide = np.zeros((5, 48), x.dtype)
    wide[:, :32] = x
    target = np.full((5, 40), 7, x.dtype)
    given = (wide[:, :32], w1.view(np.uint8), w2, weights, ids.astype(np.int64))
    out = target[:, 8:]
    assert sm12x.fused_moe(*given, **keywords, out=out, dtype="float8_e4m3fn") is out
    np.testing.assert_array_equal(out, expected)
    assert (target[:, :8] == 7).all()
    assert (sm12x.fused_moe(*given, **keywords, dtype=ml_dtypes.float8_e4m3fn) == expected).all()


def test_nan_and_infinity_stay_with_their_token(rng):
    """A NaN, or with dynamic scales an infinity, in x spoils its own token only; a static scale saturates."""
    (x, w1, w2, weights, _), keywords = fixed(rng, tokens=4, top_k=2, experts=2, biases=(False, False))
    keywords.pop("limit", None)
    ids = np.array([[0, 1]] * 4)
    clean = sm12x.fused_moe(x, w1, w2, weights, ids, **keywords)
    for bad in (np.nan, np.inf):
        spoilt = x.copy()
        spoilt[1, 3] = bad
        out = sm12x.fused_moe(spoilt, w1, w2, weights, ids, **keywords)
        assert np.isnan(out[1].astype(np.float32)).all()
        np.testing.assert_array_equal(out[[0, 2, 3]], clean[[0, 2, 3]])
    static = sm12x.fused_moe(spoilt, w1, w2, weights, ids, **keywords, a1_scale=0.01)
    spoilt[1, 3] = 100
    np.testing.assert_array_equal(
        static, sm12x.fused_moe(spoilt, w1, w2, weights, ids, **keywords, a1_scale=0.01)
    )


def test_a_result_past_float16_is_infinite(rng):
    """No warning and no wrapped value where y does not fit x's dtype."""
    x = np.ones((2, 16), np.float16)
    w1, w2 = small_codes(rng, (1, 32, 16)), small_codes(rng, (1, 16, 16))
    w1.view(np.uint8)[...] = w2.view(np.uint8)[...] = 0x7E  # 448
    weights, ids = np.array([[1], [-1]], np.float32), np.zeros((2, 1), np.int32)
    out = sm12x.fused_moe(x, w1, w2, weights, ids, a2_scale=1.0)
    np.testing.assert_array_equal(out, np.repeat([[np.inf], [-np.inf]], 16, 1).astype(np.float16))

"""The checks of a layer's stages: what is right passes, one wrong element, scale, weight or order fails."""

from __future__ import annotations

import numpy as np
import pytest

import sm12x
from sm12x import reference
from sm12x.ops.activation import activation
from unit.moe_cases import DTYPES, KINDS, random_layer


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def staged(rng, static=False, **more):
    """A layer with rows, its stages, and the keywords of the checks of its two GEMMs."""
    layer = {
        "tokens": 6,
        "top_k": 2,
        "experts": 3,
        "mapped": False,
        "biases": (True, True),
        "scales": ("channel", "channel"),
        "static": (False, static),
        "weight_on_input": False,
    }
    (x, w1, w2, weights, ids), keywords = random_layer(rng, **{**layer, **more})
    ids[0] = 0  # some row there is
    weights[...] = rng.uniform(0.2, 1, weights.shape)
    stages = reference.fused_moe_stages(x, w1, w2, weights, ids, **keywords)
    chosen = activation(
        keywords["activation"],
        keywords["gated"],
        *(keywords.get(name) for name in ("alpha", "beta", "limit")),
    )
    first = {
        "q1": stages.q1,
        "s1": stages.s1,
        "w1": w1,
        "routing": stages.routing,
        "activation": chosen,
        "w1_scale": keywords["w1_scale"],
        "bias1": keywords["bias1"],
    }
    if static:
        first["a2_scale"] = float(np.float32(np.asarray(keywords["a2_scale"]).item()))
    second = {
        "q2": stages.q2,
        "s2": stages.s2,
        "w2": w2,
        "routing": stages.routing,
        "w2_scale": keywords["w2_scale"],
        "bias2": keywords["bias2"],
    }
    return stages, first, second


def stepped(values, at, steps):
    """A copy with one element some representable values further from zero."""
    moved = np.array(values)
    bits = moved.view(np.uint16 if moved.itemsize == 2 else np.uint8)
    bits[at] += steps
    return moved


def some_large(rng, values):
    """The place of an element that is not small, so that steps of its type are of its own size, nor so large
    that there are no codes above it."""
    size = np.abs(values.astype(np.float32))
    fits = (size > 0) & (size < 300)
    places = np.argwhere(fits & (size >= np.median(size[fits])))
    return tuple(places[rng.integers(len(places))])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("name", "gated"), KINDS)
def test_one_element_of_gemm1_that_is_off_fails(name, gated, dtype, rng):
    """Four units in the last place of bfloat16, sixteen of float16, whose drift is more of them."""
    stages, first, _ = staged(rng, kind=(name, gated), dtype=dtype)
    assert reference.check_gemm1_stage(stages.h, **first) <= 1
    at = some_large(rng, stages.h)
    wrong = stepped(stages.h, at, 4 if dtype == "bfloat16" else 16)
    assert reference.check_gemm1_stage(wrong, **first) > 1
    wrong[at] = np.nan
    assert reference.check_gemm1_stage(wrong, **first) == np.inf


@pytest.mark.parametrize(("name", "gated"), KINDS)
def test_one_static_code_that_is_off_fails(name, gated, rng):
    stages, first, _ = staged(rng, kind=(name, gated), static=True)
    assert reference.check_gemm1_stage(stages.q2, **first) <= 1
    assert reference.check_gemm1_stage(stages.q2.view(np.uint8), **first) <= 1
    at = some_large(rng, stages.q2)
    assert reference.check_gemm1_stage(stepped(stages.q2, at, 2), **first) > 1


@pytest.mark.parametrize("what", ["gate and up", "limit", "beta", "bias1", "w1_scale", "rows", "s1"])
def test_a_wrong_argument_of_gemm1_fails(what, rng):
    """What a kernel may take wrongly: the layout, a parameter, a bias or scale of another expert, rows."""
    stages, first, _ = staged(rng, kind=("swigluoai_uninterleave", True), tokens=8, intermediate=48)
    chosen = first["activation"]
    if what == "gate and up":
        edit = {"activation": activation("swigluoai", True, chosen.alpha, chosen.beta, chosen.limit)}
    elif what == "limit":
        edit = {"activation": activation(chosen.name, True, chosen.alpha, chosen.beta, 0.5 * chosen.limit)}
    elif what == "beta":
        edit = {"activation": activation(chosen.name, True, chosen.alpha, chosen.beta + 0.5, chosen.limit)}
    elif what == "rows":
        index = first["routing"].row_index.copy()
        rows = first["routing"].offsets[-1]
        index[:rows] = np.roll(index[:rows], 1)
        index[0] = (index[0] + 1) % 8
        edit = {"routing": first["routing"]._replace(row_index=index)}
    elif what == "s1":
        edit = {"s1": np.roll(first["s1"], 1)}
    else:
        edit = {what: np.roll(first[what], 1, axis=0)}
    assert reference.check_gemm1_stage(stages.h, **first) <= 1
    assert reference.check_gemm1_stage(stages.h, **{**first, **edit}) > 1


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_gemm2_that_is_off_fails(dtype, rng):
    """One element, or weights that were forgotten or applied twice over."""
    stages, _, second = staged(rng, dtype=dtype)
    assert reference.check_gemm2_stage(stages.y, **second) <= 1
    wrong = stepped(stages.y, some_large(rng, stages.y), 4 if dtype == "bfloat16" else 16)
    assert reference.check_gemm2_stage(wrong, **second) > 1
    assert reference.check_gemm2_stage(stages.y, **second, weight_on_input=True) > 1


@pytest.mark.parametrize("static", [False, True])
def test_rows_behind_the_last_are_not_looked_at(static, rng):
    """Buffers of T * k rows, as a GPU has them, with anything behind the valid routes."""
    stages, first, second = staged(rng, static=static)

    def padded(values, filling):
        more = np.full((5, values.shape[1]), filling).astype(values.dtype)
        return np.concatenate([values, more])

    h = padded(stages.q2 if static else stages.h, np.nan)
    assert reference.check_gemm1_stage(h, **first) <= 1
    q2, y = padded(stages.q2, np.nan), padded(stages.y, np.inf)
    s2 = stages.s2 if static else padded(stages.s2, np.nan)
    assert reference.check_gemm2_stage(y, **{**second, "q2": q2, "s2": s2}) <= 1
    assert reference.check_combine(stages.out, y, stages.routing) == 0


def test_combine_counts_wrong_elements(rng):
    stages, _, _ = staged(rng)
    assert reference.check_combine(stages.out, stages.y, stages.routing) == 0
    wrong = stages.out.copy()
    wrong[0, :3] = wrong[0, :3].astype(np.float32) + 3
    assert reference.check_combine(wrong, stages.y, stages.routing) == 3
    dropped = stages.routing.route_row.copy()
    dropped[0, 1] = -1
    assert reference.check_combine(stages.out, stages.y, stages.routing._replace(route_row=dropped)) > 0


@pytest.mark.parametrize("per_token", [True, False])
def test_codes_and_scales_are_told_apart(per_token, rng):
    """Codes one step off are counted and pass, two steps off fail, so does a scale by its last bit."""
    x = rng.standard_normal((6, 32), dtype=np.float32)
    q, scale = sm12x.quantize_fp8(x, per_token=per_token)
    clean = reference.check_quantised(x, q, scale)
    assert (clean.elements, clean.unequal_codes, clean.passed) == (x.size, 0, True)
    # A code that was rounded towards zero, moved away from it, is within one step.
    up = np.abs(q.astype(np.float32) * scale) < np.abs(x)
    at = tuple(np.argwhere(up & (np.abs(q.astype(np.float32)) < 400))[0])
    one = reference.check_quantised(x, stepped(q, at, 1), scale)
    assert (one.unequal_codes, one.wrong_codes, one.passed) == (1, 0, True)
    two = reference.check_quantised(x, stepped(q, at, 2).view(np.uint8), scale)
    assert (two.unequal_codes, two.wrong_codes, two.passed) == (1, 1, False)
    off = scale.copy()
    off.reshape(-1)[0] = np.nextafter(off.reshape(-1)[0], np.float32(1))
    bad = reference.check_quantised(x, q, off)
    assert (bad.wrong_scales, bad.wrong_codes, bad.passed) == (1, 0, False)
    assert reference.check_quantised(x, q, scale, static=True).passed


def test_nan_must_be_nan_and_nothing_else_may(rng):
    x = rng.standard_normal((2, 16), dtype=np.float32)
    x[0, 3] = np.nan
    q, scale = sm12x.quantize_fp8(x)
    assert reference.check_quantised(x, q, scale).passed
    lost, made = q.copy(), q.copy()
    lost[0, 3] = 0
    made[1, 3] = np.nan
    for wrong in (lost, made):
        assert reference.check_quantised(x, wrong, scale).wrong_codes == 1


def test_shapes_that_do_not_fit_are_refused(rng):
    x = rng.standard_normal((2, 16), dtype=np.float32)
    q, scale = sm12x.quantize_fp8(x)
    with pytest.raises(ValueError, match="^q: expected the shape"):
        reference.check_quantised(x, q[:1], scale)
    with pytest.raises(ValueError, match="^scale: expected one value or shape"):
        reference.check_quantised(x, q, np.ones((3, 1), np.float32))
    with pytest.raises(ValueError, match="^out: expected the shape of ref"):
        reference.token_errors(x, x[:1])
    routing = sm12x.route(np.zeros((2, 1), np.int32), 1)
    with pytest.raises(ValueError, match="^out: expected shape"):
        reference.check_combine(x[:1], x, routing)


def test_errors_of_tokens():
    ref = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    out = np.array([[3.0, 4.5], [0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]])
    np.testing.assert_array_equal(reference.token_errors(out, ref), [0.1, 0, np.inf, np.inf])


def test_the_bound_of_gemm1_is_that_of_design_through_the_activation(rng):
    """Not gated and without clamping, a slope of 2 g: the bound can be written down."""
    stages, first, _ = staged(rng, kind=("relu2", False), dtype="bfloat16")
    rows = stages.routing.offsets[-1]
    token = stages.routing.row_index[:rows]
    a = stages.q1.astype(np.float64)[token] * stages.s1[token]
    w = first["w1"].astype(np.float64) * first["w1_scale"].reshape(3, -1, 1).astype(np.float64)
    expert = np.repeat(np.arange(3), np.diff(stages.routing.offsets))
    g = np.einsum("rk,rnk->rn", a, w[expert]) + first["bias1"].astype(np.float64)[expert]
    drift = np.einsum("rk,rnk->rn", np.abs(a), np.abs(w[expert])) * 2.0**-20 * a.shape[1] / 32
    error = reference.ulp(g, "float32") + drift
    h = np.maximum(g, 0) ** 2
    largest = 2 * np.maximum(g, 0) * error + error**2
    bound = reference.ulp(h, "bfloat16") + largest + 2.0**-20 * (h + largest)
    expected = np.max(np.abs(stages.h.astype(np.float64) - h) / bound)
    np.testing.assert_allclose(reference.check_gemm1_stage(stages.h, **first), expected, rtol=1e-6)

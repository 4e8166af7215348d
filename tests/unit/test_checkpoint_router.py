"""softmax_top_k: each model's way from hidden states to experts and weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sm12x.checkpoint import Router, softmax_top_k
from unit.checkpoints import new_seed

T, E, H, K = 7, 12, 40, 3


@pytest.fixture
def rng():
    return np.random.default_rng(new_seed())


def expected(x, router):
    """One token at a time, in float64."""
    weights, ids = [], []
    for token in x.astype(np.float64):
        if router.norm_eps is not None:
            token = token / np.sqrt((token**2).mean() + router.norm_eps)
        if router.scale is not None:
            token = token * router.scale.astype(np.float64) / np.sqrt(H)
        scores = np.exp(router.weight.astype(np.float64) @ token)
        scores /= scores.sum()
        chosen = sorted(range(E), key=lambda e, scores=scores: -scores[e])[:K]
        picked = scores[chosen]
        if router.renormalize:
            picked = picked / picked.sum()
        if router.per_expert_scale is not None:
            picked = picked * router.per_expert_scale[chosen]
        ids.append(chosen)
        weights.append(picked)
    return np.array(weights), np.array(ids)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_softmax_over_all_then_the_largest(rng, renormalize, dtype):
    weight = rng.standard_normal((E, H)).astype(np.float32)
    router = Router(weight, None, None, renormalize, None)
    x = (3 * rng.standard_normal((T, H)) / np.sqrt(H)).astype(dtype)
    weights, ids = softmax_top_k(x, router, K)
    right, chosen = expected(x, router)
    assert (weights.dtype, ids.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(ids, chosen)
    np.testing.assert_allclose(weights, right, rtol=1e-5)
    assert np.allclose(weights.sum(axis=1), 1) is renormalize


def test_gemmas_router_normalises_scales_and_weighs_its_experts(rng):
    router = Router(
        weight=rng.standard_normal((E, H)).astype(np.float32) * 4,
        scale=rng.uniform(0.5, 1.5, H).astype(np.float32),
        per_expert_scale=rng.uniform(0.5, 1.5, E).astype(np.float32),
        renormalize=True,
        norm_eps=0.25,  # large enough to matter
    )
    x = rng.standard_normal((T, H)).astype(ml_dtypes.bfloat16)
    weights, ids = softmax_top_k(x, router, K)
    right, chosen = expected(x, router)
    np.testing.assert_array_equal(ids, chosen)
    np.testing.assert_allclose(weights, right, rtol=1e-5)


def test_of_equal_experts_the_lower_id_goes_first(rng):
    scores = rng.integers(0, 3, 500)
    router = Router(np.repeat(scores[:, None], H, axis=1).astype(np.float32), None, None, True, None)
    _, ids = softmax_top_k(np.ones((2, H), np.float32) / H, router, 400)
    right = sorted(range(500), key=lambda e: (-scores[e], e))[:400]
    np.testing.assert_array_equal(ids, [right] * 2)


def test_no_tokens_and_large_logits(rng):
    router = Router(1000 * rng.standard_normal((E, H)).astype(np.float32), None, None, True, None)
    assert [each.shape for each in softmax_top_k(np.empty((0, H), np.float32), router, K)] == [(0, K)] * 2
    assert np.isfinite(softmax_top_k(rng.standard_normal((T, H)), router, K)[0]).all()


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [((T, H + 1), 1, "x: expected shape"), ((T, H), 13, "top_k"), ((T, H), 0, "top_k")],
)
def test_bad_arguments_are_named(shape, k, message):
    router = Router(np.zeros((E, H), np.float32), None, None, True, None)
    with pytest.raises(ValueError, match=message):
        softmax_top_k(np.zeros(shape, np.float32), router, k)

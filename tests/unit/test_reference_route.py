"""`route` on NumPy arrays: against sorting in plain Python, and as what `grouped_gemm` takes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sm12x
from sm12x import reference
from unit.moe_oracle import expert_of


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@st.composite
def routings(draw):
    """Ids around the valid range and far from it, with or without a map whose entries are the same."""
    experts = draw(st.integers(1, 6))
    tokens, top_k = draw(st.integers(0, 8)), draw(st.integers(1, 4))
    wide = draw(st.booleans())
    far = [2**40, -(2**40), 2**32] if wide else [2**31 - 1, -(2**31)]
    number = st.integers(-2, experts + 3) | st.sampled_from(far)
    ids = draw(st.lists(number, min_size=tokens * top_k, max_size=tokens * top_k))
    entries = st.integers(-2, experts + 1) | st.sampled_from([2**31 - 1, -(2**31)])
    expert_map = draw(st.none() | st.lists(entries, min_size=1, max_size=9))
    return (
        np.array(ids, np.int64 if wide else np.int32).reshape(tokens, top_k),
        experts,
        None if expert_map is None else np.array(expert_map, np.int32),
    )


@given(routings(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_rows_are_the_valid_routes_sorted_by_expert(routing, seed):
    """Offsets, rows, their inverse and the rows' weights, for any ids and maps."""
    ids, experts, expert_map = routing
    tokens, top_k = ids.shape
    weights = np.random.default_rng(seed).random(ids.shape, dtype=np.float32) + np.float32(0.5)
    found = {r: expert_of(int(each), experts, expert_map) for r, each in enumerate(ids.flat)}
    rows = sorted((r for r in found if found[r] is not None), key=lambda r: (found[r], r))
    rest = [-1] * (ids.size - len(rows))

    got = sm12x.route(ids, experts, topk_weights=weights, expert_map=expert_map)
    counts = [sum(found[r] == e for r in rows) for e in range(experts)]
    assert got.offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    assert got.row_index.tolist() == [r // top_k for r in rows] + rest
    inverse = [rows.index(r) if r in rows else -1 for r in range(ids.size)]
    assert got.route_row.reshape(-1).tolist() == inverse
    assert got.row_weight.tolist() == [weights.reshape(-1)[r] for r in rows] + [0.0] * len(rest)
    assert [each.dtype.name for each in got] == ["int32", "int32", "int32", "float32"]
    assert [each.shape for each in got] == [(experts + 1,), (ids.size,), (tokens, top_k), (ids.size,)]


def test_without_weights_there_are_none():
    got = sm12x.route(np.array([[1, 0]], np.int32), 2)
    assert got.row_weight is None
    assert got.row_index.tolist() == [0, 0]
    assert got.route_row.tolist() == [[1, 0]]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(65_536, 8, 1024), (65_536, 1, 1), (1, 1, 1024)])
def test_the_largest_batches(tokens, top_k, experts, rng):
    """T and E at their limits: every route has one row, rows of an expert are in order."""
    ids = rng.integers(-1, experts, (tokens, top_k)).astype(np.int32)
    offsets, row_index, route_row, _ = sm12x.route(ids, experts)
    valid = ids >= 0
    rows = route_row[valid]
    assert offsets[-1] == valid.sum() == len(np.unique(rows))
    assert (route_row[~valid] == -1).all()
    np.testing.assert_array_equal(row_index[rows], np.nonzero(valid)[0])
    np.testing.assert_array_equal(np.searchsorted(offsets, rows, side="right") - 1, ids[valid])
    for e in rng.integers(0, experts, 5):
        assert (np.diff(row_index[offsets[e] : offsets[e + 1]]) >= 0).all()


def test_what_it_returns_is_what_grouped_gemm_takes(rng):
    """row_index gathers each route's token, row_weight weights it, route_row finds it."""
    tokens, top_k, experts = 7, 3, 4
    ids = rng.integers(-1, experts, (tokens, top_k)).astype(np.int32)
    weights = rng.random((tokens, top_k), dtype=np.float32)
    a, b = reference.random_fp8((tokens, 32), rng), reference.random_fp8((experts, 16, 32), rng)
    routing = sm12x.route(ids, experts, topk_weights=weights)
    rows = routing.offsets[-1]
    y = sm12x.grouped_gemm(
        a,
        b,
        a_scale=2.0**-9,
        offsets=routing.offsets,
        row_index=routing.row_index[:rows],
        row_weight=routing.row_weight[:rows],
        out_dtype="float32",
    )
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    for (t, j), e in np.ndenumerate(ids):
        if e >= 0:
            expected = (wide_a[t] @ wide_b[e].T) * np.float32(2.0**-9) * weights[t, j]
            np.testing.assert_allclose(y[routing.route_row[t, j]], expected, rtol=1e-4, atol=1e-2)


IDS = np.zeros((4, 2), np.int32)
BAD = {
    "ids dtype": (
        {"topk_ids": IDS.astype(np.int16)},
        TypeError,
        "topk_ids: expected int32 or int64, got int16",
    ),
    "ids unsigned": ({"topk_ids": IDS.astype(np.uint32)}, TypeError, "topk_ids: .*got uint32"),
    "ids rank": ({"topk_ids": IDS[0]}, ValueError, r"topk_ids: expected shape \(T, k\), got \(2,\)"),
    "no routes": ({"topk_ids": IDS[:, :0]}, ValueError, r"topk_ids: expected at least one route.*\(4, 0\)"),
    "too many tokens": (
        {"topk_ids": np.zeros((65_537, 1), np.int32)},
        ValueError,
        "topk_ids: expected at most 65536 tokens, got 65537",
    ),
    "too many routes": (
        {"topk_ids": np.broadcast_to(np.zeros(1, np.int32), (65_536, 2**15))},
        ValueError,
        "topk_ids: expected at most 2147483647 routes, got 2147483648",
    ),
    "ids transposed": (
        {"topk_ids": np.zeros((2, 4), np.int32).T},
        ValueError,
        "topk_ids: expected contiguous",
    ),
    "ids sliced": ({"topk_ids": np.zeros((4, 3), np.int32)[:, :2]}, ValueError, "topk_ids: .*strides"),
    "ids no array": ({"topk_ids": [[0]]}, TypeError, "topk_ids: expected an array"),
    "no experts": ({"num_experts": 0}, ValueError, "num_experts: expected 1 to 1024, got 0"),
    "many experts": ({"num_experts": 1025}, ValueError, "num_experts: expected 1 to 1024, got 1025"),
    "experts float": ({"num_experts": 2.0}, TypeError, "num_experts: expected an int, got float"),
    "experts bool": ({"num_experts": True}, TypeError, "num_experts: expected an int, got bool"),
    "weights dtype": (
        {"topk_weights": np.ones((4, 2), ml_dtypes.bfloat16)},
        TypeError,
        "topk_weights: expected float32, got bfloat16",
    ),
    "weights shape": (
        {"topk_weights": np.ones((2, 4), np.float32)},
        ValueError,
        r"topk_weights: expected shape \(4, 2\), that of topk_ids, got \(2, 4\)",
    ),
    "weights strides": (
        {"topk_weights": np.ones((2, 4), np.float32).T},
        ValueError,
        "topk_weights: expected contiguous",
    ),
    "weights no array": ({"topk_weights": 1.0}, TypeError, "topk_weights: expected a NumPy array"),
    "map dtype": ({"expert_map": np.zeros(3, np.int64)}, TypeError, "expert_map: expected int32, got int64"),
    "map rank": (
        {"expert_map": np.zeros((3, 1), np.int32)},
        ValueError,
        r"expert_map: expected shape \(E_global,\), got \(3, 1\)",
    ),
    "map empty": ({"expert_map": np.zeros(0, np.int32)}, ValueError, "expert_map: expected 1 to .* got 0"),
    "map strides": (
        {"expert_map": np.zeros(6, np.int32)[::2]},
        ValueError,
        "expert_map: expected contiguous",
    ),
    "stream": ({"stream": 0}, ValueError, "stream: expected None with NumPy arrays"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of auto, emulator, got 'gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    edit, error, words = BAD[name]
    arguments = {"topk_ids": IDS, "num_experts": 3, "topk_weights": None, "expert_map": None, **edit}
    with pytest.raises(error, match=f"^{words}"):
        sm12x.route(**arguments)

"""Random expert layers for the GPU: strata are what they say, and a run of 2,000 has every edge and
kernel.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from gpu import layer_strata
from gpu.layer_strata import EXPERTS, FACTS, KINDS, MANY_TOKENS, MOST_WEIGHTS, STRATA, TOKENS, draw, facts

COUNT = 2_000


@pytest.fixture
def seed() -> int:
    value = random.randrange(2**32)
    print(f"seed {value}")
    return value


def test_every_stratum_is_what_it_says(seed: int) -> None:
    met = set()
    for number in range(len(STRATA)):
        spec = draw(number + len(STRATA) * (seed % 7), seed + number)
        experts, tokens, kind = STRATA[spec.stratum]
        met.add(spec.stratum)
        assert experts[0] <= spec.experts <= experts[1]
        assert tokens[0] <= spec.tokens <= tokens[1] or (tokens == TOKENS[-1] and spec.tokens == MANY_TOKENS)
        assert (spec.activation, spec.gated) == kind
        assert spec.hidden % 16 == 0
        assert spec.intermediate % 16 == 0
        assert min(spec.hidden, spec.intermediate) >= 16
        matrices = 3 if spec.gated else 2
        assert spec.experts * spec.hidden * spec.intermediate * matrices <= MOST_WEIGHTS
        assert not spec.weight_on_input or spec.top_k == 1
        assert "seed=" in str(spec)
    assert len(met) == len(STRATA) == len(EXPERTS) * len(TOKENS) * len(KINDS)


def test_a_run_has_every_fact_several_times(seed: int) -> None:
    specs = [draw(number, each) for number, each in enumerate(seeds_of(seed))]
    counts = {fact: sum(fact in found for found in map(facts, specs)) for fact in FACTS}
    assert min(counts.values()) >= 5, {fact: count for fact, count in counts.items() if count < 5}
    for spec in specs:
        assert facts(spec) <= set(FACTS)


def seeds_of(seed: int) -> list[int]:
    values: list[int] = np.random.default_rng(seed).integers(2**32, size=COUNT).tolist()
    return values


def test_the_same_seed_draws_the_same_layer(seed: int) -> None:
    assert draw(7, seed) == draw(7, seed)
    assert draw(7, seed) != draw(7, seed + 1)


def test_ids_are_of_the_kind_that_they_are_called(seed: int) -> None:
    kinds = set()
    for number in range(3 * len(STRATA)):
        spec = draw(number, seed + number)
        ids = layer_strata.draw_ids(spec, np.random.default_rng(seed))
        everywhere = spec.global_experts or spec.experts
        assert ids.shape == (spec.tokens, spec.top_k)
        inside = (ids >= 0) & (ids < everywhere)
        kinds.add(spec.routing)
        if spec.routing == "nobody":
            assert not inside.any()
        elif spec.routing != "invalid":
            assert inside.all()
        if spec.routing == "one expert" and ids.size:
            assert (ids == ids.flat[0]).all()
        if spec.routing == "distinct" and spec.top_k <= everywhere:
            assert all(len(set(row)) == spec.top_k for row in ids.tolist())
        if not spec.wide_ids:
            assert (np.abs(ids) <= 2**31).all()
        found = layer_strata.draw_map(spec, np.random.default_rng(seed))
        assert (found is None) == (spec.global_experts == 0)
        if found is not None:
            here = found[(found >= 0) & (found < spec.experts)]
            assert sorted(here.tolist()) == list(range(spec.experts))
    assert kinds == set(layer_strata.ROUTINGS)

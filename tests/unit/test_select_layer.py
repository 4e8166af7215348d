"""The choice of an expert layer's kernels: what fits, where rows are quantised, what the model says of it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from sm12x import manifest
from sm12x.select import RATES, describe, fits, select
from sm12x.select.layer import (
    FP8,
    MOST_WHOLE_ROUTES,
    MOST_WHOLE_ROWS,
    MOST_WHOLE_WIDTH,
    LayerProblem,
    _select,
    fits_whole,
    quantising_us,
    select_layer,
    with_all_rows,
)
from sm12x.select.model import measure
from sm12x.select.problem import expected_groups, strip_of, takes_runs, units_upper_bound
from sm12x.select.ranking import can_count
from sm12x.select.rates import FAMILIES, dram
from unit.fake_driver import install
from unit.layer_cases import INNER, TOP, E, H, T, make, run, tokens, weights

SMS = {"sm_90a": 132, "sm_120a": 170, "sm_121a": 48}
ARCHES = sorted(RATES)


@pytest.fixture
def held(layer_root):
    return manifest.load(layer_root)


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def layer(rows, arch="sm_120a", **more):
    """A layer of the size of Qwen3-30B-A3B's."""
    facts = {"experts": 128, "hidden": 2048, "intermediate": 768, "gated": True, "static": False}
    facts |= {"dtype": "bfloat16", "arch": arch, "expected_rows": rows, "weighted": True}
    return LayerProblem(rows=rows, **{**facts, **more})


def chosen(problem, held):
    return select_layer(problem, held, SMS[problem.arch])[0]


def random_layer(rng):
    rows = int(2 ** rng.uniform(0, 17))
    return layer(
        rows,
        rng.choice(ARCHES),
        experts=rng.randrange(1, 300),
        hidden=16 * rng.randrange(1, 500),
        intermediate=16 * rng.randrange(1, 300),
        gated=rng.random() < 0.5,
        static=rng.random() < 0.3,
        dtype=rng.choice(("bfloat16", "float16")),
        expected_rows=rng.randrange(1, rows + 1),
        weighted=rng.random() < 0.7,
    )


# What fits.


def test_every_choice_fits_its_gemm(held, rng):
    for _ in range(60):
        problem = random_layer(rng)
        choice = chosen(problem, held)
        up, down = with_all_rows(problem, choice)
        assert fits(up, choice.up.variant) is None
        assert fits(down, choice.down.variant) is None
        assert (choice.up.variant.role, choice.up.variant.gated) == ("up", problem.gated)
        assert (down.role == "down") is not (problem.static or choice.quantises_apart)
        assert (up.rows, down.rows) == (problem.rows, problem.rows)


def test_the_two_gemms_of_a_layer():
    problem = layer(64, expected_rows=16)
    up, down = problem.up(16), problem.down(16, quantises=True)
    assert (up.n, up.k, up.out, up.rows, up.role) == (1536, 2048, "bfloat16", 16, "up")
    assert (up.gated, up.gathers, up.weighted, up.groups) == (True, True, False, 128)
    assert (down.n, down.k, down.out, down.rows, down.role) == (2048, 768, "bfloat16", 16, "down")
    assert (down.gated, down.gathers, down.weighted) == (False, False, True)
    assert problem.down(16, quantises=False).role == "gemm"
    assert replace(problem, static=True).up(16).out == FP8
    assert replace(problem, static=True).down(16, quantises=False).out == "bfloat16"
    plain = replace(problem, gated=False).up(16)
    assert (plain.n, plain.gated) == (768, False)
    assert replace(problem, weighted=False).down(16, quantises=True).weighted is False


def test_kernels_with_gates_and_without_are_not_mixed_up(held):
    for gated in (True, False):
        problem = layer(8, gated=gated).up(8)
        for variant in held.gemms(role="up"):
            assert (fits(problem, variant) is None) is (variant.gated is gated)
    with_gates = next(v for v in held.gemms(role="up") if v.gated)
    assert fits(layer(8, gated=False).up(8), with_gates) == "is for weights with gates"
    without = next(v for v in held.gemms(role="up") if not v.gated)
    assert fits(layer(8).up(8), without) == "is for weights without gates"
    assert fits(layer(8).up(8), held.gemms()[0]) == "is a gemm kernel"


def test_grouped_gemm_never_gets_a_kernel_of_a_layer(held):
    problem = layer(8).down(8, quantises=False)
    for role in ("up", "down"):
        assert all(fits(problem, variant) is not None for variant in held.gemms(role=role))
    assert {choice.variant.role for choice in select(problem, held.variants.values(), 170)} == {"gemm"}


def without(held, *roles_and_gates):
    """The manifest without kernels of some (role, gated)."""
    kept = {k: v for k, v in held.variants.items() if (v.role, v.gated) not in roles_and_gates}
    return replace(held, variants=kept)


def test_where_nothing_fits_the_error_says_for_what(held):
    for problem, missing, words in (
        (layer(8), [("up", True)], "x: no kernel of an expert layer for bfloat16 on sm_120a$"),
        (layer(8, gated=False), [("up", False)], "x: .* bfloat16 on sm_120a, without gates$"),
        (layer(8, static=True), [("gemm", False)], "x: no kernel of an expert layer for bfloat16"),
        (layer(8), [("gemm", False), ("down", False)], "x: no kernel of an expert layer"),
        (layer(8, dtype="float32"), [], "x: no kernel of an expert layer for float32"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            select_layer(problem, without(held, *missing), 170)


def test_one_way_to_quantise_is_enough(held):
    few, many = layer(8), layer(2**16)
    assert chosen(few, without(held, ("down", False))).quantises_apart
    assert not chosen(many, without(held, ("gemm", False))).quantises_apart
    assert not chosen(layer(8, static=True), without(held, ("down", False))).quantises_apart


# What is preferred.


@pytest.mark.parametrize("arch", ARCHES)
def test_few_rows_are_quantised_on_their_way_in_and_many_apart(held, arch):
    apart = [chosen(layer(rows, arch), held).quantises_apart for rows in (1, 8, 64, 512, 2**15, 2**17)]
    assert apart[:3] == [False] * 3
    assert apart == sorted(apart)
    assert apart[-2:] == [True] * 2


@pytest.mark.parametrize("arch", ARCHES)
def test_held_codes_are_made_once_for_an_expert(held, arch, monkeypatch):
    """Where K is narrow and its rows are one tile; others are made anew for each tile of features."""

    def gather(intermediate, rows=256):
        problem = layer(rows, arch, hidden=8192, intermediate=intermediate).down(rows, quantises=True)
        variants = [v for v in held.gemms("fp8_down", "down") if v.token_tile == 8]
        return min(c.terms["gather"] for c in select(problem, variants, SMS[arch]) if not c.least_units)

    down = FAMILIES["fp8_down"]
    monkeypatch.setitem(FAMILIES, "fp8_down", replace(down, held_rows=8))
    assert gather(784) > 4 * gather(768)
    assert gather(784, 2048) < 1.1 * gather(768, 2048)
    monkeypatch.setitem(FAMILIES, "fp8_down", down)
    assert gather(784) < 1.1 * gather(768)


def test_static_scales_are_never_quantised_between(held, rng):
    for _ in range(30):
        choice = chosen(replace(random_layer(rng), static=True), held)
        assert not choice.quantises_apart
        assert choice.down.variant.family == "fp8_packed"


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("gated", [True, False])
def test_more_rows_pick_larger_tiles_and_take_longer(held, arch, gated):
    problems = [layer(2**power, arch, gated=gated) for power in range(0, 18)]
    choices = [chosen(problem, held) for problem in problems]
    tiles = [choice.up.variant.token_tile for choice in choices]
    assert tiles[0] == 8
    assert tiles[-1] == 128
    us = [
        choice.us + choice.quantises_apart * quantising_us(problem, SMS[arch])
        for problem, choice in zip(problems, choices, strict=True)
    ]
    assert us == sorted(us)


def test_the_choice_goes_by_the_rows_that_are_expected_and_the_grid_by_all(held):
    few = layer(2**15, expected_rows=8)
    choice = chosen(few, held)
    assert choice == chosen(layer(8), held) != chosen(layer(2**15), held)
    assert [gemm.rows for gemm in with_all_rows(few, choice)] == [2**15] * 2


def test_what_a_launch_between_costs(rng):
    for _ in range(20):
        problem = random_layer(rng)
        sms = SMS[problem.arch]
        more = replace(problem, expected_rows=problem.expected_rows + 1)
        start = RATES[problem.arch].next_launch
        assert start < quantising_us(problem, sms) < quantising_us(more, sms)
        # Two bytes of each value are read and one written.
        values = problem.expected_rows * problem.intermediate
        nanoseconds = 3 * values / dram(problem.arch, sms)
        assert quantising_us(problem, sms) == pytest.approx(start + nanoseconds / 1e3)


def test_the_cheaper_of_both_ways_is_taken(held, monkeypatch):
    problem = layer(8)
    assert not chosen(problem, held).quantises_apart
    dear = replace(FAMILIES["fp8_down"], start=FAMILIES["fp8_down"].start + 100.0)
    monkeypatch.setitem(FAMILIES, "fp8_down", dear)
    _select.cache_clear()
    assert chosen(problem, held).quantises_apart
    rates = replace(RATES["sm_120a"], next_launch=RATES["sm_120a"].next_launch + 200.0)
    monkeypatch.setitem(RATES, "sm_120a", rates)
    _select.cache_clear()
    assert not chosen(problem, held).quantises_apart
    _select.cache_clear()


# The model of the layer's kernels.


def down_kernel(held):
    return next(v for v in held.gemms(role="down") if v.tile == (128, 8, 128))


def test_quantising_costs_the_more_the_more_tokens_a_cta_has(held):
    kernel, before = down_kernel(held), 0.0
    for rows in (8, 128, 1024, 8192):
        (choice, *_) = select(layer(rows).down(rows, quantises=True), [kernel], 170)
        assert choice.terms["gather"] > before
        before = choice.terms["gather"]
    plain = next(v for v in held.gemms("fp8_packed") if v.tile == kernel.tile)
    (choice, *_) = select(layer(64).down(64, quantises=False), [plain], 170)
    assert choice.terms["gather"] == 0.0


def test_gates_double_the_weights_and_not_the_result(held, rng):
    for _ in range(10):
        problem = random_layer(rng)
        gated, plain = replace(problem, gated=True).up(64), replace(problem, gated=False).up(64)
        kernels = {v.gated: v for v in held.gemms(role="up") if v.tile == (128, 8, 128)}
        works = {g: measure(p, expected_groups(p), kernels[g]) for g, p in ((True, gated), (False, plain))}
        groups = expected_groups(plain)
        read = sum(group.count * plain.n * plain.k for group in groups)
        assert works[True].unique - works[False].unique == pytest.approx(read)
        assert works[True].rows == works[False].rows
        assert works[True].active == works[False].active


def test_a_run_never_parts_a_gate_from_its_up(held):
    kernels = {v.gated: v for v in held.gemms(role="up") if v.tile == (128, 8, 128)}
    assert (strip_of(kernels[True]), strip_of(kernels[False])) == (16, 8)
    gated, plain = layer(4).up(4), layer(4, gated=False).up(4)
    features = {True: gated.n // 16, False: plain.n // 8}
    assert features[True] == features[False]
    for kind, problem in ((True, gated), (False, plain)):
        assert units_upper_bound(problem, kernels[kind], 0) == 4 * features[kind]


# From calls.


def problems_of(monkeypatch, layer_root, given_of, call_of):
    """The LayerProblem of a call."""
    fake = install(monkeypatch, layer_root)
    plan = make(given_of(fake))
    run(plan, call_of(fake))
    (made,) = plan._plan._calls.values()
    return made.problem


def test_what_a_call_says_of_its_layer(monkeypatch, layer_root):
    problem = problems_of(monkeypatch, layer_root, weights, tokens)
    assert problem == LayerProblem(
        **{"experts": E, "hidden": H, "intermediate": INNER, "gated": True, "static": False},
        **{"dtype": "bfloat16", "arch": "sm_120a", "rows": T * TOP, "expected_rows": T * TOP},
        weighted=True,
    )
    problem = problems_of(
        monkeypatch,
        layer_root,
        lambda fake: weights(fake, gated=False, a2_scale=0.5, apply_router_weight_on_input=True),
        lambda fake: tokens(fake, top_k=1, dtype="float16"),
    )
    assert (problem.gated, problem.static, problem.weighted) == (False, True, False)
    assert (problem.dtype, problem.rows) == ("float16", T)


@pytest.mark.parametrize("everywhere", [E // 2, E, E + 1, 4 * E, 1000])
@pytest.mark.parametrize("count", [1, 5, 640])
def test_rows_of_experts_elsewhere_are_not_expected_here(monkeypatch, layer_root, everywhere, count):
    problem = problems_of(
        monkeypatch,
        layer_root,
        lambda fake: weights(fake, expert_map=fake.tensor((everywhere,), "int32")),
        lambda fake: tokens(fake, count),
    )
    rows = count * TOP
    assert problem.rows == rows, "they all may be here"
    assert problem.expected_rows == min(rows, math.ceil(rows * E / everywhere))
    assert problem.expected_rows >= 1


def test_the_lists_that_a_choice_comes_from(held):
    problem = layer(64)
    _, lists = select_layer(problem, held, 170)
    assert lists[0].startswith(
        "sm12x select: packed M=64 E=128 N=1536 K=2048, row_index, float8_e4m3fn x float8_e4m3fn -> bfloat16"
    )
    assert [text.partition(",")[0] for text in lists[1:]] == [
        "sm12x select: packed M=64 E=128 N=2048 K=768"
    ] * 2
    assert "fp8_up_gated_" in lists[0]
    assert "fp8_packed_" in lists[1]
    assert "fp8_down_" in lists[2]
    for text in lists:
        assert "bound by " in text
    ranked = select(problem.up(64), held.gemms(role="up"), 170)
    assert lists[0] == describe(problem.up(64), ranked)
    assert len(select_layer(replace(problem, static=True), held, 170)[1]) == 2


# What is kept, and what may not overflow.


def test_layers_with_nearly_as_many_rows_get_the_same_choice(held):
    one, other = (select_layer(layer(rows), held, 170) for rows in (2049, 2100))
    assert one is other
    assert select_layer(layer(200), held, 170) is not select_layer(layer(201), held, 170)


def test_kernels_can_count_the_rows_that_may_come_not_only_those_expected(held):
    """One expert here of 65,536: few rows are expected, but all may come, and unit counts have 32 bits."""
    few = replace(layer(8), experts=1, hidden=4096, intermediate=14336)
    most = replace(few, rows=65_536 * 8)
    assert not can_count(most.up(most.rows), chosen(few, held).up.variant, 0, 188)
    choice, _ = select_layer(most, held, 188)
    for gemm, made in zip(with_all_rows(most, choice), (choice.up, choice.down), strict=True):
        if made.least_units or takes_runs(made.variant):
            assert can_count(gemm, made.variant, made.least_units, 188)


# All of a layer in one launch.


@pytest.fixture
def held_whole(whole_root):
    return manifest.load(whole_root)


def few(**more):
    """A layer that one launch does."""
    return layer(**{"rows": 8, "intermediate": 704, **more})


def test_few_rows_are_one_launch_where_there_is_a_kernel_for_it(held, held_whole, rng):
    for _ in range(40):
        problem = replace(random_layer(rng), static=False, weighted=True)
        choice, lists = select_layer(problem, held_whole, SMS[problem.arch])
        without_it, shorter = select_layer(problem, held, SMS[problem.arch])
        fewer = problem.rows <= MOST_WHOLE_ROUTES
        wanted = fewer and problem.expected_rows <= MOST_WHOLE_ROWS * problem.experts
        wanted = wanted and problem.experts <= 256 and problem.intermediate <= MOST_WHOLE_WIDTH
        assert (choice.whole is not None) == wanted, problem
        assert without_it.whole is None
        assert len(lists) == len(shorter) + 1
        assert (choice.up.variant.key, choice.down.variant.key) == (
            without_it.up.variant.key,
            without_it.down.variant.key,
        )
        if wanted:
            assert choice.whole.gated == problem.gated
            assert fits_whole(problem, choice.whole) is None
            assert choice.whole.key in lists[-1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"static_input": True}, "takes no a1_scale"),
        ({"static": True}, "takes no a2_scale"),
        ({"weighted": False}, "takes no router weights on the input"),
        ({"rows": 513}, "takes 512 routes at most, not 513"),
        ({"experts": 257}, "takes 256 experts at most, not 257"),
        ({"hidden": 16 * 1024 + 16}, "takes H of 16384 at most, not 16400"),
        ({"gated": False}, "is for weights with gates"),
        ({"dtype": "float32"}, "gives bfloat16 or float16, not float32"),
        ({"arch": "sm_80"}, "has no cubin for sm_80"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_kernel_of_a_whole_layer_does_not_take(held_whole, changes, why):
    kernel = next(v for v in held_whole.gemms(role="layer") if v.gated)
    assert fits_whole(few(), kernel) is None
    assert fits_whole(few(**changes), kernel) == why
    if not changes.keys() & {"gated", "dtype", "arch"}:
        choice, lists = select_layer(few(**changes), held_whole, 170)
        assert choice.whole is None
        assert lists[-1] == f"sm12x select: several launches: {kernel.key} {why}"


@pytest.mark.parametrize("changes", [{"rows": 512}, {"experts": 256}, {"hidden": 16 * 1024}], ids=str)
def test_the_most_that_the_kernel_of_a_whole_layer_takes(held_whole, changes):
    kernel = next(v for v in held_whole.gemms(role="layer") if v.gated)
    assert fits_whole(few(**changes), kernel) is None


def test_one_launch_is_for_narrow_h_and_few_rows_of_an_expert(held_whole, monkeypatch):
    """Rows of experts elsewhere are not expected here; bounds are exact, also where others are rounded."""
    for changes, whole in (
        ({"experts": 3, "rows": 6, "expected_rows": 6}, True),
        ({"experts": 3, "rows": 7, "expected_rows": 7}, False),
        ({"experts": 1, "rows": 2, "expected_rows": 2}, True),
        ({"experts": 1, "rows": 3, "expected_rows": 3}, False),
        ({"experts": 3, "rows": 8, "expected_rows": 6}, True),
        ({"experts": 3, "rows": 8, "expected_rows": 7}, False),
        ({"rows": 8}, True),
        ({"rows": 9}, False),
        ({"intermediate": 768}, True),
        ({"intermediate": 784}, False),
    ):
        choice, lists = select_layer(few(**changes), held_whole, 170)
        assert (choice.whole is not None) is whole, changes
    assert "is not for I of more than 768, got 784" in lists[-1]
    monkeypatch.setattr("sm12x.select.layer.MOST_WHOLE_ROUTES", 7)
    choice, lists = select_layer(few(), held_whole, 170)
    assert choice.whole is None
    assert "is not for more than 7 routes, got 8" in lists[-1]

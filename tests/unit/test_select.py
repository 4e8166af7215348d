"""The choice of a variant: what fits, what the ranking prefers and why, and the bound on tiles."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from sm12x import manifest
from sm12x.select import (
    RATES,
    Problem,
    describe,
    expected_active,
    fits,
    select,
    tiles_upper_bound,
    units_upper_bound,
)
from sm12x.select.model import measure, of_runs, of_split
from sm12x.select.problem import Groups, expected_groups
from sm12x.select.ranking import SPLIT_GAINS, TOO_MANY_UNITS, least_units
from sm12x.select.rates import DRAM, FAMILIES, dram
from unit import packed_schedule
from unit.fake_family import write_family
from unit.packed_variants import packed_variants

E4M3 = "float8_e4m3fn"
SMS = {"sm_90a": 132, "sm_120a": 170, "sm_121a": 48}
CONCURRENT = ("dram", "smem", "gather")


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    root = tmp_path_factory.mktemp("cubins")
    write_family(root)
    return manifest.load(root)


@pytest.fixture(scope="module")
def gemms(held):
    """All GEMM variants of both families."""
    return [*held.gemms(), *packed_variants()]


def packed(rows, groups=128, n=1408, k=2816, arch="sm_120a", out="bfloat16", a=E4M3, **more):
    return Problem("packed", groups, a, E4M3, out, arch, rows, n, k, **more)


def masked(max_rows, expected_rows=0, groups=128, n=1408, k=2816, arch="sm_120a"):
    problem = Problem("masked", groups, E4M3, E4M3, "bfloat16", arch, n=n, k=k)
    return replace(problem, max_rows=max_rows, expected_rows=expected_rows)


def listed(shapes, arch="sm_120a"):
    return Problem("list", len(shapes), E4M3, E4M3, "bfloat16", arch, shapes=tuple(shapes))


def best(problem, variants):
    return select(problem, variants, SMS[problem.arch])[0]


def only(key, variants):
    return next(variant for variant in variants if variant.key == key)


def new_seed():
    seed = random.randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


def random_problem(rng):
    kind = rng.choice(("packed", "packed", "masked", "list"))
    arch = rng.choice(sorted(RATES))
    n, k, groups = 8 * rng.randrange(1, 2000), 16 * rng.randrange(1, 1000), rng.randrange(1, 300)
    rows = int(2 ** rng.uniform(0, 17)) - 1
    if kind == "list":
        return listed(
            [
                (rng.randrange(0, 300), 8 * rng.randrange(1, 500), 16 * rng.randrange(1, 300))
                for _ in range(groups)
            ],
            arch,
        )
    if kind == "masked":
        most = rng.randrange(0, 600)
        return masked(most, rng.choice((0, rng.randrange(1, 700))), groups, n, k, arch)
    out = rng.choice(("bfloat16", "float16", "float32"))
    gathers, weighted = rng.random() < 0.4, rng.random() < 0.2
    return packed(rows, groups, n, k, arch, out, gathers=gathers, weighted=weighted)


# ---------------------------------------------------------------------------------------------------
# What the ranking prefers
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(RATES))
def test_rows_per_expert_pick_the_token_tile(gemms, arch):
    tiles = [
        best(packed(128 * rows, arch=arch), gemms).variant.token_tile
        for rows in (0.0625, 1, 2, 4, 12, 24, 48, 128, 512)
    ]
    assert tiles[0] == 8
    assert tiles[-1] >= 64
    assert 16 in tiles
    assert tiles == sorted(tiles)


@pytest.mark.parametrize("arch", sorted(RATES))
def test_many_rows_pick_large_tiles(gemms, arch):
    variant = best(packed(8 * 4096, 8, 28672, 4096, arch), gemms).variant
    assert variant.token_tile * variant.feature_tile == 128 * 128


@pytest.mark.parametrize("arch", sorted(RATES))
def test_fewer_tiles_than_sms_still_use_all_of_dram(gemms, arch):
    # Two tiles of 128 features: whole ones would leave nearly all SMs without work.
    problem = packed(4, 1, 256, 14336, arch)
    choice = best(problem, gemms)
    unique = measure(problem, expected_groups(problem), choice.variant).unique
    assert choice.terms["dram"] < 1.1 * unique / dram(arch, SMS[arch]) / 1e3
    assert choice.least_units > 0 or arch == "sm_121a"  # where 16 strips on as many SMs do
    [turns] = select(problem, [only("fp8_ptr_array_128x16x128_swap_bf16", gemms)], SMS[arch])
    assert turns.terms["dram"] > 1.1 * choice.terms["dram"]


def test_enough_work_is_not_split(gemms):
    """Where split-K promises less than half a percent, its workspace is not worth it."""
    problem = packed(1024, n=28672, arch="sm_120a")
    choice = best(problem, gemms)
    assert choice.least_units == 0
    splits = [other.us for other in select(problem, gemms, SMS["sm_120a"]) if other.least_units]
    assert min(splits) < choice.us, "the problem does not show it"


def test_left_over_tiles_cost_little_where_few_sms_saturate_dram(gemms):
    # One tile more than SMs. GB10's DRAM is saturated by a handful of SMs, an H200's by a third of them.
    lost = {}
    for arch in ("sm_90a", "sm_121a"):
        rows, sms = SMS[arch] + 1, SMS[arch]
        problem = listed([(1, 128, 8192)] * rows, arch)
        groups = expected_groups(problem)
        variant = only("fp8_ptr_array_128x16x128_swap_bf16", gemms)
        [choice] = select(problem, [variant], sms)
        least = measure(problem, groups, variant).unique / dram(arch, sms) / 1e3
        lost[arch] = choice.terms["dram"] / least
    assert 1.0 <= lost["sm_121a"] < 1.1 < lost["sm_90a"]


@pytest.mark.parametrize("arch", sorted(RATES))
def test_packed_kernels_come_first_at_few_rows(gemms, arch):
    rng = new_seed()
    for _ in range(40):
        groups, k = rng.randrange(1, 257), 64 * rng.randrange(4, 120)
        problem = packed(rng.randrange(1, 8 * groups), groups, 64 * rng.randrange(4, 200), k, arch)
        assert best(problem, gemms).variant.family == "fp8_packed", problem


def test_ptr_array_is_chosen_where_the_model_says_that_it_is_cheaper(gemms, monkeypatch):
    problem = packed(1024)
    assert best(problem, gemms).variant.family == "fp8_packed"
    monkeypatch.setitem(FAMILIES, "fp8_packed", replace(FAMILIES["fp8_packed"], start=100.0))
    choice = best(problem, gemms)
    assert choice.variant.family == "fp8_ptr_array"


def test_a_list_call_is_judged_by_its_own_rows(gemms):
    assert best(listed([(3, 1408, 2816)] * 128), gemms).variant.token_tile == 16
    assert best(listed([(8192, 4096, 4096)] * 8), gemms).variant.token_tile == 128
    assert "at most 300 in one" in describe(listed([(300, 64, 64), (1, 64, 64)]), [])


def test_the_hint_of_a_masked_call_picks_the_tile(gemms):
    assert best(masked(1024, 2), gemms).variant.token_tile == 8
    assert best(masked(1024, 512), gemms).variant.token_tile >= 64
    # Without a hint: half of what fits. A hint beyond what fits is what fits.
    assert best(masked(1024), gemms).us == pytest.approx(best(masked(1024, 512), gemms).us)
    assert best(masked(64, 10**6), gemms).us == pytest.approx(best(masked(64, 64), gemms).us)


# ---------------------------------------------------------------------------------------------------
# The ranking itself
# ---------------------------------------------------------------------------------------------------


def test_the_order_of_the_variants_does_not_matter(gemms):
    rng = new_seed()
    for _ in range(10):
        problem = random_problem(rng)
        shuffled = rng.sample(gemms, len(gemms))
        assert select(problem, shuffled, 100) == select(problem, gemms, 100)


def test_ties_go_by_key(gemms):
    variant = only("fp8_packed_128x8x128_swap", gemms)
    twins = [replace(variant, key=key) for key in ("c", "a", "b")]
    ranked = select(packed(0), twins, 170)
    for split in (False, True):
        keys = [c.variant.key for c in ranked if (c.least_units > 0) == split]
        assert keys == sorted(keys)
    assert [c.variant.key for c in select(packed(512), twins, 170) if not c.least_units] == ["a", "b", "c"]


def test_terms_add_up_as_the_docstring_says(gemms):
    rng = new_seed()
    seen = set()
    for _ in range(60):
        problem = random_problem(rng)
        overlap = RATES[problem.arch].overlap
        for choice in select(problem, gemms, rng.randrange(1, 300)):
            terms = choice.terms
            assert set(terms) == {"launch", "setup", "dram", "smem", "gather", "mma", "tiles", "split"}
            assert all(math.isfinite(us) and us >= 0 for us in terms.values()), choice
            four = [*(terms[name] for name in CONCURRENT), terms["mma"] + terms["tiles"]]
            total = terms["launch"] + terms["setup"] + terms["split"] + max(four)
            assert choice.us == pytest.approx(total + overlap * (sum(four) - max(four)))
            assert (terms["split"] > 0) <= (choice.least_units > 0)
            assert (terms["gather"] > 0) <= problem.gathers
            seen.add((problem.kind, choice.least_units > 0))
    assert {("packed", False), ("packed", True), ("masked", True), ("list", False)} <= seen


def test_no_choice_is_faster_than_its_bytes(gemms):
    rng = new_seed()
    for _ in range(60):
        problem, sms = random_problem(rng), rng.randrange(1, 300)
        groups = expected_groups(problem)
        for choice in select(problem, gemms, sms):
            unique = measure(problem, groups, choice.variant).unique
            assert choice.terms["dram"] >= unique / dram(problem.arch, sms) / 1e3 * (1 - 1e-9)


def test_every_fitting_variant_is_ranked_with_a_reason(gemms):
    choices = select(packed(256), gemms, 170)
    fitting = {v.key for v in gemms if fits(packed(256), v) is None}
    assert {c.variant.key for c in choices} == fitting
    assert len({(c.variant.key, c.least_units > 0) for c in choices}) == len(choices)
    ranked_by = [c.us * (SPLIT_GAINS if c.least_units else 1.0) for c in choices]
    assert ranked_by == sorted(ranked_by)
    assert all("bound by" in c.reason for c in choices)
    text = describe(packed(256), choices)
    assert text.startswith("sm12x select: packed M=256 E=128 N=1408 K=2816")
    assert all(key in text for key in fitting)
    assert " split-K " in text
    text = describe(masked(64, 4), [])
    assert "masked max_m=64 expected 4 E=128" in text
    assert ", row_index, row_weight" in describe(packed(1, gathers=True, weighted=True), [])


def test_a_forced_variant_is_ranked_alone(gemms):
    slow = only("fp8_packed_128x128x128_coop", gemms)
    choices = select(packed(8), [slow], 170)
    assert {c.variant.key for c in choices} == {slow.key}
    assert sorted(c.least_units > 0 for c in choices) == [False, True]
    assert select(packed(8, arch="sm_120a"), [replace(slow, targets={})], 170) == []


def test_nothing_to_do_is_ranked_without_dividing_by_zero(gemms):
    fitting = sum(fits(packed(0), v) is None for v in gemms)
    for problem in (packed(0), packed(0, gathers=True), listed([]), masked(0), masked(0, 7), packed(5, 0)):
        choices = select(problem, gemms, 170)
        assert all(math.isfinite(c.us) for c in choices)
        assert choices
    assert len({c.variant.key for c in select(packed(0), gemms, 170)}) == fitting


def test_an_architecture_without_rates_is_refused(gemms):
    variants = [replace(v, targets={"sm_89": None}) for v in packed_variants()]
    with pytest.raises(KeyError):
        select(packed(8, arch="sm_89"), variants, 128)


# ---------------------------------------------------------------------------------------------------
# Terms
# ---------------------------------------------------------------------------------------------------


def test_padded_work_shows_in_the_mma_term(gemms):
    # One row in each of 170 experts: what is multiplied grows with the token tile, and nothing else does.
    problem = listed([(1, 128, 2048)] * 170)
    work = {
        v.token_tile: measure(problem, expected_groups(problem), v)
        for v in gemms
        if v.family == "fp8_ptr_array" and v.out == "bfloat16"
    }
    assert work[32].macs == 2 * work[16].macs
    assert work[128].macs == 8 * work[16].macs
    assert work[32].operands == work[16].operands
    mma = {c.variant.token_tile: c.terms["mma"] for c in select(problem, gemms, 170)}
    assert mma[16] < mma[32] < mma[64] < mma[128]


def test_a_token_step_skips_columns_past_the_groups_rows(gemms):
    variant = only("fp8_packed_128x64x128_swap", gemms)
    problem = packed(1, 1)
    stepped = measure(problem, expected_groups(problem), variant)
    whole = measure(problem, expected_groups(problem), replace(variant, token_step=0))
    assert stepped.macs * 4 == whole.macs
    assert (stepped.weights, stepped.tokens) == (whole.weights, whole.tokens)


def test_packed_kernels_multiply_useful_k_blocks_only(gemms):
    problem = packed(8, 1, 128, 704)  # 5.5 k-tiles of 128, 11 of 64
    groups = expected_groups(problem)
    macs = {
        key: measure(problem, groups, only(key, gemms)).macs
        for key in (
            "fp8_packed_128x16x128_swap",
            "fp8_packed_128x16x64_swap",
            "fp8_ptr_array_128x16x128_swap_bf16",
        )
    }
    assert macs["fp8_packed_128x16x128_swap"] == macs["fp8_packed_128x16x64_swap"] == 128 * 16 * 704
    assert macs["fp8_ptr_array_128x16x128_swap_bf16"] == 128 * 16 * 768


def test_a_preparation_kernel_costs_a_launch(gemms):
    one = only("fp8_ptr_array_128x16x128_swap_bf16", gemms)
    launch = [
        select(listed([(1, 128, 128)] * groups), [one], 170)[0].terms["launch"] for groups in (340, 341, 681)
    ]
    step = RATES["sm_120a"].next_launch
    assert launch == pytest.approx([launch[0], launch[0] + step, launch[0] + 2 * step])
    # And a packed call needs one, where the packed kernels need none.
    packed_one = only("fp8_packed_128x16x128_swap", gemms)
    own, other = (select(packed(8), [v], 170)[0].terms["launch"] for v in (packed_one, one))
    starts = FAMILIES["fp8_ptr_array"].start - FAMILIES["fp8_packed"].start
    assert other - own == pytest.approx(step + starts)


def test_an_epilogue_of_pingpong_hides_behind_the_other_group(gemms):
    def tiles(key, waves):
        problem = packed(64, 1, waves * 170 * 128, 4096)
        return next(c for c in select(problem, [only(key, gemms)], 170) if not c.least_units).terms["tiles"]

    pingpong, cooperative = "fp8_packed_64x128x128_pingpong", "fp8_packed_128x128x128_coop"
    assert tiles(pingpong, 4) == pytest.approx(tiles(pingpong, 1))
    assert tiles(cooperative, 4) == pytest.approx(4 * tiles(cooperative, 1))


def test_setup_is_for_experts_not_tiles(gemms):
    variant = only("fp8_ptr_array_128x16x128_swap_bf16", gemms)
    setup = FAMILIES["fp8_ptr_array"].setup
    one = select(packed(16, 1, 170 * 8 * 128, 512), [variant], 170)[0]
    assert one.terms["setup"] == pytest.approx(setup)
    many = select(listed([(16, 128, 512)] * (170 * 8)), [variant], 170)[0]
    assert many.terms["setup"] == pytest.approx(8 * setup)


def test_one_sm_pulls_no_more_than_its_ceiling(gemms):
    # One tile, one strip of features, one k-tile: one SM does all of it, and the others do not help.
    rates = RATES["sm_120a"]
    tile = listed([(16, 128, 8192)])
    [turns] = select(tile, [only("fp8_ptr_array_128x16x128_swap_bf16", gemms)], 170)
    ceiling = rates.sm * rates.clock * 1e3  # bytes a microsecond
    assert turns.terms["smem"] == pytest.approx((128 + 16) * 8192 / ceiling)
    assert turns.terms["dram"] == pytest.approx((128 * 8192 + 16 * (8192 + 2 * 128)) / ceiling)
    swapped = only("fp8_packed_128x16x128_swap", gemms)
    strip = packed(16, 1, 8, 8192)
    choices = {c.least_units > 0: c for c in select(strip, [swapped], 170)}
    unique = 8 * 8192 + 16 * (8192 + 2 * 8)
    assert choices[False].terms["dram"] == pytest.approx(unique / ceiling)
    assert "1 strips in runs on 1 SMs, at most 1 each" in choices[False].reason
    assert choices[False].terms["smem"] == pytest.approx((8 + 16) * 8192 / ceiling)
    work = measure(strip, expected_groups(strip), swapped)
    alone = of_split(strip, work, swapped, 170, 64)  # 64 k-tiles: one CTA has them all
    assert alone.reading == pytest.approx(unique / ceiling)


def test_wider_results_are_more_bytes(gemms):
    def unique(out):
        problem = packed(100, out=out)
        return measure(problem, expected_groups(problem), packed_variants()[0]).unique

    assert unique("float32") - unique("float16") == pytest.approx(2 * 100 * 1408, rel=1e-2)


def test_empty_groups_of_a_list_cost_nothing(gemms):
    with_work = [(3, 256, 512), (20, 128, 1024)]
    variant = only("fp8_ptr_array_128x16x128_swap_bf16", gemms)
    [one] = select(listed(with_work), [variant], 170)
    [other] = select(listed([*with_work, (0, 4096, 4096)]), [variant], 170)
    assert one.terms == other.terms


def test_features_are_padded_to_what_is_multiplied(gemms):
    problem = packed(16, 1, 136, 512)
    groups = expected_groups(problem)
    swapped, plain = only("fp8_packed_128x16x128_swap", gemms), only("fp8_packed_128x128x128_coop", gemms)
    assert measure(problem, groups, swapped).macs == 16 * 136 * 512
    assert measure(problem, groups, plain).macs == 128 * 256 * 512


def test_the_busiest_cta_is_that_of_the_kernels_schedule(gemms):
    # Against the schedule counted CTA by CTA, rows drawn evenly. The model knows means only.
    rng = new_seed()
    swapped = [v for v in gemms if v.family == "fp8_packed" and v.swap_ab]
    ratios: dict[str, list[float]] = {}

    def note(name, value, true):
        ratios.setdefault(name, []).append(value / true)

    for _ in range(400):
        variant, groups, sms = rng.choice(swapped), rng.randrange(1, 129), rng.choice((36, 48, 132, 170))
        n, k = 8 * rng.randrange(8, 600), 16 * rng.randrange(8, 300)
        rows = [0] * groups
        for _ in range(1 + int(groups * 2 ** rng.uniform(-2, 7))):
            rows[rng.randrange(groups)] += 1
        problem = packed(sum(rows), groups, n, k)
        work = measure(problem, [Groups(m, n, k, 1.0) for m in rows if m], variant)
        ctas = max(1, min(sms, units_upper_bound(problem, variant, 0)))
        model, true = of_runs(problem, work, variant, sms), packed_schedule.runs(rows, n, variant, ctas)
        assert sum(cta.weights for cta in true) == pytest.approx(work.strip_units)
        warps = variant.mma_warps
        note("share", model.share, max(cta.weights for cta in true) / work.strip_units)
        note("mma", model.mma_share, max(cta.rounds for cta in true) * warps / work.strip_units)
        tokens = sum(cta.visits for cta in true) * variant.token_tile * k
        note("tokens", model.all_tokens, tokens)
        note("visits", model.visits, max(cta.visits for cta in true))
        note("experts", model.experts, sum(len(cta.experts) for cta in true) / len(true))
        note("own tokens", model.tokens, max(cta.visits for cta in true) * variant.token_tile * k)
        least, k_tiles = rng.choice((1, 4, 32)), -(-k // variant.tile[2])
        model = of_split(problem, work, variant, sms, least)
        true = packed_schedule.split(rows, n, k_tiles, variant, sms, least)
        assert model.k_tiles == max(cta.k_tiles for cta in true)
        note("split visits", model.visits, max(cta.visits for cta in true))
        note("split experts", model.experts, sum(len(cta.experts) for cta in true) / len(true))
    for name, values in ratios.items():
        low, middle, high = (sorted(values)[int(len(values) * part)] for part in (0.1, 0.5, 0.9))
        print(f"{name}: {low:.2f} {middle:.2f} {high:.2f}")
        assert 0.9 < middle < 1.1, name
        assert low > 0.65, name
        assert high < 1.25, name
    assert sorted(ratios["share"])[20] > 0.85


def test_gathering_costs_and_grows_with_the_token_tile(gemms):
    def gather(key, gathers=True):
        return select(packed(512, gathers=gathers), [only(key, gemms)], 170)[0]

    small, large = gather("fp8_packed_128x8x128_swap"), gather("fp8_packed_128x32x128_swap")
    assert 0 < small.terms["gather"] < large.terms["gather"]
    without = gather("fp8_packed_128x8x128_swap", False)
    assert without.us < small.us
    assert small.terms["launch"] - without.terms["launch"] == pytest.approx(RATES["sm_120a"].lookup)


def test_splitting_levels_the_work_and_costs_the_parts(gemms):
    # A tile and a half for each SM: whole tiles take two rounds of MMAs, runs of k-tiles one and a half.
    variant = only("fp8_packed_128x128x128_coop", gemms)
    problem = packed(128, 1, 255 * 128, 8192)
    whole, split = sorted(select(problem, [variant], 170), key=lambda c: c.least_units)
    assert whole.least_units == 0 < split.least_units
    assert whole.terms["mma"] == pytest.approx(split.terms["mma"] * 2 / 1.5)
    small = only("fp8_packed_128x8x128_swap", gemms)
    of_small = max(select(problem, [small], 170), key=lambda c: c.least_units)
    parts = [c.terms["split"] - RATES["sm_120a"].fix_up for c in (of_small, split)]
    assert 0 < 10 * parts[0] < parts[1]
    # A tile of one k-tile is never cut.
    single = packed(128, 1, 170 * 128, 128)
    assert of_split(single, measure(single, expected_groups(single), variant), variant, 170, 1).visits == 1
    # Among equally good ones the largest run: fewer parts where there are fewer rows than expected.
    assert of_small.least_units == split.least_units == 32


def test_runs_of_strips_level_the_work(gemms):
    # A tile for each SM and one more: 17 strips at most, against two tiles of 16.
    swapped = only("fp8_packed_128x16x128_swap", gemms)
    turns = only("fp8_ptr_array_128x16x128_swap_bf16", gemms)
    problem = packed(16, 1, 171 * 128, 8192)
    whole = next(c for c in select(problem, [swapped], 170) if not c.least_units)
    [other] = select(problem, [turns], 170)
    assert "17 each" in whole.reason
    assert "2 each" in other.reason
    assert whole.terms["dram"] < other.terms["dram"]
    # Eight warps take a piece's strips in twos: pieces of nine and eight take as long as two full tiles.
    even = next(c for c in select(packed(16, 1, 170 * 128, 8192), [swapped], 170) if not c.least_units)
    assert even.terms["mma"] == pytest.approx(whole.terms["mma"] / 2)


def test_runs_that_the_kernel_cannot_count_are_left_out(gemms):
    variant = only("fp8_packed_128x8x128_swap", gemms)
    plain = only("fp8_packed_128x128x128_coop", gemms)
    huge = packed(2**24, 8, 28672, 4096)
    assert units_upper_bound(huge, variant, 0) * 170 >= TOO_MANY_UNITS
    assert select(huge, [variant], 170) == []
    assert [c.least_units for c in select(huge, [plain], 170)] == [0]
    fitting = packed(2**15, 8, 28672, 4096)
    assert 0 in {c.least_units for c in select(fitting, [variant], 170)}


def test_units_are_what_ctas_share_out(gemms):
    swapped, plain = only("fp8_packed_128x16x128_swap", gemms), only("fp8_packed_64x128x128_pingpong", gemms)
    problem = packed(8, 128, 136, 704)
    assert units_upper_bound(problem, swapped, 0) == 8 * 17
    assert units_upper_bound(problem, swapped, 2) == 8 * 2 * 6
    assert units_upper_bound(problem, plain, 0) == tiles_upper_bound(problem, plain) == 8 * 2
    assert units_upper_bound(masked(33, 1, 4, 136, 704), swapped, 0) == 4 * 3 * 17


def test_units_of_a_split_fit_the_kernels_32_bit_counts(gemms):
    variant = only("fp8_packed_128x8x128_swap", gemms)
    rng = new_seed()
    split = 0
    for _ in range(300):
        problem = packed(
            int(2 ** rng.uniform(0, 28)),
            rng.randrange(1, 1025),
            8 * rng.randrange(1, 4000),
            16 * rng.randrange(1, 1000),
        )
        sms = rng.randrange(1, 200)
        for choice in select(problem, [variant], sms):
            if choice.least_units:
                k_tiles = -(-problem.k // 128)
                assert tiles_upper_bound(problem, variant) * k_tiles * sms < 2**32
                assert choice.least_units < k_tiles
                split += 1
    assert split > 50
    assert TOO_MANY_UNITS == 2**32
    assert least_units(packed(2**26, 1, 2**20, 8192), variant, 170) == []
    assert least_units(packed(8, 1, 128, 128), variant, 170) == []  # one k-tile
    assert least_units(listed([(8, 128, 8192)]), only("fp8_ptr_array_128x16x128_swap_bf16", gemms), 170) == []


# ---------------------------------------------------------------------------------------------------
# What fits, bounds, expectations
# ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_says_why(held, gemms):
    ptr_array = held.variants["fp8_ptr_array_128x128x128_coop_bf16"]
    assert fits(packed(8), ptr_array) is None
    assert fits(listed([(1, 8, 16)]), ptr_array) is None
    assert fits(packed(8, out="float16"), ptr_array) == "out is bfloat16, not float16"
    assert fits(packed(8, out="float32"), ptr_array) == "out is bfloat16, not float32"
    assert fits(packed(8, a="float8_e5m2"), ptr_array) == "a is float8_e4m3fn, not float8_e5m2"
    assert fits(packed(8, arch="sm_89"), ptr_array) == "has no cubin for sm_89"
    assert fits(masked(8), ptr_array) == "takes packed and list calls, not masked ones"
    assert fits(packed(8, gathers=True), ptr_array) == "takes no row_index"
    assert fits(packed(8, weighted=True), ptr_array) == "takes no row_weight"
    assert "prepare_packed" in fits(packed(8), held.variants["fp8_ptr_array_prepare_packed"])
    own = only("fp8_packed_128x8x128_swap", gemms)
    for out in ("bfloat16", "float16", "float32"):
        assert fits(packed(8, out=out, gathers=True, weighted=True), own) is None
        assert fits(replace(masked(8), out=out, weighted=True), own) is None
    assert fits(listed([(1, 8, 16)]), own) == "takes packed and masked calls, not list ones"
    assert fits(packed(8, out="float8_e4m3fn"), own).startswith("out is bfloat16 or float16 or float32")
    assert "mma_probe" in fits(packed(8), replace(own, family="mma_probe"))
    assert select(packed(8, out="float32"), held.gemms(), 170) == []


def test_the_bound_covers_every_way_to_route(gemms):
    rng = new_seed()
    for _ in range(300):
        groups, rows, n = rng.randrange(1, 40), rng.randrange(0, 600), 8 * rng.randrange(1, 40)
        cuts = sorted(rng.choices(range(rows + 1), k=groups - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
        most = max(counts) + rng.randrange(3)
        for variant in gemms:
            features = -(-n // variant.feature_tile)
            exact = sum(-(-m // variant.token_tile) for m in counts) * features
            assert exact <= tiles_upper_bound(packed(rows, groups, n, 64), variant)
            assert exact <= tiles_upper_bound(masked(most, 0, groups, n, 64), variant)
            assert exact == tiles_upper_bound(listed([(m, n, 64) for m in counts]), variant)


def test_the_bound_is_tight_for_one_row_each(gemms):
    variant = only("fp8_packed_128x16x128_swap", gemms)
    assert tiles_upper_bound(packed(8, 128, 128, 64), variant) == 8
    assert tiles_upper_bound(masked(17, 1, 4, 129, 64), variant) == 4 * 2 * 2


def test_expected_active_experts():
    assert expected_active(0, 8) == 0
    assert expected_active(1, 8) == pytest.approx(1)
    assert expected_active(8, 1) == pytest.approx(1)
    assert 7.5 < expected_active(8, 128) < 8
    assert expected_active(10**6, 128) == pytest.approx(128)


def test_expected_groups_are_those_of_even_draws():
    rng = new_seed()
    for _ in range(100):
        rows, groups = int(2 ** rng.uniform(0, 18)), rng.randrange(1, 600)
        sizes = expected_groups(packed(rows, groups))
        assert len(sizes) <= 128
        assert sum(each.count for each in sizes) == pytest.approx(expected_active(rows, groups), rel=1e-3)
        assert sum(each.count * each.rows for each in sizes) == pytest.approx(rows, rel=1e-2)
    # Against a draw: experts with more rows than a tile holds.
    draws = [rng.choices(range(16), k=100) for _ in range(400)]
    seen = sum(sum(draw.count(e) > 8 for e in range(16)) for draw in draws) / len(draws)
    expected = sum(each.count for each in expected_groups(packed(100, 16)) if each.rows > 8)
    assert expected == pytest.approx(seen, rel=0.25)


def test_masked_groups_never_have_more_than_fits():
    rng = new_seed()
    for _ in range(100):
        most = rng.randrange(1, 300)
        sizes = expected_groups(masked(most, rng.randrange(0, 400), rng.randrange(1, 300)))
        assert all(0 < each.rows <= most for each in sizes)
        assert len({each.rows for each in sizes}) == len(sizes)


def test_bandwidth_lies_between_known_parts():
    for arch, known in DRAM.items():
        for sms, rate in known.items():
            assert dram(arch, sms) == pytest.approx(rate)
        rates = [dram(arch, sms) for sms in range(1, 300)]
        assert rates == sorted(rates)
    assert dram("sm_120a", 36) < dram("sm_120a", 84) < dram("sm_120a", 170)
    assert dram("sm_121a", 24) == pytest.approx(dram("sm_121a", 48) / 2)
    assert set(DRAM) == set(RATES)

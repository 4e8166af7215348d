"""The choice of a variant: fits, the ranking's tiers, and the bound on tiles."""

from __future__ import annotations

import random

import pytest

from sm12x import manifest
from sm12x.select import RATES, Problem, describe, expected_active, fits, select, tiles_upper_bound
from unit.fake_family import write_family

E4M3 = "float8_e4m3fn"


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    root = tmp_path_factory.mktemp("cubins")
    write_family(root)
    return manifest.load(root)


def packed(rows, groups=128, n=1408, k=2816, arch="sm_120a", out="bfloat16", a=E4M3):
    return Problem("packed", groups, a, E4M3, out, arch, rows, n, k)


def listed(shapes, arch="sm_120a"):
    return Problem("list", len(shapes), E4M3, E4M3, "bfloat16", arch, shapes=tuple(shapes))


def token_tile(problem, held, sms=170):
    return select(problem, held.gemms(), sms)[0].variant.token_tile


@pytest.mark.parametrize("arch", sorted(RATES))
def test_rows_per_expert_pick_the_token_tile(held, arch):
    sms = {"sm_90a": 132, "sm_120a": 170, "sm_121a": 48}[arch]
    assert token_tile(packed(8, arch=arch), held, sms) == 16
    assert token_tile(packed(128 * 4, arch=arch), held, sms) == 16
    assert token_tile(packed(128 * 24, arch=arch), held, sms) == 32
    assert token_tile(packed(128 * 1000, arch=arch), held, sms) >= 64
    assert token_tile(packed(128 * 1000, arch="sm_120a"), held) == 128
    # Never a smaller tile for more rows.
    tiles = [token_tile(packed(128 * r, arch=arch), held, sms) for r in (1, 2, 4, 8, 16, 32, 64, 128, 512)]
    assert tiles == sorted(tiles)


def test_the_middle_of_the_range_has_a_tile_of_its_own(held):
    assert 64 in {token_tile(packed(128 * r), held) for r in (40, 48, 56, 60, 64)}


def test_every_fitting_variant_is_ranked_with_a_reason(held):
    choices = select(packed(256), held.gemms(), 170)
    assert [c.variant.out for c in choices] == ["bfloat16"] * 4
    assert [c.clocks for c in choices] == sorted(c.clocks for c in choices)
    for choice in choices:
        assert set(choice.terms) == {"dram", "l2", "mma", "tiles"}
        assert choice.clocks > 0
        assert "bound by" in choice.reason
    text = describe(packed(256), choices)
    assert text.startswith("sm12x select: packed M=256 E=128 N=1408 K=2816")
    assert all(c.variant.key in text for c in choices)


def test_padded_work_shows_in_the_mma_term(held):
    # One row in each of 170 experts: the padded work grows with the token tile and nothing else.
    shapes = [(1, 128, 2048)] * 170
    terms = {c.variant.token_tile: c.terms["mma"] for c in select(listed(shapes), held.gemms(), 170)}
    assert terms[32] == pytest.approx(2 * terms[16])
    assert terms[128] == pytest.approx(8 * terms[16])


def test_a_list_call_is_judged_by_its_own_rows(held):
    assert token_tile(listed([(3, 1408, 2816)] * 128), held) == 16
    assert token_tile(listed([(1024, 1408, 2816)] * 8), held) == 128
    assert "at most 300 in one" in describe(listed([(300, 64, 64), (1, 64, 64)]), [])


def test_what_does_not_fit_says_why(held):
    variant = held.variants["fp8_ptr_array_128x128x128_coop_bf16"]
    assert fits(packed(8), variant) is None
    assert fits(packed(8, out="float16"), variant) == "out is bfloat16, not float16"
    assert fits(packed(8, a="float8_e5m2"), variant) == "a is float8_e4m3fn, not float8_e5m2"
    assert fits(packed(8, arch="sm_89"), variant) == "has no cubin for sm_89"
    assert "prepare_packed" in fits(packed(8), held.variants["fp8_ptr_array_prepare_packed"])
    assert select(packed(8, out="float32"), held.gemms(), 170) == []


def test_the_bound_covers_every_way_to_route(held):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        groups, rows, n = rng.randrange(1, 40), rng.randrange(0, 600), 8 * rng.randrange(1, 40)
        cuts = sorted(rng.choices(range(rows + 1), k=groups - 1))
        counts = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
        for variant in held.gemms():
            features = -(-n // variant.feature_tile)
            exact = sum(-(-m // variant.token_tile) for m in counts) * features
            assert exact <= tiles_upper_bound(packed(rows, groups, n, 64), variant)
            assert exact == tiles_upper_bound(listed([(m, n, 64) for m in counts]), variant)


def test_the_bound_is_tight_for_one_row_each(held):
    variant = held.variants["fp8_ptr_array_128x16x128_swap_bf16"]
    assert tiles_upper_bound(packed(8, 128, 128, 64), variant) == 8


def test_expected_active_experts():
    assert expected_active(0, 8) == 0
    assert expected_active(1, 8) == pytest.approx(1)
    assert expected_active(8, 1) == pytest.approx(1)
    assert 7.5 < expected_active(8, 128) < 8
    assert expected_active(10**6, 128) == pytest.approx(128)


def test_nothing_to_do_is_ranked_without_dividing_by_zero(held):
    assert len(select(packed(0), held.gemms(), 170)) == 4
    assert len(select(listed([]), held.gemms(), 170)) == 4

"""Forcing the kernels of layers, as the GPU tests do: each is what runs, in its mode, and all is as before
behind it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import layer_forced

from sm12x import manifest
from sm12x.ops import moe_chain, moe_plan, moe_whole
from sm12x.select.layer import LayerProblem


def problem(**changes):
    known = {"experts": 8, "hidden": 704, "intermediate": 272, "gated": True, "static": False}
    known |= {"dtype": "bfloat16", "arch": "sm_90a", "rows": 64, "expected_rows": 64, "weighted": True}
    return LayerProblem(**{**known, **changes})


def chosen(given, held=None):
    return moe_plan.select_layer(given, held or manifest.default(), 132)[0]


@pytest.mark.parametrize("gated", [True, False])
def test_every_kernel_of_the_first_gemm_can_be_forced(gated):
    ups = layer_forced.ups("sm_90a", gated)
    assert {each.split for each in ups} == {True, False}
    free = chosen(problem(gated=gated))
    for each in ups:
        with layer_forced.kernels(up=each) as made:
            choice = chosen(problem(gated=gated))
        assert made.choices == [choice]
        assert choice.up.variant is each.variant
        assert (choice.up.least_units > 0) == each.split
        assert choice.down == free.down
    assert chosen(problem(gated=gated)) == free
    with pytest.raises(ValueError, match="cannot be forced"), layer_forced.kernels(up=ups[0]):
        chosen(problem(gated=not gated))


@pytest.mark.parametrize("static", [True, False])
def test_every_kernel_of_the_second_gemm_can_be_forced(static):
    downs = layer_forced.downs("sm_90a", static)
    assert {each.variant.role for each in downs} == ({"gemm"} if static else {"gemm", "down"})
    for each in downs:
        with layer_forced.kernels(down=each):
            choice = chosen(problem(static=static))
        assert choice.down.variant is each.variant
        assert (choice.down.least_units > 0) == each.split
        assert choice.quantises_apart == (each.variant.role == "gemm" and not static)


def test_a_k_of_one_tile_runs_split_too():
    (each,) = (e for e in layer_forced.ups("sm_90a", True) if e.name == "fp8_up_gated_64x8x128_swap:split")
    with layer_forced.kernels(up=each):
        assert chosen(problem(hidden=16)).up.least_units == 1


@pytest.mark.parametrize("gated", [True, False])
def test_one_launch_for_all_of_a_layer_can_be_forced_and_forbidden(whole_root, gated):
    held = manifest.load(whole_root)
    few = problem(gated=gated, experts=32, intermediate=768, rows=8, expected_rows=8)
    many = problem(gated=gated, experts=2, intermediate=768, rows=500, expected_rows=500)
    kernel = next(v for v in held.gemms(role="layer") if v.gated == gated)
    assert (chosen(few, held).whole, chosen(many, held).whole) == (kernel, None)
    with layer_forced.kernels(whole=True):
        assert chosen(few, held).whole is kernel
        assert chosen(many, held).whole is kernel
        for changes in ({"static": True}, {"rows": 513}, {"experts": 257}):
            with pytest.raises(ValueError, match="one launch for all of a layer cannot be forced: .* takes"):
                chosen(problem(**changes), held)
    with layer_forced.kernels(whole=False) as made:
        assert chosen(few, held).whole is None
    assert made.choices == [replace(chosen(few, held), whole=None)]
    (up, *_), (down, *_) = layer_forced.ups("sm_90a", gated), layer_forced.downs("sm_90a", False)
    for forced in ((up, None), (None, down), (up, down)):
        with layer_forced.kernels(*forced):
            assert chosen(few, held).whole is None, "kernels of a GEMM mean several launches"
    with (
        pytest.raises(ValueError, match="whole: expected None or False"),
        layer_forced.kernels(up, whole=True),
    ):
        pass


def test_the_chain_that_one_launch_has_the_bits_of():
    for gated in (True, False):
        with layer_forced.kernels(*layer_forced.chain_of_whole(gated)):
            choice = chosen(problem(gated=gated))
        for gemm, family in ((choice.up, "fp8_up"), (choice.down, "fp8_down")):
            assert (gemm.variant.family, gemm.least_units) == (family, 0)
            assert (gemm.variant.tile, gemm.variant.swap_ab) == ((128, 8, 128), True)
        assert choice.up.variant.gated == gated


def patched():
    return moe_plan.select_layer, moe_chain.lay_out, moe_whole.lay_out_whole, layer_forced._fused_moe._plans


def test_all_is_as_before_behind_a_block_that_raises():
    before = patched()
    up = layer_forced.ups("sm_90a", True)[0]
    with pytest.raises(ValueError, match="cannot be forced"), layer_forced.kernels(up):
        chosen(problem(gated=False))
    assert patched() == before

"""Forcing the kernels of layers, as the GPU tests do: each is what runs, in its mode, and all is as before
behind it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import layer_forced

from sm12x import manifest
from sm12x.ops import moe_chain, moe_plan
from sm12x.select.layer import LayerProblem


def problem(**changes):
    known = {"experts": 8, "hidden": 704, "intermediate": 272, "gated": True, "static": False}
    known |= {"dtype": "bfloat16", "arch": "sm_90a", "rows": 64, "expected_rows": 64, "weighted": True}
    return LayerProblem(**{**known, **changes})


def chosen(given):
    return moe_plan.select_layer(given, manifest.default(), 132)[0]


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


def test_all_is_as_before_behind_a_block_that_raises():
    before = moe_plan.select_layer, moe_chain.lay_out, layer_forced._fused_moe._plans
    up = layer_forced.ups("sm_90a", True)[0]
    with pytest.raises(ValueError, match="cannot be forced"), layer_forced.kernels(up):
        chosen(problem(gated=False))
    assert (moe_plan.select_layer, moe_chain.lay_out, layer_forced._fused_moe._plans) == before

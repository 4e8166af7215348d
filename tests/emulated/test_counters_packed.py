"""What is counted of the packed kernels: MMAs by what a tile holds, the problem's bytes and no more, no bank
conflicts. And that the formulas for calls too large to emulate say the same.
"""

from __future__ import annotations

import random
from functools import lru_cache

import pytest

from benchmarks import kernel_work
from benchmarks.kernel_work import Call
from emulated.kernels import Machine, ptx
from emulated.packed_case import PackedCase
from sm12x import manifest
from sm12x.emulator.ptx import parse

MMA = "m16n8k32.mxf8f6f4.e4m3.e4m3"
MACS = 16 * 8 * 32
UNEVEN = Call((21, 0, 70), 152, 656)  # tails on all sides, an empty group; K longer than a large tile's ring
GEMMS = sorted(variant.key for variant in manifest.default().gemms(kernel_work.PACKED))


def test_every_packed_kernel_is_covered():
    assert len(GEMMS) >= 10


def counted(key, rows, n, k, ctas, *, least_units=0, seed=0):
    """Counters of a call, after a check of its result."""
    variant = manifest.default().variants[key]
    case = PackedCase(rows, n, k, seed)
    out = case.run(variant, ctas, least_units=least_units, machine=Machine(counting=True), seed=seed)
    assert case.error_ratio(out) <= 1
    return case.result.counters


@lru_cache(maxsize=64)
def uneven(key, least_units):
    """Counters of uneven groups."""
    return counted(key, UNEVEN.rows, UNEVEN.n, UNEVEN.k, 3, least_units=least_units, seed=5)


@pytest.mark.parametrize("key", GEMMS)
def test_no_access_to_shared_memory_has_a_bank_conflict(key):
    """Of the main loops, and of the epilogue; whole tiles and split-K."""
    for least_units in (0, 1):
        counters = uneven(key, least_units)
        assert counters.main_loop_conflicts == 0
        assert [(line.line, line.conflicts, line.text) for line in counters.by_line if line.conflicts] == []
        looped = [line for line in counters.by_line if line.main_loop and line.text.startswith("ldmatrix")]
        assert looped, "no ldmatrix of a main loop was counted"
        in_ptx = {
            i.line
            for kernel in parse(ptx(key)).kernels.values()
            for i in kernel.instructions
            if i.opcode[0] == "ldmatrix"
        }
        assert {line.line for line in looped} <= in_ptx
        loaded = counters.shared_memory["ldmatrix"]
        assert loaded.wavefronts == loaded.minimum == 4 * loaded.requests > 0  # each is .x4


@pytest.mark.parametrize("key", GEMMS)
def test_mmas_are_those_that_the_tiles_need(key):
    variant = manifest.default().variants[key]
    for least_units in (0, 1):
        expected = kernel_work.multiply_adds(variant, UNEVEN, 3, split=least_units > 0)
        counters = uneven(key, least_units)
        assert counters.mma == {MMA: {"issued": expected // MACS, "multiply_adds": expected}}
        assert counters.work.multiply_adds == {"block_scaled": expected}


@pytest.mark.parametrize("key", GEMMS)
def test_one_cta_computes_no_features_twice(key):
    """It has no run to share: as many MMAs as the features, k-blocks and steps of tokens need."""
    variant = manifest.default().variants[key]
    found = counted(key, UNEVEN.rows, UNEVEN.n, UNEVEN.k, 1).multiply_adds
    assert found == kernel_work.multiply_adds(variant, UNEVEN, 1, split=True)


@pytest.mark.parametrize("key", GEMMS)
def test_the_problems_bytes_are_touched_and_no_others(key):
    """Rows of other groups are read with a tile's last rows, but they are the problem's too."""
    least = {"loaded": UNEVEN.least_loaded, "stored": UNEVEN.least_stored}
    assert uneven(key, 0).unique_bytes == least


@pytest.mark.parametrize("key", GEMMS)
def test_tma_moves_no_more_than_full_tiles_need(key):
    """One tile for each CTA: TMA loads every byte of the operands once. More features: tokens once for each
    piece, weights still once."""
    variant = manifest.default().variants[key]
    rows, k = (variant.token_tile,) * 3, 2 * variant.tile[2]
    call = Call(rows, variant.feature_tile, k)
    loads = counted(key, rows, call.n, k, 3).copies["tma_load"]
    assert loads.global_bytes == loads.shared_bytes == 3 * call.n * k + sum(rows) * k
    assert loads.global_bytes == kernel_work.tma_load_bytes(variant, call, 3)
    wide = Call(rows, 4 * variant.feature_tile, k)
    loads = counted(key, rows, wide.n, k, 3).copies["tma_load"]
    assert loads.global_bytes == loads.shared_bytes == kernel_work.tma_load_bytes(variant, wide, 3)


@pytest.mark.parametrize("key", GEMMS)
def test_several_tiles_of_tokens_ask_for_the_weights_again(key):
    variant = manifest.default().variants[key]
    rows, k = (2 * variant.token_tile,), variant.tile[2]
    call = Call(rows, variant.feature_tile, k)
    counters = counted(key, rows, call.n, k, 1)
    assert counters.copies["tma_load"].global_bytes == kernel_work.tma_load_bytes(variant, call, 1)
    assert counters.unique_bytes["loaded"] == call.least_loaded


@pytest.mark.parametrize("key", GEMMS)
def test_derived_counters_are_what_is_counted(key):
    """On a random call: multiply-adds and bytes exactly, the busiest CTA's but for a tile where tiles are
    taken in turns."""
    seed = random.randrange(1 << 31)
    print("seed", seed)
    draw = random.Random(seed)
    variant = manifest.default().variants[key]
    rows = tuple(draw.choice((0, draw.randrange(1, 100))) for _ in range(draw.randrange(1, 6)))
    n, k, ctas = 8 * draw.randrange(1, 60), 16 * draw.randrange(1, 40), draw.randrange(1, 6)
    call = Call(rows if any(rows) else (*rows, 7), n, k)
    print(key, call, ctas)
    found = counted(key, call.rows, n, k, ctas, seed=seed)
    derived = kernel_work.derived_counters(variant, call, ctas, issue_of(key))
    assert derived.work.multiply_adds == found.work.multiply_adds
    assert derived.unique_bytes == found.unique_bytes
    # Where CTAs take tiles in turns, the one with the most tiles need not have the most tokens to skip.
    slack = 1 if variant.swap_ab else variant.token_tile * variant.feature_tile * kernel_work.up(k, 32)
    for form, busiest in found.busiest_cta.multiply_adds.items():
        assert abs(derived.busiest_cta.multiply_adds[form] - busiest) <= slack


@lru_cache(maxsize=16)
def issue_of(key):
    variant = manifest.default().variants[key]
    token, feature, depth = (variant.token_tile,), variant.feature_tile, variant.tile[2]
    sure = [
        counted(key, token, n, k, 1).work.surely_issued
        for n, k in ((feature, 2 * depth), (feature, 5 * depth), (2 * feature, 2 * depth))
    ]
    return kernel_work.fit_issue((2, 5), *sure)


@pytest.mark.parametrize("key", GEMMS)
def test_issue_slots_grow_with_tiles_and_k_tiles(key):
    """What one tile and one k-tile take is what more of them take each."""
    variant = manifest.default().variants[key]
    issue = issue_of(key)
    call = Call((variant.token_tile,) * 2, 3 * variant.feature_tile, 7 * variant.tile[2])
    found = counted(key, call.rows, call.n, call.k, 2).work
    derived = kernel_work.derived_counters(variant, call, 2, issue).work
    assert derived.surely_issued == pytest.approx(found.surely_issued, rel=0.05)

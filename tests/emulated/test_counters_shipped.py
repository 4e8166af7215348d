"""What is counted of the shipped kernels: MMAs by the tile, no bank conflicts, and what counting costs."""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np
import pytest

from emulated.gemm_case import Case, Problem, variant_of
from emulated.kernels import Machine, ptx
from sm12x import abi, manifest
from sm12x.emulator.ptx import parse

# What multiplies for a list of groups, and the probes; the packed layer's kernels are counted elsewhere.
FAMILIES = "fp8_ptr_array", "mma_probe"
VARIANTS = sorted(v.key for v in manifest.default().variants.values() if v.family in FAMILIES)
GEMMS = sorted(v.key for v in manifest.default().gemms("fp8_ptr_array"))
MMA = "m16n8k32.mxf8f6f4.e4m3.e4m3"
ROWS, N, K = (21, 0, 130), 136, 400
MACS = 16 * 8 * 32


@lru_cache(maxsize=16)
def counted(key):
    """Counters of preparation and of the GEMM for a small problem, and the problem's Case."""
    variant, machine = variant_of(key), Machine(counting=True)
    launches = []
    run = machine.run

    def remember(*arguments, **options):
        launches.append(run(*arguments, **options))
        return launches[-1]

    machine.run = remember
    case = Case(Problem(ROWS, N, K), variant.out, 3)
    assert case.check(case.run(variant, 4, seed=3, machine=machine)) <= 1
    return [launch.counters for launch in launches]


def ceil(a, b):
    return -(-a // b)


def test_all_fourteen_variants_are_covered_that_are_not_packed():
    others = set(VARIANTS) - set(GEMMS)
    assert len(GEMMS) == 10
    assert others == {
        *("fp8_ptr_array_prepare_list", "fp8_ptr_array_prepare_packed"),
        *("mma_probe_plain", "mma_probe_unit_scale"),
    }


@pytest.mark.parametrize("key", GEMMS)
def test_mmas_are_those_of_whole_tiles(key):
    variant = variant_of(key)
    _, gemm = counted(key)
    step = variant.token_step or variant.token_tile
    tokens = sum(ceil(rows, step) * step for rows in ROWS)
    features = ceil(N, variant.feature_tile) * variant.feature_tile
    depth = ceil(K, variant.tile[2]) * variant.tile[2]
    multiply_adds = tokens * features * depth
    assert gemm.mma == {MMA: {"issued": multiply_adds // MACS, "multiply_adds": multiply_adds}}
    assert gemm.work.multiply_adds == {"block_scaled": multiply_adds}
    assert gemm.instructions["mma"] == multiply_adds // MACS
    assert multiply_adds / 4 <= gemm.busiest_cta.multiply_adds["block_scaled"] < multiply_adds


@pytest.mark.parametrize("key", GEMMS)
def test_the_copy_engine_moves_whole_tiles_and_the_output(key):
    variant = variant_of(key)
    _, gemm = counted(key)
    tiles = sum(ceil(rows, variant.token_tile) for rows in ROWS) * ceil(N, variant.feature_tile)
    steps = ceil(K, variant.tile[2])
    loads = gemm.copies["tma_load"]
    assert loads.shared_bytes == tiles * steps * (variant.tile[0] + variant.tile[1]) * variant.tile[2]
    tokens_read = sum(rows * ceil(N, variant.feature_tile) for rows in ROWS) * K
    weights_read = sum(ceil(rows, variant.token_tile) for rows in ROWS) * N * K
    assert loads.global_bytes == tokens_read + weights_read
    assert gemm.copies["tma_store"].global_bytes == sum(ROWS) * N * 2
    # Weights of groups with rows, activations and two scales; then tensor maps and group arrays.
    least = 2 * N * (K + 4) + sum(ROWS) * (K + 4)
    assert least <= gemm.unique_bytes["loaded"] < least + 4096
    assert gemm.unique_bytes["stored"] >= sum(ROWS) * N * 2


@pytest.mark.parametrize("key", GEMMS)
def test_no_ldmatrix_of_the_main_loop_has_a_bank_conflict(key):
    _, gemm = counted(key)
    lines = [line for line in gemm.by_line if line.text.startswith("ldmatrix")]
    in_ptx = {
        i.line for k in parse(ptx(key)).kernels.values() for i in k.instructions if i.opcode[0] == "ldmatrix"
    }
    assert {line.line for line in lines} <= in_ptx
    looped = [line for line in lines if line.main_loop]
    assert len(looped) >= 8
    assert min(line.requests for line in looped) > max(0, *(x.requests for x in lines if not x.main_loop))
    assert [(line.line, line.conflicts, line.text) for line in looped if line.conflicts] == []
    assert gemm.main_loop_conflicts == 0
    loaded = gemm.shared_memory["ldmatrix"]
    assert loaded.requests == sum(line.requests for line in lines) > 0
    assert loaded.wavefronts == loaded.minimum == 4 * loaded.requests  # each is .x4


@pytest.mark.parametrize("key", GEMMS)
def test_no_other_access_to_shared_memory_has_one(key):
    """Epilogues and descriptor updates."""
    for counters in counted(key):
        found = [(line.line, line.conflicts, line.text) for line in counters.by_line if line.conflicts]
        assert found == []


@pytest.mark.parametrize("key", ["mma_probe_plain", "mma_probe_unit_scale"])
def test_the_probes_issue_their_mmas(key):
    machine = Machine(counting=True)
    words = np.zeros((4, 32, 6), np.uint32)
    params = abi.sm12x_mma_probe_params(
        **{"in": machine.upload(words, "in")}, out=machine.memory.allocate(2 * 4 * 32 * 32 * 4), iterations=3
    )
    found = machine.run(ptx(key), 2, 128, params).counters
    name = MMA if key.endswith("unit_scale") else "m16n8k32.f8f6f4.e4m3.e4m3"
    issued = 2 * 4 * 3 * 8  # CTAs, warps, iterations, accumulators
    assert found.mma == {name: {"issued": issued, "multiply_adds": issued * MACS}}
    assert found.work.multiply_adds == {
        "block_scaled" if key.endswith("unit_scale") else "plain": issued * MACS
    }
    assert found.busiest_cta.multiply_adds == {
        form: count // 2 for form, count in found.work.multiply_adds.items()
    }


def test_preparation_multiplies_nothing():
    prepare, _ = counted(GEMMS[0])
    assert prepare.mma == {}
    assert prepare.copies == {}
    assert prepare.global_memory["store"].requests > 0


def test_a_list_call_prepares_without_mma():
    import sm12x
    from sm12x import emulator, reference

    rng = np.random.default_rng(0)
    a, b = [reference.random_fp8((3, 32), rng)], [reference.random_fp8((8, 32), rng)]
    with emulator.use(counters=True) as session:
        sm12x.grouped_gemm(a, b, a_scale=[1.0], b_scale=[1.0], backend="emulator")
    assert session.launches[0].variant == "fp8_ptr_array_prepare_list"
    assert session.launches[0].counters.mma == {}
    with emulator.use() as session:
        sm12x.grouped_gemm(a, b, a_scale=[1.0], b_scale=[1.0], backend="emulator")
    assert session.launches[0].counters is None, "nobody asked for them"


def test_a_tile_with_counters_takes_less_than_twice_its_time():
    variant = variant_of("fp8_ptr_array_128x128x128_coop_bf16")
    machine = Machine()
    times = {False: [], True: []}
    for _ in range(5):
        for counting, found in times.items():
            machine.counting = counting
            case = Case(Problem((128,), 128, 128), variant.out, 9)
            started = time.process_time()
            case.run(variant, 1, seed=9, machine=machine)
            found.append(time.process_time() - started)
    print(times)
    assert min(times[True]) < 2 * min(times[False])

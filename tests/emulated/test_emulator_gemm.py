"""Every shipped GEMM kernel from its PTX, under several schedules: numbers within the bound of DESIGN section
7, nothing written outside of the output, the same bits whatever the schedule.
"""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np
import pytest

from emulated.gemm_case import Case, Problem, variant_of
from emulated.kernels import Machine, ptx
from sm12x import abi, manifest
from sm12x.emulator.errors import EmulatorError

GEMMS = sorted(v.key for v in manifest.default().gemms("fp8_ptr_array"))
SEEDS = (1, 2, 3)


def problems(variant):
    """Full tiles, edges and empty groups; more than 32 groups; one row, a K that is no multiple of the
    tile's.
    """
    tokens = variant.token_tile
    return (
        Problem((tokens + 5, 0, 1, tokens), 136, 704, "vector", "vector", np.float32),
        Problem((0, 1, 2, 0, 3) * 7 + (0, 0), 64, 48, "group", "one", ml_dtypes.bfloat16),
        Problem((3, 0, tokens // 2 + 1), 8, 16, "value", "group", np.float16),
    )


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("key", GEMMS)
def test_every_gemm_kernel_within_the_bound_under_three_schedules(key, number):
    variant = variant_of(key)
    case, machine, outs = Case(problems(variant)[number], variant.out, number), Machine(), []
    for seed in SEEDS:
        print(f"{key}: schedule {seed}, data {number}, {case.problem}")
        outs.append(case.run(variant, 3, seed=seed, machine=machine))
        np.testing.assert_array_equal(outs[-1].view(np.uint16), outs[0].view(np.uint16))
    assert case.check(outs[0]) <= 1


def test_there_are_gemm_kernels():
    assert len(GEMMS) == 10


@pytest.mark.parametrize(
    "key", ["fp8_ptr_array_64x128x128_pingpong_bf16", "fp8_ptr_array_128x32x128_swap_fp16"]
)
def test_results_do_not_depend_on_the_schedule_or_the_number_of_ctas(key):
    variant = variant_of(key)
    case = Case(Problem((20, 0, 70, 33), 144, 288), variant.out, 5)
    machine = Machine()
    outs = [case.run(variant, ctas, seed=seed, machine=machine) for seed, ctas in ((0, 1), (1, 2), (2, 7))]
    for out in outs[1:]:
        np.testing.assert_array_equal(out.view(np.uint16), outs[0].view(np.uint16))


@pytest.mark.parametrize("key", ["fp8_ptr_array_128x128x128_coop_bf16", "fp8_ptr_array_128x16x128_swap_fp16"])
def test_the_hopper_twins(key):
    variant = variant_of(key)
    case = Case(Problem((17, 0, 3), 40, 144, bias=np.float32), variant.out, 4)
    assert case.check(case.run(variant, 2, arch="sm_90a", seed=4)) <= 1


def test_depth_zero_gives_the_bias():
    variant = variant_of("fp8_ptr_array_128x16x128_swap_bf16")
    case = Case(Problem((5, 2), 24, 0, bias=np.float32), variant.out, 6)
    out = case.run(variant, 1, seed=6)
    expected = np.repeat(case.bias, case.problem.rows, axis=0).astype(case.out_type)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


def test_operands_that_end_early_are_out_of_bounds():
    """The tensor maps say how many rows there are; an allocation with fewer is read past its end."""
    variant = variant_of("fp8_ptr_array_128x16x128_swap_bf16")
    case = Case(Problem((9,), 128, 128), variant.out, 7)
    whole = case.a
    machine = Machine()
    upload = machine.upload
    machine.upload = lambda array, label=None: upload(array[:-1] if array is whole else array, label)
    with pytest.raises(EmulatorError, match="bounds.*tensor copy.*past its end: a has 1024 bytes") as caught:
        case.run(variant, 1, seed=7, machine=machine)
    assert "cp.async.bulk.tensor.2d.shared::cta" in caught.value.instruction


def test_operands_that_nobody_wrote_are_reported():
    variant = variant_of("fp8_ptr_array_64x128x128_pingpong_bf16")
    case = Case(Problem((64,), 128, 128), variant.out, 8)
    machine = Machine()
    upload = machine.upload

    def partly(array, label=None):
        if array is not case.b:
            return upload(array, label)
        address = machine.memory.allocate(array.nbytes, label)
        machine.memory.write(address, array.tobytes()[: array.nbytes - 16])
        return address

    machine.upload = partly
    with pytest.raises(EmulatorError, match="uninitialised.* b: .*was never written"):
        case.run(variant, 1, seed=8, machine=machine)


def test_a_cooperative_tile_takes_at_most_two_seconds_of_one_core():
    variant = variant_of("fp8_ptr_array_128x128x128_coop_bf16")
    case = Case(Problem((128,), 128, 128), variant.out, 9)
    machine = Machine()
    started = time.process_time()
    case.run(variant, 1, seed=9, machine=machine)
    assert time.process_time() - started < 2  # parsing and compiling included


def fragment(lanes, register, per):
    """Rows and columns of a register's elements (PTX ISA, fragments of m16n8k32 for 8-bit types): A, or B by
    columns.
    """
    group, quad = lanes // 4, lanes % 4
    columns = quad[:, None] * 4 + np.arange(4)
    return group + 8 * (register % 2) * (per == "a"), columns + 16 * (
        register // 2 if per == "a" else register
    )


@pytest.mark.parametrize("key", ["mma_probe_unit_scale", "mma_probe_plain"])
@pytest.mark.parametrize("arch", ["sm_120a", "sm_90a"])
def test_the_mma_probes(key, arch):
    """Three MMAs on one accumulator, eight times over, in each of four warps."""
    seed = 11
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    lanes = np.arange(32)
    words = rng.integers(0, 1 << 32, (4, 32, 6), np.uint64).astype(np.uint32)
    words &= np.uint32(0xBFBFBFBF)  # magnitudes below 2: sums are exact
    expected = np.empty((4, 32, 32), np.float32)
    for warp in range(4):
        values = np.ascontiguousarray(words[warp]).view(np.uint8).reshape(32, 6, 4)
        values = values.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        a, b = np.empty((16, 32)), np.empty((8, 32))
        for register in range(4):
            row, columns = fragment(lanes, register, "a")
            a[row[:, None], columns] = values[:, register]
        for register in range(2):
            row, columns = fragment(lanes, register, "b")
            b[row[:, None], columns] = values[:, 4 + register]
        d = 3 * (a @ b.T)
        rows, columns = lanes // 4, lanes % 4 * 2
        registers = [d[rows + 8 * half, columns + at] for half in (0, 1) for at in (0, 1)]
        expected[warp] = np.tile(np.stack(registers, axis=1), 8)
    machine = Machine()
    params = abi.sm12x_mma_probe_params(
        **{"in": machine.upload(words, "in")},
        out=machine.memory.allocate(2 * expected.nbytes, "out"),
        iterations=3,
    )
    machine.run(ptx(key, arch), 2, 128, params, seed=seed)
    got = machine.download(params.out, (2, *expected.shape), np.float32)
    np.testing.assert_array_equal(got, np.stack([expected, expected]))

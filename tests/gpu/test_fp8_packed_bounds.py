"""Bounds and indices on the device that are wrong: nothing outside `out`, or past a group's count, is
written.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_problem import (  # noqa: E402
    GuardedOut,
    PackedProblem,
    error_ratio,
    guarded,
    make_epilogue,
    make_problem,
)
from test_gpu_offsets import BROKEN, BROKEN_64, ROWS, TOTAL  # noqa: E402
from torch_reference import E4M3_NAN, Verdicts  # noqa: E402
from variants import FORCED, Forced, name  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import Scales, offsets_of  # noqa: E402

N, K = 136, 144
VALUE = 2.0**-8
MOST = 132  # max_m: rows of ROWS and two more
COUNTS = {
    "above_max_m": [MOST + 1, 2**31 - 1, 5, 0, MOST],
    "negative": [-1, -(2**31), 7, -5, 64],
}
COUNTS_64 = {
    "above_32_bits": [2**32, 2**40 + 3, 2**31, 2**33 + 7, 12],
    "below_32_bits": [-(2**32), 3, -1, 9, 0],
}


def problem_of(seed: int) -> PackedProblem:
    return make_problem(ROWS, N, K, seed, nan_groups=False)


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "gather"])
def test_wrong_offsets_never_write_outside_out(layout: str, each: Forced, seed: int) -> None:
    operands = problem_of(seed).operands(layout)
    b = problem_of(seed).b
    cases = [(case, offsets, torch.int32) for case, offsets in BROKEN.items()]
    cases += [(case, offsets, torch.int64) for case, offsets in {**BROKEN, **BROKEN_64}.items()]
    for index, (case, offsets, dtype) in enumerate(cases):
        out = ("bfloat16", "float16", "float32")[index % 3]
        found = GuardedOut((TOTAL,), N, out, row_pad=8)
        bounds = torch.tensor(offsets, dtype=dtype, device="cuda")
        sm12x.grouped_gemm(
            operands.a,
            b,
            a_scale=VALUE,
            b_scale=VALUE,
            out=found.out,
            out_dtype=out,
            variant=each.argument,
            **{**operands.arguments, "offsets": bounds},
        )
        damaged = int(found.damaged(operands.target).item())
        assert damaged == 0, f"{case} ({dtype}): {damaged} elements outside out were written"


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_offsets_that_decrease_count_as_their_running_maximum(each: Forced, seed: int) -> None:
    """The clamped groups are computed as they stand; DESIGN's bound holds for them."""
    verdicts = Verdicts()
    for case in ("decreasing", "past_M", "negative"):
        bounds = np.maximum.accumulate(np.clip(BROKEN[case], 0, TOTAL))
        bits = problem_of(seed)
        owned = slice(int(bounds[0]), int(bounds[-1]))
        problem = make_problem(
            *(np.diff(bounds), N, K, seed),
            operands=(bits.a_bits[owned].clone(), bits.b.contiguous().view(torch.uint8)),
        )
        operands = problem_of(seed).operands("contiguous")
        found = GuardedOut((TOTAL,), N, "float32")
        sm12x.grouped_gemm(
            operands.a,
            problem.b,
            a_scale=VALUE,
            b_scale=VALUE,
            offsets=torch.tensor(BROKEN[case], dtype=torch.int32, device="cuda"),
            out=found.out,
            out_dtype="float32",
            variant=each.argument,
        )
        rng = np.random.default_rng(seed)
        modes = ("value", "value")
        epilogue = make_epilogue(
            problem, problem.operands("contiguous"), modes, 0, rng, scales=Scales(VALUE, VALUE)
        )
        rows = torch.arange(owned.start, owned.stop, device="cuda")
        verdicts.add(case, error_ratio(found.rows(rows), epilogue, problem, "float32"), found.damaged(rows))
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_rows_that_no_group_owns_are_not_written(each: Forced, seed: int) -> None:
    """offsets may start after row 0 and end before row M: those rows of out stay as they were, also where
    their index and their rows of a are good."""
    problem = problem_of(seed)
    before, after = 5, 9
    total = before + TOTAL + after
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    scales = Scales(VALUE, VALUE)
    for layout in ("contiguous", "gather"):
        operands = problem.operands(layout)
        a = operands.a
        arguments = {"offsets": torch.as_tensor(offsets_of(ROWS, before), dtype=torch.int32, device="cuda")}
        if layout == "contiguous":
            bits = torch.full((total, K), E4M3_NAN, dtype=torch.uint8, device="cuda")
            bits[before : before + TOTAL] = problem.a_bits
            a = bits.view(torch.float8_e4m3fn)
        else:
            index = torch.zeros(total, dtype=torch.int32, device="cuda")
            index[before : before + TOTAL] = problem.index.to(torch.int32)
            arguments["row_index"] = index
        found = GuardedOut((total,), N, "bfloat16")
        sm12x.grouped_gemm(
            a, problem.b, a_scale=VALUE, b_scale=VALUE, out=found.out, variant=each.argument, **arguments
        )
        rows = before + torch.arange(TOTAL, device="cuda")
        epilogue = make_epilogue(problem, operands, ("value", "value"), 0, rng, scales=scales)
        ratio = error_ratio(found.rows(rows), epilogue, problem, "bfloat16")
        verdicts.add(layout, ratio, found.damaged(rows))
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_counts_are_clamped(each: Forced, seed: int) -> None:
    """Masked: counts below 0 are 0, above max_m are max_m; rows past them are untouched."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    verdicts = Verdicts()
    cases = [(case, counts, torch.int32) for case, counts in COUNTS.items()]
    cases += [(case, counts, torch.int64) for case, counts in {**COUNTS, **COUNTS_64}.items()]
    bits = torch.randint(0, 120, (5, MOST, K), generator=generator, device="cuda", dtype=torch.uint8)
    weights = torch.randint(0, 120, (5, N, K), generator=generator, device="cuda", dtype=torch.uint8)
    for case, counts, dtype in cases:
        rows = np.clip(np.array(counts, dtype=np.int64), 0, MOST)
        taken = torch.cat([bits[e, : int(rows[e])] for e in range(5)])
        problem = make_problem(rows, N, K, seed, operands=(taken, weights))
        found = GuardedOut((5, MOST), N, "bfloat16", row_pad=8, gap=1)
        sm12x.grouped_gemm(
            bits.view(torch.float8_e4m3fn),
            problem.b,
            a_scale=VALUE,
            b_scale=VALUE,
            rows=guarded(torch.tensor(counts, dtype=dtype, device="cuda"), 7),
            out=found.out,
            variant=each.argument,
        )
        rng = np.random.default_rng(seed)
        operands = problem.operands("contiguous")
        epilogue = make_epilogue(problem, operands, ("value", "value"), 0, rng, scales=Scales(VALUE, VALUE))
        first = torch.as_tensor(offsets_of(rows)[:-1], device="cuda")[problem.group_of_row]
        target = problem.group_of_row * MOST + torch.arange(int(rows.sum()), device="cuda") - first
        ratio = error_ratio(found.rows(target), epilogue, problem, "bfloat16")
        verdicts.add(f"{case} {dtype}", ratio, found.damaged(target))
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_an_index_outside_of_a_reads_zeros(wide: bool, each: Forced, seed: int) -> None:
    """Every row's index is outside, by one, by far, past 32 bits: the result is the bias times the weight."""
    outside = [-1, TOTAL, TOTAL + 1, -(2**31), 2**31 - 1]
    if wide:
        outside += [2**32, 2**32 + 3, -(2**40), 2**62, -(2**63)]
    index = torch.tensor(outside, dtype=torch.int64, device="cuda").repeat(TOTAL // len(outside) + 1)[:TOTAL]
    generator = torch.Generator(device="cuda").manual_seed(seed)
    bias = torch.randn((5, N), generator=generator, device="cuda")
    weight = torch.rand((TOTAL,), generator=generator, device="cuda")
    found = GuardedOut((TOTAL,), N, "float32", row_pad=8)
    problem = problem_of(seed)
    sm12x.grouped_gemm(
        problem.a_bits.view(torch.float8_e4m3fn),
        problem.b,
        a_scale=torch.rand((TOTAL,), generator=generator, device="cuda"),
        b_scale=VALUE,
        offsets=torch.as_tensor(offsets_of(ROWS), device="cuda"),
        row_index=index if wide else index.to(torch.int32),
        bias=bias,
        row_weight=weight,
        out=found.out,
        out_dtype="float32",
        variant=each.argument,
    )
    expected = bias[problem.group_of_row] * weight[:, None]
    rows = torch.arange(TOTAL, device="cuda")
    assert torch.equal(found.rows(rows), expected)
    assert int(found.damaged(rows)) == 0

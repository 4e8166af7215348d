"""The family fp8_packed: every variant in both modes, over layouts, tile edges, scales, K, N, bias, row
weights and out types, with NaN in all neighbouring memory and in other groups' rows and weights.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_case import run_case  # noqa: E402
from packed_problem import PackedProblem, error_ratio, make_epilogue, make_problem  # noqa: E402
from problem_strata import LAYOUTS, OUTS  # noqa: E402
from seeding import SEED  # noqa: E402
from torch_reference import E4M3_NAN, Verdicts  # noqa: E402
from variants import FORCED, Forced, name  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import (  # noqa: E402
    BIASES,
    GROUP_COUNTS,
    REDUCTIONS,
    ROW_PATTERNS,
    SCALE_MODES,
    Scales,
    rows_per_group,
)

FEATURES = {16: 136, 704: 264, 2816: 136}  # N for each K of the matrix: never a multiple of a tile
_problems: dict[tuple[object, ...], PackedProblem] = {}


def cached_problem(groups: int, tile: int, pattern: str, k: int) -> PackedProblem:
    """The float64 products are by far the dearest part and the same for all variants with one token tile."""
    key = (groups, tile, pattern, k)
    if key not in _problems:
        for stale in [other for other in _problems if other[:2] != key[:2]]:
            del _problems[stale]
        rng = np.random.default_rng([SEED, groups, tile, ROW_PATTERNS.index(pattern), k])
        rows = rows_per_group(pattern, groups, tile, rng)
        pads = (16, 16, 1) if k == 704 else (0, 0, 0)
        _problems[key] = make_problem(rows, FEATURES[k], k, int(rng.integers(2**31)), pads=pads)
    return _problems[key]


def test_there_are_variants() -> None:
    """Parametrised tests without a variant would all be skipped."""
    assert len(FORCED) >= 2


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("groups", GROUP_COUNTS)
def test_every_tile_edge_scale_and_reduction(groups: int, each: Forced, seed: int) -> None:
    """10 row patterns x 9 scale combinations x 3 K; layouts, out types, biases and row weights rotate."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    index = int(rng.integers(1000))
    for k, pattern in itertools.product(REDUCTIONS, ROW_PATTERNS):
        problem = cached_problem(groups, each.tile, pattern, k)
        for modes in SCALE_MODES:
            index += 1
            run_case(
                *(each.argument, problem, LAYOUTS[index % 3], OUTS[index // 3 % 3], modes, index),
                *(rng, verdicts, f"K={k} N={problem.n} E={groups} rows={pattern}"),
                bias=BIASES[index % len(BIASES)],
                weighted=index % 7 < 4,
            )
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_tails_of_features_and_reduction(each: Forced, seed: int) -> None:
    """N and K that no tile divides, operands contiguous and with NaN between their rows."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    shapes = itertools.product((8, 24, 120, 128, 136, 1408, 2816), (16, 32, 48, 112, 128, 144, 704, 2816))
    for index, (n, k) in enumerate(shapes):
        rows = rows_per_group("uneven", 5, each.tile, rng)
        pads = (16 * (index % 3), 16 * (index % 2), index % 3)
        problem = make_problem(rows, n, k, seed + index, pads=pads)
        run_case(
            *(each.argument, problem, LAYOUTS[index % 3], OUTS[index // 2 % 3]),
            *(SCALE_MODES[index % len(SCALE_MODES)], index, rng, verdicts),
            f"N={n} K={k} rows={rows.tolist()}",
            bias=BIASES[(index // 2) % 4],
            weighted=index % 4 == 0,
        )
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_as_many_rows_as_experts(each: Forced, seed: int) -> None:
    """M = E: a 1-D a_scale is per token and (E, 1, 1) per expert, also where their lengths are equal."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    for groups in (2, 33, 128):
        rows = rng.multinomial(groups, np.full(groups, 1 / groups)).astype(np.int64)
        problem = make_problem(rows, 136, 144, seed + groups)
        for index, (modes, layout) in enumerate(itertools.product(SCALE_MODES, LAYOUTS)):
            out = OUTS[index // 2 % 3]
            run_case(each.argument, problem, layout, out, modes, index, rng, verdicts, f"M=E={groups}")
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_no_scales_and_up_to_1024_experts(each: Forced, seed: int) -> None:
    """Scales left out mean 1.0; operands small enough for float16 then. 1024 groups, most of them empty."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    for index, groups in enumerate((1, 1024)):
        rows = rng.poisson(1.5, size=groups).astype(np.int64)
        generator = torch.Generator(device="cuda").manual_seed(seed)
        operands = tuple(
            torch.randn(shape, generator=generator, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
            for shape in ((int(rows.sum()), 144), (groups, 264, 144))
        )
        problem = make_problem(rows, 264, 144, seed, operands=operands)
        for layout, out in itertools.product(LAYOUTS, OUTS):
            run_case(
                *(each.argument, problem, layout, out, ("value", "value"), index, rng, verdicts),
                f"E={groups}",
                scales=Scales(None, None),
            )
    verdicts.check(seed)


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_long_reduction_of_positive_operands(each: Forced, seed: int) -> None:
    """Drift: K = 16384 with all products positive, where truncating accumulation shows most."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    rows = np.array([each.tile + 1, 0, 3], dtype=np.int64)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    operands = tuple(
        (torch.rand(shape, generator=generator, device="cuda") + 0.5)
        .to(torch.float8_e4m3fn)
        .view(torch.uint8)
        for shape in ((int(rows.sum()), 16384), (3, 136, 16384))
    )
    problem = make_problem(rows, 136, 16384, seed, operands=operands)
    for index, (layout, out) in enumerate(itertools.product(LAYOUTS, OUTS)):
        run_case(
            *(each.argument, problem, layout, out, ("value", "value"), index, rng, verdicts, "K=16384"),
            scales=Scales(0.25, 0.5),
        )
    verdicts.check(seed)


def test_the_selected_variant_of_all_layouts_and_out_types(seed: int) -> None:
    """Without variant=, whatever `select` picks is right from one token to thousands."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    for tokens in (1, 8, 32, 128, 2048):
        rows = rng.multinomial(tokens * 8, rng.dirichlet(np.full(64, 0.5))).astype(np.int64)
        problem = make_problem(rows, 704, 704, seed + tokens)
        for index, (layout, out) in enumerate(itertools.product(LAYOUTS, OUTS)):
            run_case(
                *(None, problem, layout, out, ("token", "channel"), index, rng, verdicts, f"T={tokens}"),
                bias=BIASES[index % 4],
                weighted=index % 2 == 1,
            )
    verdicts.check(seed)


def test_no_rows_and_no_groups(seed: int) -> None:
    """M = 0, no group, counts of 0: a call that computes nothing returns, and writes nothing."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    for groups in (1, 40):
        problem = make_problem(np.zeros(groups, dtype=np.int64), 136, 144, seed)
        for each, layout in itertools.product(FORCED, LAYOUTS):
            for index in (1, 4):
                run_case(
                    *(each.argument, problem, layout, "bfloat16", ("token", "channel"), index, rng, verdicts),
                    f"{each.argument} E={groups} without rows",
                )
    verdicts.check(seed)


# Tiles of few rows would be more than a kernel counts.
LARGE = [None, *(each.argument for each in FORCED if each.tile >= 64)]


@pytest.mark.parametrize("layout", ["contiguous", "gather"])
@pytest.mark.parametrize("variant", LARGE)
def test_more_than_two_to_the_31_elements(variant: str | None, layout: str, seed: int) -> None:
    """Row offsets past 2^31 elements of a and of out; the last rows of the last group are checked. `a` of the
    gathered call has them first, so that both kinds of number are large."""
    n, k, groups = 1040, 1040, 3
    tail = np.array([64, 37, 3963], dtype=np.int64)
    total = 2**31 // k + 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    a = torch.randint(0, 254, (total, k), generator=generator, device="cuda", dtype=torch.uint8)
    a += a >= 127
    b = torch.randint(0, 120, (groups, n, k), generator=generator, device="cuda", dtype=torch.uint8)
    checked = int(tail.sum())
    first = total - checked
    offsets = torch.tensor([0, first + 64, first + 101, total], dtype=torch.int64, device="cuda")
    arguments = {"offsets": offsets}
    rows = a[first:]
    if layout == "gather":  # the order of rows turned round
        arguments["row_index"] = torch.arange(total - 1, -1, -1, dtype=torch.int64, device="cuda")
        rows = a[:checked].flip(0)
    out = torch.full((total, n), torch.nan, dtype=torch.bfloat16, device="cuda")
    sm12x.grouped_gemm(
        a.view(torch.float8_e4m3fn),
        b.view(torch.float8_e4m3fn),
        a_scale=2.0**-8,
        b_scale=2.0**-8,
        out=out,
        variant=variant,
        **arguments,
    )
    problem = make_problem(tail, n, k, seed, operands=(rows.contiguous(), b))
    scales = Scales(2.0**-8, 2.0**-8)
    operands = problem.operands("contiguous")
    rng = np.random.default_rng(seed)
    epilogue = make_epilogue(problem, operands, ("value", "value"), 0, rng, scales=scales)
    verdicts = Verdicts()
    verdicts.add("last rows", error_ratio(out[first:], epilogue, problem, "bfloat16"))
    verdicts.check(seed)
    assert not out[:first].isnan().any(), "rows before them were not written"


@pytest.mark.parametrize("variant", LARGE)
def test_masked_groups_past_two_to_the_31_elements(variant: str | None, seed: int) -> None:
    """The last group begins more than 2^31 elements into a and into out; rows past its count stay as they
    are.
    """
    n, k, groups, most = 1040, 1040, 16, 140_000
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    rows = np.zeros(groups, dtype=np.int64)
    rows[0], rows[-1] = 70, 301
    generator = torch.Generator(device="cuda").manual_seed(seed)
    bits = torch.randint(0, 120, (371, k), generator=generator, device="cuda", dtype=torch.uint8)
    weights = torch.randint(0, 120, (groups, n, k), generator=generator, device="cuda", dtype=torch.uint8)
    problem = make_problem(rows, n, k, seed, operands=(bits, weights))
    a = torch.full((groups, most, k), E4M3_NAN, dtype=torch.uint8, device="cuda")
    a[0, :70], a[-1, :301] = bits[:70], bits[70:]
    out = torch.full((groups, most, n), torch.inf, dtype=torch.bfloat16, device="cuda")
    sm12x.grouped_gemm(
        a.view(torch.float8_e4m3fn),
        problem.b,
        a_scale=2.0**-8,
        b_scale=2.0**-8,
        rows=torch.as_tensor(rows, device="cuda"),
        out=out,
        variant=variant,
    )
    operands = problem.operands("contiguous")
    rng = np.random.default_rng(seed)
    scales = Scales(2.0**-8, 2.0**-8)
    epilogue = make_epilogue(problem, operands, ("value", "value"), 0, rng, scales=scales)
    verdicts = Verdicts()
    values = torch.cat([out[0, :70], out[-1, :301]])
    verdicts.add("first and last group", error_ratio(values, epilogue, problem, "bfloat16"))
    verdicts.check(seed)
    assert int((out != torch.inf).sum()) == 371 * n, "rows past the counts were written"

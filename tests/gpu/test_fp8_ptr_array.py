"""Packed calls of the family fp8_ptr_array: every variant forced, over tile edges, scales, K, N, bias and out
types.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from seeding import SEED  # noqa: E402
from torch_reference import (  # noqa: E402
    DTYPES,
    PoisonedOut,
    Problem,
    Verdicts,
    error_ratio,
    make_problem,
    scaled_reference,
    scales_to_device,
)
from variants import VARIANTS, Variant, key  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import (  # noqa: E402
    BIASES,
    GROUP_COUNTS,
    REDUCTIONS,
    ROW_PATTERNS,
    SCALE_MODES,
    Scales,
    make_scales,
    offsets_of,
    rows_per_group,
)

FEATURES = {16: 136, 704: 264, 2816: 136}  # N for each K of the matrix: never a multiple of a tile
_problems: dict[tuple[object, ...], Problem] = {}


def cached_problem(groups: int, tile: int, pattern: str, k: int) -> Problem:
    """The float64 products are by far the dearest part and the same for all variants with one token tile."""
    key = (groups, tile, pattern, k)
    if key not in _problems:
        for stale in [other for other in _problems if other[:2] != key[:2]]:
            del _problems[stale]
        rng = np.random.default_rng([SEED, groups, tile, ROW_PATTERNS.index(pattern), k])
        rows = rows_per_group(pattern, groups, tile, rng)
        _problems[key] = make_problem(
            rows, FEATURES[k], k, int(rng.integers(2**31)), row_pad=16 if k == 704 else 0
        )
    return _problems[key]


def device_bias(kind: str | None, groups: int, n: int, seed: int) -> torch.Tensor | None:
    if kind is None:
        return None
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn((groups, n), generator=generator, device="cuda").to(DTYPES[kind])


def run_case(
    variant: Variant,
    problem: Problem,
    scales: Scales,
    verdicts: Verdicts,
    label: str,
    index: int,
    bias: torch.Tensor | None = None,
) -> None:
    """One forced call and its check. ``index`` rotates offsets' type, row stride of out, and whose buffers
    are used.
    """
    offset_type = torch.int64 if index % 2 else torch.int32
    offsets = torch.as_tensor(offsets_of(problem.rows), dtype=offset_type, device="cuda")
    a_scale, b_scale = scales_to_device(scales)
    arguments = {
        "a_scale": a_scale,
        "b_scale": b_scale,
        "offsets": offsets,
        "bias": bias,
        "variant": variant.key,
    }
    if index % 5 == 4:
        out = sm12x.grouped_gemm(problem.a, problem.b, out_dtype=variant.out, **arguments)
        assert out.shape == (problem.total_rows, problem.n)
        assert out.dtype == DTYPES[variant.out]
        damage = None
    else:
        poisoned = PoisonedOut(
            problem.total_rows, problem.n, variant.out, "cuda", row_pad=(0, 8, 56)[index % 3]
        )
        # Whatever the workspace held before must not matter.
        bytes_ = sm12x.workspace_size(problem.groups)
        workspace = torch.randint(0, 256, (bytes_,), dtype=torch.uint8, device="cuda") if index % 4 else None
        out = sm12x.grouped_gemm(
            problem.a, problem.b, out=poisoned.out, out_dtype=variant.out, workspace=workspace, **arguments
        )
        damage = poisoned.damaged()
    reference, magnitude = scaled_reference(problem, scales, bias)
    verdicts.add(label, error_ratio(out, reference, magnitude, problem.k, variant.out), damage)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
@pytest.mark.parametrize("groups", GROUP_COUNTS)
def test_every_tile_edge_scale_and_reduction(groups: int, variant: Variant, seed: int) -> None:
    """10 row patterns x 9 scale combinations x 3 K, with guard rows, poisoned surroundings and rotating
    biases.
    """
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    index = int(rng.integers(1000))
    for k, pattern in itertools.product(REDUCTIONS, ROW_PATTERNS):
        problem = cached_problem(groups, variant.token_tile, pattern, k)
        for modes in SCALE_MODES:
            index += 1
            scales = make_scales(modes, problem.total_rows, groups, problem.n, index, rng)
            kind = BIASES[index % len(BIASES)]
            bias = device_bias(kind, groups, problem.n, seed + index)
            label = f"K={k} N={problem.n} E={groups} rows={pattern} scales={modes} bias={kind} index={index}"
            run_case(variant, problem, scales, verdicts, label, index, bias)
    verdicts.check(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_as_many_rows_as_experts(variant: Variant, seed: int) -> None:
    """M = E: a 1-D a_scale is per token and (E, 1, 1) per expert, also where their lengths are equal."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    for groups in (2, 33, 128):
        rows = rng.multinomial(groups, np.full(groups, 1 / groups)).astype(np.int64)
        problem = make_problem(rows, 136, 144, seed)
        for index, modes in enumerate(SCALE_MODES):
            scales = make_scales(modes, groups, groups, problem.n, index, rng)
            run_case(variant, problem, scales, verdicts, f"M=E={groups} scales={modes}", index)
    verdicts.check(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_tails_of_features_and_reduction(variant: Variant, seed: int) -> None:
    """N and K that no tile divides, operands contiguous and with NaN between their rows."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    shapes = itertools.product((8, 24, 120, 128, 136, 1408, 2816), (16, 32, 112, 128, 144, 704, 2816))
    for index, (n, k) in enumerate(shapes):
        rows = rows_per_group("uneven", 5, variant.token_tile, rng)
        problem = make_problem(rows, n, k, seed + index, row_pad=16 * (index % 3))
        modes = SCALE_MODES[index % len(SCALE_MODES)]
        scales = make_scales(modes, problem.total_rows, problem.groups, n, index, rng)
        bias = device_bias(BIASES[(index // 2) % 4], problem.groups, n, seed + index)
        run_case(
            variant,
            problem,
            scales,
            verdicts,
            f"N={n} K={k} rows={rows.tolist()} scales={modes}",
            index,
            bias,
        )
    verdicts.check(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_no_scales_and_up_to_1024_experts(variant: Variant, seed: int) -> None:
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
        run_case(variant, problem, Scales(None, None), verdicts, f"E={groups}", index)
    verdicts.check(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_long_reduction_of_positive_operands(variant: Variant, seed: int) -> None:
    """Drift: K = 16384 with all products positive, where truncating accumulation shows most."""
    verdicts = Verdicts()
    rows = np.array([variant.token_tile + 1, 0, 3], dtype=np.int64)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    operands = tuple(
        (torch.rand(shape, generator=generator, device="cuda") + 0.5)
        .to(torch.float8_e4m3fn)
        .view(torch.uint8)
        for shape in ((int(rows.sum()), 16384), (3, 136, 16384))
    )
    problem = make_problem(rows, 136, 16384, seed, operands=operands)
    scales = Scales(0.25, 0.5)
    run_case(variant, problem, scales, verdicts, "K=16384", 0)
    verdicts.check(seed)


def test_the_selected_variant_of_both_out_types(seed: int) -> None:
    """Without variant=, whatever `select` picks is right from one token to thousands."""
    verdicts = Verdicts()
    rng = np.random.default_rng(seed)
    for index, tokens in enumerate((1, 8, 32, 128, 2048)):
        rows = rng.multinomial(tokens * 8, rng.dirichlet(np.full(64, 0.5))).astype(np.int64)
        problem = make_problem(rows, 704, 704, seed + index)
        scales = make_scales(("token", "channel"), problem.total_rows, 64, 704, index, rng)
        a_scale, b_scale = scales_to_device(scales)
        offsets = torch.as_tensor(offsets_of(rows), dtype=torch.int32, device="cuda")
        for dtype in ("bfloat16", "float16"):
            out = sm12x.grouped_gemm(
                problem.a, problem.b, a_scale=a_scale, b_scale=b_scale, offsets=offsets, out_dtype=dtype
            )
            assert out.dtype == DTYPES[dtype]
            reference, magnitude = scaled_reference(problem, scales)
            verdicts.add(f"T={tokens} {dtype}", error_ratio(out, reference, magnitude, problem.k, dtype))
    verdicts.check(seed)


def test_more_than_two_to_the_31_elements(seed: int) -> None:
    """Row offsets past 2^31 elements of a and of out; the last rows of the last group are checked."""
    n, k, groups = 1040, 1040, 3
    total = 2**31 // k + 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    a = torch.randint(0, 254, (total, k), generator=generator, device="cuda", dtype=torch.uint8)
    a += a >= 127
    rows = np.array([total - 4000, 37, 3963], dtype=np.int64)
    b = torch.randint(0, 120, (groups, n, k), generator=generator, device="cuda", dtype=torch.uint8)
    offsets = torch.as_tensor(offsets_of(rows), dtype=torch.int64, device="cuda")
    out = sm12x.grouped_gemm(
        a.view(torch.float8_e4m3fn),
        b.view(torch.float8_e4m3fn),
        a_scale=2.0**-8,
        b_scale=2.0**-8,
        offsets=offsets,
    )
    tail = np.array([64, 37, 3963], dtype=np.int64)
    first = total - int(tail.sum())
    problem = make_problem(tail, n, k, seed, operands=(a[first:], b))
    verdicts = Verdicts()
    reference, magnitude = scaled_reference(problem, Scales(2.0**-8, 2.0**-8))
    verdicts.add("last rows", error_ratio(out[first:], reference, magnitude, k, "bfloat16"))
    verdicts.check(seed)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
def test_bit_identical_from_run_to_run(variant: Variant, seed: int) -> None:
    """1000 repeats on uneven routing; a race between tiles or groups would change some of them."""
    rng = np.random.default_rng(seed)
    rows = rows_per_group("uneven", 48, variant.token_tile, rng)
    problem = make_problem(rows, 1408, 704, seed)
    scales = make_scales(("token", "channel"), problem.total_rows, problem.groups, problem.n, 0, rng)
    a_scale, b_scale = scales_to_device(scales)
    offsets = torch.as_tensor(offsets_of(rows), dtype=torch.int32, device="cuda")
    workspace = torch.empty(sm12x.workspace_size(problem.groups), dtype=torch.uint8, device="cuda")
    poisoned = PoisonedOut(problem.total_rows, problem.n, variant.out, "cuda")

    def call() -> torch.Tensor:
        poisoned.poison()
        return sm12x.grouped_gemm(
            problem.a,
            problem.b,
            a_scale=a_scale,
            b_scale=b_scale,
            offsets=offsets,
            out=poisoned.out,
            out_dtype=variant.out,
            workspace=workspace,
            variant=variant.key,
        )

    call()
    first = poisoned.buffer.clone()
    reference, magnitude = scaled_reference(problem, scales)
    verdicts = Verdicts()
    ratio = error_ratio(poisoned.out, reference, magnitude, problem.k, variant.out)
    verdicts.add("first run", ratio, poisoned.damaged())
    verdicts.check(seed)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        call()
        differing += (poisoned.buffer != first).any()
    assert differing.item() == 0, (
        f"{differing.item()} of 1000 repeats differ from the first run (test seed {seed})"
    )

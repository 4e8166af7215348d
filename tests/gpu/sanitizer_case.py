"""A few small calls of every variant for compute-sanitizer: no framework, every array its own exact
allocation.

    compute-sanitizer --tool memcheck python tests/gpu/sanitizer_case.py [--family FAMILY] [--quick]
    [--variant KEY]

Exits with 1 where a result is wrong. tests/gpu/run runs it under memcheck, racecheck and synccheck. What they
say of fp8_ptr_array, whose kernel shell is CUTLASS's, is compared with sanitizer_ledger.json; of fp8_packed
and of the kernels of an expert layer (family "layer", sanitizer_layers.py), which are ours, they may say
nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "runtime"), str(Path(__file__).resolve().parent)]

from forced import Forced, forced  # noqa: E402
from sanitizer_layers import layer_cases  # noqa: E402

import sm12x  # noqa: E402
from sm12x.manifest import Variant  # noqa: E402
from sm12x.reference import check, grouped_gemm_float64  # noqa: E402
from sm12x.validation.cases import make_scales, offsets_of, random_e4m3_bits  # noqa: E402
from sm12x.validation.device import Gpu  # noqa: E402
from sm12x.validation.variants import gemm_variants  # noqa: E402

FP8 = "float8_e4m3fn"
FAMILIES = ("fp8_ptr_array", "fp8_packed", "layer")
OUTS = ("bfloat16", "float16", "float32")
Case = tuple[str, float]  # what ran, and the error over its bound


def edge_rows(tile: int) -> NDArray[np.int64]:
    """Four groups, one empty, one of a single row, one of a tile and a row."""
    return np.array([1, 0, tile + 1, 7], dtype=np.int64)


# -------------------------------------------------------------------------------------------------
# fp8_ptr_array
# -------------------------------------------------------------------------------------------------


def packed(gpu: Gpu, variant: Variant, rng: np.random.Generator) -> float:
    """Tails in N and K."""
    rows = edge_rows(variant.token_tile)
    n, k, total = 136, 272, int(rows.sum())
    a, b = random_e4m3_bits((total, k), rng), random_e4m3_bits((4, n, k), rng)
    scales = make_scales(("token", "channel"), total, 4, n, 0, rng)
    offsets = offsets_of(rows).astype(np.int32)
    bias = rng.standard_normal((4, n)).astype(np.float32)
    out = gpu.empty((total, n), variant.out)
    sm12x.grouped_gemm(
        gpu.upload(a, FP8),
        gpu.upload(b, FP8),
        a_scale=gpu.upload(np.asarray(scales.a)),
        b_scale=gpu.upload(np.asarray(scales.b)),
        offsets=gpu.upload(offsets),
        bias=gpu.upload(bias),
        out=out,
        out_dtype=variant.out,
        workspace=gpu.empty((sm12x.workspace_size(4),), "uint8"),
        stream=gpu.stream,
        variant=variant.key,
    )
    reference, magnitude = grouped_gemm_float64(
        a, b, a_scale=scales.a, b_scale=scales.b, offsets=offsets, bias=bias, dtype=FP8
    )
    return check(gpu.download(out), reference, magnitude, k)[1]


def groups_of_own_shape(gpu: Gpu, variant: Variant, rng: np.random.Generator) -> float:
    """A list call of three groups, one of them empty."""
    shapes = [(variant.token_tile + 1, 72, 144), (0, 136, 16), (3, 264, 272)]
    a = [random_e4m3_bits((m, k), rng) for m, _, k in shapes]
    b = [random_e4m3_bits((n, k), rng) for _, n, k in shapes]
    outs = [gpu.empty((m, n), variant.out) for m, n, _ in shapes]
    sm12x.grouped_gemm(
        [gpu.upload(x, FP8) for x in a],
        [gpu.upload(x, FP8) for x in b],
        a_scale=2.0**-8,
        b_scale=2.0**-8,
        out=outs,
        out_dtype=variant.out,
        stream=gpu.stream,
        variant=variant.key,
    )
    references, magnitudes = grouped_gemm_float64(a, b, a_scale=2.0**-8, b_scale=2.0**-8, dtype=FP8)
    results = [gpu.download(out) for out in outs]
    return max(check(results[i], references[i], magnitudes[i], shapes[i][2])[1] for i in range(3))


def wrong_offsets(gpu: Gpu, variant: Variant, rng: np.random.Generator) -> float:
    """Offsets that decrease and run past M: the result means nothing, but no access may leave its array."""
    total, n, k = 40, 136, 144
    gpu_out = gpu.empty((total, n), variant.out)
    sm12x.grouped_gemm(
        gpu.upload(random_e4m3_bits((total, k), rng), FP8),
        gpu.upload(random_e4m3_bits((4, n, k), rng), FP8),
        a_scale=2.0**-8,
        b_scale=2.0**-8,
        offsets=gpu.upload(np.array([-5, 30, 10, 4000, 41], dtype=np.int32)),
        out=gpu_out,
        out_dtype=variant.out,
        workspace=gpu.empty((sm12x.workspace_size(4),), "uint8"),
        stream=gpu.stream,
        variant=variant.key,
    )
    gpu.synchronize()
    return 0.0


def ptr_array_cases(gpu: Gpu, quick: bool, only: str | None, rng: np.random.Generator) -> Iterator[Case]:
    """Quick: packed calls of bfloat16 variants only (racecheck is slow)."""
    for variant in gemm_variants(gpu.device.arch):
        if only not in (None, variant.key) or (quick and variant.out != "bfloat16"):
            continue
        for case in [packed] if quick else [packed, groups_of_own_shape, wrong_offsets]:
            yield f"{variant.key} {case.__name__}", case(gpu, variant, rng)


# -------------------------------------------------------------------------------------------------
# fp8_packed
# -------------------------------------------------------------------------------------------------


def layout_case(
    gpu: Gpu, each: Forced, layout: str, out_dtype: str, wrong: bool, rng: np.random.Generator
) -> float:
    """Every argument given; tails in N and K. `wrong`: bounds and indices mean nothing, and so does the
    result, but no access may leave its array."""
    rows = edge_rows(each.tile)
    n, k, total, most = 136, 272, int(rows.sum()), int(rows.max()) + 2
    tokens = total // 2 + 1
    source = random_e4m3_bits((tokens, k), rng)
    index = rng.integers(0, tokens, total).astype(np.int32)
    a, b = source[index], random_e4m3_bits((4, n, k), rng)
    scale = rng.uniform(0.5, 1.5, tokens).astype(np.float32) * np.float32(2**-8)
    scales = make_scales(("token", "channel"), total, 4, n, 0, rng)
    weight = rng.uniform(-1.5, 1.5, total).astype(np.float32)
    bias = rng.standard_normal((4, n)).astype(np.float32)
    offsets = offsets_of(rows)
    place = (np.repeat(np.arange(4), rows), np.arange(total) - np.repeat(offsets[:-1], rows))
    given: dict[str, Any] = {"a": a, "a_scale": scale[index], "row_weight": weight}
    shape: tuple[int, ...] = (total, n)
    if layout == "gather":
        given.update(a=source, a_scale=scale, row_index=index)
        if wrong:
            given["row_index"] = rng.choice(np.array([-1, tokens, 2**31 - 1, -(2**31)], np.int32), total)
    if layout == "masked":
        given["rows"] = np.array([-1, most + 1, 2**31 - 1, 0] if wrong else rows, np.int32)
        shape = (4, most, n)
        for key in ("a", "a_scale", "row_weight"):
            padded = np.zeros((4, most, *given[key].shape[1:]), given[key].dtype)
            padded[place] = given[key]
            given[key] = padded
    else:
        given["offsets"] = np.array([-5, 30, 10, 4000, total + 1] if wrong else offsets, np.int32)
    out = gpu.empty(shape, out_dtype)
    uploaded = {key: gpu.upload(value, FP8 if key == "a" else None) for key, value in given.items()}
    sm12x.grouped_gemm(
        **uploaded,
        b=gpu.upload(b, FP8),
        b_scale=gpu.upload(np.asarray(scales.b)),
        bias=gpu.upload(bias),
        out=out,
        out_dtype=out_dtype,
        workspace=gpu.empty((sm12x.workspace_size(4),), "uint8"),
        stream=gpu.stream,
        variant=each.argument,
    )
    found = gpu.download(out)
    if wrong:
        return 0.0
    reference, magnitude = grouped_gemm_float64(
        *(a, b), a_scale=scale[index], b_scale=scales.b, offsets=offsets, bias=bias, dtype=FP8
    )
    factor = weight[:, None].astype(np.float64)
    # The weight is a rounding more in FP32 (tests/gpu/packed_problem.py).
    slack = 2.0**-24 * np.abs(reference) / (2.0**-20 * k / 32)
    values = found[place] if layout == "masked" else found
    return check(values, reference * factor, (magnitude + slack) * np.abs(factor), k)[1]


def packed_cases(gpu: Gpu, quick: bool, only: str | None, rng: np.random.Generator) -> Iterator[Case]:
    """Both modes of every variant, on every layout. Quick: without wrong bounds."""
    for number, each in enumerate(forced(gpu.device.arch)):
        if only not in (None, each.variant.key):
            continue
        for i, layout in enumerate(("contiguous", "gather", "masked")):
            out = OUTS[(number + i) % 3]
            yield f"{each.argument} {layout} {out}", layout_case(gpu, each, layout, out, False, rng)
            if not quick:
                yield (
                    f"{each.argument} {layout} {out}, wrong bounds",
                    layout_case(gpu, each, layout, out, True, rng),
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, help="this family only")
    parser.add_argument("--variant", help="this variant only")
    parser.add_argument("--quick", action="store_true", help="fewer cases: racecheck is slow")
    options = parser.parse_args()
    gpu = Gpu.open(0)
    rng = np.random.default_rng()
    failed = ran = 0
    for family, cases in zip(FAMILIES, (ptr_array_cases, packed_cases, layer_cases), strict=True):
        if options.family not in (None, family):
            continue
        for case, ratio in cases(gpu, options.quick, options.variant, rng):
            print(f"{case}: error {ratio:.3f} of its bound", flush=True)
            failed += not ratio <= 1.0
            ran += 1
    if not ran:
        print("no variant to run")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())

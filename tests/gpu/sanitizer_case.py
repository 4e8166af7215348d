"""A few small calls of every variant for compute-sanitizer: no framework, every array its own exact
allocation.

    compute-sanitizer --tool memcheck python tests/gpu/sanitizer_case.py [--quick] [--variant KEY]

Exits with 1 where a result is wrong. tests/gpu/run runs it under memcheck, racecheck and synccheck and
compares what they say with sanitizer_ledger.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime"))

import sm12x
from sm12x.manifest import Variant
from sm12x.reference import check, grouped_gemm_float64
from sm12x.validation.cases import make_scales, offsets_of, random_e4m3_bits
from sm12x.validation.device import Gpu
from sm12x.validation.variants import gemm_variants

FP8 = "float8_e4m3fn"


def packed(gpu: Gpu, variant: Variant, rng: np.random.Generator) -> float:
    """Four groups, one empty, one of a single row, one of a tile and a row; tails in N and K."""
    rows = np.array([1, 0, variant.token_tile + 1, 7], dtype=np.int64)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", help="this variant only")
    parser.add_argument(
        "--quick", action="store_true", help="packed calls of bfloat16 variants only (racecheck is slow)"
    )
    options = parser.parse_args()
    gpu = Gpu.open(0)
    rng = np.random.default_rng()
    cases = [packed] if options.quick else [packed, groups_of_own_shape, wrong_offsets]
    failed = 0
    for variant in gemm_variants(gpu.device.arch):
        if options.variant not in (None, variant.key) or (options.quick and variant.out != "bfloat16"):
            continue
        for case in cases:
            ratio = case(gpu, variant, rng)
            print(f"{variant.key} {case.__name__}: error {ratio:.3f} of its bound", flush=True)
            failed += not ratio <= 1.0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

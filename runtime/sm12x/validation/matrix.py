"""Every variant against the NumPy reference, on device memory that holds NaN wherever a kernel has no
business.

No framework is needed. Products of a problem are computed once on the host and shared by all variants with
its tile, all scales and all output types.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..manifest import Variant
from ..ops.grouped_gemm import grouped_gemm
from ..ops.launch import workspace_size
from ..reference import check, dequantise
from .cases import (
    BIASES,
    ROW_PATTERNS,
    SCALE_MODES,
    Scales,
    make_scales,
    offsets_of,
    random_e4m3_bits,
    rows_per_group,
)
from .device import DeviceArray, Gpu, numpy_dtype

E4M3 = "float8_e4m3fn"
E4M3_NAN = 0x7F
GUARD_ROWS = 8
POISON = 0xFF  # bytes of it are a NaN in bfloat16 and in float16
# (groups, K, N) of the matrix; N is never a multiple of a tile. Larger ones would keep a slow host busy for
# minutes.
SIZES = (
    *((1, 16, 136), (1, 704, 264), (1, 2816, 136)),
    *((5, 16, 136), (5, 704, 264), (5, 2816, 136)),
    *((33, 16, 72), (33, 704, 72)),
)
QUICK_SIZES = ((5, 16, 136), (5, 704, 136))


@dataclass(frozen=True)
class Problem:
    """One packed problem on the device, and its float64 products without scales and bias on the host."""

    rows: NDArray[np.int64]
    n: int
    k: int
    a: DeviceArray
    b: DeviceArray
    product: NDArray[np.float64]  # (M, n)
    magnitude: NDArray[np.float64]  # (M, n): sum_k |a| |b|

    @property
    def total_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def groups(self) -> int:
        return int(self.rows.size)


@dataclass(frozen=True)
class Result:
    """One case: `ratio` is the largest error over its bound, `damaged` counts elements changed outside the
    output.
    """

    variant: str
    case: str
    ratio: float
    damaged: int

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0 and self.damaged == 0


def upload_in_poison(gpu: Gpu, bits: NDArray[np.uint8], row_pad: int) -> DeviceArray:
    """`bits` (..., rows, k) on the device as e4m3, with NaN around and, `row_pad` bytes of it, between
    rows.
    """
    *lead, k = bits.shape
    rows = int(np.prod(lead, dtype=np.int64))
    pitch = k + row_pad
    host = np.full((rows + 2 * GUARD_ROWS, pitch), E4M3_NAN, dtype=np.uint8)
    host[GUARD_ROWS : GUARD_ROWS + rows, :k] = bits.reshape(rows, k)
    strides = (pitch, 1) if len(lead) == 1 else (lead[1] * pitch, pitch, 1)
    return gpu.view(gpu.upload(host), GUARD_ROWS * pitch, bits.shape, strides, E4M3)


def make_problem(
    gpu: Gpu, rows: NDArray[np.int64], n: int, k: int, rng: np.random.Generator, row_pad: int = 0
) -> Problem:
    """Random full-range operands."""
    total, groups = int(rows.sum()), int(rows.size)
    a, b = random_e4m3_bits((total, k), rng), random_e4m3_bits((groups, n, k), rng)
    product, magnitude = np.zeros((total, n)), np.zeros((total, n))
    offsets = offsets_of(rows)
    for e in np.flatnonzero(rows):
        mine = slice(int(offsets[e]), int(offsets[e + 1]))
        left, right = (dequantise(x.view(numpy_dtype(E4M3)), np.float64) for x in (a[mine], b[e]))
        product[mine] = left @ right.T
        magnitude[mine] = np.abs(left) @ np.abs(right).T
    return Problem(
        rows, n, k, upload_in_poison(gpu, a, row_pad), upload_in_poison(gpu, b, row_pad), product, magnitude
    )


def upload_scale(gpu: Gpu, scale: NDArray[np.float32] | float | None) -> DeviceArray | float | None:
    """A scale as grouped_gemm takes it; an array lies between NaNs."""
    if scale is None or isinstance(scale, float):
        return scale
    host = np.full(scale.size + 8, np.nan, dtype=np.float32)
    host[4 : 4 + scale.size] = scale.reshape(-1)
    array = gpu.upload(host)
    strides = tuple(stride // 4 for stride in np.ascontiguousarray(scale).strides)
    return gpu.view(array, 4, scale.shape, strides)


class GuardedOut:
    """An output (rows, n) inside a buffer of NaN with guard rows and, if wanted, a wider row stride."""

    def __init__(self, gpu: Gpu, rows: int, n: int, dtype: str, row_pad: int) -> None:
        self.gpu, self.rows, self.n, self.dtype = gpu, rows, n, dtype
        pitch = n + row_pad
        self.buffer = gpu.empty((rows + 2 * GUARD_ROWS, pitch), dtype)
        self.out = gpu.view(self.buffer, GUARD_ROWS * pitch, (rows, n), (pitch, 1))
        self.poison()

    def poison(self) -> None:
        self.gpu.fill(self.buffer, POISON)

    def read(self) -> tuple[NDArray[Any], int]:
        """The output, and how many elements outside of it have changed."""
        buffer = self.gpu.download(self.buffer)
        changed = buffer.view(np.uint16) != 0x0101 * POISON
        inner = (slice(GUARD_ROWS, GUARD_ROWS + self.rows), slice(0, self.n))
        return buffer[inner], int(changed.sum() - changed[inner].sum())


def expected(
    problem: Problem, scales: Scales, bias: NDArray[Any] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(reference, sum of magnitudes) of a call."""
    a, b = scales.per_row(problem.rows, problem.n)
    factor = a * np.repeat(b, problem.rows, axis=0)
    reference = problem.product * factor
    if bias is not None:
        reference += np.repeat(bias.astype(np.float64), problem.rows, axis=0)
    return reference, problem.magnitude * np.abs(factor)


def run_case(
    gpu: Gpu,
    variant: Variant,
    problem: Problem,
    modes: tuple[str, str],
    index: int,
    rng: np.random.Generator,
) -> Result:
    """One forced call. `index` rotates bias, offsets' type, row stride of out, workspace, and forms of
    scales.
    """
    scales = make_scales(modes, problem.total_rows, problem.groups, problem.n, index, rng)
    kind = BIASES[index % len(BIASES)]
    bias = None
    if kind is not None:
        bias = rng.standard_normal((problem.groups, problem.n)).astype(np.float32).astype(numpy_dtype(kind))
    offsets = offsets_of(problem.rows).astype(np.int64 if index % 2 else np.int32)
    out = GuardedOut(gpu, problem.total_rows, problem.n, variant.out, (0, 8, 56)[index % 3])
    workspace = None
    if index % 4:
        workspace = gpu.empty((workspace_size(problem.groups, device=gpu.device.ordinal),), "uint8")
        gpu.fill(workspace, int(rng.integers(256)))  # whatever it held before must not matter
    grouped_gemm(
        problem.a,
        problem.b,
        a_scale=upload_scale(gpu, scales.a),
        b_scale=upload_scale(gpu, scales.b),
        offsets=gpu.upload(offsets),
        out=out.out,
        out_dtype=variant.out,
        bias=None if bias is None else gpu.upload(bias),
        workspace=workspace,
        stream=gpu.stream,
        variant=variant.key,
    )
    values, damaged = out.read()
    reference, magnitude = expected(problem, scales, bias)
    ratio = check(values, reference, magnitude, problem.k)[1]
    label = (
        f"E={problem.groups} K={problem.k} N={problem.n} M={problem.total_rows} scales={modes} bias={kind}"
    )
    return Result(variant.key, label, ratio, damaged)


def tile_edges(
    gpu: Gpu, variants: list[Variant], quick: bool, rng: np.random.Generator
) -> Iterator[list[Result]]:
    """All variants x row patterns x scale combinations x sizes. Yields one list for each of `steps(...)`
    problems.
    """
    index = int(rng.integers(1000))
    for tile in sorted({variant.token_tile for variant in variants}):
        mine = [variant for variant in variants if variant.token_tile == tile]
        for groups, k, n in QUICK_SIZES if quick else SIZES:
            for pattern in ROW_PATTERNS:
                rows = rows_per_group(pattern, groups, tile, rng)
                problem = make_problem(gpu, rows, n, k, rng, row_pad=16 if k == 704 else 0)
                found = []
                for modes in SCALE_MODES:
                    for variant in mine:
                        index += 1
                        result = run_case(gpu, variant, problem, modes, index, rng)
                        case = f"rows={pattern} {result.case}"
                        found.append(Result(result.variant, case, result.ratio, result.damaged))
                yield found


def steps(variants: list[Variant], quick: bool) -> int:
    """How many lists `tile_edges` yields."""
    return (
        len({variant.token_tile for variant in variants})
        * len(QUICK_SIZES if quick else SIZES)
        * len(ROW_PATTERNS)
    )


def rows_as_experts(gpu: Gpu, variant: Variant, rng: np.random.Generator) -> list[Result]:
    """M = E, where only the number of axes tells a scale per token from one per expert."""
    rows = rng.multinomial(33, np.full(33, 1 / 33)).astype(np.int64)
    problem = make_problem(gpu, rows, 136, 144, rng)
    return [run_case(gpu, variant, problem, modes, index, rng) for index, modes in enumerate(SCALE_MODES)]


def wrong_offsets(gpu: Gpu, variant: Variant, rng: np.random.Generator) -> list[Result]:
    """Offsets that decrease or run past M: no element outside `out` may change; its values mean nothing."""
    rows = np.array([40, 0, 130, 7, 64], dtype=np.int64)
    problem = make_problem(gpu, rows, 136, 144, rng)
    total = problem.total_rows
    cases = {
        "decreasing": [0, 40, 20, 177, 170, total],
        "past M": [0, 40, 40, 170, 177, total + 500],
        "negative": [-64, 40, 40, 170, 177, total],
        "far past M": [0] + [2**31 - 1] * 5,
    }
    found = []
    for name, offsets in cases.items():
        out = GuardedOut(gpu, total, 136, variant.out, 8)
        grouped_gemm(
            problem.a,
            problem.b,
            a_scale=2.0**-8,
            b_scale=2.0**-8,
            offsets=gpu.upload(np.array(offsets, dtype=np.int32)),
            out=out.out,
            out_dtype=variant.out,
            stream=gpu.stream,
            variant=variant.key,
        )
        found.append(Result(variant.key, f"offsets {name}", 0.0, out.read()[1]))
    return found


def repeats(gpu: Gpu, variant: Variant, count: int, rng: np.random.Generator) -> Result:
    """`count` runs of one uneven problem, bit for bit: `damaged` counts the runs that differ from the
    first.
    """
    rows = rows_per_group("uneven", 24, variant.token_tile, rng)
    problem = make_problem(gpu, rows, 264, 704, rng)
    scales = make_scales(("token", "channel"), problem.total_rows, problem.groups, problem.n, 0, rng)
    a_scale, b_scale = upload_scale(gpu, scales.a), upload_scale(gpu, scales.b)
    offsets = gpu.upload(offsets_of(rows).astype(np.int32))
    workspace = gpu.empty((workspace_size(problem.groups, device=gpu.device.ordinal),), "uint8")
    out = GuardedOut(gpu, problem.total_rows, problem.n, variant.out, 0)

    def run() -> NDArray[Any]:
        out.poison()
        grouped_gemm(
            problem.a,
            problem.b,
            a_scale=a_scale,
            b_scale=b_scale,
            offsets=offsets,
            out=out.out,
            out_dtype=variant.out,
            workspace=workspace,
            stream=gpu.stream,
            variant=variant.key,
        )
        return gpu.download(out.buffer).view(np.uint16)

    first = run()
    reference, magnitude = expected(problem, scales, None)
    ratio = check(out.read()[0], reference, magnitude, problem.k)[1]
    differing = sum(not np.array_equal(run(), first) for _ in range(count))
    return Result(variant.key, f"{count} repeats, M={problem.total_rows} E=24", ratio, differing)

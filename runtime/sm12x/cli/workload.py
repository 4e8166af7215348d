"""The demo's workload: an FP8-Dynamic mixture-of-experts projection with the sizes of gemma-4-26B-A4B."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sm12x import reference
from sm12x.cli.progress import progress

K, N, EXPERTS, TOP_K = 2816, 1408, 128, 8
EMULATED_K, EMULATED_N = 704, 256  # for a result within seconds


@dataclass(frozen=True)
class Workload:
    """Operands of one packed call, in host memory, rows sorted by expert."""

    tokens: int
    a: NDArray[Any]  # (T * k, K) float8_e4m3fn
    a_scale: NDArray[np.float32]  # (T * k, 1), per token
    b: NDArray[Any]  # (E, N, K) float8_e4m3fn
    b_scale: NDArray[np.float32]  # (E, N, 1), per channel
    offsets: NDArray[np.int32]  # (E + 1,)

    @property
    def counts(self) -> NDArray[np.int32]:
        """Rows of each expert, (E,)."""
        return np.diff(self.offsets)

    @property
    def shape(self) -> dict[str, int]:
        experts, n, k = self.b.shape
        return {
            "T": self.tokens,
            "M": self.a.shape[0],
            "E": experts,
            "top_k": min(TOP_K, experts),
            "K": k,
            "N": n,
        }

    def least_bytes(self) -> int:
        """Bytes any kernel must move, with bfloat16 out."""
        return least_bytes(self.counts, self.b.shape[1], self.b.shape[2], 2) + self.offsets.nbytes


def least_bytes(counts: NDArray[np.int32], n: int, k: int, out_bytes: int) -> int:
    """Bytes any kernel must move for `counts` rows per expert: weights with rows, activations and scales (per
    token and per channel) once, the output in elements of `out_bytes`."""
    rows, active = int(counts.sum()), int(np.count_nonzero(counts))
    return active * n * (k + 4) + rows * (k + 4) + rows * n * out_bytes


def build(tokens: int, experts: int, seed: int, *, show_progress: bool, emulated: bool = False) -> Workload:
    """BF16 activations and weights, routed and quantised as an FP8-Dynamic checkpoint runs: same seed, same
    operands. `emulated`: of a size for the emulator."""
    k, n = (EMULATED_K, EMULATED_N) if emulated else (K, N)
    activation_seed, router_seed, *expert_seeds = np.random.SeedSequence(seed).spawn(2 + experts)
    x = reference.random_bfloat16((tokens, k), np.random.default_rng(activation_seed))
    router = reference.random_bfloat16((experts, k), np.random.default_rng(router_seed), k**-0.5)
    rows, _, offsets = reference.route_top_k(
        x.astype(np.float32) @ router.astype(np.float32).T, min(TOP_K, experts)
    )
    quantised, scale = reference.quantize_per_token(x)

    b = np.empty((experts, n, k), ml_dtypes.float8_e4m3fn)
    b_scale = np.empty((experts, n, 1), np.float32)

    def fill(e: int) -> None:
        w = reference.random_bfloat16((1, n, k), np.random.default_rng(expert_seeds[e]), k**-0.5)
        b[e : e + 1], b_scale[e : e + 1] = reference.quantize_per_channel(w)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in progress(
            pool.map(fill, range(experts)), "quantising weights", experts, enabled=show_progress
        ):
            pass
    return Workload(tokens, quantised[rows], scale[rows], b, b_scale, offsets)


def sample_experts(workload: Workload, most: int, seed: int) -> list[int]:
    """At most `most` experts that have rows: those with the most and the fewest rows, and random others."""
    active = np.flatnonzero(workload.counts)
    if len(active) <= most:
        return [int(e) for e in active]
    by_rows = active[np.argsort(workload.counts[active], kind="stable")]
    others = np.random.default_rng(seed).permutation(by_rows[1:-1])[: most - 2]
    return sorted(int(e) for e in (by_rows[0], by_rows[-1], *others))


def check(
    workload: Workload, out: NDArray[Any], experts: list[int], *, show_progress: bool
) -> tuple[float, float]:
    """(max_rel_err, tolerance_ratio) of `out` (M, N) over the rows of `experts`, against the float64
    reference."""
    results = list(_check_each(workload, out, experts, show_progress))
    return max((r[0] for r in results), default=0.0), max((r[1] for r in results), default=0.0)


def _check_each(
    workload: Workload, out: NDArray[Any], experts: list[int], show_progress: bool
) -> Iterator[tuple[float, float]]:
    for e in progress(experts, "checking against float64", len(experts), enabled=show_progress):
        rows = slice(workload.offsets[e], workload.offsets[e + 1])
        ref, abs_sum = reference.grouped_gemm_float64(
            workload.a[rows],
            workload.b[e : e + 1],
            a_scale=workload.a_scale[rows],
            b_scale=workload.b_scale[e : e + 1],
            offsets=np.array([0, rows.stop - rows.start], np.int32),
        )
        yield reference.check(out[rows], ref, abs_sum, workload.a.shape[1])

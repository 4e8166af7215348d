"""Times of the grouped GEMM on shapes of real models, by itself and beside torch and Triton where they are
installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import driver
from ..ops.grouped_gemm import grouped_gemm
from ..ops.launch import workspace_size
from ..reference import check, dequantise
from . import shapes
from .device import DeviceArray, Gpu, device_attribute, numpy_dtype
from .shapes import MoeGemm, Routing
from .timing import Contender, capture, interleave
from .variants import gemm_variants

E4M3 = "float8_e4m3fn"
BLOCK = 1 << 24  # bytes of random weights that are repeated until the pool is full
CHECKED_EXPERTS = 3


@dataclass(frozen=True)
class Batch:
    """Operands of one routing. Activations and their scales also stay on the host, for the check."""

    routing: Routing
    host_a: np.ndarray[Any, Any]  # (rows, K) uint8
    host_a_scale: np.ndarray[Any, Any]
    a: DeviceArray
    a_scale: DeviceArray
    offsets: DeviceArray
    out: DeviceArray


@dataclass(frozen=True)
class Weights:
    """Copies of one projection's weights; the random block that fills them also stays on the host."""

    pool: DeviceArray  # (sets, E, N, K)
    scale: DeviceArray  # (E, N)
    host_block: np.ndarray[Any, Any]
    host_scale: np.ndarray[Any, Any]

    def one_set(self, gpu: Gpu, index: int) -> DeviceArray:
        _, *shape = self.pool.shape
        return gpu.view(self.pool, index * int(np.prod(shape)), tuple(shape), self.pool.strides[1:])

    def host_expert(self, expert: int) -> np.ndarray[Any, Any]:
        """(N, K) bits of an expert of the first set."""
        _, _, n, k = self.pool.shape
        at = np.arange(expert * n * k, (expert + 1) * n * k, dtype=np.int64) % self.host_block.size
        return self.host_block[at].reshape(n, k)


def everyday_fp8(count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Normally distributed values over most of e4m3's range, as uint8, as quantised data has."""
    return (
        (rng.standard_normal(count, dtype=np.float32) * 64)
        .clip(-448, 448)
        .astype(numpy_dtype(E4M3))
        .view(np.uint8)
    )


def make_weights(gpu: Gpu, shape: MoeGemm, sets: int, rng: np.random.Generator) -> Weights:
    pool = gpu.empty((sets, shape.experts, shape.n, shape.k), E4M3)
    block = everyday_fp8(min(BLOCK, pool.nbytes), rng)
    source = gpu.upload(block)
    for start in range(0, pool.nbytes, block.size):
        size = min(block.size, pool.nbytes - start)
        part = gpu.view(source, 0, (size,), (1,))
        gpu.copy(gpu.view(pool, start, (size,), (1,)), part)
    gpu.synchronize()
    scale = (rng.random((shape.experts, shape.n)) * 1e-3).astype(np.float32)
    return Weights(pool, gpu.upload(scale), block, scale)


def make_batch(gpu: Gpu, shape: MoeGemm, tokens: int, rng: np.random.Generator) -> Batch:
    routing = shapes.make_routing(shape, tokens, rng)
    rows = tokens * shape.top_k
    a = everyday_fp8(rows * shape.k, rng).reshape(rows, shape.k)
    scale = (rng.random(rows) * 1e-3).astype(np.float32)
    return Batch(
        routing,
        a,
        scale,
        gpu.upload(a, E4M3),
        gpu.upload(scale),
        gpu.upload(routing.offsets.astype(np.int32)),
        gpu.empty((rows, shape.n), "bfloat16"),
    )


def call(
    gpu: Gpu, batch: Batch, b: DeviceArray, weights: Weights, workspace: DeviceArray, variant: str | None
) -> None:
    """One packed call into `batch.out`."""
    grouped_gemm(
        batch.a,
        b,
        a_scale=batch.a_scale,
        b_scale=weights.scale,
        offsets=batch.offsets,
        out=batch.out,
        workspace=workspace,
        stream=gpu.stream,
        variant=variant,
    )


def deferred(*arguments: Any) -> Callable[[], None]:
    """`call` with these arguments, later."""
    return lambda: call(*arguments)


def worst_ratio(gpu: Gpu, shape: MoeGemm, batch: Batch, weights: Weights) -> float:
    """The error of `batch.out`, computed with the first weight set, over its bound, for a few experts."""
    out = gpu.download(batch.out)
    ratios = []
    for expert in batch.routing.active[:CHECKED_EXPERTS].tolist():
        rows = slice(int(batch.routing.offsets[expert]), int(batch.routing.offsets[expert + 1]))
        left = dequantise(batch.host_a[rows].view(numpy_dtype(E4M3)), np.float64)
        right = dequantise(weights.host_expert(expert).view(numpy_dtype(E4M3)), np.float64)
        factor = batch.host_a_scale[rows, None].astype(np.float64) * weights.host_scale[expert].astype(
            np.float64
        )
        magnitude = (np.abs(left) @ np.abs(right).T) * factor
        ratios.append(check(out[rows], (left @ right.T) * factor, magnitude, shape.k)[1])
    return max(ratios)


def l2_bytes(gpu: Gpu) -> int:
    return device_attribute(gpu.device, "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE")


def free_bytes() -> int:
    """Free memory of the device whose context is current."""
    return int(driver.call("cuMemGetInfo")[0])


def time_shape(
    gpu: Gpu,
    shape: MoeGemm,
    tokens: tuple[int, ...],
    copy_gb_per_s: float,
    rounds: int,
    peers: bool,
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    """One row for each T, in the form that `plot_rows` takes. Raises MemoryError where the weights do not
    fit.
    """
    l2 = l2_bytes(gpu)
    sets = shapes.weight_sets(shape, min(tokens) * shape.top_k, l2)
    room = free_bytes() // 2 // (shape.experts * shape.expert_bytes)
    if room < 1:
        raise MemoryError(
            f"{shape.name}: {shape.experts * shape.expert_bytes >> 20} MiB of weights do not fit"
        )
    weights = make_weights(gpu, shape, min(sets, room), rng)
    workspace = gpu.empty((workspace_size(shape.experts, device=gpu.device.ordinal),), "uint8")
    variants = [variant for variant in gemm_variants(gpu.device.arch) if variant.out == "bfloat16"]
    for t in tokens:
        batches = [make_batch(gpu, shape, t, rng) for _ in range(shapes.ROUTINGS)]
        active = float(np.mean([batch.routing.active.size for batch in batches]))
        used = shapes.weight_sets(shape, active, l2, weights.pool.shape[0])
        turns = shapes.rotation(used)
        contenders: dict[str, Contender] = {}
        worst: dict[str, float] = {}
        for name, forced in (("sm12x", None), *((v.key, v.key) for v in variants)):
            gpu.fill(batches[0].out, 0xFF)
            call(gpu, batches[0], weights.one_set(gpu, 0), weights, workspace, forced)
            worst[name] = worst_ratio(gpu, shape, batches[0], weights)
            calls = [
                deferred(gpu, batches[r], weights.one_set(gpu, s), weights, workspace, forced)
                for r, s in turns
            ]
            contenders[name] = capture(gpu, calls)
        notes: dict[str, str] = {}
        if peers:
            from .peers import peer_contenders

            found, notes = peer_contenders(gpu, shape, batches, weights, turns)
            contenders.update(found)
        times = interleave(gpu, contenders, rounds)
        selected = times["sm12x"].median_us
        bytes_ = shapes.call_bytes(shape, t, active)
        floor = bytes_ / copy_gb_per_s / 1e3
        yield {
            "model": shape.model,
            "gemm": shape.gemm,
            "T": t,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "K": shape.k,
            "N": shape.n,
            "active": active,
            "weight_sets": used,
            "bytes": round(bytes_),
            "sm12x_us": round(selected, 2),
            "best_variant": min((v.key for v in variants), key=lambda key: times[key].median_us),
            "gb_per_s": round(bytes_ / selected / 1e3, 1),
            "tflop_per_s": round(2e-6 * t * shape.top_k * shape.n * shape.k / selected, 2),
            "floor": "counted",
            "floor_us": round(floor, 2),
            "percent_of_floor": round(100 * floor / selected, 1),
            "worst_error_ratio": max(worst.values()),
            "times": {name: timing.as_json() for name, timing in times.items()},
            "notes": notes,
            "passed": all(ratio <= 1.0 for ratio in worst.values()),
            "date": time.strftime("%Y-%m-%d"),
        }

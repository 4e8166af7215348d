"""Expert layers for compute-sanitizer: every kernel of either GEMM in small layers, routing of either size,
quantising by itself. No framework, every array its own exact allocation, the workspace too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from forced import Forced
from layer_forced import downs, kernels, ups, wholes
from numpy.typing import NDArray

import sm12x
from sm12x.ops.activation import activation
from sm12x.ops.moe_workspace import Layout
from sm12x.ops.route import Routing
from sm12x.reference import moe_checks
from sm12x.reference.quantize import quantize_fp8_numpy
from sm12x.validation.cases import random_e4m3_bits
from sm12x.validation.device import Gpu

E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
FP8 = "float8_e4m3fn"
EXPERTS, HIDDEN, INNER = 4, 144, 80
KINDS = {
    True: ("silu", "swigluoai", "gelu", "swigluoai_uninterleave", "gelu_tanh"),
    False: ("relu2", "silu", "gelu"),
}
Case = tuple[str, float]  # what ran, and the error over its bound


class Stages:
    """What a layer left in its workspace, as NumPy arrays."""

    def __init__(self, content: NDArray[np.uint8], at: Layout, rows: int) -> None:
        self.content, self.at, self.rows = content, at, rows

    def part(self, name: str, dtype: Any, *shape: int) -> NDArray[Any]:
        kind = np.dtype(dtype)
        start = getattr(self.at, name)
        size = int(np.prod(shape)) * kind.itemsize
        return self.content[start : start + size].view(kind).reshape(shape)


def layer_case(
    gpu: Gpu,
    up: Forced | None,
    down: Forced | None,
    gated: bool,
    static: bool,
    dtype: Any,
    tile: int,
    rng: np.random.Generator,
    whole: bool | None = None,
) -> float:
    """One layer with every argument given: rows at the tile's edges, an expert without any, invalid
    routes. `whole`: as one launch, twice."""
    kind = np.dtype(dtype)
    name = KINDS[gated][int(rng.integers(len(KINDS[gated])))]
    how = activation(name, gated)
    rows = np.array([1, 0, tile + 1, 7])
    ids = rng.permutation(np.r_[np.repeat(np.arange(EXPERTS), rows), -1, EXPERTS, -1])
    ids = np.append(ids, np.full(-ids.size % 2, -1)).reshape(-1, 2).astype(np.int32)
    tokens, count = ids.shape[0], int(rows.sum())
    n1 = 2 * INNER if gated else INNER
    x = rng.standard_normal((tokens, HIDDEN)).astype(kind)
    w1 = random_e4m3_bits((EXPERTS, n1, HIDDEN), rng)
    w2 = random_e4m3_bits((EXPERTS, HIDDEN, INNER), rng)
    scales = [
        (rng.uniform(0.5, 1.5, (EXPERTS, n)) * k**-0.5 / 104).astype(np.float32)
        for n, k in ((n1, HIDDEN), (HIDDEN, INNER))
    ]
    weights = rng.uniform(0.1, 1.0, ids.shape).astype(np.float32)
    biases = [rng.standard_normal((EXPERTS, n)).astype(np.float32) for n in (n1, HIDDEN)]
    a2 = np.array([0.01], np.float32)
    options: dict[str, Any] = {
        "w1_scale": gpu.upload(scales[0]),
        "w2_scale": gpu.upload(scales[1]),
        "bias1": gpu.upload(biases[0]),
        "bias2": gpu.upload(biases[1].astype(BF16)),
        "a2_scale": gpu.upload(a2) if static else None,
    }
    held = gpu.upload(w1, FP8), gpu.upload(w2, FP8)
    given = gpu.upload(x), gpu.upload(weights), gpu.upload(ids)
    out = gpu.empty(x.shape, "bfloat16" if kind == BF16 else kind.name)
    with kernels(up, down, whole) as made:
        layer = sm12x.FusedMoE(*held, activation=name, gated=gated, **options)
        workspace = gpu.empty((layer.workspace_size(tokens, 2, out.dtype),), "uint8")
        for _ in range(2 if whole else 1):
            layer(*given, out=out, workspace=workspace, stream=gpu.stream)
    at, choice = made.layouts[-1], made.choices[-1]
    stages = Stages(gpu.download(workspace), at, count)
    result = gpu.download(out)

    routing = sm12x.route(ids, EXPERTS, topk_weights=weights)
    most = ids.size
    first, second = w1.view(E4M3), w2.view(E4M3)
    if whole:
        row_of_route = routing.route_row.reshape(-1)
        order = np.argsort(row_of_route, kind="stable")[most - count :]  # the route of each row
        h, y = (stages.part(name, kind, most, n)[order] for name, n in (("h", INNER), ("y", HIDDEN)))
        more = {"w1_scale": scales[0], "bias1": biases[0]}
        ratio = moe_checks.check_gemm1_stage(h, *quantize_fp8_numpy(x), first, routing, how, **more)
        more = {"w2_scale": scales[1], "bias2": biases[1].astype(BF16)}
        other = moe_checks.check_gemm2_stage(y, *quantize_fp8_numpy(h), second, routing, **more)
        return float("inf") if moe_checks.check_combine(result, y, routing) else max(ratio, other)
    found = Routing(
        stages.part("offsets", np.int32, EXPERTS + 1),
        stages.part("row_index", np.int32, most),
        stages.part("route_row", np.int32, tokens, 2),
        stages.part("row_weight", np.float32, most),
    )
    wrong = sum(int((a != b).sum()) for a, b in zip(found, routing, strict=True))
    q1, s1 = stages.part("q1", E4M3, tokens, HIDDEN), stages.part("s1", np.float32, tokens, 1)
    checked = moe_checks.check_quantised(x, q1, s1)
    wrong += checked.wrong_scales + checked.unequal_codes + checked.wrong_codes
    more = {"w1_scale": scales[0], "bias1": biases[0]}
    if static:
        q2 = stages.part("h", E4M3, most, INNER)[:count]
        s2: Any = a2
        ratio = moe_checks.check_gemm1_stage(q2, q1, s1, first, routing, how, a2_scale=float(a2[0]), **more)
    else:
        h = stages.part("h", kind, most, INNER)[:count]
        ratio = moe_checks.check_gemm1_stage(h, q1, s1, first, routing, how, **more)
        q2, s2 = quantize_fp8_numpy(h)
        if choice.quantises_apart:
            q2, s2 = (
                stages.part("q2", E4M3, most, INNER)[:count],
                stages.part("s2", np.float32, most, 1)[:count],
            )
            checked = moe_checks.check_quantised(h, q2, s2)
            wrong += checked.wrong_scales + checked.unequal_codes
    y = stages.part("y", kind, most, HIDDEN)[:count]
    other = moe_checks.check_gemm2_stage(
        y, q2, s2, second, routing, w2_scale=scales[1], bias2=biases[1].astype(BF16)
    )
    wrong += moe_checks.check_combine(result, y, routing)
    return float("inf") if wrong else max(ratio, other)


def route_case(gpu: Gpu, routes: int, rng: np.random.Generator) -> float:
    """`sm12x.route` by itself, as the launches of a layer: with 8193 routes two CTAs count and place."""
    tokens = -(-routes // 3)
    ids = rng.integers(-1, 40, (tokens, 3))  # of 64 bits
    weights = rng.random(ids.shape, np.float32)
    x = rng.standard_normal((tokens, 16)).astype(BF16)
    w1, w2 = random_e4m3_bits((40, 32, 16), rng), random_e4m3_bits((40, 16, 16), rng)
    out = gpu.empty(x.shape, "bfloat16")
    layer = sm12x.FusedMoE(gpu.upload(w1, FP8), gpu.upload(w2, FP8), w1_scale=0.01, w2_scale=0.01)
    with kernels(whole=False) as made:
        workspace = gpu.empty((layer.workspace_size(tokens, 3),), "uint8")
        layer(
            gpu.upload(x),
            gpu.upload(weights),
            gpu.upload(ids),
            out=out,
            workspace=workspace,
            stream=gpu.stream,
        )
    stages = Stages(gpu.download(workspace), made.layouts[-1], 0)
    right = sm12x.route(ids, 40, topk_weights=weights)
    found = (
        stages.part("offsets", np.int32, 41),
        stages.part("row_index", np.int32, ids.size),
        stages.part("route_row", np.int32, *ids.shape),
        stages.part("row_weight", np.float32, ids.size),
    )
    same = all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))
    return 0.0 if same else float("inf")


def quantise_case(gpu: Gpu, mode: str, rng: np.random.Generator) -> float:
    """`sm12x.quantize_fp8` by itself."""
    x = rng.standard_normal((37, 272)).astype(np.float16)
    q, scale = gpu.empty(x.shape, FP8), gpu.empty((37, 1) if mode == "per_token" else (1,), "float32")
    given: dict[str, Any] = {"out_scale": scale, "per_token": mode == "per_token"}
    if mode == "static":
        scale = gpu.upload(np.array([0.03], np.float32))
        given = {"scale": scale}
    sm12x.quantize_fp8(gpu.upload(x), out=q, stream=gpu.stream, **given)
    checked = moe_checks.check_quantised(x, gpu.download(q), gpu.download(scale), static=mode == "static")
    return 0.0 if checked.passed and not checked.unequal_codes else float("inf")


def layer_cases(gpu: Gpu, quick: bool, only: str | None, rng: np.random.Generator) -> Iterator[Case]:
    """Every kernel. Quick: kernels of tiles of at most 16 tokens split, the others whole."""
    arch = gpu.device.arch
    forced = [(each, None) for gated in (True, False) for each in ups(arch, gated)]
    pairs: list[tuple[Forced | None, Forced | None]] = [
        *forced,
        *((None, each) for each in downs(arch, False)),
    ]
    for number, (up, down) in enumerate(pairs):
        each = up or down
        assert each is not None
        if only not in (None, each.variant.key) or (quick and each.split != (each.tile <= 16)):
            continue
        gated = each.variant.gated if up else number % 3 > 0
        static = rng.random() < 0.5 and (down is None or down.variant.role == "gemm")
        kind = (BF16, np.float16)[int(rng.integers(2))]
        words = f"{'gated ' * gated}{'static ' * static}{np.dtype(kind).name}"
        yield f"layer {each.argument} {words}", layer_case(gpu, up, down, gated, static, kind, each.tile, rng)
    for gated, variant in wholes(arch).items():
        for kind in (BF16, np.float16):
            if only in (None, variant.key):
                words = f"{variant.key} {np.dtype(kind).name}"
                yield f"layer {words}", layer_case(gpu, None, None, gated, False, kind, 8, rng, whole=True)
    if only is None:
        for routes in (5, 8193):
            yield f"route of {routes}", route_case(gpu, routes, rng)
        for mode in ("per_token", "per_tensor", "static"):
            yield f"quantise {mode}", quantise_case(gpu, mode, rng)

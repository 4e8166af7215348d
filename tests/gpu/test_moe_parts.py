"""`sm12x.route` and `sm12x.quantize_fp8` by themselves: bit for bit what the rules give."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

import layer_reference as reference  # noqa: E402
from layer_problem import ROUTES_PER_CTA, route_on_host  # noqa: E402
from packed_problem import guarded  # noqa: E402
from torch_reference import DEVICE, DTYPES, E4M3_NAN  # noqa: E402

import sm12x  # noqa: E402

ON_EMULATOR = DEVICE == "cpu"
FP8 = torch.float8_e4m3fn


def check_route(
    ids: np.ndarray[Any, Any],
    experts: int,
    expert_map: np.ndarray[Any, Any] | None,
    wide: bool,
    weighted: bool,
) -> None:
    tokens, top_k = ids.shape
    local, order = route_on_host(ids, experts, expert_map)
    counts = np.bincount(local[order], minlength=experts)
    weights = torch.rand((tokens, top_k), device=DEVICE)
    kind = torch.int64 if wide else torch.int32
    given = guarded(torch.as_tensor(ids, device=DEVICE).to(kind), 0)
    mapped = None
    if expert_map is not None:
        mapped = guarded(torch.as_tensor(expert_map, device=DEVICE), 0)
    found = sm12x.route(
        given, experts, topk_weights=guarded(weights, torch.nan) if weighted else None, expert_map=mapped
    )
    row = np.full(ids.size, -1)
    row[order] = np.arange(order.size)
    tail = np.full(ids.size - order.size, -1)
    expected = {
        "offsets": np.concatenate([[0], np.cumsum(counts)]),
        "row_index": np.concatenate([order // top_k, tail]),
        "route_row": row.reshape(tokens, top_k),
    }
    for name, values in expected.items():
        array = getattr(found, name)
        assert array.dtype == torch.int32
        assert array.shape == values.shape
        assert np.array_equal(array.cpu().numpy(), values), f"{name}: {tokens} tokens, {experts} experts"
    if not weighted:
        assert found.row_weight is None
        return
    ordered = torch.zeros(ids.size, device=DEVICE)
    ordered[: order.size] = weights.reshape(-1)[torch.as_tensor(order, device=DEVICE)]
    assert torch.equal(found.row_weight, ordered)


@pytest.mark.parametrize("experts", [1, 2, 8, 31, 33, 128, 129, 256, 1000, 1024])
def test_routes_are_sorted_and_stay_in_order(experts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = (0, 1, 5) if ON_EMULATOR else (0, 1, 2, 5, 31, 64, 257, 1000)
    for index, (count, top_k) in enumerate(itertools.product(tokens, (1, 2, 8, 11))):
        mapped = index % 3 == 1
        expert_map = None
        if mapped:
            expert_map = np.full(2 * experts + 3, -1, np.int32)
            expert_map[rng.permutation(expert_map.size)[:experts]] = rng.permutation(experts)
            expert_map[int(rng.integers(expert_map.size))] = experts  # past this device's
        everywhere = experts if expert_map is None else expert_map.size
        ids = rng.integers(-2, everywhere + 2, (count, top_k))
        wide = index % 2 == 0
        if wide and ids.size:
            ids.flat[0] += 2**32
        check_route(ids, experts, expert_map, wide, index % 4 != 3)


@pytest.mark.parametrize(
    ("tokens", "top_k"),
    [
        (ROUTES_PER_CTA, 1),
        (ROUTES_PER_CTA + 1, 1),
        (3 * ROUTES_PER_CTA // 8 + 3, 8),
        (65_536, 1),
        (65_536, 10),
    ],
)
def test_many_routes(tokens: int, top_k: int, seed: int) -> None:
    """One CTA's, one route more, many CTAs; spread over many experts and all to one."""
    if ON_EMULATOR and tokens > 10_000:
        pytest.skip("would take the emulator long")
    rng = np.random.default_rng(seed)
    for experts in (3, 1024):
        check_route(rng.integers(-1, experts, (tokens, top_k)), experts, None, experts == 3, True)
    check_route(np.full((tokens, top_k), 5), 7, None, True, False)


def rows_of(seed: int, tokens: int, k: int, dtype: str, pad: int) -> Any:
    """Rows of all magnitudes, some zero, some below the floor, ties of e4m3 among them, between NaNs."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    values = torch.randn((tokens, k), generator=generator, device=DEVICE)
    values *= torch.exp2(torch.randint(-20, 12, (tokens, 1), generator=generator, device=DEVICE).float())
    if tokens > 3:
        values[1] = 0
        halves = torch.randint(1, 2 * 448, (k,), generator=generator, device=DEVICE) / 2
        halves[0] = 448.0  # a scale of 1: ties as they stand
        values[2] = halves
    wide = torch.full((tokens + 4, k + pad), torch.nan, dtype=DTYPES[dtype], device=DEVICE)
    inner = wide[2 : 2 + tokens, :k]
    inner.copy_(values.clamp(-6e4, 6e4))
    return inner


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("how", ["per_token", "per_tensor", "static float", "static array"])
def test_codes_and_scales_are_those_of_the_rule(how: str, dtype: str, seed: int) -> None:
    sizes = (
        ((0, 32), (5, 16), (9, 704))
        if ON_EMULATOR
        else ((0, 32), (5, 16), (64, 2816), (1000, 704), (7, 14336))
    )
    for index, (tokens, k) in enumerate(sizes):
        x = rows_of(seed + index, tokens, k, dtype, 8 * (index % 3))
        given = {}
        value = torch.tensor([0.037], device=DEVICE)
        if how.startswith("static"):
            given["scale"] = float(value[0]) if how == "static float" else guarded(value, torch.nan)
        else:
            given["per_token"] = how == "per_token"
        codes = torch.full((tokens + 4, k + 16), E4M3_NAN - 1, dtype=torch.uint8, device=DEVICE)
        inner = codes[2 : 2 + tokens, :k]
        q, scale = sm12x.quantize_fp8(x, **given, out=inner)
        assert q is inner
        made, its_scale = sm12x.quantize_fp8(x, **given)
        assert made.dtype == FP8
        assert torch.equal(made.view(torch.uint8), q)
        values = x.float()
        if how == "per_token":
            expected = reference.dynamic_scale(values)
            assert scale.shape == (tokens, 1)
        elif how == "per_tensor":
            expected = (
                reference.dynamic_scale(values.reshape(1, -1))
                if tokens
                else torch.zeros((1, 1), device=DEVICE)
            )
            if not tokens:
                expected = reference.dynamic_scale(torch.zeros((1, 1), device=DEVICE))
            assert scale.shape == (1,)
        else:
            expected = value
        assert torch.equal(scale.reshape(-1), expected.reshape(-1))
        assert torch.equal(its_scale, scale)
        far, unequal = reference.wrong_codes(values, q, expected)
        assert (int(far), int(unequal)) == (0, 0), f"{tokens} x {k}"
        codes[2 : 2 + tokens, :k] = E4M3_NAN - 1
        assert (codes == E4M3_NAN - 1).all(), "written outside of out"


def test_what_is_not_finite(seed: int) -> None:
    """NaN stays and does not enter a scale; an infinity makes the scale infinite, its row zeros and NaN."""
    x = rows_of(seed, 6, 96, "bfloat16", 0)
    x[3, 5] = torch.nan
    x[4, 7] = -torch.inf
    x[5] = torch.nan
    q, scale = sm12x.quantize_fp8(x)
    assert torch.equal(scale, reference.dynamic_scale(x.float()))
    assert scale[5] == scale.new_tensor(1 / 512) / scale.new_tensor([448.0])
    far, unequal = reference.wrong_codes(x.float(), q.view(torch.uint8), scale)
    assert (int(far), int(unequal)) == (0, 0)
    bits = q.view(torch.uint8)
    assert bits[3, 5] & 0x7F == 0x7F
    assert bits[4, 7] & 0x7F == 0x7F
    assert (bits[4, :7] & 0x7F == 0).all()


def test_every_bfloat16_by_scales_of_all_magnitudes(seed: int) -> None:
    """True division: all values of 16 bits over scales that do not divide evenly."""
    bits = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16)
    rng = np.random.default_rng(seed)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).view(64, 1024)
        for exponent in (0,) if ON_EMULATOR else (-30, -12, -8, -3, 0, 5, 20):
            scale = float(np.float32(rng.uniform(1, 2) * 2.0**exponent))
            q, _ = sm12x.quantize_fp8(x, scale=scale)
            divisor = torch.tensor([scale], device=DEVICE)
            far, unequal = reference.wrong_codes(x.float(), q.view(torch.uint8), divisor)
            assert (int(far), int(unequal)) == (0, 0), f"{dtype} / {scale}"


def test_parts_make_the_layer(seed: int) -> None:
    """quantize_fp8, route and grouped_gemm with row_index and row_weight, an activation between: the layer to
    within the rounding that fusion removes."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    tokens, top_k, experts, hidden, inner = 6, 2, 4, 96, 80

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=DEVICE)

    x = random(tokens, hidden).bfloat16()
    w1 = (random(experts, 2 * inner, hidden) * 32).clamp(-448, 448).to(FP8)
    w2 = (random(experts, hidden, inner) * 32).clamp(-448, 448).to(FP8)
    s1, s2 = (torch.rand(each, device=DEVICE) * 0.005 for each in ((experts, 2 * inner), (experts, hidden)))
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator, device=DEVICE, dtype=torch.int32)
    weights = torch.rand((tokens, top_k), generator=generator, device=DEVICE) + 0.1
    routing = sm12x.route(ids, experts, topk_weights=weights)
    q1, a1 = sm12x.quantize_fp8(x)
    rows = {"offsets": routing.offsets}
    pre = sm12x.grouped_gemm(
        q1, w1, a_scale=a1, b_scale=s1, row_index=routing.row_index, out_dtype="float32", **rows
    )
    h = (torch.nn.functional.silu(pre[:, :inner]) * pre[:, inner:]).bfloat16()
    q2, a2 = sm12x.quantize_fp8(h)
    y = sm12x.grouped_gemm(q2, w2, a_scale=a2, b_scale=s2, row_weight=routing.row_weight, **rows)
    expected = reference.combine(y.float(), routing.route_row)
    found = sm12x.fused_moe(x, w1, w2, weights, ids, w1_scale=s1, w2_scale=s2)
    error = (found.float() - expected).norm(dim=1)
    assert (error <= 2e-2 * expected.norm(dim=1)).all()

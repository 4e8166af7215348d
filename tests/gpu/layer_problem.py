"""An expert layer and its tokens on the device, NaN wherever a kernel has no business.

NaN lies before, behind and between rows of x, w1 and w2, in all of an expert that no route goes to (weights,
scales and bias), in tokens without a valid route, in the weights of invalid routes, around scales, biases and
out. Ids, expert_map and workspace lie between, or hold, what would lead there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from layer_strata import Spec, draw_ids, draw_map
from numpy.typing import NDArray
from packed_problem import GuardedOut, guarded
from torch_reference import DEVICE, DTYPES, E4M3_NAN, GUARD_ROWS, in_poison, random_e4m3

import sm12x
from sm12x import abi, driver
from sm12x.ops import emulated, moe_workspace
from sm12x.ops.activation import Activation, activation
from sm12x.ops.moe_chain import most_partials


@dataclass
class Scale:
    """A scale as the caller passes it, and in float64 for each expert: (E, N) or (E, 1)."""

    argument: Any
    factor: torch.Tensor


@dataclass
class LayerProblem:
    spec: Spec
    activation: Activation
    x: torch.Tensor  # (T, H)
    w1: torch.Tensor  # (E, N1, H) float8_e4m3fn
    w2: torch.Tensor  # (E, H, I) float8_e4m3fn
    bits1: torch.Tensor  # of w1, contiguous
    bits2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    arguments: dict[str, Any]  # the layer's other arguments
    factor1: torch.Tensor
    factor2: torch.Tensor
    bias1: torch.Tensor | None  # float64
    bias2: torch.Tensor | None
    a1: torch.Tensor | None  # (1,) float32
    a2: torch.Tensor | None
    rows: NDArray[np.int64]  # of each expert
    expert_of_row: torch.Tensor
    token_of_row: torch.Tensor
    offsets: torch.Tensor
    row_index: torch.Tensor
    route_row: torch.Tensor
    row_weight: torch.Tensor

    @property
    def total_rows(self) -> int:
        return int(self.rows.sum())

    def call(self, out: torch.Tensor | None, workspace: torch.Tensor | None) -> torch.Tensor:
        """Through the public functions, as the spec says."""
        given: dict[str, Any] = {"out": out, "workspace": workspace}
        if self.spec.plan:
            layer = sm12x.FusedMoE(self.w1, self.w2, **self.arguments)
            result: torch.Tensor = layer(self.x, self.topk_weights, self.topk_ids, **given)
            return result
        return sm12x.fused_moe(
            self.x, self.w1, self.w2, self.topk_weights, self.topk_ids, **self.arguments, **given
        )

    def workspace_bytes(self) -> int:
        """Enough for every choice of kernels."""
        spec = self.spec
        rows, tokens = spec.tokens * spec.top_k, spec.tokens
        parts = [
            *(tokens * spec.hidden, 4 * tokens, 4 * (spec.experts + 1), *(4 * rows,) * 5),
            *(4 * moe_workspace.route_ctas(rows) * spec.experts, 3 * rows * spec.intermediate),
            *(2 * rows * spec.hidden, most_partials(device_of_layers())),
        ]
        return sum(parts) + 16 * 256

    def guarded_out(self) -> GuardedOut:
        return GuardedOut((self.spec.tokens,), self.spec.hidden, self.spec.dtype, row_pad=self.spec.out_pad)

    def quantised_x(self) -> torch.Tensor:
        """(T, H) float32: x, or x times its weight, as it is quantised."""
        if not self.spec.weight_on_input:
            return self.x.float()
        return (self.x.float() * self.topk_weights.to(self.x.dtype).float()).to(self.x.dtype).float()


def device_of_layers() -> driver.Device:
    """Where layers run: the GPU, or the emulated one."""
    return emulated.device() if DEVICE == "cpu" else driver.get_device(torch.cuda.current_device())


# -------------------------------------------------------------------------------------------------
# Making one
# -------------------------------------------------------------------------------------------------


def route_on_host(
    ids: NDArray[np.int64], experts: int, expert_map: NDArray[np.int32] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The expert of each route (T * k,), -1 for none, and the routes that have rows, sorted by expert."""
    flat = ids.reshape(-1)
    if expert_map is not None:
        inside = (flat >= 0) & (flat < expert_map.size)
        flat = np.where(inside, expert_map[np.where(inside, flat, 0)], -1)
    local = np.where((flat >= 0) & (flat < experts), flat, -1).astype(np.int64)
    order = np.argsort(np.where(local < 0, experts, local), kind="stable")[: int((local >= 0).sum())]
    return local, order


def make_layer(spec: Spec, ids: NDArray[np.int64] | None = None) -> LayerProblem:
    """`ids` (T, k): instead of random ones."""
    rng = np.random.default_rng([spec.seed, 1])
    generator = torch.Generator(device=DEVICE).manual_seed(spec.seed % 2**63)
    ids = draw_ids(spec, rng) if ids is None else ids
    expert_map = draw_map(spec, rng)
    local, order = route_on_host(ids, spec.experts, expert_map)
    rows = np.bincount(local[order], minlength=spec.experts).astype(np.int64)
    how = activation(spec.activation, spec.gated, spec.alpha, spec.beta, spec.limit)
    n1 = spec.intermediate * (2 if spec.gated else 1)
    idle = torch.as_tensor(rows == 0, device=DEVICE)

    bits1, scale1 = _weights(spec, n1, spec.hidden, spec.w1_scale, 0, idle, rng, generator)
    bits2, scale2 = _weights(spec, spec.hidden, spec.intermediate, spec.w2_scale, 1, idle, rng, generator)
    bias1, wide1 = _bias(spec.bias1, spec.experts, n1, idle, generator)
    bias2, wide2 = _bias(spec.bias2, spec.experts, spec.hidden, idle, generator)
    a1, given1 = _static(spec.static1, 0.02, rng)
    a2, given2 = _static(spec.static2, 0.01, rng)
    # Positive ones, as routers give them: rows of the same expert would cancel with others.
    weights = rng.uniform(0.05, 1.5, local.size).astype(np.float32)
    weights[rng.random(local.size) < 0.03] = 0.0
    weights[local < 0] = np.nan
    row_of_route = np.full(local.size, -1, np.int64)
    row_of_route[order] = np.arange(order.size)
    tail = local.size - order.size

    def device(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, device=DEVICE).to(dtype)

    token_of_row = order // spec.top_k
    shape = spec.tokens, spec.top_k
    options: dict[str, Any] = {
        **{"w1_scale": scale1.argument, "w2_scale": scale2.argument, "a1_scale": given1, "a2_scale": given2},
        **{"activation": spec.activation, "gated": spec.gated, "bias1": bias1, "bias2": bias2},
        **{"alpha": spec.alpha, "beta": spec.beta, "limit": spec.limit},
        "apply_router_weight_on_input": spec.weight_on_input,
        "expert_map": None if expert_map is None else guarded(device(expert_map, torch.int32), 0),
    }
    return LayerProblem(
        spec=spec,
        activation=how,
        x=_tokens(
            spec, device(np.bincount(token_of_row, minlength=spec.tokens) > 0, torch.bool), rng, generator
        ),
        w1=_in_nan_rows(bits1, spec.pads[3], spec.pads[1]),
        w2=_in_nan_rows(bits2, spec.pads[3], spec.pads[2]),
        bits1=bits1,
        bits2=bits2,
        topk_weights=guarded(device(weights.reshape(shape), torch.float32), float("nan")),
        topk_ids=guarded(device(ids, torch.int64 if spec.wide_ids else torch.int32), 0),
        arguments=options,
        factor1=scale1.factor,
        factor2=scale2.factor,
        bias1=wide1,
        bias2=wide2,
        a1=a1,
        a2=a2,
        rows=rows,
        expert_of_row=device(local[order], torch.int64),
        token_of_row=device(token_of_row, torch.int64),
        offsets=device(np.concatenate([[0], np.cumsum(rows)]), torch.int32),
        row_index=device(np.concatenate([token_of_row, np.full(tail, -1)]), torch.int32),
        route_row=device(row_of_route.reshape(shape), torch.int32),
        row_weight=device(np.concatenate([weights[order], np.zeros(tail, np.float32)]), torch.float32),
    )


def _tokens(
    spec: Spec, used: torch.Tensor, rng: np.random.Generator, generator: torch.Generator
) -> torch.Tensor:
    """Rows of all magnitudes, some zero, some below the scale's floor; half of the unused ones are NaN."""
    values = torch.randn((spec.tokens, spec.hidden), generator=generator, device=DEVICE)
    size = np.exp2(rng.integers(-4, 4, spec.tokens).astype(np.float32))
    kind = rng.random(spec.tokens)
    size[kind < 0.03] = 0.0
    size[kind > 0.97] *= 2.0**-16
    values *= torch.as_tensor(size, device=DEVICE)[:, None]
    bad = torch.as_tensor(rng.random(spec.tokens) < 0.5, device=DEVICE) & ~used
    values[bad] = float("nan")
    wide = torch.full(
        (spec.tokens + 2 * GUARD_ROWS, spec.hidden + spec.pads[0]),
        float("nan"),
        dtype=DTYPES[spec.dtype],
        device=DEVICE,
    )
    inner = wide[GUARD_ROWS : GUARD_ROWS + spec.tokens, : spec.hidden]
    inner.copy_(values)
    return inner


def _in_nan_rows(bits: torch.Tensor, rows: int, pad: int) -> torch.Tensor:
    experts, n, k = bits.shape
    buffer = torch.full((experts, n + rows, k), E4M3_NAN, dtype=torch.uint8, device=DEVICE)
    buffer[:, :n] = bits
    return in_poison(buffer, pad).view(torch.float8_e4m3fn)[:, :n]


def _weights(
    spec: Spec,
    n: int,
    k: int,
    mode: str,
    which: int,
    idle: torch.Tensor,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Scale]:
    """Codes (E, n, k) and their scale, so that products with values around 1 are around 1."""
    shape = spec.experts, n, k
    form = spec.form >> 4 * which
    if mode != "none" and form % 2:
        bits, size = random_e4m3(shape, generator, DEVICE), 104.0  # root of the mean square
    else:
        size = 64.0 if mode != "none" else k**-0.5
        values = torch.randn(shape, generator=generator, device=DEVICE) * size
        bits = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    bits[idle] = E4M3_NAN
    if mode == "none":
        return bits, Scale(None, torch.ones((spec.experts, 1), dtype=torch.float64, device=DEVICE))
    entries = {"value": (1,), "expert": (spec.experts,), "channel": (spec.experts, n)}[mode]
    drawn = rng.uniform(0.5, 1.5, entries) * rng.choice([-1.0, 1.0], entries) * k**-0.5 / size
    scale = torch.as_tensor(drawn.astype(np.float32), device=DEVICE)
    if mode == "value":
        number = float(scale[0])
        factor = torch.full((spec.experts, 1), number, dtype=torch.float64, device=DEVICE)
        return bits, Scale(number if form // 2 % 2 else guarded(scale, float("nan")), factor)
    scale[idle] = float("nan")
    argument = guarded(scale, float("nan"))
    if mode == "channel" and form // 2 % 4 == 3:  # rows of it further apart
        wide = torch.full((spec.experts, n + 4), float("nan"), device=DEVICE)
        wide[:, :n] = scale
        argument = wide[:, :n]
    if form // 8 % 2:
        argument = argument[..., None]
    return bits, Scale(argument, scale.double().view(spec.experts, -1))


def _bias(
    dtype: str | None, experts: int, n: int, idle: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As it is passed, and in float64."""
    if dtype is None:
        return None, None
    values = (torch.randn((experts, n), generator=generator, device=DEVICE) * 0.5).to(DTYPES[dtype])
    values[idle] = float("nan")
    return guarded(values, float("nan")), values.double()


def _static(
    how: str | None, about: float, rng: np.random.Generator
) -> tuple[torch.Tensor | None, torch.Tensor | float | None]:
    """(1,) float32, and as it is passed."""
    if how is None:
        return None, None
    value = torch.tensor([about * float(rng.uniform(0.5, 2.0))], dtype=torch.float32, device=DEVICE)
    return value, float(value[0]) if how == "float" else guarded(value, float("nan"))


# Routes that one CTA sorts.
ROUTES_PER_CTA = abi.SM12X_ROUTES_PER_CTA

"""Operands of one routed batch of an expert layer, our calls on them, and what some tokens have to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import layer_reference as reference
import numpy as np
import torch
from torch_reference import DEVICE

import sm12x
from sm12x.ops.activation import activation
from sm12x.validation import shapes
from sm12x.validation.shapes import MOE_GEMMS, MoeGemm, Routing

FP8 = torch.float8_e4m3fn
CHECKED_TOKENS = 4
LIMIT = 2e-2  # relative Frobenius error of a token
# The same for the peer, which rounds to bfloat16 before the activation and adds in fewer bits than FP32 has.
PEER_LIMIT = 6e-2
MMA_COLUMNS = 8  # tokens that one MMA computes, used or not

Call = Callable[[], object]


@dataclass(frozen=True)
class MoeLayer:
    """The expert layer of a model: its two GEMMs."""

    first: MoeGemm
    second: MoeGemm

    @property
    def model(self) -> str:
        return self.first.model

    @property
    def experts(self) -> int:
        return self.first.experts

    @property
    def top_k(self) -> int:
        return self.first.top_k

    @property
    def hidden(self) -> int:
        return self.first.k

    @property
    def intermediate(self) -> int:
        return self.second.k


LAYERS = tuple(MoeLayer(*MOE_GEMMS[i : i + 2]) for i in range(0, len(MOE_GEMMS), 2))


@dataclass
class Weights:
    """Sets of weights that calls take in turns, (sets, E, N, K), and the scales of all sets."""

    w1: torch.Tensor
    w2: torch.Tensor
    s1: torch.Tensor  # (E, 2I) float32
    s2: torch.Tensor  # (E, H)

    def first(self, sets: int) -> Weights:
        return Weights(self.w1[:sets], self.w2[:sets], self.s1, self.s2)

    @property
    def sets(self) -> int:
        return self.w1.shape[0]


def random_fp8(shape: tuple[int, ...]) -> torch.Tensor:
    """Normally distributed values over most of e4m3's range."""
    out = torch.empty(shape, dtype=FP8, device=DEVICE)
    for part in out.view(-1).split(1 << 26):
        part.copy_((torch.randn(part.numel(), device=DEVICE, dtype=torch.bfloat16) * 64).to(FP8))
    return out


def make_weights(layer: MoeLayer, sets: int) -> Weights:
    """Scaled so that values around 1 give values around 1."""

    def scale(n: int, k: int) -> torch.Tensor:
        return (torch.rand((layer.experts, n), device=DEVICE) + 0.5) * (k**-0.5 / 64)

    first, second = layer.first, layer.second
    return Weights(
        random_fp8((sets, layer.experts, first.n, first.k)),
        random_fp8((sets, layer.experts, second.n, second.k)),
        scale(first.n, first.k),
        scale(second.n, second.k),
    )


@dataclass
class LayerBatch:
    """T tokens and their routes; what we and the peer write."""

    routing: Routing
    x: torch.Tensor  # (T, H) bfloat16
    topk_weights: torch.Tensor  # (T, k) float32
    topk_ids: torch.Tensor  # (T, k) int32
    out: torch.Tensor
    peer_out: torch.Tensor

    @property
    def mma_columns(self) -> int:
        """Token columns that MMAs have to compute for each output feature."""
        rows = np.diff(self.routing.offsets)
        return int((-(-rows // MMA_COLUMNS) * MMA_COLUMNS).sum())


def make_batch(layer: MoeLayer, tokens: int, rng: np.random.Generator) -> LayerBatch:
    """Each token goes to top_k different experts, all equally likely, with weights that add up to 1."""
    routing = shapes.make_routing(layer.first, tokens, rng)
    weights = torch.rand((tokens, layer.top_k), device=DEVICE) + 0.1
    x = torch.randn((tokens, layer.hidden), device=DEVICE, dtype=torch.bfloat16)
    return LayerBatch(
        routing=routing,
        x=x,
        topk_weights=(weights / weights.sum(1, keepdim=True)).contiguous(),
        topk_ids=torch.as_tensor(routing.expert_ids, dtype=torch.int32, device=DEVICE),
        out=torch.empty_like(x),
        peer_out=torch.empty_like(x),
    )


def plans(weights: Weights, *, early_routes: bool = False) -> list[Any]:
    """A `FusedMoE` for each set of weights. In a batch's graph nothing writes routes or weights: what
    early_routes promises is so."""
    scales = {"w1_scale": weights.s1, "w2_scale": weights.s2}
    return [
        sm12x.FusedMoE(weights.w1[i], weights.w2[i], **scales, early_routes=early_routes)
        for i in range(weights.sets)
    ]


def our_calls(
    batches: Sequence[LayerBatch],
    layers: Sequence[Any],
    workspaces: Sequence[torch.Tensor],
    stream: int | None,
) -> list[Call]:
    """One call for each turn of the rotation; batch r uses workspaces[r]."""

    def one(r: int, s: int) -> Call:
        batch, layer = batches[r], layers[s]
        return lambda: layer(
            batch.x,
            batch.topk_weights,
            batch.topk_ids,
            out=batch.out,
            workspace=workspaces[r],
            stream=stream,
        )

    return [one(r, s) for r, s in shapes.rotation(len(layers))]


def expected(batch: LayerBatch, weights: Weights, index: int) -> torch.Tensor:
    """Float64 results of the first tokens of a batch with set `index` of the weights, quantised where the
    layer is: (min(T, CHECKED_TOKENS), H)."""
    how = activation("silu")
    tokens = min(batch.x.shape[0], CHECKED_TOKENS)
    total = torch.zeros((tokens, batch.x.shape[1]), dtype=torch.float64, device=DEVICE)
    x = batch.x[:tokens].float()
    scale = reference.dynamic_scale(x)
    q = reference.values_of(reference.codes_of(x, scale)) * scale.double()
    ids, routed = batch.topk_ids.tolist(), batch.topk_weights.double()
    for t in range(tokens):
        for j, expert in enumerate(ids[t]):
            w1 = (
                reference.values_of(weights.w1[index, expert].view(torch.uint8)) * weights.s1[expert, :, None]
            )
            h = reference.activate(*reference.split((w1 @ q[t])[None], how), how).bfloat16().float()
            row_scale = reference.dynamic_scale(h)
            row = reference.values_of(reference.codes_of(h, row_scale)) * row_scale.double()
            w2 = (
                reference.values_of(weights.w2[index, expert].view(torch.uint8)) * weights.s2[expert, :, None]
            )
            total[t] += (w2 @ row[0]) * routed[t, j]
    return total


def check(out: torch.Tensor, right: torch.Tensor, name: str, limit: float = LIMIT) -> None:
    """Raises ArithmeticError where a token of `out` is further from `right` than `limit`. A time of wrong
    results means nothing."""
    mine = out[: right.shape[0]].double()
    errors = reference.token_errors(mine, right.double(), right.double().norm(dim=1))
    largest = float(errors.max())
    if not largest <= limit:
        raise ArithmeticError(f"{name}: wrong result, relative error {largest:.3g} of a token")

"""Operands of one routed batch, our calls on them, and the float64 results that every contender is held
to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch_reference import as_float64, error_ratio

import sm12x
from sm12x.validation import shapes
from sm12x.validation.shapes import MoeGemm, Routing

FP8 = torch.float8_e4m3fn
CHECKED_EXPERTS, CHECKED_ROWS = 8, 64
MMA_COLUMNS = 8  # tokens that one MMA computes, used or not

Call = Callable[[], object]


@dataclass
class Batch:
    """Everything that a call of one routing needs, for each contender. GEMM1 has one row for each token,
    which top_k experts read; GEMM2 one for each token and expert."""

    routing: Routing
    offsets: torch.Tensor  # (E + 1,) int32
    tokens: torch.Tensor  # activations where the model has them: (T, K) for GEMM1, (T * top_k, K) for GEMM2
    token_scale: torch.Tensor
    row_index: torch.Tensor  # (T * top_k,) int32: the row of `tokens` of each row sorted by expert
    rows: torch.Tensor  # tokens[row_index]
    row_scale: torch.Tensor
    out: torch.Tensor
    peer_out: torch.Tensor

    @property
    def order(self) -> np.ndarray[Any, Any]:
        """Which (token, choice) each row sorted by expert is."""
        return np.argsort(self.routing.expert_ids.reshape(-1), kind="stable")

    @property
    def mma_columns(self) -> int:
        """Token columns that MMAs have to compute for each output feature."""
        rows = np.diff(self.routing.offsets)
        return int((-(-rows // MMA_COLUMNS) * MMA_COLUMNS).sum())


def random_fp8(shape: tuple[int, ...]) -> torch.Tensor:
    """Normally distributed values over most of e4m3's range, as quantised weights and activations have."""
    out = torch.empty(shape, dtype=FP8, device="cuda")
    for part in out.view(-1).split(1 << 26):
        part.copy_((torch.randn(part.numel(), device="cuda", dtype=torch.bfloat16) * 64).to(FP8))
    return out


def make_batch(shape: MoeGemm, tokens: int, rng: np.random.Generator) -> Batch:
    """T tokens, each to top_k experts, all equally likely."""
    routing = shapes.make_routing(shape, tokens, rng)
    rows = tokens * shape.top_k
    order = np.argsort(routing.expert_ids.reshape(-1), kind="stable")
    first = shape.gemm == "GEMM1"
    source = random_fp8((tokens if first else rows, shape.k))
    scale = torch.rand(source.shape[0], device="cuda") * 1e-3
    index = torch.as_tensor(order // shape.top_k if first else order, device="cuda")
    return Batch(
        routing=routing,
        offsets=torch.as_tensor(routing.offsets, dtype=torch.int32, device="cuda"),
        tokens=source,
        token_scale=scale,
        row_index=index.to(torch.int32),
        rows=source.view(torch.uint8)[index].view(FP8),
        row_scale=scale[index].contiguous(),
        out=torch.empty((rows, shape.n), dtype=torch.bfloat16, device="cuda"),
        peer_out=torch.empty((rows, shape.n), dtype=torch.bfloat16, device="cuda"),
    )


def our_calls(
    batches: list[Batch],
    weights: torch.Tensor,
    b_scale: torch.Tensor,
    workspace: torch.Tensor,
    stream: int,
    variant: str | None,
    gather: bool,
    early: bool = False,
) -> list[Call]:
    """One call for each turn of the rotation; weights (sets, E, N, K). `gather`: rows where the tokens
    lie; `early`: early_weights.
    """

    def one(batch: Batch, b: torch.Tensor) -> Call:
        rows: dict[str, Any] = {"a": batch.rows, "a_scale": batch.row_scale}
        if gather:
            rows = {"a": batch.tokens, "a_scale": batch.token_scale, "row_index": batch.row_index}
        return lambda: sm12x.grouped_gemm(
            b=b,
            b_scale=b_scale,
            offsets=batch.offsets,
            out=batch.out,
            workspace=workspace,
            stream=stream,
            variant=variant,
            early_weights=early,
            **rows,
        )

    return [one(batches[r], weights[s]) for r, s in shapes.rotation(weights.shape[0])]


@dataclass(frozen=True)
class Expected:
    """Float64 results of some rows of a batch: of up to eight experts, the first and the last ones."""

    k: int
    rows: list[torch.Tensor]
    references: list[torch.Tensor]
    magnitudes: list[torch.Tensor]

    def check(self, out: torch.Tensor, name: str) -> None:
        """Raises ArithmeticError where `out` is not within DESIGN's bound. A time of wrong results means
        nothing."""
        torch.cuda.synchronize()
        for rows, reference, magnitude in zip(self.rows, self.references, self.magnitudes, strict=True):
            ratio = float(error_ratio(out[rows], reference, magnitude, self.k, "bfloat16"))
            if not ratio <= 1.0:
                raise ArithmeticError(f"{name}: wrong result, error {ratio:.3g} of its bound")


def expected(batch: Batch, b: torch.Tensor, b_scale: torch.Tensor) -> Expected:
    """Of a batch and one set of weights (E, N, K)."""
    found = Expected(b.shape[2], [], [], [])
    for expert in batch.routing.active[:CHECKED_EXPERTS].tolist():
        first, last = batch.routing.offsets[expert : expert + 2].tolist()
        chosen = np.unique(
            np.r_[first : min(last, first + CHECKED_ROWS // 2), max(first, last - CHECKED_ROWS // 2) : last]
        )
        rows = torch.as_tensor(chosen, device="cuda")
        left, right = as_float64(batch.rows.view(torch.uint8)[rows]), as_float64(b[expert]).T
        factor = batch.row_scale[rows].double()[:, None] * b_scale[expert].double()[None, :]
        found.rows.append(rows)
        found.references.append((left @ right) * factor)
        found.magnitudes.append((left.abs() @ right.abs()) * factor)
    return found

"""Grouped GEMMs of mixture-of-experts models: shapes, routings, and the bytes that a call cannot avoid
moving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOKENS = (1, 8, 32, 128)
ROUTINGS = 4
COLD = 3  # operands are rotated so that this many times the L2 is read before anything is read again


@dataclass(frozen=True)
class MoeGemm:
    """One expert projection: (experts, n, k) weights, top_k experts for each token."""

    model: str
    gemm: str
    experts: int
    top_k: int
    k: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.gemm}"

    @property
    def expert_bytes(self) -> int:
        """FP8 weights of one expert."""
        return self.n * self.k


MOE_GEMMS = (
    MoeGemm("gemma-4-26B-A4B", "GEMM1", 128, 8, 2816, 1408),
    MoeGemm("gemma-4-26B-A4B", "GEMM2", 128, 8, 704, 2816),
    MoeGemm("qwen3-30B-A3B", "GEMM1", 128, 8, 2048, 1536),
    MoeGemm("qwen3-30B-A3B", "GEMM2", 128, 8, 768, 2048),
    MoeGemm("mixtral-8x7B", "GEMM1", 8, 2, 4096, 28672),
    MoeGemm("mixtral-8x7B", "GEMM2", 8, 2, 14336, 4096),
)


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens of one batch went to. Rows of a packed call lie in the order of
    `expert_of_row`.
    """

    expert_ids: NDArray[np.int64]  # (T, top_k)
    offsets: NDArray[np.int64]  # (experts + 1,)

    @property
    def active(self) -> NDArray[np.int64]:
        """Experts that have rows."""
        return np.flatnonzero(np.diff(self.offsets))


def make_routing(shape: MoeGemm, tokens: int, rng: np.random.Generator) -> Routing:
    """Each token goes to `top_k` different experts, all equally likely."""
    scores = rng.random((tokens, shape.experts))
    expert_ids = np.argsort(scores, axis=1)[:, : shape.top_k].astype(np.int64)
    counts = np.bincount(expert_ids.reshape(-1), minlength=shape.experts)
    offsets = np.zeros(shape.experts + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return Routing(expert_ids, offsets)


def call_bytes(shape: MoeGemm, tokens: int, active: float) -> float:
    """Bytes of a call: the weights of `active` experts once, activations in, bfloat16 output out."""
    rows = tokens * shape.top_k
    return active * shape.expert_bytes + rows * shape.k + 2 * rows * shape.n


def weight_sets(shape: MoeGemm, active: float, l2_bytes: int, most: int = 16) -> int:
    """Copies of the weights to rotate through, so that COLD times the L2 is read before a byte is read
    again.
    """
    return min(most, max(1, -(-COLD * l2_bytes // int(max(1.0, active * shape.expert_bytes)))))


def rotation(sets: int, least_calls: int = 16) -> list[tuple[int, int]]:
    """(routing, weight set) of each call of a graph: the set changes at every call."""
    once = [(routing, each) for routing in range(ROUTINGS) for each in range(sets)]
    return once * -(-least_calls // len(once))

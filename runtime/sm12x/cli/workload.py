"""The demo's workload: an expert layer out of a checkpoint, and tokens that its own router sends there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sm12x import reference
from sm12x.checkpoint import FP8_DYNAMIC, MoELayer, load_moe_layer, make_checkpoint, softmax_top_k
from sm12x.cli.progress import counting, progress
from sm12x.errors import CheckpointError

# Sizes of gemma-4-26B-A4B, with half of its experts; and smaller ones, for a result within seconds.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2816, 704, 64, 8
EMULATED_HIDDEN, EMULATED_INTERMEDIATE, EMULATED_EXPERTS = 256, 128, 16

TOLERANCE = 2e-2
"""Largest relative Frobenius error of a token. The layer quantises what the first GEMM gives, and a last bit
before that is an e4m3 step behind it: elements of two right results differ by more than their rounding."""


@dataclass(frozen=True)
class Workload:
    """A layer and the operands of one call, in host memory."""

    layer: MoELayer
    x: NDArray[Any]  # (T, H) bfloat16
    topk_weights: NDArray[np.float32]  # (T, k)
    topk_ids: NDArray[np.int32]  # (T, k)

    @property
    def counts(self) -> NDArray[np.intp]:
        """Routes to each expert, (E,)."""
        return np.bincount(self.topk_ids.reshape(-1), minlength=self.layer.num_experts)

    @property
    def shape(self) -> dict[str, int]:
        return {
            "T": self.x.shape[0],
            "E": self.layer.num_experts,
            "top_k": self.layer.top_k,
            "H": self.layer.hidden_size,
            "I": self.layer.intermediate_size,
        }

    def expert_bytes(self) -> int:
        """Bytes of one expert's weights and scales."""
        layer = self.layer
        parts = layer.w1, layer.w2, layer.w1_scale, layer.w2_scale
        return int(sum(part.nbytes for part in parts)) // layer.num_experts

    def least_bytes(self) -> int:
        """Bytes any kernel must move: experts that tokens go to once, x, ids and weights, the result."""
        routing = self.topk_weights.nbytes + self.topk_ids.nbytes
        return int(np.count_nonzero(self.counts)) * self.expert_bytes() + 2 * self.x.nbytes + routing


def least_bytes(counts: NDArray[np.int32], n: int, k: int, out_bytes: int) -> int:
    """Bytes any kernel of a grouped GEMM must move for `counts` rows per expert: weights with rows,
    activations and scales (per token and per channel) once, the output in elements of `out_bytes`."""
    rows, active = int(counts.sum()), int(np.count_nonzero(counts))
    return active * n * (k + 4) + rows * (k + 4) + rows * n * out_bytes


def make(folder: Path, experts: int, seed: int, *, emulated: bool) -> None:
    """Write a checkpoint of one layer as gemma-4-26B-A4B's FP8-Dynamic ones are, in two files; `emulated`: of
    a size for the emulator."""
    make_checkpoint(
        folder,
        model="gemma4",
        scheme=FP8_DYNAMIC,
        num_experts=experts,
        top_k=min(TOP_K, experts),
        hidden_size=EMULATED_HIDDEN if emulated else HIDDEN,
        intermediate_size=EMULATED_INTERMEDIATE if emulated else INTERMEDIATE,
        files=min(2, experts),
        seed=seed,
    )


def build(folder: Path, layer: int, tokens: int, seed: int, *, show_progress: bool) -> Workload:
    """The layer in host memory, and random bfloat16 tokens: same files and seed, same operands.

    In a model the router's input is not always that of the experts (Gemma normalises each on its own way);
    here both are the same. Raises what `load_moe_layer` raises, and CheckpointError where there is no router.
    """
    with counting("experts", enabled=show_progress) as show:
        told = None if show is None else lambda done, total: show("reading the layer", done)
        loaded = load_moe_layer(folder, layer, framework="numpy", on_expert=told)
    if loaded.router is None:
        raise CheckpointError(folder, None, f"a router's weight in layer {layer}", "none")
    rng = np.random.default_rng(seed)
    x = reference.random_bfloat16((tokens, loaded.hidden_size), rng)
    return Workload(loaded, x, *softmax_top_k(x, loaded.router, loaded.top_k))


def sample_tokens(workload: Workload, most: int, seed: int) -> list[int]:
    """At most `most` tokens: all, or the first, the last, and random others."""
    tokens = workload.x.shape[0]
    if tokens <= most:
        return list(range(tokens))
    others = np.random.default_rng(seed).permutation(np.arange(1, tokens - 1))[: most - 2]
    return sorted(int(token) for token in (0, tokens - 1, *others))


def check(
    workload: Workload, out: NDArray[Any], tokens: list[int], *, show_progress: bool
) -> tuple[float, float]:
    """(largest relative error of a token, that over TOLERANCE) of `out` (T, H) over `tokens`, against the
    layer in float64."""
    errors = [0.0]
    for token in progress(tokens, "checking against float64", len(tokens), enabled=show_progress):
        one = slice(token, token + 1)
        ref = reference.fused_moe_float64(
            workload.x[one],
            topk_weights=workload.topk_weights[one],
            topk_ids=workload.topk_ids[one],
            **workload.layer.arguments(),
        )
        errors.append(float(reference.token_errors(out[one], ref)[0]))
    return max(errors), max(errors) / TOLERANCE

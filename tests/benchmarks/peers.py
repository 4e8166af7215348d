"""The peers: torch's grouped GEMM and the fastest way to launch vLLM's Triton kernel, as contenders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm_triton
from moe_batch import Batch

import sm12x
from sm12x.validation import shapes
from sm12x.validation.device import Gpu
from sm12x.validation.shapes import MoeGemm
from sm12x.validation.timing import Contender, interleave

COMPARED_ROWS = 2048


def torch_graph(stream: Any, calls: list[Callable[[], object]]) -> Contender:
    """A graph captured by torch, which allocates its results in a pool of the graph's own."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()

    return Contender(replay, len(calls), calls)


def torch_calls(
    batches: list[Batch], weights: torch.Tensor, b_scale: torch.Tensor
) -> list[Callable[[], object]]:
    """torch._scaled_grouped_mm, one call for each turn of the rotation."""

    def one(batch: Batch, b: torch.Tensor) -> Callable[[], object]:
        ends = batch.offsets[1:].contiguous()
        return lambda: torch._scaled_grouped_mm(
            batch.rows,
            b.transpose(-2, -1),
            batch.row_scale,
            b_scale,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return [one(batches[r], weights[s]) for r, s in shapes.rotation(weights.shape[0])]


def fastest_triton(
    gpu: Gpu,
    stream: Any,
    kernel: Any,
    shape: MoeGemm,
    tokens: int,
    batches: list[Batch],
    weights: torch.Tensor,
    b_scale: torch.Tensor,
) -> tuple[Contender, str] | None:
    """The fastest of the configurations for this batch, and its name; None where none ran.

    Raises ArithmeticError where its results are not ours.
    """
    graphs: dict[str, Contender] = {}
    top_k = shape.top_k if shape.gemm == "GEMM1" else 1
    rows = tokens * shape.top_k
    for config in vllm_triton.configs(tokens, rows, shape.experts):
        blocks = [vllm_triton.make_blocks(batch.routing, shape.experts, config) for batch in batches]
        calls = [
            vllm_triton.make_call(
                *(kernel, shape, config, blocks[r], batches[r].tokens, weights[s]),
                *(batches[r].peer_out, batches[r].token_scale, b_scale, top_k),
            )
            for r, s in shapes.rotation(weights.shape[0])
        ]
        try:
            graphs[str(config)] = torch_graph(stream, calls)
        except Exception as error:  # this Triton cannot compile it, or it needs too much memory
            print(f"  Triton {config}: {str(error).splitlines()[0][:120]}", flush=True)
    if not graphs:
        return None
    times = interleave(gpu, graphs, 5)
    best = min(times, key=lambda name: times[name].median_us)
    _compare(batches[-1], weights, b_scale)
    return graphs[best], best


def _compare(batch: Batch, weights: torch.Tensor, b_scale: torch.Tensor) -> None:
    """Triton's last result, in the order of the tokens, against ours, sorted by expert."""
    torch.cuda.synchronize()
    last = weights[shapes.rotation(weights.shape[0])[-1][1]]
    mine = sm12x.grouped_gemm(
        batch.rows, last, a_scale=batch.row_scale, b_scale=b_scale, offsets=batch.offsets
    )
    theirs = batch.peer_out[torch.as_tensor(batch.order, device="cuda")]
    chosen = torch.randperm(mine.shape[0], device="cuda")[:COMPARED_ROWS]
    left, right = mine[chosen].double(), theirs[chosen].double()
    difference = float((left - right).norm() / left.norm())
    if not difference < 1e-2:
        raise ArithmeticError(f"Triton: differs from ours by {difference:.3g}: not the same problem")

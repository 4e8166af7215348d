"""The peer: an expert layer as vLLM's Triton path runs it, 7 launches, 6 where it skips alignment.

    quantise, align, fused_moe_kernel, silu_and_mul, quantise, fused_moe_kernel times the weights, sum

fused_moe_kernel is vLLM's own (vllm_triton.py). The small kernels stand in for vLLM's, one launch each, with
no more work than the layer needs: Triton's, and CUDA C through CuPy for the alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
import vllm_triton
from layer_batch import LayerBatch, MoeLayer, Weights
from torch_reference import DEVICE
from vllm_triton import Blocks, Config

from sm12x.validation import shapes

FP8 = torch.float8_e4m3fn
COLUMNS = 1024  # of a program of the kernels that work on parts of rows

_FINE = (
    Config(16, 128, 128, 4, swap_ab=True),
    Config(16, 128, 128, 3, swap_ab=True),
    Config(16, 64, 128, 4),
    Config(16, 128, 128, 4, swap_ab=True, naive=True),
)
_LARGE = (Config(16, 128, 256, 3, swap_ab=True), Config(16, 64, 128, 3))
_LARGE_MANY = (
    Config(32, 128, 128, 4, swap_ab=True),
    Config(32, 128, 128, 3, swap_ab=True),
    Config(64, 128, 128, 3),
)


def configs(layer: MoeLayer, tokens: int) -> list[Config]:
    """Those that won a row of a model with such experts and so many tokens, whole layers or single GEMMs. As
    in vLLM both GEMMs have one, and there is no alignment where each route may be a block of its own."""
    rows = tokens * layer.top_k
    large = _LARGE if tokens <= 16 else (*_LARGE[:1], *_LARGE_MANY)
    found = _FINE if layer.experts >= 64 else large
    naive = rows * 4 <= layer.experts
    return [config for config in found if naive or not config.naive]


@triton.jit
def quantise_rows(x, codes, scales, columns, BLOCK: tl.constexpr):
    """A row of bfloat16 to e4m3 with its own scale."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1.0 / 512.0) / 448.0
    tl.store(scales + row, scale)
    tl.store(codes + row * columns + at, (values / scale).to(tl.float8e4nv), mask=inside)


@triton.jit
def silu_and_mul(gate_up, h, columns, BLOCK: tl.constexpr):
    """Part of a row of [gate; up]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(gate_up + 2 * row * columns + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * columns + at, (gate / (1.0 + tl.exp(-gate)) * up).to(tl.bfloat16), mask=inside)


@triton.jit
def sum_routes(rows, out, columns, ROUTES: tl.constexpr, BLOCK: tl.constexpr):
    """Part of a token's row: the sum over its routes."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(ROUTES):
        part = tl.load(rows + (token * ROUTES + j) * columns + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    tl.store(out + token * columns + at, total.to(tl.bfloat16), mask=inside)


ALIGN = r"""
// Routes by expert, each expert's padded to whole blocks: one block of threads does it all.
extern "C" __global__ void align_routes(const int* ids, int routes, int experts, int block, int capacity,
                                        int* row_ids, int* expert_of_block, int* padded) {
  __shared__ int count[1024], first[1025], placed[1024];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = placed[e] = 0;
  for (int i = threadIdx.x; i < capacity; i += blockDim.x) row_ids[i] = routes;
  __syncthreads();
  for (int i = threadIdx.x; i < routes; i += blockDim.x) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int at = 0;
    for (int e = 0; e < experts; ++e) {
      first[e] = at;
      at += (count[e] + block - 1) / block * block;
    }
    first[experts] = at;
    *padded = at;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    for (int b = first[e] / block; b < first[e + 1] / block; ++b) expert_of_block[b] = e;
  for (int i = threadIdx.x; i < routes; i += blockDim.x) {
    int e = ids[i];
    row_ids[first[e] + atomicAdd(&placed[e], 1)] = i;
  }
}
"""
_align: list[Any] = []  # compiled at first use


def align(batch: LayerBatch, experts: int, config: Config, blocks: Blocks) -> Callable[[], None]:
    """The launch that fills `blocks`."""
    import cupy

    if not _align:
        _align.append(cupy.RawKernel(ALIGN, "align_routes"))
    numbers = (batch.topk_ids.numel(), experts, config.m, blocks.capacity)
    assert blocks.row_ids is not None
    arguments = (
        batch.topk_ids.data_ptr(),
        *(cupy.int32(number) for number in numbers),
        *(each.data_ptr() for each in (blocks.row_ids, blocks.expert_of_block, blocks.padded_rows)),
    )

    def launch() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            _align[0]((1,), (1024,), arguments)

    return launch


@dataclass
class Buffers:
    """Between the launches."""

    codes: torch.Tensor
    scales: torch.Tensor
    gate_up: torch.Tensor
    h: torch.Tensor
    row_codes: torch.Tensor
    row_scales: torch.Tensor
    rows: torch.Tensor


def make_buffers(layer: MoeLayer, tokens: int) -> Buffers:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    routes, inner, hidden = tokens * layer.top_k, layer.intermediate, layer.hidden
    return Buffers(
        codes=empty(tokens, hidden, dtype=FP8),
        scales=empty(tokens, dtype=torch.float32),
        gate_up=empty(routes, 2 * inner),
        h=empty(routes, inner),
        row_codes=empty(routes, inner, dtype=FP8),
        row_scales=empty(routes, dtype=torch.float32),
        rows=empty(routes, hidden),
    )


def make_blocks(batch: LayerBatch, experts: int, config: Config) -> Blocks:
    routes = batch.topk_ids.numel()
    if config.naive:
        count = torch.tensor([routes * config.m], dtype=torch.int32, device=DEVICE)
        return Blocks(None, batch.topk_ids.view(-1), count, routes * config.m)
    capacity = routes + min(experts, routes) * (config.m - 1)
    capacity = -(-capacity // config.m) * config.m

    def empty(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=DEVICE)

    return Blocks(empty(capacity), empty(capacity // config.m), empty(1), capacity)


def layer_call(
    kernel: Any,
    layer: MoeLayer,
    config: Config,
    batch: LayerBatch,
    w1: Any,
    w2: Any,
    weights: Weights,
    held: Buffers,
) -> Callable[[], None]:
    """All launches of one layer."""
    tokens, inner, hidden = batch.x.shape[0], layer.intermediate, layer.hidden
    routes = tokens * layer.top_k
    blocks = make_blocks(batch, layer.experts, config)
    aligned = None if config.naive else align(batch, layer.experts, config, blocks)
    first = vllm_triton.make_call(
        *(kernel, layer.first, config, blocks, held.codes, w1, held.gate_up, held.scales, weights.s1),
        layer.top_k,
    )
    second = vllm_triton.make_call(
        *(kernel, layer.second, config, blocks, held.row_codes, w2, held.rows, held.row_scales, weights.s2),
        *(1, batch.topk_weights.view(-1)),
    )
    wide, narrow = triton.next_power_of_2(hidden), triton.next_power_of_2(inner)

    def call() -> None:
        quantise_rows[(tokens,)](batch.x, held.codes, held.scales, hidden, BLOCK=wide)
        if aligned is not None:
            aligned()
        first()
        silu_and_mul[(routes, triton.cdiv(inner, COLUMNS))](held.gate_up, held.h, inner, BLOCK=COLUMNS)
        quantise_rows[(routes,)](held.h, held.row_codes, held.row_scales, inner, BLOCK=narrow)
        second()
        sum_routes[(tokens, triton.cdiv(hidden, COLUMNS))](
            held.rows, batch.peer_out, hidden, ROUTES=layer.top_k, BLOCK=COLUMNS
        )

    return call


def peer_calls(
    kernel: Any, layer: MoeLayer, config: Config, batches: Sequence[LayerBatch], weights: Weights
) -> list[Callable[[], None]]:
    """One call for each turn of the rotation."""
    held = make_buffers(layer, batches[0].x.shape[0])
    return [
        layer_call(kernel, layer, config, batches[r], weights.w1[s], weights.w2[s], weights, held)
        for r, s in shapes.rotation(weights.sets)
    ]

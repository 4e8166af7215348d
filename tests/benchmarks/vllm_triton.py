"""The peer: vLLM's tuned Triton MoE kernel, taken out of its wheel into `.peer/triton_moe.py` (never
committed).

The configurations are those that won some row of an exhaustive sweep on an H200, or of our own runs since, by
tokens of the batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sm12x.validation.shapes import MoeGemm, Routing


@dataclass(frozen=True)
class Config:
    """One way to launch the kernel. `naive`: one block for each row, no sorting; for few tokens only."""

    m: int
    n: int
    k: int
    stages: int
    swap_ab: bool = False
    naive: bool = False
    warps: int = 4

    def __str__(self) -> str:
        words = " swap-AB" * self.swap_ab + " naive" * self.naive + " 8 warps" * (self.warps == 8)
        return f"{self.m}x{self.n}x{self.k} stages {self.stages}{words}"


_NARROW = Config(16, 128, 128, 4, swap_ab=True)
_NARROW_3 = Config(16, 128, 128, 3, swap_ab=True)
_WIDE = Config(64, 128, 128, 3)
_LARGE = (Config(128, 256, 128, 3, warps=8), Config(128, 256, 128, 4, warps=8))
# Winners of some row with so many tokens.
CONFIGS = {
    1: (
        _NARROW,
        Config(32, 128, 128, 4, swap_ab=True),
        Config(16, 64, 128, 3),
        Config(16, 64, 128, 4),
        Config(16, 64, 256, 3),
        Config(16, 128, 128, 4, swap_ab=True, naive=True),
        Config(16, 64, 128, 4, naive=True),
    ),
    8: (
        _NARROW,
        Config(16, 128, 128, 3),
        _NARROW_3,
        Config(16, 128, 256, 3, swap_ab=True),
        Config(32, 128, 128, 4, swap_ab=True),
    ),
    32: (_NARROW, _NARROW_3, Config(16, 128, 256, 3, swap_ab=True)),
    128: (_NARROW, _NARROW_3, Config(32, 128, 128, 3, swap_ab=True), _WIDE),
    512: (_WIDE, *_LARGE),
    2048: _LARGE,
}


def configs(tokens: int, rows: int, experts: int) -> list[Config]:
    """Candidates for a batch: the winners of the nearest numbers of tokens that were swept, below and above.
    Those without sorting only where vLLM itself uses them."""
    below = max((known for known in CONFIGS if known <= tokens), default=min(CONFIGS))
    above = min((known for known in CONFIGS if known >= tokens), default=max(CONFIGS))
    found = dict.fromkeys((*CONFIGS[below], *CONFIGS[above]))
    return [config for config in found if not config.naive or rows * 4 <= experts]


def load_kernel(folder: Path) -> Any | None:
    """fused_moe_kernel, or None where `folder` has no triton_moe.py or Triton is missing."""
    path = folder / "triton_moe.py"
    if not path.exists() or importlib.util.find_spec("triton") is None:
        return None
    spec = importlib.util.spec_from_file_location("triton_moe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


@dataclass(frozen=True)
class Blocks:
    """Rows sorted by expert and padded to blocks, as vLLM's alignment kernel leaves them."""

    row_ids: torch.Tensor | None
    expert_of_block: torch.Tensor
    padded_rows: torch.Tensor
    capacity: int


def make_blocks(routing: Routing, experts: int, config: Config) -> Blocks:
    flat = routing.expert_ids.reshape(-1)
    rows = flat.size
    if config.naive:
        count = torch.tensor([rows * config.m], dtype=torch.int32, device="cuda")
        return Blocks(None, torch.as_tensor(flat, dtype=torch.int32, device="cuda"), count, rows * config.m)
    capacity = rows + min(experts, rows) * (config.m - 1)
    capacity = -(-capacity // config.m) * config.m
    row_ids = np.full(capacity, rows, dtype=np.int32)
    expert_of_block = np.zeros(capacity // config.m, dtype=np.int32)
    position = 0
    for expert in routing.active:
        mine = np.flatnonzero(flat == expert)
        padded = -(-mine.size // config.m) * config.m
        row_ids[position : position + mine.size] = mine
        expert_of_block[position // config.m : (position + padded) // config.m] = expert
        position += padded
    return Blocks(
        torch.as_tensor(row_ids, device="cuda"),
        torch.as_tensor(expert_of_block, device="cuda"),
        torch.tensor([position], dtype=torch.int32, device="cuda"),
        capacity,
    )


def make_call(
    kernel: Any,
    shape: MoeGemm,
    config: Config,
    blocks: Blocks,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    top_k: int,
    topk_weights: torch.Tensor | None = None,
) -> Callable[[], None]:
    """One launch: a (rows / top_k, K), b (E, N, K), out (rows, N); a_scale per row of a, b_scale (E, N). Rows
    of out are multiplied by `topk_weights` (rows,) where they are given."""
    import triton
    import triton.language as tl

    rows = a.shape[0] * top_k
    padded = blocks.capacity
    if not config.naive and a.shape[0] < config.m:
        padded = min(padded, rows * config.m)
    grid = (triton.cdiv(padded, config.m) * triton.cdiv(shape.n, config.n),)
    positional = (
        a,
        b,
        out,
        None,
        a_scale,
        b_scale,
        topk_weights,
        blocks.row_ids,
        blocks.expert_of_block,
        blocks.padded_rows,
    )
    sizes = (shape.n, shape.k, padded, rows)
    strides = (a.stride(0), 1, b.stride(0), 1, b.stride(1), out.stride(0), 1)
    scale_strides = (a_scale.stride(0), 1, b_scale.stride(0), 0, 1, 0, 0)
    options = {
        "BLOCK_SIZE_M": config.m,
        "BLOCK_SIZE_N": config.n,
        "BLOCK_SIZE_K": config.k,
        "GROUP_SIZE_M": 16,
        "SPLIT_K": 1,
        "MUL_ROUTED_WEIGHT": topk_weights is not None,
        "top_k": top_k,
        "compute_type": tl.bfloat16,
        "use_fp8_w8a8": True,
        "use_int8_w8a8": False,
        "use_int8_w8a16": False,
        "per_channel_quant": True,
        "HAS_BIAS": False,
        "SWAP_AB": config.swap_ab,
        "USE_TD": False,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }

    def call() -> None:
        kernel[grid](*positional, *sizes, *strides, *scale_strides, 0, 0, config.naive, **options)

    return call

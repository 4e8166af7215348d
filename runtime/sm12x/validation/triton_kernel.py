"""A plain FP8 grouped GEMM in Triton, as a peer for timings. Imported only where Triton is installed."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def grouped(  # type: ignore[no-untyped-def]
    a, b, a_scale, b_scale, offsets, out,
    n, k,
    blocks_m, blocks_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of one group; programs past a group's rows return."""
    program = tl.program_id(0)
    group = program // (blocks_m * blocks_n)
    block_m = (program // blocks_n) % blocks_m
    block_n = program % blocks_n
    first = tl.load(offsets + group)
    rows = tl.load(offsets + group + 1) - first
    if block_m * BLOCK_M >= rows:
        return
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    f = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    reduction = tl.arange(0, BLOCK_K)
    a_at = a + (first + m).to(tl.int64)[:, None] * k + reduction[None, :]
    b_at = b + (group.to(tl.int64) * n + f)[None, :] * k + reduction[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, k, BLOCK_K):
        left = tl.load(a_at + done, mask=(m < rows)[:, None] & (reduction < k - done)[None, :], other=0.0)
        right = tl.load(b_at + done, mask=(f < n)[None, :] & (reduction < k - done)[:, None], other=0.0)
        total = tl.dot(left, right, acc=total)
    row_scale = tl.load(a_scale + first + m, mask=m < rows, other=0.0)
    column_scale = tl.load(b_scale + group * n + f, mask=f < n, other=0.0)
    result = (total * row_scale[:, None] * column_scale[None, :]).to(out.dtype.element_ty)
    out_at = out + (first + m).to(tl.int64)[:, None] * n + f[None, :]
    tl.store(out_at, result, mask=(m < rows)[:, None] & (f < n)[None, :])


Config = tuple[int, int, int, int]


def configs(most_rows: int) -> list[Config]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, stages) to try where no group has more than `most_rows` rows."""
    block_m = 16 if most_rows <= 32 else 64
    return [(block_m, 128, 128, 3), (block_m, 64, 128, 4), (16, 128, 128, 2)]


def launch(
    a: Any, b: Any, a_scale: Any, b_scale: Any, offsets: Any, out: Any, most_rows: int, config: Config
) -> None:
    """a (M, K), b (E, N, K), a_scale (M,), b_scale (E, N), offsets (E + 1,) int32, out (M, N)."""
    block_m, block_n, block_k, stages = config
    groups, n, k = b.shape
    blocks_m, blocks_n = -(-most_rows // block_m), -(-n // block_n)
    grouped[(groups * blocks_m * blocks_n,)](
        a, b, a_scale, b_scale, offsets, out, n, k, blocks_m, blocks_n,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=stages,
    )  # fmt: skip

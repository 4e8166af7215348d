"""No warp of the family fp8_packed hands a stage back to TMA before it has read its fragments.

A release that overtakes its own loads changes a result only where something holds those loads up: on an H200,
bursts of split-K stores by warps that had run ahead, in 1 to 5 % of calls. `tests/static/test_sass.py` looks
for such releases in the machine code.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_problem import GuardedOut, error_ratio, make_epilogue, make_problem  # noqa: E402
from torch_reference import GUARD_ROWS, Verdicts  # noqa: E402
from variants import FORCED, Forced, name  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import Scales, rows_per_group  # noqa: E402

REPEATS = 1000
# Rows of each group, groups, N and K. Of the last tile of features only 8 are there: most MMA warps have
# nothing to multiply in it and go on to their stores.
SHAPES = {"many_groups": ("uneven", 128, 136, 2816), "few_groups": ("empty_first", 33, 264, 704)}


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_fragments_are_read_before_their_stage_is_written_again(shape: str, each: Forced, seed: int) -> None:
    """1000 calls on one problem, nothing beside them, give the same bits."""
    rng = np.random.default_rng(seed)
    pattern, groups, n, k = SHAPES[shape]
    problem = make_problem(
        rows_per_group(pattern, groups, each.tile, rng), n, k, seed % 2**31, nan_groups=False
    )
    operands = problem.operands("contiguous")
    epilogue = make_epilogue(problem, operands, ("value", "value"), 0, rng, scales=Scales(None, None))
    workspace = torch.empty(sm12x.workspace_size(groups), dtype=torch.uint8, device="cuda")
    found = GuardedOut(operands.out_rows, n, "float32")

    def call() -> None:
        found.poison()
        sm12x.grouped_gemm(
            operands.a,
            problem.b,
            out=found.out,
            out_dtype="float32",
            workspace=workspace,
            variant=each.argument,
            **operands.arguments,
        )

    call()
    first = found.buffer.clone()
    verdicts = Verdicts()
    ratio = error_ratio(found.rows(operands.target), epilogue, problem, "float32")
    verdicts.add("first call", ratio, found.damaged(operands.target))
    verdicts.check(seed)
    # Read once, at the end: no call waits for the host.
    calls = torch.zeros((), dtype=torch.int64, device="cuda")
    anywhere = torch.zeros_like(first, dtype=torch.bool)
    for _ in range(REPEATS):
        call()
        changed = found.buffer != first
        calls += changed.any()
        anywhere |= changed
    if calls.item():
        rows, columns = (places.cpu().numpy() for places in anywhere.nonzero(as_tuple=True))
        rows -= GUARD_ROWS
        pytest.fail(
            f"{calls.item()} of {REPEATS} calls differ from the first: rows {rows.min()} to {rows.max()} of "
            f"{problem.total_rows}, columns {columns.min()} to {columns.max()} of {n} (test seed {seed})"
        )

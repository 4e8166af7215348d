"""The family fp8_packed is bit-identical from run to run, also while other work moves CTAs about on the
device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_problem import GuardedOut, error_ratio, make_epilogue, make_problem  # noqa: E402
from problem_strata import LAYOUTS, OUTS  # noqa: E402
from torch_reference import Verdicts  # noqa: E402
from variants import FORCED, Forced, name  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import rows_per_group  # noqa: E402

REPEATS = 1000
# Rows of each group, N and K, small enough to split into parts of a tile on any device, and large enough for
# waves.
SHAPES = {"few_tiles": ("uneven", 6, 264, 2816), "many_tiles": ("uneven", 48, 1408, 704)}


class OtherWork:
    """Kernels of many sizes on a stream of their own: whoever's CTAs run beside them end in another order."""

    def __init__(self, seed: int) -> None:
        self.stream = torch.cuda.Stream()
        self.rng = np.random.default_rng(seed)
        self.memory = torch.ones(1 << 24, device="cuda")
        self.matrix = torch.ones((1024, 1024), dtype=torch.bfloat16, device="cuda")

    def enqueue(self) -> None:
        with torch.cuda.stream(self.stream):
            if self.rng.random() < 0.5:
                self.memory[: int(self.rng.integers(1, 1 << 24))].mul_(1.0)
            else:
                size = 64 * int(self.rng.integers(1, 17))
                torch.mm(self.matrix[:size], self.matrix)


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_identical_from_run_to_run(shape: str, each: Forced, seed: int) -> None:
    """1000 repeats on uneven routing, half of them beside other work; a race between CTAs, or parts of a tile
    that are added as they come, would change some of them."""
    rng = np.random.default_rng(seed)
    pattern, groups, n, k = SHAPES[shape]
    index = FORCED.index(each) + list(SHAPES).index(shape)
    layout, out = LAYOUTS[index % 3], OUTS[index // 3 % 3]
    rows = rows_per_group(pattern, groups, each.tile, rng)
    problem = make_problem(rows, n, k, seed % 2**31, nan_groups=False)
    operands = problem.operands(layout)
    epilogue = make_epilogue(
        problem, operands, ("token", "channel"), index, rng, bias="float32", weighted=index % 2 == 0
    )
    workspace = torch.empty(sm12x.workspace_size(groups), dtype=torch.uint8, device="cuda")
    found = GuardedOut(operands.out_rows, n, out)
    arguments: dict[str, Any] = {**operands.arguments, **epilogue.arguments}

    def call() -> None:
        found.poison()
        sm12x.grouped_gemm(
            operands.a,
            problem.b,
            out=found.out,
            out_dtype=out,
            workspace=workspace,
            variant=each.argument,
            **arguments,
        )

    call()
    first = found.buffer.clone()
    verdicts = Verdicts()
    ratio = error_ratio(found.rows(operands.target), epilogue, problem, out)
    verdicts.add(f"first run, {layout} {out}", ratio, found.damaged(operands.target))
    verdicts.check(seed)
    other = OtherWork(seed)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for repeat in range(REPEATS):
        if repeat % 2:
            other.enqueue()
        call()
        differing += (found.buffer != first).any()
    other.stream.synchronize()
    assert differing.item() == 0, (
        f"{differing.item()} of {REPEATS} repeats differ from the first, {layout} {out} (test seed {seed})"
    )

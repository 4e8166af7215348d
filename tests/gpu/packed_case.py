"""One call of the family fp8_packed with a problem of packed_problem.py, and its check."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from packed_problem import GuardedOut, PackedProblem, error_ratio, make_epilogue
from torch_reference import DTYPES, Verdicts

import sm12x
from sm12x.validation.cases import Scales

_scratch: list[torch.Tensor] = []


def any_workspace() -> torch.Tensor:
    """A workspace for every problem, full of random bytes: what it held before must not matter."""
    if not _scratch:
        _scratch.append(torch.empty(sm12x.workspace_size(1024), dtype=torch.uint8, device="cuda"))
    return _scratch[0].random_()


def run_case(
    variant: str | None,
    problem: PackedProblem,
    layout: str,
    out: str,
    modes: tuple[str, str],
    index: int,
    rng: np.random.Generator,
    verdicts: Verdicts,
    label: str,
    *,
    bias: str | None = None,
    weighted: bool = False,
    scales: Scales | None = None,
) -> None:
    """``index`` rotates forms of scales, strides of out, and whose buffers are used."""
    operands = problem.operands(layout)
    epilogue = make_epilogue(
        problem, operands, modes, index, rng, bias=bias, weighted=weighted, scales=scales
    )
    arguments: dict[str, Any] = {**operands.arguments, **epilogue.arguments, "variant": variant}
    label = f"{layout} {out} {label} scales={modes} bias={bias} weighted={weighted} index={index}"
    if index % 5 == 4:
        made = sm12x.grouped_gemm(operands.a, problem.b, out_dtype=out, **arguments)
        assert made.shape == (*operands.out_rows, problem.n)
        assert made.dtype == DTYPES[out]
        values = made.reshape(-1, problem.n)[operands.target]
        verdicts.add(label, error_ratio(values, epilogue, problem, out))
        return
    guarded = GuardedOut(operands.out_rows, problem.n, out, row_pad=(0, 8, 56)[index % 3], gap=index % 2)
    sm12x.grouped_gemm(
        operands.a,
        problem.b,
        out=guarded.out,
        out_dtype=out,
        workspace=any_workspace() if index % 4 else None,
        **arguments,
    )
    ratio = error_ratio(guarded.rows(operands.target), epilogue, problem, out)
    verdicts.add(label, ratio, guarded.damaged(operands.target))

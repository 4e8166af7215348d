"""One small packed call with everything a test of streams, frameworks or bad input needs around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_reference import (
    PoisonedOut,
    Problem,
    Verdicts,
    error_ratio,
    make_problem,
    scaled_reference,
    scales_to_device,
)

import sm12x
from sm12x.validation.cases import Scales, make_scales, offsets_of


@dataclass
class PackedCall:
    """Arguments of a call on torch arrays, and the check of its result."""

    problem: Problem
    scales: Scales
    a_scale: torch.Tensor
    b_scale: torch.Tensor
    offsets: torch.Tensor
    seed: int

    def arguments(self, **changes: Any) -> dict[str, Any]:
        known: dict[str, Any] = {
            "a": self.problem.a,
            "b": self.problem.b,
            "a_scale": self.a_scale,
            "b_scale": self.b_scale,
            "offsets": self.offsets,
        }
        return {**known, **changes}

    def __call__(self, **changes: Any) -> Any:
        return sm12x.grouped_gemm(**self.arguments(**changes))

    def check(self, out: torch.Tensor, label: str, dtype: str = "bfloat16") -> None:
        verdicts = Verdicts()
        reference, magnitude = scaled_reference(self.problem, self.scales)
        verdicts.add(label, error_ratio(out, reference, magnitude, self.problem.k, dtype))
        verdicts.check(self.seed)

    def poisoned_out(self, dtype: str = "bfloat16") -> PoisonedOut:
        return PoisonedOut(self.problem.total_rows, self.problem.n, dtype, "cuda")


def make_call(
    seed: int, rows: NDArray[np.int64] | None = None, n: int = 264, k: int = 704, contiguous: bool = True
) -> PackedCall:
    """Per-token and per-channel scales; by default 12 groups, uneven, the first and the last of them
    empty.
    """
    rng = np.random.default_rng(seed)
    if rows is None:
        rows = np.array([0, 1, 40, 0, 130, 7, 64, 16, 3, 33, 2, 0], dtype=np.int64)
    problem = make_problem(rows, n, k, seed % 2**31)
    if contiguous:
        problem.a, problem.b = problem.a.clone(), problem.b.clone()
    scales = make_scales(("token", "channel"), problem.total_rows, problem.groups, n, 0, rng)
    a_scale, b_scale = scales_to_device(scales)
    assert isinstance(a_scale, torch.Tensor)
    assert isinstance(b_scale, torch.Tensor)
    offsets = torch.as_tensor(offsets_of(rows), dtype=torch.int32, device="cuda")
    return PackedCall(problem, scales, a_scale, b_scale, offsets, seed)

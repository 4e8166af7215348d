"""A layer with everything that a test of streams needs around it."""

from __future__ import annotations

from typing import Any

import torch
from forced import Forced
from layer_case import Layers, run_layer
from layer_forced import downs, kernels, ups
from layer_problem import LayerProblem, make_layer
from layer_strata import make_spec
from torch_reference import DEVICE
from variants import ARCH

import sm12x

SLEEP_CYCLES = 200_000_000  # about 0.1 s: far longer than a host call
UPS, DOWNS = ups(ARCH, True), downs(ARCH, False)


def up_with(down: Forced) -> Forced:
    """A kernel of the first GEMM for each of the second, so that all have their turn."""
    return UPS[DOWNS.index(down) % len(UPS)]


class Case:
    """A layer with everything that a call takes, and what it gave when nothing was beside it."""

    def __init__(self, seed: int, *, early_routes: bool = False, **changes: Any) -> None:
        known: dict[str, Any] = {
            **{"tokens": 24, "top_k": 3, "experts": 9, "hidden": 144, "intermediate": 176, "routing": "any"},
            **{"bias1": "float32", "bias2": "bfloat16", "seed": seed},
        }
        self.problem: LayerProblem = make_layer(make_spec(**{**known, **changes}))
        options = {**self.problem.arguments, "early_routes": early_routes}
        self.layer = sm12x.FusedMoE(self.problem.w1, self.problem.w2, **options)
        self.workspace = torch.empty(self.problem.workspace_bytes(), dtype=torch.uint8, device=DEVICE)
        self.out = torch.zeros_like(self.problem.x)

    def __call__(self, **changes: Any) -> Any:
        known = {"x": self.problem.x, "topk_weights": self.problem.topk_weights}
        known["topk_ids"] = self.problem.topk_ids
        return self.layer(**{**known, **changes})

    def expected(self, up: Forced | None = None, down: Forced | None = None) -> Any:
        """What the layer gives, checked stage by stage."""
        layers = Layers()
        layers.add(str(self.problem.spec), run_layer(self.problem, up, down))
        layers.check(self.problem.spec.seed)
        with kernels(up, down):
            return self.problem.call(None, None).clone()

    def tensors(self) -> list[Any]:
        problem = self.problem
        arrays = [problem.x, problem.topk_weights, problem.topk_ids, problem.w1, problem.w2]
        arrays += [each for each in problem.arguments.values() if isinstance(each, torch.Tensor)]
        return [each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for each in arrays]

    def take(self, other: Case) -> None:
        """Makes the arrays of this case hold what those of `other` hold, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


def same(found: Any, expected: Any) -> bool:
    return bool(torch.equal(found.view(torch.int16), expected.view(torch.int16)))

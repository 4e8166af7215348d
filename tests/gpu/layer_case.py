"""One call of an expert layer with everything checked: stages, result, guards."""

from __future__ import annotations

from typing import Any

import torch
from forced import Forced
from layer_forced import kernels
from layer_problem import LayerProblem
from layer_stages import LIMITS, check, read_stages
from layer_whole import check_whole, whole_kernel

_scratch: list[torch.Tensor] = []

Found = dict[str, torch.Tensor]


def scratch(size: int) -> torch.Tensor:
    """At least so many bytes of workspace, random ones: what it held before must not matter."""
    from torch_reference import DEVICE

    if not _scratch or _scratch[0].numel() < size:
        _scratch[:] = [torch.empty(size, dtype=torch.uint8, device=DEVICE)]
    return _scratch[0][:size].random_()


def run_layer(
    problem: LayerProblem,
    up: Forced | None = None,
    down: Forced | None = None,
    whole: bool | None = None,
) -> Found:
    """What LIMITS limits, on the device, of the launches behind each other with these kernels forced, and of
    one launch for all of the layer where there is a kernel that takes it: with `whole`, and for None where no
    kernel is forced. Where the spec wants no workspace there is a second call without one, which has to give
    the same bits."""
    zero = torch.zeros((), dtype=torch.int64, device=problem.x.device)
    found: Found = dict.fromkeys(LIMITS, zero)
    workspace = scratch(problem.workspace_bytes())
    out = problem.guarded_out()
    target = torch.arange(problem.spec.tokens, device=problem.x.device)
    with kernels(up, down, False) as made:
        returned = problem.call(out.out, workspace)
        assert returned is out.out
        found["outside"] = out.damaged(target)
        if problem.spec.tokens:
            stages = read_stages(problem, workspace, made.layouts[-1], made.choices[-1])
            found.update(check(problem, out.out, stages))
        if not problem.spec.workspace:
            again = problem.call(None, None)
            assert again.shape == out.out.shape
            assert again.dtype == out.out.dtype
            found["again"] = (again.view(torch.int16) != out.out.view(torch.int16)).sum()
    wanted = up is None and down is None if whole is None else whole
    if wanted and whole_kernel(problem.spec) is not None:
        more = check_whole(problem, workspace)
        found["whole"], found["outside"] = more["whole"], found["outside"] + more["outside"]
    return found


class Layers:
    """Outcomes of many layers, read back together."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Found]] = []
        self.checked = self.requantised = self.tokens = 0
        self.worst: dict[str, float] = dict.fromkeys(LIMITS, 0.0)
        self.failed: list[str] = []

    def add(self, name: str, found: Found, tokens: int = 0) -> None:
        self.waiting.append((name, found))
        self.tokens += tokens

    def run(self, name: str, problem: LayerProblem, **forced: Any) -> None:
        self.add(f"{name} {problem.spec}", run_layer(problem, **forced), problem.spec.tokens)

    def read(self) -> None:
        if not self.waiting:
            return
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(self.waiting[0][1].values())).device)
        names = (*LIMITS, "requantised")
        rows = torch.stack(
            [torch.stack([found.get(name, zero).double() for name in names]) for _, found in self.waiting]
        ).tolist()
        for (label, _), values in zip(self.waiting, rows, strict=True):
            self.checked += 1
            *measured, requantised = values
            self.requantised += int(requantised)
            wrong = []
            for name, value in zip(LIMITS, measured, strict=True):
                self.worst[name] = max(self.worst[name], value)
                if not value <= LIMITS[name]:
                    wrong.append(f"{name} {value:.4g} (limit {LIMITS[name]:g})")
            if wrong:
                self.failed.append(f"{label}: {', '.join(wrong)}")
        self.waiting.clear()

    def check(self, seed: int) -> None:
        """Fails with the first bad cases."""
        self.read()
        assert self.checked, "no case ran"
        worst = max(self.worst[name] for name, limit in LIMITS.items() if limit)
        print(f"{self.checked} cases, worst error {worst:.3f} of its bound")
        shown = "\n".join(self.failed[:8])
        assert not self.failed, (
            f"{len(self.failed)} of {self.checked} cases wrong (test seed {seed}):\n{shown}"
        )

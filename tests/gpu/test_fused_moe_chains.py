"""Chains of expert layers and torch kernels, each of which may begin before what is ahead has ended (PDL)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from forced import Forced  # noqa: E402
from layer_forced import kernels  # noqa: E402
from layer_graph import TorchGraph  # noqa: E402
from layer_on_stream import DOWNS, SLEEP_CYCLES, Case, same, up_with  # noqa: E402
from torch_reference import DEVICE  # noqa: E402

LINKS = 16  # layers of a chain

Link = Callable[[], object]


class Chain:
    """Layers that each need the one before, with kernels of torch between some of them. Two outputs take
    turns, so that a layer also writes what the layer before the last one's reader may still be reading; all
    share a workspace. What is in front of a layer writes its x, never its routes."""

    def __init__(self, seed: int, up: Forced | None, down: Forced | None, early: bool) -> None:
        sizes: dict[str, Any] = {
            "hidden": 144,
            "intermediate": 96,
            "tokens": 20,
            "routing": "any",
            "bias2": "float32",
        }
        sizes["early_routes"] = early
        self.cases = [
            Case(seed + i, static2=("float" if i == 2 and down is None else None), **sizes) for i in range(3)
        ]
        self.up, self.down = up, down
        x = self.cases[0].problem.x
        self.start = torch.randn(x.shape, device=DEVICE).to(x.dtype)
        self.outs = [torch.zeros_like(self.start) for _ in range(2)]
        self.held = torch.zeros_like(self.start)
        self.seen = torch.zeros((LINKS, *x.shape), dtype=x.dtype, device=DEVICE)
        self.workspace = torch.empty(
            max(case.workspace.numel() for case in self.cases), dtype=torch.uint8, device=DEVICE
        )

    def links(self) -> list[Link]:
        found: list[Link] = [lambda: self.held.copy_(self.start)]
        before = self.held
        for i in range(LINKS):
            out = self.outs[i % 2]
            found.append(self._layer(self.cases[i % 3], before, out))
            before = out
            if i % 3 == 2:
                found.append(self._norm(out))
                before = self.held
            if i % 4 == 3:
                found.append(self._keep(i, out))
        return found

    def _layer(self, case: Case, x: Any, out: Any) -> Link:
        return lambda: case(x=x, out=out, workspace=self.workspace)

    def _norm(self, out: Any) -> Link:
        def normalise() -> None:
            wide = out.float()
            size = wide.abs().amax(1, keepdim=True).clamp(min=1e-3)
            torch.add(self.start, (wide / size).to(out.dtype), out=self.held)

        return normalise

    def _keep(self, i: int, out: Any) -> Link:
        return lambda: self.seen[i].copy_(out)

    def reset(self) -> None:
        for each in (*self.outs, self.held, self.seen):
            each.zero_()

    def result(self) -> list[Any]:
        return [each.clone() for each in (self.seen, *self.outs, self.held)]


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("each", [None, *DOWNS], ids=lambda each: each.argument if each else "selected")
def test_chains_of_layers_and_torch_kernels(each: Forced | None, early: bool, seed: int) -> None:
    """Eager without a pause and replayed graphs give what the same links give with the device idle between
    any two: a kernel that reads, or writes, before what is ahead of it has ended would not."""
    up = None if each is None else up_with(each)
    with kernels(up, each):
        chain = Chain(seed, up, each, early)
        links = chain.links()
        chain.reset()
        for link in links:
            link()
            torch.cuda.synchronize()
        expected = chain.result()
        assert expected[0].abs().sum() > 0
        assert not any(part.isnan().any() for part in expected)
        chain.reset()
        torch.cuda._sleep(SLEEP_CYCLES // 20)  # so that the whole chain is queued before it runs
        for link in links:
            link()
        torch.cuda.synchronize()
        assert all(same(x, y) for x, y in zip(chain.result(), expected, strict=True)), "eager"
        graph = TorchGraph(lambda: [link() for link in links])
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(30):
        chain.reset()
        graph.replay()
        for x, y in zip(chain.result(), expected, strict=True):
            differing += (x.view(torch.int16) != y.view(torch.int16)).any()
    assert differing.item() == 0, "replays differ"

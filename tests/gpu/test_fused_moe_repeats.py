"""The expert layer is bit-identical from run to run, also while other work moves CTAs about on the device."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from forced import Forced  # noqa: E402
from layer_case import Layers, run_layer  # noqa: E402
from layer_forced import downs, kernels, ups  # noqa: E402
from layer_problem import make_layer  # noqa: E402
from layer_strata import make_spec  # noqa: E402
from test_fp8_packed_repeats import OtherWork  # noqa: E402
from torch_reference import DEVICE  # noqa: E402
from variants import ARCH  # noqa: E402

import sm12x  # noqa: E402

REPEATS = 1000
# Few routes to large experts, which split; many routes to small ones, for waves.
SHAPES = {
    "few": {"tokens": 5, "top_k": 3, "experts": 9, "hidden": 2816, "intermediate": 704},
    "many": {"tokens": 90, "top_k": 6, "experts": 70, "hidden": 272, "intermediate": 144},
}
DOWNS = downs(ARCH, False)
# Every kernel of either GEMM at least once.
PAIRS = list(zip(itertools.cycle([*ups(ARCH, True), *ups(ARCH, False)]), DOWNS, strict=False))


def pair_name(pair: tuple[Forced, Forced]) -> str:
    return "-".join(each.argument for each in pair)


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_identical_from_run_to_run(shape: str, pair: tuple[Forced, Forced], seed: int) -> None:
    """1000 repeats, half of them beside other work: a race between CTAs or launches, a maximum that is read
    too early, parts of a tile that are added as they come, would change some of them."""
    up, down = pair
    spec = make_spec(
        **{"seed": seed, "routing": "skewed", "gated": up.variant.gated, "bias1": "float32", **SHAPES[shape]}
    )
    problem = make_layer(spec)
    layers = Layers()
    layers.add(f"first run of {spec}", run_layer(problem, up, down))
    layers.check(seed)
    workspace = torch.empty(problem.workspace_bytes(), dtype=torch.uint8, device=DEVICE)
    found = problem.guarded_out()
    with kernels(up, down):
        layer = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments)
        given = problem.x, problem.topk_weights, problem.topk_ids
        layer(*given, out=found.out, workspace=workspace)
        first = found.buffer.clone()
        other = OtherWork(seed)
        differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for repeat in range(REPEATS):
            if repeat % 2:
                other.enqueue()
            found.poison()
            layer(*given, out=found.out, workspace=workspace)
            differing += (found.buffer != first).any()
        other.stream.synchronize()
    assert differing.item() == 0, f"{differing.item()} of {REPEATS} repeats differ from the first ({spec})"

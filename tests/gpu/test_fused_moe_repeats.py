"""The expert layer is bit-identical from run to run, also while other work moves CTAs about on the device."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from forced import Forced  # noqa: E402
from layer_case import Layers, run_layer  # noqa: E402
from layer_forced import chain_of_whole, downs, kernels, ups, wholes  # noqa: E402
from layer_problem import LayerProblem, make_layer  # noqa: E402
from layer_strata import make_spec  # noqa: E402
from layer_whole import nonzero_states  # noqa: E402
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
# One launch: a token, a few to large experts, all that it takes to many small ones.
WHOLE_SHAPES = {
    "one": {"tokens": 1, "top_k": 8, "experts": 64, "hidden": 2816, "intermediate": 704},
    "few": SHAPES["few"],
    "most": {"tokens": 64, "top_k": 8, "experts": 100, "hidden": 272, "intermediate": 144},
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
    differing = repeated(problem, seed, kernels(up, down))
    assert differing == 0, f"{differing} of {REPEATS} repeats differ from the first ({spec})"


@pytest.mark.parametrize("gated", list(wholes(ARCH)), ids=lambda gated: "gated" if gated else "plain")
@pytest.mark.parametrize("shape", WHOLE_SHAPES)
def test_one_launch_is_bit_identical_from_run_to_run(shape: str, gated: bool, seed: int) -> None:
    """The same of a layer that is one launch, which also is what the chain gives: CTAs that finish in another
    order, read what others have not written yet, or leave their state behind, would show."""
    known = {"routing": "skewed", "bias1": "float32", "bias2": "bfloat16", **WHOLE_SHAPES[shape]}
    spec = make_spec(seed=seed, gated=gated, **known)
    problem = make_layer(spec)
    layers = Layers()
    layers.add(f"first run of {spec}", run_layer(problem, *chain_of_whole(gated), whole=True))
    layers.check(seed)
    differing = repeated(problem, seed, kernels(whole=True))
    assert differing == 0, f"{differing} of {REPEATS} repeats differ from the first ({spec})"
    assert int(nonzero_states()) == 0


def repeated(problem: LayerProblem, seed: int, forced: AbstractContextManager[Any]) -> int:
    """How many of REPEATS calls with kernels `forced` gave other bits than the first, half of them beside
    other work."""
    workspace = torch.empty(problem.workspace_bytes(), dtype=torch.uint8, device=DEVICE)
    found = problem.guarded_out()
    with forced:
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
    return int(differing)

"""The expert layer as one launch: bit for bit the chain of launches with tiles of 8 tokens and K whole, which
other tests check stage by stage; NaN in all neighbouring memory; its state zero behind every call.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from forced import Forced  # noqa: E402
from layer_case import Layers, run_layer, scratch  # noqa: E402
from layer_forced import chain_of_whole, downs, kernels, ups, wholes  # noqa: E402
from layer_graph import TorchGraph  # noqa: E402
from layer_problem import LayerProblem, make_layer  # noqa: E402
from layer_strata import BIASES, DTYPES, KINDS, ROUTINGS, WEIGHT_SCALES, Spec, make_spec  # noqa: E402
from layer_whole import check_whole, nonzero_states, whole_kernel  # noqa: E402
from torch_reference import DEVICE  # noqa: E402
from variants import ARCH  # noqa: E402

import sm12x  # noqa: E402

ON_EMULATOR = DEVICE == "cpu"
WHOLES = wholes(ARCH)
# Of H and I: a block, one short of a tile and one past it, odd numbers of them, Gemma's and Qwen's.
SIZES = (16, 112, 144, 208, 704, 768)
SLEEP_CYCLES = 20_000_000

pytestmark = pytest.mark.skipif(not WHOLES, reason="the manifest has no kernel that does all of a layer")
on_a_gpu = pytest.mark.skipif(ON_EMULATOR, reason="would take the emulator hours, or needs streams")


def specs(seed: int, count: int, **changes: Any) -> Spec:
    """A layer that one launch can do, with all that does not matter to a test drawn at random."""
    rng = np.random.default_rng([seed, count])
    known: dict[str, Any] = {
        **{"seed": int(rng.integers(2**32)), "wide_ids": bool(rng.integers(2)), "routing": "any"},
        "pads": (8 * int(rng.integers(3)), 16 * int(rng.integers(2)), 16 * int(rng.integers(2)), count % 2),
        **{"out_pad": 8 * int(rng.integers(3)), "form": int(rng.integers(1 << 16))},
        **{"plan": bool(rng.integers(2)), "dtype": DTYPES[int(rng.integers(2))]},
    }
    return make_spec(**{**known, **changes})


class Checked:
    """Layers as one launch, read back together."""

    def __init__(self) -> None:
        self.layers = Layers()

    def run(self, spec: Spec, ids: Any = None) -> None:
        assert whole_kernel(spec) is not None, spec
        problem = make_layer(spec, ids)
        self.layers.add(str(spec), check_whole(problem, scratch(problem.workspace_bytes())), spec.tokens)

    def check(self, seed: int) -> None:
        self.layers.check(seed)


def test_there_is_a_kernel_with_gates_and_one_without() -> None:
    assert set(WHOLES) == {True, False}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_every_activation(activation: str, gated: bool, dtype: str, seed: int) -> None:
    """With its parameters given and left out, and every type of either bias."""
    checked = Checked()
    given: list[dict[str, Any]] = [{}]
    if activation.startswith("swigluoai"):
        given += [{"alpha": 1.3, "beta": 0.25, "limit": 0.75}]
    if activation == "silu":
        given += [{"limit": 0.5}]
    biases = BIASES[:2] if ON_EMULATOR else BIASES
    for index, (parameters, bias) in enumerate(itertools.product(given, biases)):
        known = {"tokens": 9, "top_k": 3, "experts": 5, "hidden": 144, "intermediate": 112, "dtype": dtype}
        known |= {"bias1": bias, "bias2": BIASES[(index + 1) % 4], **parameters}
        checked.run(specs(seed, index, activation=activation, gated=gated, **known))
    checked.check(seed)


def test_every_way_to_give_scales_of_weights(seed: int) -> None:
    checked = Checked()
    pairs = list(itertools.product(WEIGHT_SCALES, WEIGHT_SCALES))
    for index, (first, second) in enumerate(pairs[:: 5 if ON_EMULATOR else 1]):
        known = {"w1_scale": first, "w2_scale": second, "form": 977 * index, "gated": index % 2 == 0}
        known |= {"tokens": 7, "top_k": 2, "experts": 6, "hidden": 80, "intermediate": 48}
        checked.run(specs(seed, index, **known))
    checked.check(seed)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_sizes_that_no_tile_divides(gated: bool, seed: int) -> None:
    checked = Checked()
    shapes = list(itertools.product(SIZES, SIZES))
    for index, (hidden, inner) in enumerate(shapes[:: 12 if ON_EMULATOR else 1]):
        known = {"hidden": hidden, "intermediate": inner, "gated": gated, "experts": 7 + index % 5}
        checked.run(specs(seed, index, tokens=1 + 5 * index % 13, top_k=3, **known))
    checked.check(seed)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_every_number_of_tokens(top_k: int, seed: int) -> None:
    checked = Checked()
    counts = (1, 2, 9) if ON_EMULATOR else range(1, 65)
    for count in counts:
        known = {"tokens": count, "top_k": top_k, "experts": (9, 40, 128)[count % 3], "gated": count % 4 > 0}
        known |= {"routing": ROUTINGS[count % len(ROUTINGS)], "hidden": 144, "intermediate": 80}
        checked.run(specs(seed, count, **known))
    checked.check(seed)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("mapped", [False, True], ids=["all_here", "expert_map"])
def test_every_kind_of_routing(mapped: bool, routing: str, seed: int) -> None:
    """Duplicates, ids that are invalid or elsewhere, one expert that takes everything, none that takes
    any."""
    checked = Checked()
    for index, count in enumerate((1, 3, 33) if ON_EMULATOR else (1, 2, 7, 8, 9, 33, 64)):
        experts = (5, 1, 64)[index % 3]
        known = {"routing": routing, "tokens": count, "top_k": (1, 3, 8)[index % 3], "experts": experts}
        known |= {"global_experts": 3 * experts if mapped else 0, "hidden": 80, "intermediate": 48}
        checked.run(specs(seed, index, gated=index % 2 == 0, **known))
    checked.check(seed)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_no_valid_route_at_all_gives_zeros(wide: bool, seed: int) -> None:
    for index, tokens in enumerate((1, 5, 64)):
        spec = specs(seed, index, tokens=tokens, top_k=4, experts=6, routing="nobody", wide_ids=wide)
        problem = make_layer(spec)
        assert problem.total_rows == 0
        out = problem.guarded_out()
        with kernels(whole=True):
            problem.call(out.out, scratch(problem.workspace_bytes()))
        assert (out.out.view(torch.int16) == 0).all(), "not +0"
        assert int(out.damaged(torch.arange(tokens, device=DEVICE))) == 0
    checked = Checked()
    checked.run(spec)
    checked.check(seed)


def test_duplicate_ids_of_a_token(seed: int) -> None:
    """Each is a row of its own."""
    checked = Checked()
    for index, top_k in enumerate((2, 8)):
        spec = specs(seed, index, tokens=6, top_k=top_k, experts=3)
        ids = np.repeat(np.arange(6) % 3, top_k).reshape(6, top_k)
        checked.run(spec, ids)
        ids[::2, 1:] = -1
        checked.run(spec, ids)
    checked.check(seed)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 64, 129, 512])
def test_one_expert_takes_everything(rows: int, seed: int) -> None:
    """Among many, at the edges of its tiles."""
    if ON_EMULATOR and rows > 17:
        pytest.skip("would take the emulator hours")
    checked = Checked()
    for index, experts in enumerate((1, 2, 200)):
        spec = specs(seed, index, tokens=rows, top_k=1, experts=experts, hidden=144, intermediate=112)
        checked.run(spec, np.full((rows, 1), experts - 1))
    checked.check(seed)


@on_a_gpu
@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 127, 128, 129, 255, 256])
def test_every_number_of_experts(experts: int, seed: int) -> None:
    checked = Checked()
    for index, (tokens, top_k) in enumerate(((1, 8), (3, 5), (64, 8), (512, 1), (1, 512))):
        known = {"tokens": tokens, "top_k": top_k, "hidden": 48, "intermediate": 32, "gated": index % 2 == 0}
        checked.run(specs(seed, index, experts=experts, routing="skewed" if index % 2 else "any", **known))
    checked.check(seed)


@on_a_gpu
def test_the_widest_hidden_size(seed: int) -> None:
    """As many strips of features as the state has words."""
    checked = Checked()
    for index, hidden in enumerate((16 * 1024, 16 * 1023)):
        checked.run(specs(seed, index, tokens=5, top_k=2, experts=3, hidden=hidden, intermediate=48))
    checked.check(seed)


@on_a_gpu
@pytest.mark.parametrize("shape", [(128, 8, 2816, 704), (128, 8, 2048, 768), (8, 2, 4096, 14336)])
def test_layers_of_models(shape: tuple[int, int, int, int], seed: int) -> None:
    """Gemma 4, Qwen3 and Mixtral, also against float64 stage by stage."""
    layers = Layers()
    experts, top_k, hidden, inner = shape
    for index, tokens in enumerate((1, 4, 16, 64)):
        known = {"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": inner}
        spec = specs(seed, index, tokens=tokens, routing="distinct", **known)
        problem = make_layer(spec)
        layers.add(str(spec), run_layer(problem, *chain_of_whole(True), True), tokens)
    layers.check(seed)


def test_what_is_not_finite_stays_in_its_rows(seed: int) -> None:
    """A NaN or an infinity in a token makes NaN of that token alone."""
    for index, value in enumerate((torch.nan, torch.inf)):
        known = {"tokens": 8, "experts": 3, "top_k": 2, "hidden": 96, "intermediate": 64}
        problem = make_layer(specs(seed, index, routing="distinct", dtype=DTYPES[index], **known))
        with kernels(whole=True):
            expected = problem.call(None, None).clone()
            problem.x[5, 17] = value
            found = problem.call(None, None)
        assert found[5].isnan().all()
        others = torch.arange(8, device=DEVICE) != 5
        assert not expected.isnan().any()
        assert torch.equal(found[others].view(torch.int16), expected[others].view(torch.int16))


def reference(problem: LayerProblem) -> Any:
    """What the chain gives whose bits one launch has."""
    with kernels(*chain_of_whole(problem.spec.gated)):
        return problem.call(None, None).clone()


def same(found: Any, expected: Any) -> bool:
    return bool(torch.equal(found.view(torch.int16), expected.view(torch.int16)))


def test_the_function_and_the_plan_object_with_and_without_a_workspace(seed: int) -> None:
    for index in range(2):
        problem = make_layer(specs(seed, index, plan=index == 1, tokens=9, top_k=3, experts=6))
        expected = reference(problem)
        with kernels(whole=True):
            assert same(problem.call(None, None), expected)
            assert same(
                problem.call(torch.empty_like(problem.x), scratch(problem.workspace_bytes())), expected
            )
    assert int(nonzero_states()) == 0


@on_a_gpu
def test_a_workspace_is_taken_in_turns_with_split_kernels(seed: int) -> None:
    """Whatever is next finds its counters zero: another layer as one launch, or a chain that splits K. The
    workspace is overwritten between calls, as a caller may."""
    shapes = ((40, 9, 144), (1, 9, 2816), (64, 128, 272), (7, 3, 16))
    cases = [
        make_layer(specs(seed, i, tokens=t, top_k=3, experts=e, hidden=h, gated=i != 2))
        for i, (t, e, h) in enumerate(shapes)
    ]
    workspace = torch.empty(max(case.workspace_bytes() for case in cases), dtype=torch.uint8, device=DEVICE)
    expected = [reference(case) for case in cases]
    rng = np.random.default_rng(seed)
    splits = {gated: [each for each in ups(ARCH, gated) if each.split] for gated in (True, False)}
    seconds = [each for each in downs(ARCH, False) if each.split]
    for turn in range(200):
        index = int(rng.integers(len(cases)))
        problem = cases[index]
        if turn % 3 == 0:
            workspace.random_()
        if rng.random() < 0.3:
            first: Forced = splits[problem.spec.gated][int(rng.integers(len(splits[problem.spec.gated])))]
            with kernels(first, seconds[int(rng.integers(len(seconds)))]):
                problem.call(None, workspace)
            continue
        with kernels(whole=True):
            assert same(problem.call(None, workspace), expected[index]), f"turn {turn}"
    assert int(nonzero_states()) == 0


@on_a_gpu
def test_two_streams_at_once(seed: int) -> None:
    """With workspaces of their own and with the library's; each state is left zero."""
    problems = [make_layer(specs(seed, i, tokens=(60, 9)[i], top_k=3, experts=20)) for i in range(2)]
    expected = [reference(problem) for problem in problems]
    spaces = [torch.empty(p.workspace_bytes(), dtype=torch.uint8, device=DEVICE) for p in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outs: list[list[Any]] = [[], []]
    with kernels(whole=True):
        layers = [sm12x.FusedMoE(p.w1, p.w2, **p.arguments) for p in problems]
        for turn in range(60):
            for index, (problem, stream) in enumerate(zip(problems, streams, strict=True)):
                with torch.cuda.stream(stream):
                    given = problem.x, problem.topk_weights, problem.topk_ids
                    outs[index].append(layers[index](*given, workspace=spaces[index] if turn % 2 else None))
        torch.cuda.synchronize()
    for index in range(2):
        assert all(same(out, expected[index]) for out in outs[index])
    assert int(nonzero_states()) == 0


@on_a_gpu
def test_a_launch_beside_work_that_keeps_most_of_the_device(seed: int) -> None:
    """No CTA waits for one that is not running: it ends though others hold SMs for long."""
    problem = make_layer(specs(seed, 0, tokens=48, top_k=8, experts=64, hidden=1024, intermediate=512))
    expected = reference(problem)
    other = torch.cuda.Stream()
    a = torch.randn((4096, 4096), device=DEVICE)
    torch.cuda.synchronize()
    with kernels(whole=True):
        layer = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments)
        outs = []
        for _ in range(30):
            with torch.cuda.stream(other):
                a @ a
            outs.append(layer(problem.x, problem.topk_weights, problem.topk_ids))
    torch.cuda.synchronize()
    assert all(same(out, expected) for out in outs)


LINKS = 24


@on_a_gpu
@pytest.mark.parametrize("tokens", [1, 20])
def test_chains_of_launches_each_of_which_may_begin_before_the_last_has_ended(tokens: int, seed: int) -> None:
    """Eager, queued behind a pause, and as graphs: what the same calls give with the device idle between any
    two. All share a workspace; two outputs take turns, and torch kernels lie between some."""
    sizes = {"hidden": 144, "intermediate": 96, "tokens": tokens, "top_k": 3, "dtype": "bfloat16"}
    problems = [make_layer(specs(seed, i, experts=9, **sizes)) for i in range(3)]
    start = torch.randn(problems[0].x.shape, device=DEVICE).to(problems[0].x.dtype)
    outs = [torch.zeros_like(start) for _ in range(2)]
    held = torch.zeros_like(start)
    seen = torch.zeros((LINKS, *start.shape), dtype=start.dtype, device=DEVICE)
    size = max(problem.workspace_bytes() for problem in problems)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    wait = [False]

    def chain() -> None:
        held.copy_(start)
        before = held
        for i in range(LINKS):
            problem, out = problems[i % 3], outs[i % 2]
            layers[i % 3](before, problem.topk_weights, problem.topk_ids, out=out, workspace=workspace)
            before = out
            if i % 3 == 2:
                wide = out.float()
                torch.add(
                    start, (wide / wide.abs().amax(1, keepdim=True).clamp(min=1e-3)).to(out.dtype), out=held
                )
                before = held
            if i % 4 == 3:
                seen[i].copy_(out)
            if wait[0]:
                torch.cuda.synchronize()

    def result() -> list[Any]:
        found = [each.clone() for each in (seen, *outs, held)]
        for each in (seen, *outs, held):
            each.zero_()
        return found

    with kernels(whole=True):
        layers = [sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments) for problem in problems]
        wait[0] = True
        chain()
        expected = result()
        wait[0] = False
        torch.cuda._sleep(SLEEP_CYCLES)
        chain()
        assert all(same(x, y) for x, y in zip(result(), expected, strict=True)), "eager"
        graph = TorchGraph(chain)
    result()
    for _ in range(30):
        graph.replay()
        torch.cuda.synchronize()
        assert all(same(x, y) for x, y in zip(result(), expected, strict=True)), "replays differ"
    assert int(nonzero_states()) == 0


@on_a_gpu
def test_graph_replays_with_changed_inputs(seed: int) -> None:
    """A captured layer reads tokens, routes and weights when it is replayed; graphs without a workspace have
    memory, and a state, of their own."""
    problems = [make_layer(specs(seed, i, tokens=17, top_k=4, experts=12, pads=(0,) * 4)) for i in range(2)]
    for problem in problems:
        layers = Layers()
        layers.add(str(problem.spec), run_layer(problem))
        layers.check(seed)
    problem = problems[0]
    out = torch.empty_like(problem.x)
    with kernels(whole=True):
        layer = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments)
        given = problem.x, problem.topk_weights, problem.topk_ids
        layer(*given, out=out)
        graph = TorchGraph(lambda: layer(*given, out=out))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        problem.x.copy_(torch.randn(problem.x.shape, device=DEVICE))
        ids = rng.integers(-2, 14, tuple(problem.topk_ids.shape))
        problem.topk_ids.copy_(torch.as_tensor(ids, device=DEVICE))
        problem.topk_weights.copy_(torch.rand(problem.topk_weights.shape, device=DEVICE))
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        found = out.clone()
        assert same(found, reference(problem))

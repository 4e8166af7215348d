"""The expert layer on torch tensors: every activation, way to give scales, kind of routing and kernel, stage
by stage against float64, NaN in all neighbouring memory.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from forced import Forced  # noqa: E402
from layer_case import Layers, run_layer, scratch  # noqa: E402
from layer_forced import downs, kernels, ups  # noqa: E402
from layer_problem import ROUTES_PER_CTA, LayerProblem, make_layer  # noqa: E402
from layer_strata import BIASES, DTYPES, KINDS, ROUTINGS, STATIC, WEIGHT_SCALES, Spec, make_spec  # noqa: E402
from torch_reference import DEVICE, POISON  # noqa: E402
from variants import ARCH, name  # noqa: E402

import sm12x  # noqa: E402
from sm12x.validation.cases import rows_per_group  # noqa: E402

UPS = [*ups(ARCH, True), *ups(ARCH, False)]
DOWNS = downs(ARCH, False)
PAIRS = [each for each in DOWNS if each.variant.role == "down"]
SIZES = (16, 112, 144, 704)  # of H and I: a block, one short of a tile, one past it, Gemma's I
ON_EMULATOR = DEVICE == "cpu"


def specs(seed: int, count: int, **changes: Any) -> Spec:
    """A layer with all that does not matter to a test drawn at random."""
    rng = np.random.default_rng([seed, count])
    known = {
        "seed": int(rng.integers(2**32)),
        "wide_ids": bool(rng.integers(2)),
        "pads": (8 * int(rng.integers(3)), 16 * int(rng.integers(2)), 16 * int(rng.integers(2)), count % 2),
        "out_pad": 8 * int(rng.integers(3)),
        "form": int(rng.integers(1 << 16)),
        "plan": bool(rng.integers(2)),
        "dtype": DTYPES[int(rng.integers(2))],
        "routing": "any",
    }
    return make_spec(**{**known, **changes})


def tile_edges(tile: int, experts: int, seed: int, top_k: int = 2) -> np.ndarray[Any, Any]:
    """topk_ids (T, k) that give experts rows at the edges of a kernel's tile of tokens."""
    rng = np.random.default_rng(seed)
    patterns = ("tile_minus_1", "tile", "tile_plus_1", "half_a_tile", "uneven")
    rows = np.concatenate([rows_per_group(each, 2, tile, rng) for each in patterns])
    rows = np.resize(rng.permutation(rows), experts)
    rows[rng.integers(experts)] = 0
    ids = rng.permutation(np.repeat(np.arange(experts), rows))
    return np.append(ids, np.full(-ids.size % top_k, -1)).reshape(-1, top_k)


def with_ids(spec: Spec, ids: np.ndarray[Any, Any]) -> LayerProblem:
    return make_layer(replace(spec, tokens=ids.shape[0], top_k=ids.shape[1]), ids)


def test_there_are_kernels() -> None:
    """Parametrised tests without a kernel would all be skipped."""
    assert len(UPS) >= 4
    assert len(PAIRS) >= 2
    assert len(DOWNS) > len(PAIRS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "gated"), KINDS)
def test_every_activation(activation: str, gated: bool, dtype: str, seed: int) -> None:
    """With its parameters given and left out, static and dynamic, biases or none."""
    layers = Layers()
    swiglu = activation.startswith("swigluoai")
    given: list[dict[str, Any]] = [{}]
    if swiglu:
        given += [{"alpha": 1.3, "beta": 0.25, "limit": 0.75}]
    if activation == "silu":
        given += [{"limit": 0.5}]
    cases = itertools.product(given, (None, "float"), (None, "float32"))
    for index, (parameters, static, bias) in enumerate(cases):
        spec = specs(
            *(seed, index),
            **{"activation": activation, "gated": gated, "dtype": dtype, "static2": static, "bias1": bias},
            **{"tokens": 9, "top_k": 3, "experts": 5, "hidden": 144, "intermediate": 112, **parameters},
        )
        layers.run(f"case {index}", make_layer(spec))
    layers.check(seed)


@pytest.mark.parametrize("static1", STATIC)
@pytest.mark.parametrize("static2", STATIC)
def test_every_way_to_give_scales(static1: str | None, static2: str | None, seed: int) -> None:
    """Weights' scales of either GEMM x biases of every type, in all shapes that mean the same."""
    layers = Layers()
    for index, (first, second) in enumerate(itertools.product(WEIGHT_SCALES, WEIGHT_SCALES)):
        spec = specs(
            *(seed, index),
            **{"w1_scale": first, "w2_scale": second, "static1": static1, "static2": static2},
            **{"bias1": BIASES[index % 4], "bias2": BIASES[(index + index // 4) % 4], "form": 977 * index},
            **{"tokens": 7, "top_k": 2, "experts": 6, "hidden": 80, "intermediate": 48},
        )
        layers.run(f"case {index}", make_layer(spec))
    layers.check(seed)


@pytest.mark.parametrize("each", UPS, ids=name)
def test_every_kernel_of_the_first_gemm(each: Forced, seed: int) -> None:
    """Rows at the edges of its tile, H and I that no tile divides, results of two bytes and e4m3."""
    layers = Layers()
    gated = each.variant.gated
    kinds = [kind for kind in KINDS if kind[1] == gated]
    shapes = list(itertools.product(SIZES, SIZES))
    for index, (hidden, inner) in enumerate(shapes[:: 5 if ON_EMULATOR else 1]):
        spec = specs(
            *(seed, index),
            **{"activation": kinds[index % len(kinds)][0], "gated": gated, "static2": STATIC[index % 3]},
            **{
                "static1": STATIC[index // 3 % 3],
                "bias1": BIASES[index // 2 % 4],
                "dtype": DTYPES[index % 2],
            },
            **{"hidden": hidden, "intermediate": inner, "experts": 11, "global_experts": 0},
        )
        ids = tile_edges(each.tile, spec.experts, seed + index)
        layers.run(each.name, with_ids(spec, ids), up=each)
    layers.check(seed)


@pytest.mark.parametrize("each", DOWNS, ids=name)
def test_every_kernel_of_the_second_gemm(each: Forced, seed: int) -> None:
    """The same; those of fp8_packed also without a launch that quantises, where the scale is static."""
    layers = Layers()
    shapes = list(itertools.product(SIZES, SIZES))
    for index, (hidden, inner) in enumerate(shapes[:: 5 if ON_EMULATOR else 1]):
        static = None if each.variant.role == "down" else STATIC[index % 3]
        spec = specs(
            *(seed, index),
            **{"static2": static, "bias2": BIASES[index // 2 % 4], "dtype": DTYPES[index % 2]},
            **{"hidden": hidden, "intermediate": inner, "experts": 11, "gated": index % 3 > 0},
            **{"weight_on_input": index % 8 == 5},
        )
        ids = tile_edges(each.tile, spec.experts, seed + index, 1 if spec.weight_on_input else 2)
        layers.run(each.name, with_ids(spec, ids), down=each)
    layers.check(seed)


@pytest.mark.parametrize("each", PAIRS, ids=name)
def test_rows_quantised_apart_or_on_their_way_in_give_the_same_bits(each: Forced, seed: int) -> None:
    """What select decides shows in nothing but time: a kernel of fp8_down and that of fp8_packed with its
    tile."""
    key = each.variant.key.replace("fp8_down", "fp8_packed")
    apart = next(other for other in DOWNS if (other.variant.key, other.split) == (key, each.split))
    for index, hidden in enumerate((704,) if ON_EMULATOR else (144, 704, 2816)):
        spec = specs(
            *(seed, index),
            **{"hidden": hidden, "intermediate": (704, 176, 16)[index], "experts": 9, "routing": "invalid"},
            **{"tokens": 6 if ON_EMULATOR else 67, "bias2": "float32"},
        )
        problem = make_layer(spec)
        outs = []
        for forced in (each, apart):
            out = problem.guarded_out()
            with kernels(None, forced) as made:
                problem.call(out.out, scratch(problem.workspace_bytes()))
            assert made.choices[-1].quantises_apart == (forced is apart)
            outs.append(out.buffer)
        assert not (outs[0] == POISON[spec.dtype]).all()
        assert torch.equal(*outs), f"{spec}"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("mapped", [False, True], ids=["all_here", "expert_map"])
def test_every_kind_of_routing(mapped: bool, routing: str, seed: int) -> None:
    """Duplicates, ids that are invalid or elsewhere, one expert that takes everything, none that takes any;
    from no token to more than one CTA routes."""
    layers = Layers()
    tokens = (0, 1, 2, 33) if ON_EMULATOR else (0, 1, 2, 7, 8, 33, 130, 700)
    for index, count in enumerate(tokens):
        experts = (5, 1, 64)[index % 3]
        spec = specs(
            *(seed, index),
            **{"routing": routing, "tokens": count, "top_k": (1, 3, 8)[index % 3], "experts": experts},
            **{"global_experts": 3 * experts if mapped else 0, "hidden": 80, "intermediate": 48},
            **{"workspace": index % 2 == 0, "static2": STATIC[index % 3]},
        )
        layers.run(f"T={count}", make_layer(spec))
    layers.check(seed)


@pytest.mark.parametrize("experts", [1, 2, 31, 32, 33, 127, 128, 129, 256, 512, 1023, 1024])
def test_every_number_of_experts(experts: int, seed: int) -> None:
    layers = Layers()
    for index, tokens in enumerate((3,) if ON_EMULATOR else (1, 3, 40, 257)):
        spec = specs(
            *(seed, index),
            **{
                "experts": experts,
                "tokens": tokens,
                "top_k": 1 + index % 8,
                "hidden": 48,
                "intermediate": 32,
            },
            **{"routing": "skewed" if index % 2 else "any"},
        )
        layers.run(f"E={experts}", make_layer(spec))
    layers.check(seed)


@pytest.mark.parametrize(
    ("tokens", "top_k"), [(ROUTES_PER_CTA // 2, 2), (ROUTES_PER_CTA // 2 + 1, 2), (20_000, 4), (65_536, 6)]
)
def test_many_tokens(tokens: int, top_k: int, seed: int) -> None:
    """Up to the most: routes that one CTA sorts, one more, and many CTAs."""
    if ON_EMULATOR:
        pytest.skip("would take the emulator hours")
    layers = Layers()
    for index in range(2):
        spec = specs(
            *(seed, index),
            **{
                "tokens": tokens,
                "top_k": top_k,
                "experts": (7, 300)[index],
                "hidden": 64,
                "intermediate": 48,
            },
            **{"routing": ("skewed", "invalid")[index], "static2": (None, "float")[index]},
        )
        layers.run(f"T={tokens}", make_layer(spec))
    layers.check(seed)


@pytest.mark.parametrize("shape", [(128, 8, 2816, 704), (128, 8, 2048, 768), (8, 2, 4096, 14336)])
def test_layers_of_models(shape: tuple[int, int, int, int], seed: int) -> None:
    """Gemma 4, Qwen3 and Mixtral with the kernels that select chooses, from one token to hundreds."""
    if ON_EMULATOR:
        pytest.skip("would take the emulator hours")
    layers = Layers()
    experts, top_k, hidden, inner = shape
    for index, tokens in enumerate((1, 8, 64, 300)):
        spec = specs(
            *(seed, index),
            **{"experts": experts, "top_k": top_k, "hidden": hidden, "intermediate": inner, "tokens": tokens},
            **{"routing": "distinct"},
        )
        layers.run(f"T={tokens}", make_layer(spec))
    layers.check(seed)


def test_what_is_not_finite_stays_in_its_rows(seed: int) -> None:
    """A NaN in a token makes NaN of that token alone; so does an infinity where scales are dynamic."""
    for index, (static1, value) in enumerate(itertools.product((None, "float"), (torch.nan, torch.inf))):
        if static1 and value == torch.inf:
            continue  # saturates
        spec = specs(
            *(seed, index),
            **{
                "tokens": 8,
                "experts": 3,
                "top_k": 2,
                "hidden": 96,
                "intermediate": 64,
                "routing": "distinct",
            },
            **{"static1": static1, "dtype": DTYPES[index % 2]},
        )
        problem = make_layer(spec)
        expected = problem.call(None, None).clone()
        problem.x[5, 17] = value
        found = problem.call(None, None)
        assert found[5].isnan().all()
        others = torch.arange(8, device=DEVICE) != 5
        assert not expected.isnan().any()
        assert torch.equal(found[others].view(torch.int16), expected[others].view(torch.int16))


def small(seed: int, **changes: Any) -> LayerProblem:
    known = {"tokens": 9, "top_k": 3, "experts": 6, "hidden": 96, "intermediate": 80, "plan": False}
    return make_layer(specs(seed, 0, **{**known, **changes}))


def test_the_plan_object_and_the_function_give_the_same_bits(seed: int) -> None:
    problem = small(seed, dtype="bfloat16")
    given = problem.x, problem.topk_weights, problem.topk_ids
    layer = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments)
    out = torch.full_like(problem.x, torch.nan)
    assert layer(*given, out=out) is out
    expected = sm12x.fused_moe(given[0], problem.w1, problem.w2, *given[1:], **problem.arguments)
    assert torch.equal(out, expected)
    assert expected.dtype == problem.x.dtype
    assert expected.device == problem.x.device
    again = torch.full_like(problem.x, torch.nan)
    assert problem.call(again, None) is again
    assert torch.equal(again, expected)


def test_weights_as_uint8_and_as_parameters(seed: int) -> None:
    """uint8 with dtype=, nn.Parameter as in a model, ids of either width."""
    problem = small(seed)
    given = problem.x, problem.topk_weights
    ids = problem.topk_ids.to(torch.int64)
    expected = sm12x.fused_moe(given[0], problem.w1, problem.w2, given[1], ids, **problem.arguments)
    bits = problem.w1.view(torch.uint8), problem.w2.view(torch.uint8)
    named = {**problem.arguments, "dtype": "float8_e4m3fn"}
    assert torch.equal(sm12x.fused_moe(given[0], *bits, given[1], ids.to(torch.int32), **named), expected)
    with pytest.raises(TypeError, match="w1: uint8 data needs"):
        sm12x.fused_moe(given[0], *bits, given[1], ids, **problem.arguments)
    parameters = [torch.nn.Parameter(each, requires_grad=False) for each in (problem.w1, problem.w2)]
    layer = sm12x.FusedMoE(*parameters, **problem.arguments)
    assert torch.equal(layer(given[0], given[1], ids), expected)


def test_calls_of_many_shapes_of_one_layer(seed: int) -> None:
    """One plan object with every number of tokens in turn, up and down: workspaces of ours grow, plans are
    found again."""
    problem = small(seed, tokens=40, routing="any", dtype="bfloat16")
    layer = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments)
    rng = np.random.default_rng(seed)
    counts = (40, 1, 3) if ON_EMULATOR else rng.integers(0, 41, 60).tolist()
    whole = layer(problem.x, problem.topk_weights, problem.topk_ids)
    for count in counts:
        first = int(rng.integers(0, 41 - count))
        part = slice(first, first + count)
        found = layer(problem.x[part], problem.topk_weights[part].clone(), problem.topk_ids[part].clone())
        # Another number of rows may run another kernel: compared within its rounding.
        expected = whole[part].float()
        assert found.shape == expected.shape
        error = (found.float() - expected).norm(dim=1)
        assert (error <= 2e-2 * expected.norm(dim=1) + 1e-30).all(), (count, first)


def test_a_workspace_of_the_size_that_is_asked_for(seed: int) -> None:
    """`workspace_size` bytes are enough for so many tokens and for fewer, whatever kernels run, and none
    outside of them is written; far too few are refused."""
    if ON_EMULATOR:
        pytest.skip("workspace_size is that of a GPU")
    for index, tokens in enumerate((1, 5, 64, 500)):
        problem = small(seed + index, tokens=tokens, experts=33)
        spec = problem.spec
        size = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments).workspace_size(
            spec.tokens, spec.top_k, spec.dtype
        )
        whole = torch.full((size + 4096,), 0xA5, dtype=torch.uint8, device=DEVICE)
        inner = whole[2048 : 2048 + size]
        static = spec.static2 is not None
        for up, down in ((None, None), (UPS[1], DOWNS[1]), (UPS[3], DOWNS[-1] if not static else DOWNS[3])):
            with kernels(up, down):
                layer = sm12x.FusedMoE(problem.w1, problem.w2, **problem.arguments)
                for count in (spec.tokens, max(1, spec.tokens - 3)):
                    given = problem.x[:count], problem.topk_weights[:count], problem.topk_ids[:count]
                    expected = layer(*given)
                    assert torch.equal(layer(*given, workspace=inner), expected)
        assert (whole[:2048] == 0xA5).all()
        assert (whole[2048 + size :] == 0xA5).all()
        with pytest.raises(ValueError, match="workspace: expected at least"):
            layer(*given, workspace=inner[:512])


def test_what_is_wrong_is_named_and_nothing_is_written(seed: int) -> None:
    """Arrays of another device, shape or type, overlaps: the error names the argument."""
    problem = small(seed, dtype="bfloat16", static2="array")
    out = problem.guarded_out()
    good = {
        **{"x": problem.x, "w1": problem.w1, "w2": problem.w2, "topk_weights": problem.topk_weights},
        **{"topk_ids": problem.topk_ids, "out": out.out, **problem.arguments},
    }
    wrong: list[tuple[str, Any]] = [
        ("x", problem.x.float()),
        ("x", problem.x[:, ::2]),
        ("w2", problem.w2[:, :, :-16]),
        ("topk_weights", problem.topk_weights.bfloat16()),
        ("topk_weights", problem.topk_weights[:-1].clone()),
        ("topk_ids", problem.topk_ids.float()),
        ("w1_scale", torch.ones(7, device=DEVICE)),
        ("a2_scale", torch.ones(2, device=DEVICE)),
        ("bias1", torch.ones((6, 8), device=DEVICE)),
        ("activation", "selu"),
        ("out", problem.x),
    ]
    if not ON_EMULATOR:
        wrong += [
            ("w1", problem.w1.cpu()),
            ("topk_ids", problem.topk_ids.cpu()),
            ("workspace", torch.zeros(1 << 24)),
        ]
    for argument, value in wrong:
        with pytest.raises((ValueError, TypeError), match=f"^{argument}"):
            sm12x.fused_moe(**{**good, argument: value})
    target = torch.arange(0, device=DEVICE)
    assert int(out.damaged(target)) == 0
    layers = Layers()
    layers.add("after the errors", run_layer(problem))
    layers.check(seed)

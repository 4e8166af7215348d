"""What a call of an expert layer launches where one kernel does all of it, with which parameters, on a fake
driver.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from sm12x import abi, counters, driver, manifest
from sm12x.ops import moe_plan
from sm12x.select import layer as layer_select
from sm12x.select.layer import LayerProblem
from unit.fake_driver import CONTEXT, FakeGpu, install
from unit.layer_cases import (
    ACTIVATIONS,
    INNER,
    STREAM,
    TOP,
    E,
    H,
    T,
    force,
    keys,
    make,
    run,
    run_function,
    tokens,
    weights,
)
from unit.layer_params import bias_facts, expected_up, facts, scale_facts
from unit.test_fp8_packed import address_of, text_of

GATED, PLAIN = "fp8_layer_gated_128x8x128_swap", "fp8_layer_128x8x128_swap"
CHAIN = ["moe_route", "fp8_up_gated_64x8x128_swap", "fp8_down_128x8x128_swap", "moe_combine"]


@pytest.fixture(autouse=True)
def chosen_wherever_it_works(monkeypatch):
    """Where one launch is faster is not what this file is about."""
    for name, limit in (("ROUTES", 512), ("ROWS", 16), ("WIDTH", 1 << 20)):
        monkeypatch.setattr(f"sm12x.select.layer.MOST_WHOLE_{name}", limit)


@pytest.fixture
def fake(monkeypatch, whole_root):
    fake = install(monkeypatch, whole_root)
    fake.streams[0] = STREAM
    return fake


def launched(fake, layer, call):
    """The one launch of a call."""
    fake.launches.clear()
    assert run(layer, call) is call["out"]
    (found,) = fake.launches
    return found


def expected(given, call, base, state):
    """Every field of sm12x_layer_params but tensor maps."""
    count, top_k = call["topk_ids"].extents
    experts, hidden, inner = given["w2"].extents
    routes, element = count * top_k, 2
    h = base
    y = base + -(-routes * inner * element // 256) * 256
    kind = abi.OUT_TYPES[call["x"].dtype.name]
    x, out = call["x"], call["out"]
    none: dict[str, object] = {
        "bounds": 0,
        "a_scale": 0,
        "a_scale_mode": 0,
        "a_scale_value": 0.0,
        "row_index": 0,
    }
    parts = {"q1": x.address, "h": h, "offsets": 0, "row_index": 0, "s1": 0, "maxima": 0}
    up = expected_up(given, call, parts)
    down = {
        **none,
        **{"a": h, "d": y, "row_weight": 0, "partials": 0, "counters": 0, "rows": routes, "a_rows": routes},
        **{"stride_a": inner, "stride_d": hidden, "stride_d_group": 0, "n": hidden, "k": inner},
        **{"num_groups": experts, "row_layout": abi.SM12X_ROWS_PACKED, "bounds_are_64_bit": 0},
        **{"row_index_is_64_bit": 0, "least_units": 0, "flags": 0, "out_type": kind},
        **scale_facts(given.get("w2_scale"), "b_scale", hidden),
        **bias_facts(given.get("bias2")),
    }
    return {
        **{f"up.{name}": each for name, each in up.items()},
        **{f"up.gemm.{name}": each for name, each in none.items()},
        "up.gemm.stride_a": x.steps[0] if count > 1 else hidden,
        "up.gemm.flags": 0,
        "up.topk_ids": call["topk_ids"].address,
        "up.row_maxima": 0,
        **{f"down.{name}": each for name, each in down.items()},
        "topk_weights": call["topk_weights"].address,
        "out": out.address,
        "state": state,
        "stride_out": out.steps[0] if count > 1 else hidden,
        "tokens": count,
        "top_k": top_k,
        "type": kind,
    }


def check(fake, given, call, key=GATED, layer=None):
    """One call: the launch, every field of its parameters, its workspace and its state."""
    found = launched(fake, layer or make(given), call)
    variant = manifest.default().variants[key]
    assert keys(fake) == [key]
    assert (found.grid, found.block) == ((170, 1, 1), (variant.threads, 1, 1))
    assert (found.shared_memory, found.stream, found.context) == (variant.shared_memory, STREAM, CONTEXT)
    assert found.programmatic
    assert fake.context == 0
    base = found.params.up.gemm.d
    state = driver.get_device(0).counters[base]
    assert facts(found.params) == expected(given, call, base, state)
    end = state + 4 * (abi.SM12X_LAYER_STATE + abi.SM12X_LAYER_STRIPS)
    zeroed = [(entry[1], entry[1] + entry[3]) for entry in fake.log if entry[0] == "memset" and not entry[2]]
    assert any(first <= state and end <= last for first, last in zeroed)
    if "workspace" not in call:
        size = fake.kept[base]
        rows, width = math.prod(call["topk_ids"].extents), 2 * call["x"].extents[1]
        assert found.params.down.d + rows * width <= base + size
    return found.params


def test_few_rows_are_one_launch_on_every_sm(fake):
    check(fake, weights(fake), tokens(fake))
    assert fake.allocated == {}


def test_without_gates(fake):
    params = check(fake, weights(fake, gated=False, activation="relu2"), tokens(fake), PLAIN)
    for each, features in zip(params.up.gemm.map_b, (16, 32, 64, 128), strict=False):
        assert text_of(each) == f"0 3 {[H, INNER, E]} {[H, INNER * H]} [128, {features}, 1] 3 2"


def test_the_tensor_maps_of_both_weights(fake):
    given = weights(fake)
    params = check(fake, given, tokens(fake))
    shape, strides = [H, 8, 2, INNER // 8, E], [H, INNER * H, 8 * H, 2 * INNER * H]
    first, second = params.up.gemm, params.down
    for each, features in zip(first.map_b, (16, 32, 64, 128), strict=False):
        assert text_of(each) == f"0 5 {shape} {strides} [128, 8, 2, {features // 16}, 1] 3 2"
        assert address_of(each) == given["w1"].address
    for each, features in zip(second.map_b, (16, 32, 64, 128), strict=False):
        assert text_of(each) == f"0 3 [{INNER}, {H}, {E}] [{INNER}, {H * INNER}] [128, {features}, 1] 3 2"
        assert address_of(each) == given["w2"].address
    for gemm in (first, second):
        assert all(bytes(each) == bytes(128) for each in (gemm.map_a, *gemm.map_b[4:]))


def test_the_tensor_maps_of_weights_with_gaps(fake):
    w1 = fake.tensor((E, 2 * INNER, H), "float8_e4m3fn", strides=(20_000, H + 16, 1))
    w2 = fake.tensor((E, H, INNER), "float8_e4m3fn", strides=(9_600, INNER + 32, 1))
    given = weights(fake, w1=w1, w2=w2, activation="swigluoai")
    params = check(fake, given, tokens(fake))
    row = H + 16
    for each in params.up.gemm.map_b[:4]:
        assert text_of(each).startswith(f"0 5 {[H, 8, 2, INNER // 8, E]} {[2 * row, row, 16 * row, 20_000]} ")
    for each in params.down.map_b[:4]:
        assert text_of(each).startswith(f"0 3 {[INNER, H, E]} {[INNER + 32, 9_600]} ")


@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_activation(fake, options, dtype):
    check(fake, weights(fake, **options), tokens(fake, dtype=dtype))


@pytest.mark.parametrize("shape", [(1,), (E,), (E, 1), (E, "n"), (E, "n", 1)])
def test_scales_of_the_weights(fake, shape):
    def scale(n):
        return fake.tensor([n if each == "n" else each for each in shape], "float32")

    check(fake, weights(fake, w1_scale=scale(2 * INNER), w2_scale=scale(H)), tokens(fake))
    check(fake, weights(fake, w1_scale=0.5, w2_scale=scale(H)), tokens(fake))
    wide = fake.tensor((E, H), "float32", strides=(1000, 1))
    check(fake, weights(fake, w2_scale=wide), tokens(fake))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_biases(fake, dtype):
    bias1 = fake.tensor((E, 2 * INNER), dtype, strides=(128, 1))
    check(fake, weights(fake, bias1=bias1, bias2=fake.tensor((E, H), dtype)), tokens(fake))


@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_experts_elsewhere(fake, ids):
    check(fake, weights(fake, expert_map=fake.tensor((4 * E,), "int32")), tokens(fake, ids=ids))


def test_rows_of_x_and_out_with_gaps(fake):
    x = fake.tensor((T, H), "bfloat16", strides=(H + 8, 1))
    out = fake.tensor((T, H), "bfloat16", strides=(3 * H, 1))
    check(fake, weights(fake), tokens(fake, x=x, out=out))


def test_sizes_drawn_at_random(fake):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(25):
        experts, hidden, inner = rng.randrange(4, 257), 16 * rng.randrange(1, 200), 16 * rng.randrange(1, 99)
        top_k = rng.randrange(1, 9)
        count = rng.randrange(1, 513) // top_k or 1
        count = min(count, 16 * experts // top_k)
        given = weights(fake, experts, hidden, inner)
        call = tokens(fake, count, top_k, hidden)
        layer = make(given)
        size = layer.workspace_size(count, top_k, "bfloat16")
        workspace = fake.tensor((size,), "uint8")
        params = check(fake, given, {**call, "workspace": workspace}, layer=layer)
        assert params.up.gemm.d == workspace.address
        assert params.down.d + 2 * count * top_k * hidden <= workspace.address + size


def test_a_call_brings_four_addresses_and_the_rest_stays(fake):
    """Also in a plan of the function, which is found again."""
    given = weights(fake)
    layer, before = make(given), None
    for _ in range(3):
        call = tokens(fake)
        params = check(fake, given, call, layer=layer)
        state, h = params.state, params.up.gemm.d
        assert before in (None, (state, h))
        before = state, h
        fake.calls.clear()
        run(layer, call)
        assert set(fake.calls) <= {
            "cuCtxGetCurrent",
            "cuCtxSetCurrent",
            "cuStreamIsCapturing",
            "cuLaunchKernelEx",
        }
        assert fake.calls.count("cuLaunchKernelEx") == 1
    fake.launches.clear()
    for _ in range(2):
        run_function(given, call)
    assert keys(fake) == [GATED] * 2
    assert facts(fake.launches[0].params) == facts(fake.launches[1].params) == facts(params)


@pytest.mark.parametrize("given", [False, True], ids=["workspace_ours", "workspace_given"])
def test_a_graph_gets_several_launches_where_they_give_the_same_bits(fake, monkeypatch, given):
    """Both ways are prepared by the first call, so that a capture loads nothing."""
    same = ["moe_route", "fp8_up_gated_128x8x128_swap", "fp8_down_128x8x128_swap", "moe_combine"]
    whole = manifest.default().variants[GATED]
    force(monkeypatch, up=same[1], down=same[2])
    forced = moe_plan.select_layer
    monkeypatch.setattr(
        moe_plan,
        "select_layer",
        lambda *problem: (replace(forced(*problem)[0], whole=whole, several_in_graphs=True), []),
    )
    layer = make(weights(fake))
    space = {"workspace": fake.tensor((layer.workspace_size(T, TOP),), "uint8")} if given else {}
    for capturing, expected_keys in ((False, [GATED]), (True, same), (False, [GATED]), (True, same)):
        fake.capturing = capturing
        fake.launches.clear()
        fake.calls.clear()
        run(layer, tokens(fake, **space))
        assert keys(fake) == expected_keys
        assert not any("Library" in name for name in fake.calls) or not capturing


def test_which_graphs_get_several_launches(whole_root):
    """Those whose kernels have the tiles of the launch for all of the layer, and K whole."""
    held = manifest.load(whole_root)
    whole = held.variants[GATED]
    problem = LayerProblem(
        **{"experts": E, "hidden": H, "intermediate": INNER, "gated": True, "static": False},
        **{"dtype": "bfloat16", "arch": "sm_120a", "rows": 8, "expected_rows": 8, "weighted": True},
        static_input=False,
    )
    choice, _ = layer_select.select_layer(problem, held, 170)
    up, down = (
        replace(each, variant=held.variants[key], least_units=0)
        for each, key in (
            (choice.up, "fp8_up_gated_128x8x128_swap"),
            (choice.down, "fp8_down_128x8x128_swap"),
        )
    )
    same = replace(choice, up=up, down=down)
    assert layer_select._same_bits(same, whole)
    narrow = replace(up, variant=held.variants["fp8_up_gated_64x8x128_swap"])
    plain = replace(down, variant=held.variants["fp8_packed_128x8x128_swap"])
    for changes in (
        {"up": narrow},
        {"up": replace(up, least_units=1)},
        {"down": replace(down, least_units=8)},
        {"down": plain},
    ):
        assert not layer_select._same_bits(replace(same, **changes), whole), changes


def test_every_workspace_and_stream_has_a_state_of_its_own(fake):
    layer = make(weights(fake))
    spaces = [{"workspace": fake.tensor((1 << 16,), "uint8")} for _ in range(3)]
    spaces += [{"stream": STREAM + 16 * i} for i in range(3)]
    found = {}
    for _ in range(2):
        for index, more in enumerate(spaces):
            params = launched(fake, layer, tokens(fake, **more)).params
            assert found.setdefault(index, (params.state, params.up.gemm.d)) == (
                params.state,
                params.up.gemm.d,
            )
    assert len({state for state, _ in found.values()}) == len(spaces)
    size = counters.block_bytes(driver.get_device(0))
    states = sorted(state for state, _ in found.values())
    words = abi.SM12X_LAYER_STATE + abi.SM12X_LAYER_STRIPS
    assert all(b - a >= size >= 4 * words for a, b in pairwise(states))


def test_a_state_is_that_of_split_k_on_the_same_workspace(fake, monkeypatch):
    """Both find it zero and leave it so, and follow each other on one stream."""
    workspace = fake.tensor((1 << 22,), "uint8")
    call = tokens(fake, workspace=workspace)
    state = launched(fake, make(weights(fake)), call).params.state
    force(monkeypatch, up=CHAIN[1], down=CHAIN[2], up_units=1)
    fake.launches.clear()
    run(make(weights(fake)), call)
    assert keys(fake) == CHAIN
    assert fake.launches[1].params.gemm.counters == state


def test_the_grid_is_as_large_as_the_device(monkeypatch, whole_root):
    fake = install(monkeypatch, whole_root, gpus=[FakeGpu(sm_count=48)])
    assert launched(fake, make(weights(fake)), tokens(fake)).grid == (48, 1, 1)


@pytest.mark.parametrize(
    "options", [{"a1_scale": 0.5}, {"a2_scale": 0.5}, {"a1_scale": 0.5, "a2_scale": 0.5}]
)
def test_static_scales_are_several_launches(fake, options):
    run(make(weights(fake, **options)), tokens(fake))
    assert len(keys(fake)) == 4


def test_router_weights_on_the_input_are_several_launches(fake):
    run(make(weights(fake, apply_router_weight_on_input=True)), tokens(fake, top_k=1))
    assert keys(fake) == CHAIN


@pytest.mark.parametrize(
    ("count", "top_k", "experts", "hidden", "launches"),
    [
        (64, 8, 32, H, 1),
        (65, 8, 40, H, 4),
        (513, 1, 40, H, 4),
        (8, 2, 256, H, 1),
        (8, 2, 257, H, 4),
        (8, 2, 4, 16384, 1),
        (8, 2, 4, 16400, 4),
        (32, 4, 8, H, 1),  # 16 rows of an expert
        (33, 4, 8, H, 4),
        (16, 1, 1, H, 1),
        (17, 1, 1, H, 4),
    ],
)
def test_where_rows_are_few_enough(fake, count, top_k, experts, hidden, launches):
    run(make(weights(fake, experts, hidden)), tokens(fake, count, top_k, hidden))
    assert len(keys(fake)) == launches


def test_no_tokens_are_no_launch(fake):
    run(make(weights(fake)), tokens(fake, 0))
    assert keys(fake) == []


def test_a_failed_launch_is_an_error_that_names_the_kernel(fake):
    fake.fail["cuLaunchKernelEx"] = [1]
    layer, call = make(weights(fake)), tokens(fake)
    with pytest.raises(driver.CudaError, match=f"cuLaunchKernelEx.*{GATED}"):
        run(layer, call)
    check(fake, weights(fake), call)


def test_what_sm12x_log_says(fake, monkeypatch, capsys):
    monkeypatch.setattr("sm12x.ops.launch.LOG_SELECT", True)
    run(make(weights(fake)), tokens(fake))
    text = capsys.readouterr().err
    assert f"one launch for all of the layer, {GATED}: {T * TOP} of at most 512 routes, 1.7 rows" in text
    assert "rows of the second GEMM" not in text
    run(make(weights(fake, a2_scale=0.5)), tokens(fake))
    text = capsys.readouterr().err
    assert f"several launches: {GATED} takes no a2_scale" in text
    assert "rows of the second GEMM" in text

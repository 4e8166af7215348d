"""What a call of an expert layer launches, with which parameters, on a fake driver."""

from __future__ import annotations

import pytest
from hypothesis import given as having
from hypothesis import settings
from hypothesis import strategies as st

from sm12x import abi, manifest
from sm12x.ops import moe_chain
from unit.fake_driver import CONTEXT, install
from unit.layer_cases import ACTIVATIONS, INNER, STREAM, TOP, E, H, T, force, keys, make, tokens, weights
from unit.layer_params import (
    check_call,
    check_workspace,
    expected_route,
    facts,
    gemm_of,
    launched,
    parts_of,
    sizes_of,
)
from unit.test_fp8_packed import address_of, text_of

UP, DOWN, PLAIN = "fp8_up_gated_64x8x128_swap", "fp8_down_128x8x128_swap", "fp8_packed_128x8x128_swap"


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def test_few_rows_are_four_launches_one_behind_the_other(fake):
    given, call = weights(fake), tokens(fake)
    found = check_call(fake, given, call)
    assert keys(fake) == ["moe_route", UP, DOWN, "moe_combine"]
    strips = 2 * INNER // 16
    grids = [(1 + T, 1, 1), (min(170, (E + T * TOP // 8) * strips), 1, 1), (170, 1, 1), (T, 1, 1)]
    grids[2] = (min(170, (E + T * TOP // 8) * H // 8), 1, 1)
    assert [each.grid for each in fake.launches] == grids
    variants = [manifest.default().variants[key] for key in keys(fake)]
    for each, variant in zip(fake.launches, variants, strict=True):
        assert (each.stream, each.context) == (STREAM, CONTEXT)
        assert each.programmatic, each.symbol
        assert each.block == (variant.threads, 1, 1)
        assert each.shared_memory == variant.shared_memory
    assert bytes(gemm_of(found["down"]).map_a) == bytes(128), "rows are gathered or quantised: no map"
    assert bytes(gemm_of(found["up"]).map_a) == bytes(128)
    assert fake.context == 0
    assert fake.allocated == {}


def test_the_tensor_maps_of_the_weights(fake):
    given, call = weights(fake), tokens(fake)
    found = launched(fake, make(given), call)
    row = H  # bytes
    # Eight gates, the eight ups that belong to them, and so on; boxes of twice as many features each.
    shape = [H, 8, 2, INNER // 8, E]
    strides = [row, INNER * row, 8 * row, 2 * INNER * row]
    maps = found["up"].params.gemm.map_b
    for each, features in zip(maps, (16, 32, 64), strict=False):
        assert text_of(each) == f"0 5 {shape} {strides} [128, 8, 2, {features // 16}, 1] 3 2"
        assert address_of(each) == given["w1"].address
    assert all(bytes(each) == bytes(128) for each in maps[3:])
    maps = found["down"].params.gemm.map_b
    for each, features in zip(maps, (8, 16, 32, 64, 128), strict=False):
        assert text_of(each) == f"0 3 [{INNER}, {H}, {E}] [{INNER}, {H * INNER}] [128, {features}, 1] 3 2"
        assert address_of(each) == given["w2"].address
    assert bytes(maps[5]) == bytes(128)


def test_the_tensor_map_of_interleaved_weights_with_gaps(fake):
    w1 = fake.tensor((E, 2 * INNER, H), "float8_e4m3fn", strides=(20_000, H + 16, 1))
    given = weights(fake, w1=w1, activation="swigluoai")
    found = check_call(fake, given, tokens(fake))
    row = H + 16
    for each in found["up"].params.gemm.map_b[:3]:
        text = text_of(each)
        assert text.startswith(f"0 5 {[H, 8, 2, INNER // 8, E]} {[2 * row, row, 16 * row, 20_000]} ")
    w2 = fake.tensor((E, H, INNER), "float8_e4m3fn", strides=(9_600, INNER + 32, 1))
    found = check_call(fake, {**given, "w2": w2}, tokens(fake))
    for each in found["down"].params.gemm.map_b[:5]:
        assert text_of(each).startswith(f"0 3 {[INNER, H, E]} {[INNER + 32, 9_600]} ")


def test_without_gates(fake):
    given = weights(fake, gated=False, activation="relu2")
    found = check_call(fake, given, tokens(fake))
    assert keys(fake)[1] == UP.replace("_gated", "")
    for each, features in zip(found["up"].params.gemm.map_b, (8, 16, 32, 64), strict=False):
        assert text_of(each) == f"0 3 {[H, INNER, E]} {[H, INNER * H]} [128, {features}, 1] 3 2"


@pytest.mark.parametrize("options", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_activation(fake, options, dtype):
    check_call(fake, weights(fake, **options), tokens(fake, dtype=dtype))


@pytest.mark.parametrize("static", ["number", "array"])
@pytest.mark.parametrize("which", ["a1_scale", "a2_scale", "both"])
def test_static_scales(fake, static, which):
    names = ("a1_scale", "a2_scale") if which == "both" else (which,)
    scales = {
        name: 0.25 * (i + 1) if static == "number" else fake.tensor((1,), "float32")
        for i, name in enumerate(names)
    }
    given, call = weights(fake, **scales), tokens(fake)
    quantises = "a2_scale" not in scales
    found = check_call(fake, given, call, quantises)
    assert keys(fake) == ["moe_route", UP, DOWN if quantises else PLAIN, "moe_combine"]
    if not quantises:  # TMA brings the rows, which the first GEMM has quantised
        p = found["down"].params
        assert address_of(p.map_a) == p.a == found["up"].params.gemm.d
        rows = T * TOP
        assert text_of(p.map_a) == f"0 3 {[INNER, rows, 1]} {[INNER, INNER]} [128, 8, 1] 3 2"


def test_rows_quantised_apart_are_five_launches(fake, monkeypatch):
    force(monkeypatch, down="fp8_packed_128x16x64_swap")
    given, call = weights(fake), tokens(fake)
    found = check_call(fake, given, call, quantises=False, padding=16)
    assert keys(fake) == ["moe_route", UP, "quantize_fp8", "fp8_packed_128x16x64_swap", "moe_combine"]
    assert found["quantise"].grid == (T * TOP, 1, 1)
    assert found["quantise"].programmatic
    p = found["down"].params
    assert address_of(p.map_a) == p.a == found["quantise"].params.q
    assert text_of(p.map_a) == f"0 3 {[INNER, T * TOP, 1]} {[INNER, INNER]} [64, 16, 1] 2 2"


@pytest.mark.parametrize("more", [0, 1])
def test_results_leave_l2_last_where_they_are_few(fake, monkeypatch, more):
    monkeypatch.setattr(moe_chain, "MOST_KEPT_BYTES", 2 * T * TOP * (H + INNER) - more)
    found = launched(fake, make(weights(fake)), tokens(fake))
    kept = 0 if more else abi.SM12X_KEEP_RESULTS
    assert (found["up"].params.gemm.flags, found["down"].params.gemm.flags) == (kept, kept)


@pytest.mark.parametrize("count", [T, 512 // TOP, 512 // TOP + 1])
def test_early_routes_where_the_first_gemm_counts_them(fake, count):
    given, call = weights(fake, early_routes=True), tokens(fake, count)
    found = launched(fake, make(given), call)
    counted = count * TOP <= 512
    assert (found["route"].params.early, found["up"].params.topk_ids != 0) == (int(counted), counted)
    if count == T:
        check_call(fake, given, call)


def test_early_routes_of_two_layers_alike_are_told_apart(fake):
    given, call = weights(fake), tokens(fake)
    for early in (True, False, True):
        found = launched(fake, make({**given, "early_routes": early}), call)
        assert found["route"].params.early == int(early)


def test_the_attribute_of_programmatic_launch_is_the_manifests(fake, monkeypatch):
    force(monkeypatch, down="fp8_packed_128x32x128_swap")  # made without
    found = launched(fake, make(weights(fake)), tokens(fake))
    assert {name: each.programmatic for name, each in found.items()} == {
        **dict.fromkeys(found, True),
        "down": False,
    }


@pytest.mark.parametrize(("top_k", "ctas"), [(8, 1), (9, 2), (16, 2), (17, 3)])
def test_many_routes_are_counted_by_one_launch_and_placed_by_another(fake, top_k, ctas):
    count = 1024
    given, call = weights(fake), tokens(fake, count, top_k)
    found = launched(fake, make(given), call)
    route = found["route"]
    assert route.grid == (ctas + count, 1, 1)
    variant = manifest.default().variants[keys(fake)[-2]]
    parts = parts_of(found)
    phase = abi.SM12X_ROUTE_ALL if ctas == 1 else abi.SM12X_ROUTE_COUNT
    expected = expected_route(given, call, parts, padding=variant.token_tile, phase=phase)
    assert facts(route.params) == expected
    assert ("place" in found) == (ctas > 1)
    if ctas > 1:
        assert keys(fake)[:2] == ["moe_route"] * 2
        assert found["place"].grid == (ctas, 1, 1)
        assert facts(found["place"].params) == {**expected, "phase": abi.SM12X_ROUTE_PLACE}
    (base,) = fake.kept
    check_workspace(given, call, found, base, fake.kept[base])


@pytest.mark.parametrize("shape", [(1,), (E,), (E, 1), (E, "n"), (E, "n", 1)])
def test_scales_of_the_weights(fake, shape):
    def scale(n):
        return fake.tensor([n if each == "n" else each for each in shape], "float32")

    check_call(fake, weights(fake, w1_scale=scale(2 * INNER), w2_scale=scale(H)), tokens(fake))
    check_call(fake, weights(fake, w1_scale=0.5, w2_scale=scale(H)), tokens(fake))


def test_scales_of_the_weights_with_gaps(fake):
    wide = fake.tensor((E, 2 * INNER), "float32", strides=(1000, 1))
    found = check_call(fake, weights(fake, w1_scale=wide, w2_scale=2.0), tokens(fake))
    assert found["up"].params.gemm.stride_b_scale == 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_biases(fake, dtype):
    bias1 = fake.tensor((E, 2 * INNER), dtype, strides=(128, 1))
    given = weights(fake, bias1=bias1, bias2=fake.tensor((E, H), dtype))
    check_call(fake, given, tokens(fake))


@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_experts_elsewhere(fake, ids):
    given = weights(fake, expert_map=fake.tensor((4 * E,), "int32"))
    check_call(fake, given, tokens(fake, ids=ids))


@pytest.mark.parametrize("options", [{}, {"a2_scale": 0.5}, {"a1_scale": 0.5}])
def test_router_weights_on_the_input_do_not_come_again_behind_it(fake, options):
    given = weights(fake, apply_router_weight_on_input=True, **options)
    call = tokens(fake, top_k=1)
    check_call(fake, given, call, quantises="a2_scale" not in options)


def test_rows_of_x_and_out_with_gaps(fake):
    x = fake.tensor((T, H), "bfloat16", strides=(H + 8, 1))
    out = fake.tensor((T, H), "bfloat16", strides=(3 * H, 1))
    check_call(fake, weights(fake), tokens(fake, x=x, out=out))


def test_a_wide_hidden_size_is_summed_by_several_ctas(fake):
    hidden = 2064  # one CTA has 128 threads of 8 values
    given, call = weights(fake, hidden=hidden), tokens(fake, hidden=hidden)
    found = launched(fake, make(given), call)
    assert found["combine"].grid == (T, 3, 1)


def test_split_k_has_counters_and_room_for_its_parts(fake, monkeypatch):
    force(monkeypatch, up=UP, down=DOWN, up_units=1, down_units=2)
    hidden, inner = 512, 1024
    given = weights(fake, hidden=hidden, inner=inner)
    call = tokens(fake, hidden=hidden)
    found = launched(fake, make(given), call)
    up, down = gemm_of(found["up"]), gemm_of(found["down"])
    assert (up.least_units, down.least_units) == (1, 2)
    assert up.partials == down.partials != 0
    base, counters = fake.kept
    assert (up.counters, down.counters) == (counters, counters)
    assert ("memset", counters, 0, fake.kept[counters]) in fake.log
    check_workspace(given, call, found, base, fake.kept[base])
    # Only where K is split.
    force(monkeypatch, up=UP, down=DOWN, down_units=2)
    found = launched(fake, make(given), call)
    up, down = gemm_of(found["up"]), gemm_of(found["down"])
    assert (up.partials, up.counters) == (0, 0)
    assert (down.partials != 0, down.counters) == (True, counters)


shapes = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 64),
        "hidden": st.integers(1, 40).map(lambda n: 16 * n),
        "inner": st.integers(1, 40).map(lambda n: 16 * n),
        "count": st.integers(1, 3000),
        "top_k": st.integers(1, 9),
        "dtype": st.sampled_from(["bfloat16", "float16"]),
        "gated": st.booleans(),
        "a1_scale": st.sampled_from([None, 0.5]),
        "a2_scale": st.sampled_from([None, 0.5]),
        "units": st.integers(0, 3),
        "down": st.sampled_from([None, DOWN, "fp8_packed_128x128x128_coop"]),
    }
)


@having(shapes)
@settings(max_examples=30, deadline=None)
def test_no_part_of_the_workspace_lies_on_another(layer_root, shape):
    count, top_k, hidden = shape["count"], shape["top_k"], shape["hidden"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = install(monkeypatch, layer_root)
        down = None if shape["a2_scale"] is not None else shape["down"]
        if down or shape["units"]:
            force(monkeypatch, down=down, up_units=shape["units"], down_units=shape["units"] // 2)
        options = {name: shape[name] for name in ("gated", "a1_scale", "a2_scale")}
        given = weights(fake, shape["experts"], hidden, shape["inner"], **options)
        call = tokens(fake, count, top_k, hidden, shape["dtype"])
        layer = make(given)
        needed = layer.workspace_size(count, top_k, shape["dtype"])
        workspace = call["workspace"] = fake.tensor((needed + 256,), "uint8", offset=16)
        found = launched(fake, layer, call)
        base = -(-workspace.address // 256) * 256
        check_workspace(given, call, found, base, needed)
        sizes, parts = sizes_of(given, call, found), parts_of(found)
        assert parts["q1"] == base
        assert max(parts[name] + size for name, size in sizes.items() if size) <= base + needed
        assert all(layer.workspace_size(less, top_k, shape["dtype"]) <= needed for less in range(count))

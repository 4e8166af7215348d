"""Plans of expert layers on a fake driver: what calls share, and what they do not."""

from __future__ import annotations

import gc
import weakref

import pytest

from sm12x import abi, driver
from sm12x.errors import CudaError
from sm12x.ops import fused_moe as module
from sm12x.ops import launch, moe_plan, scratch
from unit.fake_driver import CONTEXT, install
from unit.layer_cases import (
    INNER,
    STREAM,
    TOP,
    E,
    H,
    T,
    make,
    run,
    run_function,
    tokens,
    weights,
)
from unit.layer_params import facts, gemm_of


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def last(fake, count=4):
    """All parameters of the last call, as bytes."""
    return [bytes(each.params) for each in fake.launches[-count:]]


LAUNCHES = ["cuLaunchKernelEx"] * 4


def test_a_second_call_changes_its_addresses_and_nothing_else(fake):
    fake.context = CONTEXT
    layer, first, second = make(weights(fake)), tokens(fake), tokens(fake)
    run(layer, first)
    before = [facts(each.params) for each in fake.launches]
    maps = [bytes(gemm_of(each).map_b) for each in fake.launches[1:3]]
    fake.calls.clear()
    run(layer, second)
    assert fake.calls == ["cuCtxGetCurrent", "cuStreamIsCapturing", *LAUNCHES]
    assert fake.asked_stream == fake.launches[-1].stream > 2**32
    after = [facts(each.params) for each in fake.launches[4:]]
    changed = [
        {name: (old[name], new[name]) for name in old if old[name] != new[name]}
        for old, new in zip(before, after, strict=True)
    ]
    moved = {name: (first[name].address, second[name].address) for name in first}
    assert changed == [
        {"tokens.x": moved["x"], "topk_ids": moved["topk_ids"], "topk_weights": moved["topk_weights"]},
        {"topk_ids": moved["topk_ids"]},  # which count the rows of the first GEMM
        {},
        {"out": moved["out"]},
    ]
    assert [bytes(gemm_of(each).map_b) for each in fake.launches[5:7]] == maps


def test_router_weights_on_the_input_come_with_every_call(fake):
    layer = make(weights(fake, apply_router_weight_on_input=True))
    for _ in range(2):
        call = tokens(fake, top_k=1)
        run(layer, call)
        assert fake.launches[-4].params.tokens.weight == call["topk_weights"].address


def test_every_number_of_tokens_is_prepared_once(fake):
    layer = make(weights(fake))
    made = {}
    for count in (1, 5, 5, 64, 1, 5, 64):
        fake.calls.clear()
        run(layer, tokens(fake, count))
        known = count in made
        assert ("cuTensorMapEncodeTiled" in fake.calls) is not known, count
        assert fake.launches[-1].params.tokens == count
        made[count] = True


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "float16"},
        {"ids": "int64"},
        {"top_k": 3},
        {"count": T + 1},
        {"x": ((T, H), "bfloat16", (2 * H, 1))},
        {"out": ((T, H), "bfloat16", (2 * H, 1))},
    ],
    ids=str,
)
def test_calls_that_differ_do_not_share_launches(fake, other):
    layer = make(weights(fake))
    run(layer, tokens(fake))
    given = {
        name: fake.tensor(*value[:2], strides=value[2]) if isinstance(value, tuple) else value
        for name, value in other.items()
    }
    call = tokens(fake, **given)
    run(layer, call)
    run(make(weights(fake)), call)  # that never saw another
    seen = [facts(each.params) for each in fake.launches]
    assert seen[4:8] == seen[8:] != seen[:4]
    route, combine = fake.launches[4].params, fake.launches[7].params
    assert route.tokens.x_type == abi.OUT_TYPES[call["x"].dtype.name]
    assert route.ids_are_64_bit == int(call["topk_ids"].dtype.name == "int64")
    assert (route.top_k, route.tokens.rows) == call["topk_ids"].extents[::-1]
    assert (route.tokens.stride_x, combine.stride_out) == (call["x"].steps[0], call["out"].steps[0])


def test_the_function_finds_its_plan_again(fake):
    given = weights(fake, w1_scale=fake.tensor((E,), "float32"), a2_scale=0.5)
    run_function(given, tokens(fake))
    fake.calls.clear()
    fake.context = CONTEXT
    run_function(given, tokens(fake))
    assert len(module._plans) == 1
    assert fake.calls == ["cuCtxGetCurrent", "cuStreamIsCapturing", *LAUNCHES]


def at_other_shapes(fake, given):
    """Arrays at the same addresses that are something else."""
    w1, w2 = given["w1"], given["w2"]

    def like(tensor, *args, **more):
        made = fake.tensor(*args, **more)
        made.address = tensor.address
        return made

    scale = fake.tensor((1,), "float32")
    yield {**given, "w1_scale": scale}
    yield {**given, "w1_scale": like(scale, (E,), "float32")}
    yield {**given, "w1_scale": like(scale, (E, 2 * INNER), "float32")}
    yield {**given, "w2_scale": scale}
    yield {**given, "w2_scale": 0.5}
    yield {**given, "a1_scale": scale}
    yield {**given, "a2_scale": scale}
    yield {**given, "a1_scale": 0.5}
    yield {**given, "a2_scale": 0.5}
    yield {**given, "a2_scale": 0.25}
    yield {**given, "activation": "gelu"}
    yield {**given, "activation": "swigluoai"}
    yield {**given, "activation": "swigluoai", "limit": 2.0}
    yield {**given, "activation": "swigluoai", "alpha": 2.0}
    yield {**given, "activation": "swigluoai", "beta": 2.0}
    yield {**given, "expert_map": like(scale, (8,), "int32")}
    yield {**given, "expert_map": like(scale, (9,), "int32")}
    for dtype in ("float32", "bfloat16"):
        yield {**given, "bias1": like(scale, (E, 2 * INNER), dtype)}
        yield {**given, "bias2": like(scale, (E, H), dtype)}
    strided = {"strides": (4 * INNER * H, 2 * H, 1)}
    yield {**given, "w1": like(w1, (E, 2 * INNER, H), "float8_e4m3fn", **strided)}
    fewer = {"w1": like(w1, (E - 1, 2 * INNER, H), "float8_e4m3fn")}
    yield {**given, **fewer, "w2": like(w2, (E - 1, H, INNER), "float8_e4m3fn")}
    halves = {"w1": like(w1, (E, INNER, H), "float8_e4m3fn"), "gated": False}
    yield {**given, **halves}
    yield {**given, "w1": like(w1, (E, 2 * INNER, H), "uint8"), "dtype": "float8_e4m3fn"}
    yield {**given, "w1": weights(fake)["w1"]}
    yield {**given, "w2": weights(fake)["w2"]}


def test_layers_at_the_same_addresses_are_not_confused(fake):
    """Each gets the launches that it gets where no other was seen before."""
    call = tokens(fake)
    given = weights(fake)
    layers = [given, *at_other_shapes(fake, given)]
    for _ in range(2):
        for each in layers:
            fake.launches.clear()
            run_function(each, call)
            cached = last(fake)
            run(make(each), call)
            assert last(fake) == cached
    assert len(module._plans) == len(layers)
    call = tokens(fake, top_k=1)
    for on_input in (False, True):
        run_function({**given, "apply_router_weight_on_input": on_input}, call)
        assert bool(fake.launches[-4].params.tokens.weight) is on_input


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({}, {"gated": 1}),
        ({}, {"apply_router_weight_on_input": 0}),
        ({"activation": "swigluoai", "alpha": 1.0}, {"activation": "swigluoai", "alpha": True}),
        ({"limit": 1.0}, {"limit": True}),
    ],
)
def test_a_plan_does_not_make_bad_input_good(fake, good, bad):
    given, call = weights(fake), tokens(fake)
    run_function({**given, **good}, call)
    fake.launches.clear()
    (name,) = (name for name in bad if bad[name] is True or bad[name] in (0, 1))
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        run_function({**given, **bad}, call)
    assert fake.launches == []


def test_an_option_that_cannot_be_hashed_is_named(fake):
    with pytest.raises(TypeError, match="^activation: expected a str, got list"):
        run_function(weights(fake, activation=["silu"]), tokens(fake))
    assert module._plans == {}


def test_the_caches_have_an_end(fake, monkeypatch):
    monkeypatch.setattr(module, "MAX_PLANS", 3)
    monkeypatch.setattr(moe_plan, "MOST_CALLS", 4)
    call = tokens(fake)
    for _ in range(8):
        run_function(weights(fake), call)
        assert 1 <= len(module._plans) <= 3
    layer = make(weights(fake))
    for count in range(1, 10):
        run(layer, tokens(fake, count))
        assert fake.launches[-1].params.tokens == count
        assert 1 <= len(layer._plan._calls) <= 4


def test_the_plan_object_keeps_its_arrays_alive_and_the_functions_cache_does_not(fake):
    given = weights(fake, w1_scale=fake.tensor((E,), "float32"), bias2=fake.tensor((E, H), "float32"))
    names = ("w1", "w2", "w1_scale", "bias2")
    there = [weakref.ref(given[name]) for name in names]
    run_function(given, tokens(fake))
    assert len(module._plans) == 1
    layer = make(given)
    del given
    gc.collect()
    assert all(each() is not None for each in there)
    del layer
    gc.collect()
    assert [each() for each in there] == [None] * 4
    assert len(module._plans) == 1


def test_a_new_out_is_of_xs_kind(fake):
    layer = make(weights(fake))
    call = tokens(fake, dtype="float16")
    del call["out"]
    out = run(layer, call)
    assert (out.shape, out.dtype.name, out.get_device()) == ((T, H), "float16", 0)
    assert fake.launches[-1].params.out == out.address
    assert run(layer, call) is not out


def test_a_forked_process_begins_anew(fake, monkeypatch):
    given, call = weights(fake), tokens(fake)
    layer = make(given)
    run(layer, call)
    run_function(given, call)
    assert module._plans
    assert scratch._blocks
    driver._after_fork_in_child()
    assert module._plans == scratch._blocks == {}
    monkeypatch.setattr(driver, "_owner_pid", 1)
    fake.launches.clear()
    fake.calls.clear()
    for again in (lambda: run(layer, call), lambda: run_function(given, call)):
        with pytest.raises(CudaError, match="initialised by sm12x in process 1 before it forked this one"):
            again()
    assert fake.launches == []
    assert fake.calls == [], "not one call of the parent's driver"


def test_the_choice_is_printed(fake, monkeypatch, capsys):
    monkeypatch.setattr(launch, "LOG_SELECT", True)
    run(make(weights(fake)), tokens(fake))
    text = capsys.readouterr().err
    rows = f"packed M={T * TOP} E={E}"
    assert f"sm12x select: {rows} N={2 * INNER} K={H}, row_index" in text
    assert text.count(f"sm12x select: {rows} N={H} K={INNER}, row_weight") == 2
    assert "sm12x select: rows of the second GEMM: no launch of their own" in text
    run(make(weights(fake)), tokens(fake, 8192))
    assert "sm12x select: rows of the second GEMM: a launch of their own" in capsys.readouterr().err

"""Calls of a layer on torch tensors that look like one before: what is skipped, and what never is."""

from __future__ import annotations

import pytest

from sm12x import driver
from sm12x.ops import fused_moe as module
from sm12x.ops import moe_plan, torch_call, torch_layer_call
from unit.fake_driver import install
from unit.layer_cases import STREAM, TOP, H, T, make, run, tokens, weights


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def space(fake, layer):
    return fake.tensor((layer.workspace_size(T, TOP),), "uint8")


ARRAYS = ("x", "topk_weights", "topk_ids", "out")


def sized(fake, count):
    """Arguments of a call of so many tokens."""
    t = fake.tensor
    return {
        "x": t((count, H), "bfloat16"),
        "topk_weights": t((count, TOP), "float32"),
        "topk_ids": t((count, TOP), "int32"),
        "out": t((count, H), "bfloat16"),
    }


@pytest.fixture(params=[False, True], ids=["own memory", "workspace"])
def known(fake, monkeypatch, request):
    """A layer whose first call was made, and what makes the arguments of others; taking an array in the long
    way fails from here on."""
    layer = make(weights(fake))

    def call(**more):
        given = {"workspace": space(fake, layer)} if request.param else {}
        return tokens(fake, **given, **more)

    run(layer, call())
    fake.launches.clear()

    def long_way(obj, name, stream):
        raise AssertionError(f"{name} was taken in")

    monkeypatch.setattr(module, "ingest", long_way)
    return layer, call


def test_a_call_like_one_before_launches_with_the_new_addresses_on_the_current_stream(fake, known):
    layer, call = known
    given = call()
    fake.streams[0] = STREAM + 64
    assert run(layer, given) is given["out"]
    route, up, down, combine = fake.launches
    assert {each.stream for each in fake.launches} == {STREAM + 64}
    assert route.params.tokens.x == given["x"].address
    assert (route.params.topk_weights, route.params.topk_ids) == tuple(
        given[name].address for name in ("topk_weights", "topk_ids")
    )
    assert combine.params.out == given["out"].address
    if "workspace" in given:
        start = given["workspace"].address
        for address in (up.params.gemm.d, down.params.gemm.d, route.params.offsets):
            assert start <= address < start + given["workspace"].shape[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"x": ((T + 1, H), "bfloat16")},
        {"x": ((T, H), "float16")},
        {"x": ((T, H), "bfloat16", 1)},
        {"topk_weights": ((T, TOP), "float16")},
        {"topk_ids": ((T, TOP), "int64")},
        {"topk_ids": ((T, TOP + 1), "int32")},
        {"out": ((T, H), "float16")},
        {"out": ((T, H), "bfloat16", 0, (2 * H, 1))},
        {"workspace": ((64,), "uint8")},
    ],
    ids=lambda changed: f"{next(iter(changed))}-{next(iter(changed.values()))}",
)
def test_a_call_that_differs_in_anything_but_addresses_is_looked_at_in_full(fake, known, changed):
    layer, call = known
    given = {**call(), **{name: fake.tensor(*spec) for name, spec in changed.items()}}
    with pytest.raises(AssertionError, match="was taken in"):
        run(layer, given)
    assert fake.launches == []


@pytest.mark.parametrize("name", [*ARRAYS, "workspace"])
def test_a_nested_or_lazily_negated_tensor_is_never_taken_for_a_plain_one(fake, known, name):
    layer, call = known
    if name not in call():
        pytest.skip("calls without a workspace")
    for fault in ({"is_nested": True}, {"is_neg": lambda: True}):
        given = call()
        for attribute, value in fault.items():
            setattr(given[name], attribute, value)
        with pytest.raises(AssertionError, match="was taken in"):
            run(layer, given)
    assert fake.launches == []


def test_a_stream_or_a_new_output_goes_the_long_way(fake, known):
    layer, call = known
    with pytest.raises(AssertionError, match="was taken in"):
        layer(**{**call(), "stream": STREAM})
    with pytest.raises(AssertionError, match="was taken in"):
        layer(**{**call(), "out": None})
    assert fake.launches == []


@pytest.mark.parametrize("name", ARRAYS)
def test_misaligned_and_missing_memory_is_refused_in_a_known_call_too(fake, name):
    layer = make(weights(fake))
    run(layer, tokens(fake))
    fake.launches.clear()
    for address in (0, 2):
        given = tokens(fake)
        given[name].address = given[name].address + 2 if address else 0
        with pytest.raises(ValueError, match=f"^{name}: "):
            run(layer, given)
    assert fake.launches == []


def test_overlaps_are_refused_in_a_known_call_too(fake):
    made = weights(fake)
    layer = make(made)
    run(layer, tokens(fake, workspace=space(fake, layer)))
    fake.launches.clear()
    for other in ("x", "w1", "w2"):
        given = tokens(fake, workspace=space(fake, layer))
        given["out"].address = {**made, **given}[other].address
        with pytest.raises(ValueError, match="^out: "):
            run(layer, given)
    given = tokens(fake, workspace=space(fake, layer))
    given["workspace"].address = given["x"].address
    with pytest.raises(ValueError, match="^workspace: "):
        run(layer, given)
    assert fake.launches == []


def test_tensors_of_which_one_is_two_arguments_have_no_guard(fake):
    tensor, other = fake.tensor((4,), "uint8"), fake.tensor((4,), "uint8")
    assert torch_call.make_guard((tensor, other)) is not None
    assert torch_call.make_guard((tensor, tensor)) is None


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_others_go_the_long_way(fake, known, name):
    layer, call = known

    class Other:
        """Has what DLPack asks for."""

        def __init__(self, tensor):
            self.shape = tensor.shape

    given = call()
    given[name] = Other(given[name])
    with pytest.raises((AssertionError, TypeError)) as caught:
        run(layer, given)
    assert "taken in" in str(caught.value) or name in str(caught.value)
    assert fake.launches == []


def test_calls_that_hand_arrays_over_are_not_remembered(fake):
    layer = make(weights(fake))
    run(layer, tokens(fake))
    (plan,) = layer._plan._calls.values()
    layer._plan.known.clear()
    plan.hand_over = True  # as where the weights are JAX's, which have to live until the kernels have run
    torch_layer_call.remember(layer._plan, plan, *(tokens(fake)[name] for name in ARRAYS), None)
    assert layer._plan.known == {}
    plan.hand_over = False
    torch_layer_call.remember(layer._plan, plan, *(tokens(fake)[name] for name in ARRAYS), None)
    assert len(layer._plan.known) == 1


def test_what_is_known_goes_with_the_plans_of_calls(fake, monkeypatch):
    monkeypatch.setattr(moe_plan, "MOST_CALLS", 2)
    layer = make(weights(fake))
    for count in (1, 2):
        run(layer, sized(fake, count))
    assert len(layer._plan.known) == len(layer._plan._calls) == 2
    run(layer, sized(fake, 3))
    assert len(layer._plan.known) == len(layer._plan._calls) == 1


def test_so_many_calls_of_a_shape_are_known_at_most(fake, monkeypatch):
    monkeypatch.setattr(torch_layer_call, "MAX_ALIKE", 2)
    layer = make(weights(fake))
    for stride in (H, 2 * H, 3 * H):
        run(layer, tokens(fake, out=fake.tensor((T, H), "bfloat16", 0, (stride, 1))))
    (alike,) = layer._plan.known.values()
    assert len(alike) == 2
    fake.launches.clear()
    monkeypatch.setattr(module, "ingest", None)
    for stride in (3 * H, 2 * H):  # the last two
        run(layer, tokens(fake, out=fake.tensor((T, H), "bfloat16", 0, (stride, 1))))
    assert len(fake.launches) == 8


def test_calls_of_several_shapes_are_all_known(fake, monkeypatch):
    layer = make(weights(fake))
    for count in (1, 2, 3):
        run(layer, sized(fake, count))
    monkeypatch.setattr(module, "ingest", None)
    for count in (3, 1, 2):
        run(layer, sized(fake, count))
    assert len(layer._plan.known) == 3


def test_a_call_of_no_tokens_is_not_remembered_and_launches_nothing(fake):
    layer = make(weights(fake))
    t = fake.tensor
    for _ in range(2):
        layer(
            t((0, H), "bfloat16"),
            t((0, TOP), "float32"),
            t((0, TOP), "int32"),
            out=t((0, H), "bfloat16"),
        )
    assert layer._plan.known == {}
    assert fake.launches == []


def test_a_forked_process_is_refused_though_the_call_is_known(fake, known, monkeypatch):
    layer, call = known

    def refuse(ordinal):
        raise driver.CudaError("forked")

    monkeypatch.setattr(moe_plan.driver, "get_device", refuse)
    with pytest.raises(driver.CudaError, match="forked"):
        run(layer, call())
    assert fake.launches == []

"""Plans of expert layers on a fake driver: what calls share, what they do not, and what they refuse."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from sm12x import abi, driver, outputs
from sm12x.errors import CudaError
from sm12x.ops import fused_moe as module
from sm12x.ops import launch, moe_plan, scratch
from unit.fake_driver import CONTEXT, install
from unit.fake_jax import ArrayImpl, install_jax
from unit.layer_cases import (
    CALL,
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
from unit.test_moe_chain import facts, gemm_of

LAUNCHES = ["cuLaunchKernelEx"] * 4


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def last(fake, count=4):
    """All parameters of the last call, as bytes."""
    return [bytes(each.params) for each in fake.launches[-count:]]


def nothing_happened(fake):
    return fake.launches == [] and fake.allocated == {}


# What calls share.


def test_a_second_call_changes_its_addresses_and_nothing_else(fake):
    fake.context = CONTEXT
    layer, first, second = make(weights(fake)), tokens(fake), tokens(fake)
    run(layer, first)
    before = [facts(each.params) for each in fake.launches]
    maps = [bytes(gemm_of(each).map_b) for each in fake.launches[1:3]]
    fake.calls.clear()
    run(layer, second)
    assert fake.calls == ["cuCtxGetCurrent", *LAUNCHES]
    after = [facts(each.params) for each in fake.launches[4:]]
    changed = [
        {name: (old[name], new[name]) for name in old if old[name] != new[name]}
        for old, new in zip(before, after, strict=True)
    ]
    moved = {name: (first[name].address, second[name].address) for name in first}
    assert changed == [
        {"tokens.x": moved["x"], "topk_ids": moved["topk_ids"], "topk_weights": moved["topk_weights"]},
        {},
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
    assert fake.calls == ["cuCtxGetCurrent", *LAUNCHES]


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
    monkeypatch.setattr(moe_plan, "MOST_CHAINS", 4)
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


# Streams, contexts, threads, failures.


def test_the_current_stream_is_asked_for_on_every_call(fake):
    layer = make(weights(fake))
    for stream in (STREAM, STREAM + 16, 0, STREAM):
        fake.streams[0] = stream
        run(layer, tokens(fake))
        assert {each.stream for each in fake.launches[-4:]} == {stream}
        run(layer, tokens(fake, stream=STREAM + 32))
        assert {each.stream for each in fake.launches[-4:]} == {STREAM + 32}


def test_a_stream_that_is_none(fake):
    layer = make(weights(fake))
    with pytest.raises(TypeError, match="^stream: expected an integer handle"):
        run(layer, tokens(fake, stream="0"))
    assert nothing_happened(fake)


@pytest.mark.parametrize("before", [0, CONTEXT, CONTEXT + 1, 0x7F00_1234_5678])
def test_the_callers_context_is_put_back(fake, before):
    layer = make(weights(fake))
    for _ in range(2):
        fake.context = before
        run(layer, tokens(fake))
        assert fake.context == before
    assert {each.context for each in fake.launches} == {CONTEXT}
    fake.fail["cuLaunchKernelEx"] = [719]
    with pytest.raises(CudaError):
        run(layer, tokens(fake))
    assert fake.context == before


def test_a_context_that_cannot_be_asked_for_is_an_error(fake):
    fake.context = CONTEXT
    layer = make(weights(fake))
    run(layer, tokens(fake))
    fake.fail["cuCtxGetCurrent"] = [4]
    run(layer, tokens(fake))  # asked again, with the status checked
    fake.launches.clear()
    fake.fail["cuCtxGetCurrent"] = [4, 4]
    with pytest.raises(CudaError, match="cuCtxGetCurrent failed with CUDA_ERROR_DEINITIALIZED"):
        run(layer, tokens(fake))
    assert fake.launches == []


def test_a_layer_of_the_second_device(fake):
    fake.streams[1], fake.context = STREAM + 16, CONTEXT
    given = {name: fake.tensor(x.shape, x.dtype.name, 1) for name, x in weights(fake).items()}
    call = {name: fake.tensor(x.shape, x.dtype.name, 1) for name, x in tokens(fake).items()}
    layer = make(given)
    for _ in range(2):
        run(layer, call)
    assert {(each.context, each.stream) for each in fake.launches} == {(CONTEXT + 1, STREAM + 16)}
    assert fake.context == CONTEXT
    assert list(scratch._blocks) == [(1, STREAM + 16)]


def test_threads_do_not_share_parameters(fake):
    fake.context = CONTEXT  # the fake's threads have one
    layer, calls = make(weights(fake)), [tokens(fake, random.choice((3, 7))) for _ in range(64)]
    run(layer, calls[0])
    fake.launches.clear()
    barrier = threading.Barrier(4)

    def work(part):
        barrier.wait()
        for call in part:
            run(layer, {**call, "stream": call["x"].address})  # the stream tells the calls apart

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [calls[i::4] for i in range(4)]))
    for call in calls:
        route, up, _, combine = (each for each in fake.launches if each.stream == call["x"].address)
        p = route.params
        assert (p.tokens.x, p.topk_ids) == (call["x"].address, call["topk_ids"].address)
        assert combine.params.out == call["out"].address
        assert up.params.gemm.a == p.tokens.q
        assert scratch._blocks[0, call["x"].address].address == p.tokens.q


def test_launches_of_two_threads_on_one_stream_do_not_come_in_turns(fake, monkeypatch):
    """They share a workspace: the kernels of one call must be behind each other."""
    fake.context = CONTEXT
    real = fake._launched

    def slow(*arguments):
        real(*arguments)
        time.sleep(0.0003)  # another thread's turn, as where the device's queue is full

    monkeypatch.setattr(fake, "_launched", slow)
    layers, calls = [make(weights(fake)) for _ in range(2)], [tokens(fake) for _ in range(24)]
    barrier = threading.Barrier(3)

    def work(number):
        barrier.wait()
        for call in calls[number::3]:
            run(layers[number % 2], call)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    of_call = {call["x"].address: call["out"].address for call in calls}
    assert len(fake.launches) == 4 * len(calls)
    for i in range(0, len(fake.launches), 4):
        route, _, _, combine = fake.launches[i : i + 4]
        assert of_call[route.params.tokens.x] == combine.params.out
    assert len({each.params.tokens.q for each in fake.launches[::4]}) == 1


@pytest.mark.parametrize("which", range(4))
def test_a_failed_launch_names_its_kernel_and_the_next_call_works(fake, which):
    layer, call = make(weights(fake)), tokens(fake)
    run(layer, call)
    expected, variant = last(fake), keys(fake)[which]
    fake.launches.clear()
    fake.fail["cuLaunchKernelEx"] = [0] * which + [719]
    with pytest.raises(CudaError, match=f"cuLaunchKernelEx failed with .*719.*variant {variant}") as caught:
        run(layer, tokens(fake))
    assert (caught.value.variant, caught.value.code) == (variant, 719)
    assert len(fake.launches) == which
    run(layer, call)
    assert last(fake) == expected
    assert len(layer._plan._calls) == 1


def test_a_workspace_that_could_not_be_pointed_at_is_pointed_at_again(fake, monkeypatch):
    force(monkeypatch, down="fp8_packed_128x8x128_swap", down_units=1)
    layer, call = make(weights(fake)), tokens(fake)
    for name in ("cuMemsetD8Async", "cuTensorMapReplaceAddress"):
        fake.fail[name] = [719]
        with pytest.raises(CudaError, match=f"{name} failed"):
            run(layer, call)
        assert fake.launches == []
    run(layer, call)
    expected = last(fake, 5)
    run(make(weights(fake)), tokens(fake, stream=0))
    fake.launches.clear()
    for where in (0, STREAM):
        run(layer, {**call, "stream": where})
    assert last(fake, 5) == expected
    assert last(fake, 10)[:5] != expected


def test_every_status_of_a_call_is_checked(fake):
    fake.capturing = True
    layer, call = make(weights(fake)), tokens(fake)
    run(layer, call)
    for name in ("cuMemAllocAsync", "cuMemFreeAsync", "cuCtxSetCurrent", "cuStreamIsCapturing"):
        fake.fail[name] = [2]
        with pytest.raises(CudaError, match=f"{name} failed with CUDA_ERROR_OUT_OF_MEMORY"):
            run(layer, call)
    fake.capturing = False
    fake.fail["cuMemAlloc"] = [2]
    with pytest.raises(CudaError, match="cuMemAlloc failed"):
        run(layer, call)
    assert scratch._blocks == {}
    run(layer, call)


# Memory of the library's own.


def base_of(fake):
    return fake.launches[-4].params.tokens.q


def test_one_block_for_each_stream_shared_by_all_layers(fake):
    layers = [make(weights(fake)) for _ in range(3)]
    bases = set()
    for layer in layers:
        for stream in (STREAM, STREAM + 16):
            run(layer, tokens(fake, stream=stream))
            bases.add((stream, base_of(fake)))
    assert len(bases) == len({base for _, base in bases}) == 2
    assert {base for _, base in bases} == set(fake.kept)
    fake.calls.clear()
    for layer in layers:
        run(layer, tokens(fake))
    assert not [name for name in fake.calls if name.startswith("cuMem")]
    assert fake.allocated == {}


def test_blocks_grow_to_twice_their_size_and_old_ones_stay(fake):
    layer = make(weights(fake))
    needed = 0
    for count in (1, 2, 40, 41, 42, 400, 7):
        run(layer, tokens(fake, count))
        needed = max(needed, layer.workspace_size(count, TOP))
        sizes = list(fake.kept.values())
        assert sizes[-1] >= layer.workspace_size(count, TOP)
        assert all(2 * old <= new for old, new in pairwise(sizes))
        assert sum(sizes) < 4 * needed
        assert base_of(fake) == list(fake.kept)[-1]
    assert len(fake.kept) < 6
    assert fake.freed == []


def test_a_bigger_block_is_used_by_calls_that_had_a_smaller_one(fake):
    layer = make(weights(fake))
    for count in (2, 200, 2):
        run(layer, tokens(fake, count))
    assert [each.params.tokens.q for each in fake.launches[::4]][1:] == [list(fake.kept)[-1]] * 2


def test_while_a_graph_is_captured_nothing_is_allocated_for_good(fake):
    layer = make(weights(fake))
    fake.capturing = True
    for _ in range(2):
        fake.log.clear()
        run(layer, tokens(fake))
        (alloc, address, stream), *launches, freed = fake.log
        assert (alloc, stream, freed) == ("alloc", STREAM, ("free", address, STREAM))
        assert len(launches) == 4
        assert base_of(fake) == address
        assert fake.allocated[address] == layer.workspace_size(T, TOP)
    assert fake.kept == {}
    fake.capturing = False
    run(layer, tokens(fake))
    (block,) = fake.kept
    fake.capturing = True
    fake.calls.clear()
    run(layer, tokens(fake))  # a call as this one has run before: no driver call but the launches
    assert base_of(fake) == block
    assert [name for name in fake.calls if "Mem" in name] == []


def test_a_block_is_allocated_though_another_stream_is_captured(fake, monkeypatch):
    """cuMemAlloc fails while any thread captures in global mode, unless it is told not to mind."""
    real, modes = fake.do_cuMemAlloc, []
    monkeypatch.setattr(
        fake.bindings, "cuMemAlloc", lambda size: modes.append(fake.capture_mode) or (fake.ok, real(size))
    )
    fake.ok = fake.bindings.CUresult(0)
    before = fake.capture_mode
    run(make(weights(fake)), tokens(fake))
    assert [mode.name for mode in modes] == ["CU_STREAM_CAPTURE_MODE_RELAXED"]
    assert fake.capture_mode == before


def test_the_per_thread_default_stream_has_no_block(fake):
    """Its handle names another stream in every thread."""
    layer = make(weights(fake))
    for _ in range(2):
        run(layer, tokens(fake, stream=2))
        assert base_of(fake) in fake.allocated
    assert list(fake.allocated) == fake.freed
    assert fake.kept == {}


def test_a_failed_launch_frees_what_was_allocated_for_it(fake):
    layer = make(weights(fake))
    fake.capturing = True
    fake.fail["cuLaunchKernelEx"] = [0, 719]
    with pytest.raises(CudaError, match="cuLaunchKernelEx"):
        run(layer, tokens(fake))
    assert list(fake.allocated) == fake.freed != []


# A workspace of the caller's.


def test_the_callers_workspace_is_used_from_its_first_multiple_of_256(fake):
    layer = make(weights(fake))
    needed = layer.workspace_size(T, TOP)
    for offset in (0, 16, 255):
        workspace = fake.tensor((needed + 256,), "uint8", offset=offset)
        run(layer, tokens(fake, workspace=workspace))
        assert base_of(fake) == -(-workspace.address // 256) * 256
    exact = fake.tensor((needed // 4,), "float32")
    run(layer, tokens(fake, workspace=exact))
    assert base_of(fake) == exact.address
    assert fake.kept == fake.allocated == {}


def inside(tensor, fake, size, at=0):
    workspace = fake.tensor((size,), "uint8")
    workspace.address = tensor.address + at
    return workspace


def bad_workspaces(fake, given, call, needed):
    short = fake.tensor((needed - 1,), "uint8")
    who = "FusedMoE.workspace_size gives how many"
    yield short, f"expected at least {needed} bytes \\({who}\\), got {needed - 1}$"
    shifted = fake.tensor((needed + 15,), "uint8", offset=240)
    yield shifted, f"expected at least {needed} .*, of which 16 lie before the first multiple of 256"
    yield fake.tensor((0,), "uint8"), "expected at least"
    nowhere = fake.tensor((needed,), "uint8")
    nowhere.address = 0
    yield nowhere, "expected an array that has memory, got address 0"
    for name, tensor in (("x", call["x"]), ("out", call["out"]), ("w1", given["w1"]), ("w2", given["w2"])):
        words = f"expected memory of its own, got an array that overlaps {name}"
        yield inside(tensor, fake, needed), words
        yield inside(tensor, fake, needed, 256 - needed), words
    yield fake.tensor((2, needed), "uint8", strides=(2 * needed, 1)), "expected a contiguous array"
    other = fake.tensor((needed,), "uint8", 1)
    yield other, "expected memory of CUDA device 0 like x, got device 1"
    yield fake.tensor((needed,), "uint8", -1), "expected memory of CUDA device 0 like x, got host memory"


@pytest.mark.parametrize("warm", [False, True])
def test_workspaces_that_are_refused(fake, warm):
    given, call = weights(fake), tokens(fake)
    layer = make(given)
    needed = layer.workspace_size(T, TOP)
    if warm:
        run(layer, {**call, "workspace": fake.tensor((needed,), "uint8")})
    fake.launches.clear()
    for workspace, words in bad_workspaces(fake, given, call, needed):
        with pytest.raises(ValueError, match=f"^workspace: {words}"):
            run(layer, {**call, "workspace": workspace})
        assert nothing_happened(fake)
    run(layer, call)


@pytest.mark.parametrize("name", ["out", "workspace"])
def test_a_read_only_array_is_refused_also_by_a_known_plan(fake, monkeypatch, name):
    readonly = set()

    def ingest(obj, *rest):
        return real(obj, *rest)._replace(readonly=id(obj) in readonly)

    real = module.ingest
    monkeypatch.setattr(module, "ingest", ingest)
    layer = make(weights(fake))
    call = tokens(fake, workspace=fake.tensor((layer.workspace_size(T, TOP),), "uint8"))
    run(layer, call)
    fake.launches.clear()
    readonly.add(id(call[name]))
    with pytest.raises(ValueError, match=f"^{name}: expected an array that can be written"):
        run(layer, call)
    assert nothing_happened(fake)


@pytest.mark.parametrize("count", [0, 1, 5, 9000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_workspace_size_is_what_a_call_takes(fake, count, dtype):
    layer = make(weights(fake))
    needed = layer.workspace_size(count, TOP, dtype)
    assert (needed > 0) is (count > 0)
    if not count:
        return
    for size in (needed, needed - 1):
        call = tokens(fake, count, dtype=dtype, ids="int64", workspace=fake.tensor((size,), "uint8"))
        if size == needed:
            run(layer, call)
        else:
            with pytest.raises(ValueError, match="^workspace: expected at least"):
                run(layer, call)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, 2), ValueError, "tokens: expected at least 0, got -1"),
        ((65_537, 2), ValueError, "tokens: expected at most 65536, got 65537"),
        ((1, 0), ValueError, "top_k: expected at least 1, got 0"),
        ((65_536, 32_768), ValueError, "top_k: expected at most .* routes of all tokens, got 2147483648"),
        ((True, 2), TypeError, "tokens: expected an int, got bool"),
        ((1, 2.0), TypeError, "top_k: expected an int, got float"),
        ((1, 2, "float32"), ValueError, "dtype: expected bfloat16 or float16, got 'float32'"),
    ],
)
def test_bad_arguments_of_workspace_size(fake, arguments, error, words):
    with pytest.raises(error, match=f"^{words}"):
        make(weights(fake)).workspace_size(*arguments)


# What is refused by address and device.


def moved(tensor, by):
    tensor.address += by
    return tensor


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("name", "by", "multiple"),
    [("x", 8, 16), ("out", 8, 16), ("topk_weights", 2, 4), ("topk_ids", 2, 4), ("wide topk_ids", 4, 8)],
)
def test_misaligned_and_null_addresses_name_the_argument(fake, name, by, multiple, warm):
    layer = make(weights(fake))
    ids = "int64" if name.startswith("wide ") else "int32"
    name = name.removeprefix("wide ")
    if warm:
        run(layer, tokens(fake, ids=ids))
        fake.launches.clear()
    call = tokens(fake, ids=ids)
    words = f"^{name}: expected an address that is a multiple of {multiple} bytes"
    with pytest.raises(ValueError, match=words):
        run(layer, {**call, name: moved(call[name], by)})
    assert nothing_happened(fake)
    call = tokens(fake, ids=ids)
    call[name].address = 0
    with pytest.raises(ValueError, match=f"^{name}: expected an array that has memory, got address 0"):
        run(layer, call)
    assert nothing_happened(fake)
    run(layer, tokens(fake, ids=ids))


def test_addresses_that_are_aligned_just_enough(fake):
    layer = make(weights(fake))
    for ids, by in (("int32", 4), ("int64", 8)):
        call = tokens(fake, ids=ids)
        moved(call["topk_ids"], by)
        moved(call["topk_weights"], 4)
        run(layer, call)


@pytest.mark.parametrize("kind", ["object", "function"])
@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        *[("w1", 16), ("w2", 16), ("w1_scale", 4), ("w2_scale", 4), ("a1_scale", 4), ("a2_scale", 4)],
        *[("expert_map", 4), ("bias1", 4), ("bias2", 2)],
    ],
)
def test_misaligned_and_null_addresses_of_the_layer(fake, name, multiple, kind):
    def given():
        t = fake.tensor
        return weights(
            fake,
            w1_scale=t((E,), "float32"),
            w2_scale=t((E, H), "float32"),
            a1_scale=t((1,), "float32"),
            a2_scale=t((1,), "float32"),
            expert_map=t((2 * E,), "int32"),
            bias1=t((E, 2 * INNER), "float32"),
            bias2=t((E, H), "bfloat16"),
        )

    def use(layer):
        if kind == "object":
            make(layer)
        else:
            run_function(layer, tokens(fake))

    layer = given()
    moved(layer[name], multiple)
    use(layer)
    fake.launches.clear()
    layer = given()
    moved(layer[name], multiple // 2)
    words = f"^{name}: expected an address that is a multiple of {multiple} bytes"
    with pytest.raises(ValueError, match=words):
        use(layer)
    layer = given()
    layer[name].address = 0
    with pytest.raises(ValueError, match=f"^{name}: expected an array that has memory, got address 0"):
        use(layer)
    assert nothing_happened(fake)


@pytest.mark.parametrize("name", ["x", "w1", "w2"])
def test_out_that_overlaps_what_is_read(fake, name):
    given = weights(fake)
    call = tokens(fake)
    layer = make(given)
    read = {**given, **call}[name]
    end = read.address + (T * H * 2 if name == "x" else read.extents[0] * read.steps[0])
    for address in (read.address, end - 16, read.address - T * H * 2 + 16):
        out = fake.tensor((T, H), "bfloat16")
        out.address = address
        with pytest.raises(ValueError, match=f"^out: expected memory of its own, .* overlaps {name}"):
            run(layer, {**call, "out": out})
    assert nothing_happened(fake)
    for address in (end, read.address - T * H * 2):  # behind each other without a gap
        out = fake.tensor((T, H), "bfloat16")
        out.address = address
        run(layer, {**call, "out": out})


def test_out_in_the_gaps_between_the_rows_of_x(fake):
    x = fake.tensor((T, H), "bfloat16", strides=(2 * H, 1))
    out = fake.tensor((T, H), "bfloat16", strides=(2 * H, 1))
    out.address = x.address + 2 * H
    run(make(weights(fake)), tokens(fake, x=x, out=out))
    assert len(fake.launches) == 4


@pytest.mark.parametrize("name", [*CALL, "out"])
@pytest.mark.parametrize("device", [1, -1])
def test_arrays_of_another_device(fake, name, device):
    layer, call = make(weights(fake)), tokens(fake)
    call[name] = fake.tensor(call[name].shape, call[name].dtype.name, device)
    with pytest.raises(ValueError, match=r"^(x|out|topk_\w+): expected memory of (a )?CUDA device"):
        run(layer, call)
    assert nothing_happened(fake)


def test_tokens_of_another_device_than_the_weights(fake):
    layer = make(weights(fake))
    call = {name: fake.tensor(x.shape, x.dtype.name, 1) for name, x in tokens(fake).items()}
    words = "^x: expected memory of CUDA device 0, where w1 is, got 1"
    with pytest.raises(ValueError, match=words):
        run(layer, call)
    given = weights(fake, w1_scale=fake.tensor((E,), "float32", 1))
    with pytest.raises(ValueError, match="^w1_scale: expected memory of CUDA device 0 like w1, got device 1"):
        make(given)
    assert nothing_happened(fake)


def test_no_tokens_are_no_launch(fake):
    layer = make(weights(fake))
    call = tokens(fake, 0)
    for each in call.values():
        each.address = 0
    assert run(layer, call) is call["out"]
    del call["out"]
    assert run(layer, call).shape == (0, H)
    assert nothing_happened(fake)
    assert fake.kept == {}


def test_a_new_out_is_of_xs_kind(fake):
    layer = make(weights(fake))
    call = tokens(fake, dtype="float16")
    del call["out"]
    out = run(layer, call)
    assert (out.shape, out.dtype.name, out.get_device()) == ((T, H), "float16", 0)
    assert fake.launches[-1].params.out == out.address
    assert run(layer, call) is not out


# Forks and frameworks.


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


def of_jax(fake, arrays):
    return {
        name: ArrayImpl(fake, x.shape, x.dtype.name) if hasattr(x, "address") else x
        for name, x in arrays.items()
    }


@pytest.mark.parametrize("which", ["tokens", "weights", "both"])
def test_jax_arrays_are_handed_over_on_both_sides(fake, monkeypatch, which):
    install_jax(monkeypatch, fake)
    given, call = weights(fake, w1_scale=fake.tensor((E,), "float32")), tokens(fake)
    if which != "tokens":
        given = of_jax(fake, given)
    if which != "weights":
        del call["out"]
        call = of_jax(fake, call)
    layer = make(given)
    for use in (lambda: run(layer, call), lambda: run_function(given, call)):
        fake.log.clear()
        out = use()
        ours = {each.stream for each in fake.launches[-4:]}
        if which == "weights":
            assert ours == {STREAM}
            assert out is call["out"]
        else:
            kind, array = out
            assert (kind, array.tensor.shape) == ("imported", (T, H))
            assert fake.launches[-1].params.out == array.tensor.address
            assert min(ours) > 2, "a stream of our own"
        # JAX knows nothing of that stream: an event behind the last launch says when memory is free again.
        kinds = [entry[0] for entry in fake.log]
        assert kinds.index("record") > len(kinds) - kinds[::-1].index("launch") - 1
        assert ("record", *ours) in fake.log


def test_what_is_jaxs_is_held_until_the_kernels_have_run(fake, monkeypatch):
    install_jax(monkeypatch, fake)
    monkeypatch.setattr(fake.bindings, "cuEventQuery", lambda event: (fake.bindings.CUresult(600),))
    given, call = of_jax(fake, weights(fake)), of_jax(fake, tokens(fake))
    del call["out"]
    run_function(given, call)
    (held,) = outputs._held
    assert len(held.owners[0]) == 5  # x, routes, w1, w2


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

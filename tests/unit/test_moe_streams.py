"""Streams, contexts, threads, frameworks and failing driver calls of expert layers, on a fake driver."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sm12x import outputs
from sm12x.errors import CudaError
from sm12x.ops import scratch
from unit.fake_driver import CONTEXT, install
from unit.fake_jax import ArrayImpl, install_jax
from unit.layer_cases import (
    STREAM,
    E,
    H,
    T,
    force,
    keys,
    make,
    nothing_happened,
    run,
    run_function,
    tokens,
    weights,
)


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


def last(fake, count=4):
    """All parameters of the last call, as bytes."""
    return [bytes(each.params) for each in fake.launches[-count:]]


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


def slow_launches(fake, monkeypatch):
    """Every launch gives other threads a turn, as where the device's queue is full."""
    real = fake._launched

    def launched(*arguments):
        real(*arguments)
        time.sleep(0.0003)

    monkeypatch.setattr(fake, "_launched", launched)
    fake.context = CONTEXT  # the fake's threads have one


def test_threads_do_not_share_parameters(fake, monkeypatch):
    slow_launches(fake, monkeypatch)
    layer, calls = make(weights(fake)), [tokens(fake, random.choice((3, 7))) for _ in range(32)]
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
    slow_launches(fake, monkeypatch)
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
    other = {**call, "stream": 0}
    fake.fail["cuTensorMapReplaceAddress"] = [719]
    with pytest.raises(CudaError, match="cuTensorMapReplaceAddress failed"):
        run(layer, other)  # at another workspace by half
    run(layer, call)
    assert last(fake, 5) == expected
    run(layer, other)
    moved = last(fake, 5)
    assert all(mine != its for mine, its in zip(moved, expected, strict=True))
    run(layer, call)
    assert last(fake, 5) == expected


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
    by_plan = lambda: run(layer, call)  # noqa: E731
    for use in (
        by_plan,
        by_plan,
        lambda: run_function(given, call),
    ):  # a call like one before is no different
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

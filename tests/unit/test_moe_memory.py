"""Where calls of expert layers have their workspace, on a fake driver."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from sm12x import driver
from sm12x.errors import CudaError
from sm12x.ops import fused_moe as module
from unit.fake_driver import CONTEXT, install
from unit.layer_cases import (
    STREAM,
    TOP,
    T,
    base_of,
    make,
    nothing_happened,
    run,
    tokens,
    weights,
)


@pytest.fixture
def fake(monkeypatch, layer_root):
    fake = install(monkeypatch, layer_root)
    fake.streams[0] = STREAM
    return fake


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


def needed_by(layer):
    """Bytes of workspace that the calls so far need, at most."""
    return max(chain.needed for calls in layer._plan._calls.values() for chain in calls.chains)


def test_blocks_grow_to_twice_their_size_and_old_ones_stay(fake):
    layer = make(weights(fake))
    needed = 0
    for count in (1, 2, 40, 41, 42, 400, 7):
        run(layer, tokens(fake, count))
        needed = needed_by(layer)
        sizes = list(fake.kept.values())
        assert sizes[-1] >= needed
        assert all(2 * old <= new for old, new in pairwise(sizes))
        assert sum(sizes) < 4 * needed
        assert base_of(fake) == list(fake.kept)[-1]
    assert len(fake.kept) < 6
    assert fake.freed == []


def test_two_first_calls_on_a_stream_make_one_block(fake, monkeypatch):
    """Both find none, and the second one must not make another behind the first."""
    fake.context = CONTEXT  # the fake's threads have one
    layer, barrier = make(weights(fake)), threading.Barrier(2)
    monkeypatch.setattr(driver, "stream_is_capturing", lambda *_: barrier.wait() < 0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda call: run(layer, call), [tokens(fake), tokens(fake)]))
    assert len(fake.kept) == 1
    assert len(fake.launches) == 8


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
        assert fake.allocated[address] == needed_by(layer)
    assert fake.kept == {}
    fake.capturing = False
    run(layer, tokens(fake))
    (block,) = fake.kept
    fake.capturing = True
    fake.calls.clear()
    run(layer, tokens(fake))  # the graph may run on another stream than the one that has the block
    assert base_of(fake) != block
    assert [name for name in fake.calls if "Mem" in name] == ["cuMemAllocAsync", "cuMemFreeAsync"]


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
    another = make(given)
    run(another, call)
    needed = needed_by(another)
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
    layer._plan.known.clear()  # torch's tensors can always be written: other arrays come the long way
    with pytest.raises(ValueError, match=f"^{name}: expected an array that can be written"):
        run(layer, call)
    assert nothing_happened(fake)


@pytest.mark.parametrize("count", [0, 1, 5, 9000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_workspace_size_is_enough_and_a_byte_less_than_needed_is_refused(fake, count, dtype):
    layer = make(weights(fake))
    enough = layer.workspace_size(count, TOP, dtype)
    assert (enough > 0) is (count > 0)
    if not count:
        return
    run(layer, tokens(fake, count, dtype=dtype, ids="int64", workspace=fake.tensor((enough,), "uint8")))
    needed = needed_by(layer)
    assert needed <= enough
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

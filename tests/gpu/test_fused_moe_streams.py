"""The expert layer on streams: graphs, no allocation once warm, workspaces, streams and threads."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from forced import Forced  # noqa: E402
from layer_forced import downs, kernels  # noqa: E402
from layer_graph import Graph, counted_allocations  # noqa: E402
from layer_on_stream import DOWNS, SLEEP_CYCLES, UPS, Case, same, up_with  # noqa: E402
from layer_problem import ROUTES_PER_CTA  # noqa: E402
from torch_reference import DEVICE  # noqa: E402
from variants import ARCH, name  # noqa: E402

import sm12x  # noqa: E402
from sm12x.ops import scratch  # noqa: E402
from sm12x.select.layer import LayerChoice  # noqa: E402

TURNS = 120  # of layers that share a workspace
CALLS = 50  # of each thread


@pytest.mark.parametrize("each", DOWNS, ids=name)
@pytest.mark.parametrize("given", [True, False], ids=["workspace_given", "workspace_ours"])
def test_graph_replays_with_changed_inputs(given: bool, each: Forced, seed: int) -> None:
    """A captured layer reads tokens, routes, weights, scales and biases when it is replayed."""
    up = up_with(each)
    first, second, static = Case(seed), Case(seed + 1), Case(seed)
    expected = {case: case.expected(up, each) for case in (first, second)}
    extra: dict[str, Any] = {"out": static.out}
    if given:
        extra["workspace"] = static.workspace
    stream = torch.cuda.Stream()
    with kernels(up, each):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            static(**extra)  # loads kernels, finds the memory
        graph = Graph(lambda: static(**extra), stream)
    for case in (second, first, second):
        static.take(case)
        static.out.fill_(torch.nan)
        if given:
            static.workspace.random_()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert same(static.out, expected[case]), f"{up.name} {each.name}"


def launches(case: Case, choice: LayerChoice) -> int:
    if choice.whole is not None and not choice.several_in_graphs:
        return 1
    routes = case.problem.spec.tokens * case.problem.spec.top_k
    return 4 + choice.quantises_apart + (routes > ROUTES_PER_CTA)


@pytest.mark.parametrize("shape", ["one_token", "few", "many", "static", "two_route_launches"])
@pytest.mark.parametrize("given", [True, False], ids=["workspace_given", "workspace_ours"])
def test_a_warm_call_is_a_few_launches_and_nothing_else(given: bool, shape: str, seed: int) -> None:
    """No allocation, no copy, no wait: counted while calls run, and by what a global capture holds. Without a
    workspace the graph has memory of its own, because it may run beside other work of its stream."""
    changes: dict[str, Any] = {
        "one_token": {"tokens": 1},
        "few": {},
        "many": {"tokens": 700},
        "static": {"static1": "float", "static2": "array"},
        "two_route_launches": {"tokens": ROUTES_PER_CTA // 2, "hidden": 48, "intermediate": 32},
    }[shape]
    case = Case(seed, **changes)
    extra: dict[str, Any] = {"out": case.out}
    if given:
        extra["workspace"] = case.workspace
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with kernels() as made, torch.cuda.stream(stream):
        case(**extra)
        expected = case.out.clone()
        choice = made.choices[-1]
        arguments = case.problem.x, case.problem.topk_weights, case.problem.topk_ids
        function = {**case.problem.arguments, **extra}
        sm12x.fused_moe(arguments[0], case.problem.w1, case.problem.w2, *arguments[1:], **function)
        with counted_allocations() as counts:
            for _ in range(20):
                case(**extra)
                sm12x.fused_moe(arguments[0], case.problem.w1, case.problem.w2, *arguments[1:], **function)
        assert not counts, f"a warm call of a layer did {dict(counts)}"
        graph = Graph(lambda: case(**extra), stream)
    memory = {} if given else {"MEM_ALLOC": 1, "MEM_FREE": 1}
    assert graph.kinds() == {"KERNEL": launches(case, choice), **memory}
    assert launches(case, choice) <= 4 or choice.quantises_apart or shape == "two_route_launches"
    case.out.fill_(torch.nan)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert same(case.out, expected)


def test_graphs_without_a_workspace_may_run_at_once(seed: int) -> None:
    """Each has memory of its own, though all were captured on one stream, where the library has a block."""
    cases = [Case(seed + i, tokens=30 + i) for i in range(3)]
    expected = [case.expected() for case in cases]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for case in cases:
            case(out=case.out)
    graphs = [Graph(partial(case, out=case.out), stream) for case in cases]
    others = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        for case in cases:
            case.out.fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, other in zip(graphs, others, strict=True):
            graph.replay(other)
        torch.cuda.synchronize()
        assert all(same(case.out, right) for case, right in zip(cases, expected, strict=True))


def test_the_librarys_workspace_may_grow_behind_a_graph(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a graph of the stream nor calls that were queued before are disturbed when a larger call
    comes."""
    monkeypatch.setattr(scratch, "_blocks", {})
    small, large = Case(seed, tokens=3), Case(seed + 1, tokens=300)
    expected = [case.expected() for case in (small, large)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        small(out=small.out)
    graph = Graph(lambda: small(out=small.out), stream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        graph.replay()
        large(out=large.out)
        graph.replay()
        large(out=large.out)
    torch.cuda.synchronize()
    assert same(small.out, expected[0])
    assert same(large.out, expected[1])


def test_a_torch_kernel_may_overwrite_inputs_behind_a_layer(seed: int) -> None:
    """What follows in the stream waits for the call, whatever the call let begin early."""
    case, other = Case(seed), Case(seed + 1)
    expected = [each.expected() for each in (case, other)]
    outs = []
    for _ in range(20):
        outs.append(case(workspace=case.workspace))
        case.problem.x.fill_(torch.nan)
        case.problem.w2.view(torch.uint8).fill_(0x7F)
        case.problem.topk_ids.fill_(-1)
        case.take(other)
    torch.cuda.synchronize()
    assert same(outs[0], expected[0])
    for out in outs[1:]:
        assert same(out, expected[1])


def test_layers_share_a_workspace_in_turns(seed: int) -> None:
    """Whichever kernels are next, whole or split, find their counters zero. The workspace is overwritten
    between calls, as a caller may."""
    cases = [Case(seed, tokens=40), Case(seed + 1, tokens=1), Case(seed + 2, static2="float")]
    workspace = torch.empty(max(case.workspace.numel() for case in cases), dtype=torch.uint8, device=DEVICE)
    rng = np.random.default_rng(seed)
    known: dict[Any, Any] = {}
    for turn in range(TURNS):
        case = cases[int(rng.integers(3))]
        options = downs(ARCH, case.problem.spec.static2 is not None)
        up, down = UPS[int(rng.integers(len(UPS)))], options[int(rng.integers(len(options)))]
        with kernels(up, down):
            if turn % 3 == 0:
                workspace.random_()
            out = case.problem.call(torch.empty_like(case.problem.x), workspace)
        key = case, up.argument, down.argument
        if key not in known:
            known[key] = case.expected(up, down)
        assert same(out, known[key]), f"turn {turn}: {up.name} {down.name}"


def test_two_streams_at_once(seed: int) -> None:
    """Two streams, with workspaces of their own and with the library's, give what each gives alone."""
    cases = [Case(seed, tokens=60), Case(seed + 1, static2="array")]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    alone = [case.expected() for case in cases]
    torch.cuda.synchronize()
    outs: list[list[Any]] = [[], []]
    for turn in range(40):
        for index, (case, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream):
                outs[index].append(case(workspace=case.workspace if turn % 2 else None))
    torch.cuda.synchronize()
    for index in range(2):
        assert all(same(out, alone[index]) for out in outs[index])


def test_one_layer_on_two_streams(seed: int) -> None:
    """One plan object in use on two streams at once: each has launches and memory of its own."""
    case = Case(seed, tokens=60)
    expected = case.expected()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outs = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 2]):
            outs.append(case())
    torch.cuda.synchronize()
    assert all(same(out, expected) for out in outs)


def test_threads(seed: int) -> None:
    """Four threads, each on its own stream, with one plan object among them and tokens of their own."""
    cases = [Case(seed)]
    for i in range(1, 4):
        other = Case(seed)
        rolled = cases[0].problem.x.roll(i, 0)
        other.problem.x.copy_(rolled)
        cases.append(other)
    for case in cases:
        case.layer = cases[0].layer
    expected = [case().clone() for case in cases]
    results: dict[int, list[Any]] = {}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                results[index] = [cases[index]() for _ in range(CALLS)]
            stream.synchronize()
        except BaseException as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for index in range(4):
        assert all(same(out, expected[index]) for out in results[index]), f"thread {index}"


def test_no_call_waits_for_the_device(seed: int) -> None:
    """Layers, route and quantize_fp8 behind a long kernel are all enqueued while it still runs."""
    cases = [Case(seed), Case(seed + 1, tokens=1, static2="float")]
    expected = [case.expected() for case in cases]
    x = cases[0].problem.x
    codes = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)

    def parts() -> None:
        sm12x.route(cases[0].problem.topk_ids, 9)
        sm12x.quantize_fp8(x, out=codes)
        sm12x.quantize_fp8(x, per_token=False, out=codes)

    for case in cases:
        case(out=case.out)
    parts()
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * SLEEP_CYCLES)
    for _ in range(40):
        for case in cases:
            case(out=case.out)
        parts()
    pending = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert pending, "the device was idle after the calls: one of them waited"
    for case, right in zip(cases, expected, strict=True):
        assert same(case.out, right)


def test_a_late_producer_on_the_current_stream(seed: int) -> None:
    """Inputs still being written when the call is made, on the current stream and on an explicit one."""
    case, late = Case(seed), Case(seed)
    expected = case.expected()
    late(workspace=late.workspace)
    for explicit in (False, True):
        for each in (late.problem.x, late.problem.topk_weights):
            each.fill_(torch.nan)
        late.out.fill_(torch.nan)
        producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(SLEEP_CYCLES)
            late.take(case)
            if not explicit:
                late(out=late.out, workspace=late.workspace)
        if explicit:
            consumer.wait_stream(producer)
            late(out=late.out, workspace=late.workspace, stream=consumer.cuda_stream)
        assert not (consumer if explicit else producer).query(), "the call waited for the device"
        torch.cuda.synchronize()
        assert same(late.out, expected)


def test_layers_of_different_sizes_share_the_librarys_block(seed: int) -> None:
    """In turns on one stream: the second waits for the first."""
    cases = [
        Case(seed + i, tokens=count, hidden=hidden)
        for i, (count, hidden) in enumerate(((50, 704), (2, 48), (300, 16)))
    ]
    expected = [case.expected() for case in cases]
    torch.cuda._sleep(SLEEP_CYCLES // 20)
    outs = [(index, cases[index]()) for _ in range(20) for index in range(3)]
    torch.cuda.synchronize()
    for index, out in outs:
        assert same(out, expected[index])


def test_two_cases_differ_in_values_only(seed: int) -> None:
    """`Case.take` needs that."""
    first, second = Case(seed), Case(seed + 1)
    assert replace(first.problem.spec, seed=0) == replace(second.problem.spec, seed=0)
    for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)

"""Streams, CUDA graphs, threads and processes: work is ordered after its inputs, and nothing waits for the
host.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_call import PackedCall, make_call  # noqa: E402
from variants import VARIANTS, Variant, key  # noqa: E402

import sm12x  # noqa: E402

SLEEP_CYCLES = 200_000_000  # about 0.1 s: far longer than a host call


def workspace_for(call: PackedCall) -> torch.Tensor:
    return torch.empty(sm12x.workspace_size(call.problem.groups), dtype=torch.uint8, device="cuda")


def overwrite(call: PackedCall, other: PackedCall) -> None:
    """Makes the arrays of ``call`` hold the inputs of ``other``, in place."""
    call.problem.a.view(torch.uint8).copy_(other.problem.a.view(torch.uint8))
    call.problem.b.view(torch.uint8).copy_(other.problem.b.view(torch.uint8))
    call.a_scale.copy_(other.a_scale)
    call.b_scale.copy_(other.b_scale)
    call.offsets.copy_(other.offsets)


@pytest.mark.parametrize("variant", VARIANTS, ids=key)
@pytest.mark.parametrize("given", [True, False], ids=["buffers_given", "buffers_ours"])
def test_graph_replays_with_changed_inputs(given: bool, variant: Variant, seed: int) -> None:
    """A captured call reads operands, scales and offsets when it is replayed, not when it was captured."""
    rows = [0, 1, 40, 0, 130, 7, 64, 16, 3, 33, 2, 0]
    first = make_call(seed, rows=_array(rows))
    second = make_call(seed + 1, rows=_array([*reversed(rows[:-3]), 30, 5, 0]))
    assert first.problem.total_rows == second.problem.total_rows
    static = make_call(seed, rows=_array(rows))
    extra: dict[str, Any] = {"variant": variant.key, "out_dtype": variant.out}
    if given:
        extra.update(out=static.poisoned_out(variant.out).out, workspace=workspace_for(static))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        static(**extra)  # loads the cubin: not something to do while capturing
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static(**extra)
    for call in (second, first, second):
        overwrite(static, call)
        graph.replay()
        call.check(out, f"replay of {variant.key}", variant.out)


def _array(rows: list[int]) -> Any:
    import numpy as np

    return np.array(rows, dtype=np.int64)


def test_list_call_in_a_graph(seed: int) -> None:
    """Shapes and pointers of a list call are captured with it; a replay reads the operands anew."""
    call = make_call(seed)
    offsets = call.offsets.tolist()
    groups = [e for e in range(call.problem.groups) if offsets[e + 1] > offsets[e]]
    a = [call.problem.a[offsets[e] : offsets[e + 1]] for e in groups]
    b = [call.problem.b[e] for e in groups]
    a_scale = [call.a_scale[offsets[e] : offsets[e + 1]] for e in groups]
    b_scale = [call.b_scale[e] for e in groups]
    outs = [torch.empty((part.shape[0], call.problem.n), dtype=torch.bfloat16, device="cuda") for part in a]
    sm12x.grouped_gemm(a, b, a_scale=a_scale, b_scale=b_scale, out=outs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sm12x.grouped_gemm(a, b, a_scale=a_scale, b_scale=b_scale, out=outs)
    other = make_call(seed + 1)
    overwrite(call, other)
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    other.check(torch.cat(outs), "replayed list call")


def test_two_streams_at_once(seed: int) -> None:
    """Two streams with their own workspaces, 50 interleaved calls each, give what each gives alone."""
    calls = [make_call(seed), make_call(seed + 1)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    alone = [call().clone() for call in calls]
    workspaces = [workspace_for(call) for call in calls]
    torch.cuda.synchronize()
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for index, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                outs[index].append(call(workspace=workspaces[index]))
    torch.cuda.synchronize()
    for index, call in enumerate(calls):
        call.check(alone[index], "alone")
        assert all(torch.equal(out, alone[index]) for out in outs[index])


def test_the_current_stream_orders_a_late_producer(seed: int) -> None:
    """Inputs still being written on the caller's current stream when the call is made; the host never
    waits.
    """
    call = make_call(seed)
    call()
    late = make_call(seed)
    blank(late)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        overwrite(late, call)
        out = late()
        pending = not stream.query()
    assert pending, "the call waited for the device"
    stream.synchronize()
    call.check(out, "late producer")


def blank(call: PackedCall) -> None:
    """Inputs that give NaN everywhere, until something overwrites them."""
    call.problem.a.view(torch.uint8).fill_(0x7F)
    call.problem.b.view(torch.uint8).fill_(0x7F)
    call.a_scale.fill_(float("nan"))


def test_explicit_stream_behind_another_by_event(seed: int) -> None:
    """stream= wins over the current stream; torch users order it after the producer with an event."""
    call = make_call(seed)
    call()
    late = make_call(seed)
    blank(late)
    out = torch.full(
        (call.problem.total_rows, call.problem.n), float("nan"), dtype=torch.bfloat16, device="cuda"
    )
    workspace = workspace_for(call)
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(SLEEP_CYCLES)
        overwrite(late, call)
    consumer.wait_stream(producer)
    late(out=out, workspace=workspace, stream=consumer.cuda_stream)
    assert not consumer.query(), "the call waited for the device"
    consumer.synchronize()
    call.check(out, "explicit stream")


def test_no_call_waits_for_the_device(seed: int) -> None:
    """120 packed and list calls behind a long kernel are all enqueued while it still runs."""
    call = make_call(seed)
    workspace = workspace_for(call)
    out = torch.empty((call.problem.total_rows, call.problem.n), dtype=torch.bfloat16, device="cuda")
    a, b = [call.problem.a[1:41]] * 3, [call.problem.b[2]] * 3
    call(out=out, workspace=workspace)
    sm12x.grouped_gemm(a, b, a_scale=0.5, b_scale=0.5)
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * SLEEP_CYCLES)
    start = time.perf_counter()
    for _ in range(60):  # all of it fits into the device's queue of 1024 entries
        call(out=out, workspace=workspace)
        sm12x.grouped_gemm(a, b, a_scale=0.5, b_scale=0.5)
    seconds = time.perf_counter() - start
    pending = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert pending, f"the device was idle after {seconds:.3f} s of calls: one of them waited"
    call.check(out, "after the queue")


def test_threads(seed: int) -> None:
    """Four threads, each on its own stream, call at once."""
    calls = [make_call(seed + i) for i in range(4)]
    results: dict[int, list[torch.Tensor]] = {}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                results[index] = [calls[index]() for _ in range(50)]
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
    for index, call in enumerate(calls):
        call.check(results[index][0], f"thread {index}")
        assert all(torch.equal(out, results[index][0]) for out in results[index])


FORK = """
import os, sys
import numpy as np, torch, sm12x
a = torch.zeros(16, 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
b = torch.zeros(1, 8, 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
offsets = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
sm12x.grouped_gemm(a, b, offsets=offsets)
torch.cuda.synchronize()
child = os.fork()
if child == 0:
    code = 3
    try:
        sm12x.grouped_gemm(a, b, offsets=offsets)
    except Exception as error:
        code = 0 if "fork" in str(error) else 4
        print(type(error).__name__, error, flush=True)
    os._exit(code)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_gets_a_clear_error() -> None:
    """CUDA does not survive fork: a call in the child says so and does not crash."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

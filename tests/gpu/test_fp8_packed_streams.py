"""The family fp8_packed on streams: graphs, chains of calls that may begin before what is ahead has ended
(PDL), workspaces and their counters, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the GPU tests make their references with torch")

from packed_problem import (  # noqa: E402
    Epilogue,
    GuardedOut,
    Operands,
    PackedProblem,
    error_ratio,
    make_epilogue,
    make_problem,
)
from problem_strata import LAYOUTS  # noqa: E402
from torch_reference import Verdicts  # noqa: E402
from variants import FORCED, Forced, name  # noqa: E402

import sm12x  # noqa: E402

ROWS = [0, 1, 40, 0, 130, 7, 64, 16, 3, 33, 2, 0]
N, K = 264, 704
SLEEP_CYCLES = 200_000_000  # about 0.1 s: far longer than a host call
LINKS = 24  # calls of a chain


class Case:
    """A call of one layout with everything that it takes, and the check of its result."""

    def __init__(self, seed: int, layout: str, rows: list[int] = ROWS, n: int = N, k: int = K) -> None:
        rng = np.random.default_rng(seed)
        # The lowest bits of the seed decide over types and strides: of two cases they have to be the same.
        self.problem: PackedProblem = make_problem(
            np.array(rows, dtype=np.int64), n, k, 6 * (seed % 2**28), nan_groups=False
        )
        self.operands: Operands = self.problem.operands(layout)
        self.epilogue: Epilogue = make_epilogue(
            self.problem, self.operands, ("token", "channel"), 0, rng, bias="float32", weighted=True
        )
        self.workspace = torch.empty(sm12x.workspace_size(len(rows)), dtype=torch.uint8, device="cuda")

    def arguments(self) -> dict[str, Any]:
        known = {"a": self.operands.a, "b": self.problem.b}
        return {**known, **self.operands.arguments, **self.epilogue.arguments}

    def __call__(self, **changes: Any) -> Any:
        return sm12x.grouped_gemm(**{**self.arguments(), **changes})

    def out(self, dtype: str) -> GuardedOut:
        return GuardedOut(self.operands.out_rows, self.problem.n, dtype)

    def ratio(self, out: Any, dtype: str) -> Any:
        rows = out.reshape(-1, self.problem.n)[self.operands.target]
        return error_ratio(rows, self.epilogue, self.problem, dtype)

    def check(self, out: Any, label: str, dtype: str = "bfloat16") -> None:
        verdicts = Verdicts()
        verdicts.add(label, self.ratio(out, dtype))
        verdicts.check(self.problem.seed)

    def take(self, other: Case) -> None:
        """Makes the arrays of this case hold what those of `other` hold, in place."""
        mine, theirs = self.arguments(), other.arguments()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                plain = torch.uint8 if value.dtype == torch.float8_e4m3fn else value.dtype
                value.view(plain).copy_(theirs[key].view(plain))


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("given", [True, False], ids=["buffers_given", "buffers_ours"])
def test_graph_replays_with_changed_inputs(given: bool, each: Forced, seed: int) -> None:
    """A captured call reads operands, bounds, indices, scales and weights when it is replayed."""
    layout = LAYOUTS[FORCED.index(each) % 3]
    turned = [*reversed(ROWS[:-3]), 30, 5, 0]
    assert sum(turned) == sum(ROWS)
    assert max(turned) == max(ROWS)
    first, second, static = Case(seed, layout), Case(seed + 1, layout, turned), Case(seed, layout)
    extra: dict[str, Any] = {"variant": each.argument, "out_dtype": "float16"}
    if given:
        extra.update(out=static.out("float16").out, workspace=static.workspace)
    static(**extra)  # loads the cubin and makes the counters: nothing to do while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static(**extra)
    for case in (second, first, second):
        static.take(case)
        out.view(torch.int16).fill_(0x7E01)
        graph.replay()
        case.check(out, f"replay of {each.argument} {layout}", "float16")


Link = Callable[[], object]


class Chain:
    """Calls of ours that each need the one before, with kernels of torch between some of them.

    The bias of a call is the float32 output of the one before, through a small torch kernel in every third
    link: so there is ours behind ours, ours behind torch and torch behind ours. Two outputs take turns, so a
    call also writes what the call before the last one's reader may still be reading. Every link adds to a sum
    of all.
    """

    def __init__(self, seed: int, argument: str | None, layout: str, early: bool) -> None:
        rng = np.random.default_rng(seed)
        self.argument, self.layout, self.early = argument, layout, early
        # As many rows as groups: an output (M, N) is a bias (E, N).
        groups = 20
        rows = rng.multinomial(groups, np.full(groups, 1 / groups)).astype(np.int64)
        self.problem = make_problem(rows, N, K, 6 * (seed % 2**28), nan_groups=False)
        self.operands = self.problem.operands(layout)
        self.epilogue = make_epilogue(self.problem, self.operands, ("token", "channel"), 0, rng)
        self.workspace = torch.empty(sm12x.workspace_size(groups), dtype=torch.uint8, device="cuda")
        self.start = torch.as_tensor(rng.standard_normal((groups, N), np.float32), device="cuda")
        shape = (*self.operands.out_rows, N)
        self.outs = [torch.zeros(shape, dtype=torch.float32, device="cuda") for _ in range(2)]
        self.bias = torch.zeros((groups, N), dtype=torch.float32, device="cuda")
        self.seen = torch.zeros((LINKS, *shape), dtype=torch.float32, device="cuda")

    def bias_of(self, out: Any) -> Any:
        """What the next call is given: a view of the output, no copy."""
        return out if self.layout != "masked" else out[:, 0]

    def links(self) -> list[Link]:
        found: list[Link] = [lambda: self.bias.copy_(self.start)]
        before = self.bias
        for i in range(LINKS):
            out = self.outs[i % 2]
            found.append(self._call(before, out))
            if i % 3 == 2:
                found.append(self._scale(out))
                before = self.bias
            else:
                before = self.bias_of(out)
            found.append(self._keep(i, out))
        return found

    def _call(self, bias: Any, out: Any) -> Link:
        return lambda: sm12x.grouped_gemm(
            self.operands.a,
            self.problem.b,
            bias=bias,
            out=out,
            out_dtype="float32",
            workspace=self.workspace,
            variant=self.argument,
            early_weights=self.early,
            **self.operands.arguments,
            **self.epilogue.arguments,
        )

    def _scale(self, out: Any) -> Link:
        return lambda: torch.mul(self.bias_of(out), 0.5, out=self.bias)

    def _keep(self, i: int, out: Any) -> Link:
        # Every other link is read late, behind two more calls, or not copied at all: no torch kernel between.
        return (lambda: self.seen[i].copy_(out)) if i % 4 == 3 else (lambda: None)

    def reset(self) -> None:
        for out in self.outs:
            out.zero_()
        self.bias.zero_()
        self.seen.zero_()

    def result(self) -> list[Any]:
        return [self.seen.clone(), *(out.clone() for out in self.outs), self.bias.clone()]


@pytest.mark.parametrize("each", FORCED, ids=name)
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_chains_of_calls_and_torch_kernels(early: bool, each: Forced, seed: int) -> None:
    """Eager without a pause and replayed graphs give what the same links give with the device idle between
    any two: a kernel that reads, or writes, before what is ahead of it has ended would not. Early weights are
    no more than that: what links hand on are biases."""
    layout = LAYOUTS[FORCED.index(each) % 3]
    chain = Chain(seed, each.argument, layout, early)
    links = chain.links()
    chain.reset()
    for link in links:
        link()
        torch.cuda.synchronize()
    expected = chain.result()
    assert expected[0].abs().sum() > 0
    assert not any(part.isnan().any() for part in expected)
    chain.reset()
    torch.cuda._sleep(SLEEP_CYCLES // 20)  # so that the whole chain is queued before it runs
    for link in links:
        link()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(chain.result(), expected, strict=True)), f"eager {layout}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for link in links:
            link()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(50):
        chain.reset()
        graph.replay()
        for x, y in zip(chain.result(), expected, strict=True):
            differing += (x != y).any()
    assert differing.item() == 0, f"replays differ, {layout}"


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_early_bounds_and_weights_are_those_written_two_launches_ahead(each: Forced, seed: int) -> None:
    """A call of ours lies between what writes them and the call that loads them early: that one begins while
    it runs, and may find in L1 what it read there a moment ago."""
    layout = LAYOUTS[FORCED.index(each) % 3]
    turned = [*reversed(ROWS[:-3]), 30, 5, 0]
    cases = [Case(seed, layout), Case(seed + 1, layout, turned)]
    given, between = Case(seed, layout), Case(seed + 2, layout)
    outs = []
    given(variant=each.argument, early_weights=True)
    torch.cuda._sleep(SLEEP_CYCLES // 20)  # so that all is queued before it runs
    for i in range(LINKS):
        given.take(cases[i % 2])
        between(variant=each.argument, workspace=between.workspace)
        outs.append(given(variant=each.argument, workspace=given.workspace, early_weights=True))
    for i, out in enumerate(outs):
        cases[i % 2].check(out, f"call {i} of {each.argument} {layout}")


def test_a_torch_kernel_may_overwrite_inputs_behind_a_call(seed: int) -> None:
    """What follows in the stream waits for the call, whatever the call let begin early."""
    for each in FORCED:
        own, case, other = (Case(seed + i, "contiguous") for i in (0, 0, 1))
        outs = []
        for _ in range(20):
            outs.append(case(variant=each.argument, workspace=case.workspace))
            case.operands.a.view(torch.uint8).fill_(0x7F)
            case.take(other)
        torch.cuda.synchronize()
        own.check(outs[0], each.argument)
        for out in outs[1:]:
            other.check(out, each.argument)


def test_variants_share_a_workspace_in_turns(seed: int) -> None:
    """Split-K leaves its counters zero: whichever variant is next, of however many warps, finds them so. The
    workspace is overwritten between calls, as a caller may."""
    verdicts = Verdicts()
    cases = {layout: Case(seed + i, layout) for i, layout in enumerate(LAYOUTS)}
    small = Case(seed + 7, "contiguous", [1, 0, 2], 136, 2816)
    workspace = torch.empty(sm12x.workspace_size(len(ROWS)), dtype=torch.uint8, device="cuda")
    rng = np.random.default_rng(seed)
    for turn in range(200):
        each = FORCED[rng.integers(len(FORCED))]
        case = small if rng.random() < 0.3 else cases[LAYOUTS[rng.integers(3)]]
        if turn % 3 == 0:
            workspace.random_()
        out = case(variant=each.argument, workspace=workspace, out_dtype="float32")
        verdicts.add(f"turn {turn} {each.argument}", case.ratio(out, "float32"))
    verdicts.check(seed)


def test_two_streams_at_once(seed: int) -> None:
    """Two streams with workspaces of their own, split-K on both, give what each gives alone."""
    cases = [Case(seed, "contiguous"), Case(seed + 1, "gather")]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for split in [each for each in FORCED if each.split]:
        alone = [case(variant=split.argument).clone() for case in cases]
        torch.cuda.synchronize()
        outs: list[list[Any]] = [[], []]
        for turn in range(30):
            for index, (case, stream) in enumerate(zip(cases, streams, strict=True)):
                with torch.cuda.stream(stream):
                    scratch = case.workspace if turn % 2 else None
                    outs[index].append(case(variant=split.argument, workspace=scratch))
        torch.cuda.synchronize()
        for index, case in enumerate(cases):
            case.check(alone[index], "alone")
            target = case.operands.target
            for out in outs[index]:
                assert torch.equal(out[target], alone[index][target]), split.argument


def test_threads(seed: int) -> None:
    """Four threads, each on its own stream, with one plan among them."""
    cases = [Case(seed + i, "contiguous") for i in range(4)]
    each = FORCED[-1]
    results: dict[int, list[Any]] = {}
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                results[index] = [
                    cases[index](variant=each.argument, workspace=cases[index].workspace) for _ in range(50)
                ]
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
    for index, case in enumerate(cases):
        case.check(results[index][0], f"thread {index}")
        assert all(torch.equal(out, results[index][0]) for out in results[index])


def test_no_call_waits_for_the_device(seed: int) -> None:
    """Calls of all layouts, whole and split, behind a long kernel are all enqueued while it still runs."""
    cases = [Case(seed + i, layout) for i, layout in enumerate(LAYOUTS)]
    both = [FORCED[0], FORCED[1]]
    outs = [case.out("bfloat16") for case in cases]
    for case, out in zip(cases, outs, strict=True):
        for each in both:
            case(variant=each.argument, workspace=case.workspace, out=out.out)
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * SLEEP_CYCLES)
    for _ in range(40):
        for case, out in zip(cases, outs, strict=True):
            for each in both:
                case(variant=each.argument, workspace=case.workspace, out=out.out)
    pending = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert pending, "the device was idle after the calls: one of them waited"
    for case, out in zip(cases, outs, strict=True):
        case.check(out.out, "after the queue")


@pytest.mark.parametrize("each", FORCED, ids=name)
def test_a_bad_workspace_is_named_and_nothing_is_written(each: Forced, seed: int) -> None:
    """Split-K needs its whole workspace; whole tiles take any. One that overlaps an operand is refused."""
    case = Case(seed, "contiguous")
    found = case.out("bfloat16")
    bad: list[tuple[Any, Any]] = [(found.out, torch.empty(1 << 24, dtype=torch.uint8))]  # on the host
    if each.split:
        bad.append((found.out, torch.empty(256, dtype=torch.uint8, device="cuda")))
        size = 2 * found.out.numel()
        both = torch.zeros(size + case.workspace.numel(), dtype=torch.uint8, device="cuda")
        bad.append((both[:size].view(torch.bfloat16).view(found.out.shape), both))  # overlaps out
    for out, workspace in bad:
        with pytest.raises((ValueError, TypeError), match="workspace"):
            case(variant=each.argument, workspace=workspace, out=out)
    torch.cuda.synchronize()
    assert int(found.damaged(case.operands.target[:0])) == 0
    tiny = torch.empty(16, dtype=torch.uint8, device="cuda")
    if not each.split:
        case.check(case(variant=each.argument, workspace=tiny, out=found.out), "tiny workspace")

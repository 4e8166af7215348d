"""CUDA graphs straight from the driver, which tell what they are made of, and a count of what allocates.

The capture is global: what may not be done while any stream is captured (allocating with cuMemAlloc, waiting)
fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sm12x import driver

# Parts of the names of driver functions that a call of a layer has no business with once it is warm.
COSTLY = ("Alloc", "Free", "Synchronize", "Memcpy", "Memset", "EventCreate", "StreamCreate", "LoadData")


class Graph:
    """What `work` launches on `stream`, a torch stream that is current for it, captured once."""

    def __init__(self, work: Callable[[], object], stream: Any) -> None:
        bindings = driver.get_driver().bindings
        self.stream = bindings.CUstream(stream.cuda_stream)
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            driver.call("cuStreamBeginCapture", self.stream, mode)
            try:
                work()
            finally:
                self.graph = driver.call("cuStreamEndCapture", self.stream)
        self.executable = driver.call("cuGraphInstantiate", self.graph, 0)

    def replay(self, stream: Any = None) -> None:
        """On a torch stream, by default the one that it was captured on."""
        handle = self.stream
        if stream is not None:
            handle = driver.get_driver().bindings.CUstream(stream.cuda_stream)
        driver.call("cuGraphLaunch", self.executable, handle)

    def kinds(self) -> Counter[str]:
        """How many nodes it has of each kind: KERNEL, MEMCPY, MEM_ALLOC, ..."""
        _, count = driver.call("cuGraphGetNodes", self.graph, 0)
        nodes, count = driver.call("cuGraphGetNodes", self.graph, count)
        found: Counter[str] = Counter()
        for node in nodes[:count]:
            kind = driver.call("cuGraphNodeGetType", node)
            found[str(kind.name).removeprefix("CU_GRAPH_NODE_TYPE_")] += 1
        return found


class TorchGraph:
    """The same captured by torch, for work in which torch allocates."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()

    def replay(self) -> None:
        self.graph.replay()


@contextmanager
def counted_allocations() -> Iterator[Counter[str]]:
    """Within the block: calls of COSTLY driver functions by us, by name, and what torch's allocator handed
    out ("torch")."""
    counts: Counter[str] = Counter()
    real = driver.Driver.call

    def counting(self: Any, name: str, *arguments: Any, **named: Any) -> Any:
        if any(part in name for part in COSTLY):
            counts[name] += 1
        return real(self, name, *arguments, **named)

    torch.cuda.synchronize()
    handed_out = _torch_allocations()
    driver.Driver.call = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        driver.Driver.call = real  # type: ignore[method-assign]
    if _torch_allocations() != handed_out:
        counts["torch"] = _torch_allocations() - handed_out


def _torch_allocations() -> int:
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))

"""Timing on the device: CUDA graphs of rotated calls, replayed in turns, medians and spreads."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import driver
from .device import Gpu


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over replays, and the quartiles around it."""

    median_us: float
    low_us: float
    high_us: float
    replays: int

    def as_json(self) -> dict[str, float | int]:
        return {
            "median_us": round(self.median_us, 3),
            "iqr_us": round(self.high_us - self.low_us, 3),
            "replays": self.replays,
        }


@dataclass(frozen=True)
class Contender:
    """Something to time: `replay` enqueues `calls` calls on the stream that is timed. `keep` holds what the
    calls read and write: a graph knows addresses and keeps no array alive."""

    replay: Callable[[], object]
    calls: int
    keep: object = None


def capture(gpu: Gpu, calls: Sequence[Callable[[], object]]) -> Contender:
    """All `calls`, which launch on `gpu.stream`, as one CUDA graph. Each must have run before, outside of
    it.
    """
    bindings = driver.get_driver().bindings
    stream = bindings.CUstream(gpu.stream)
    mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    driver.call("cuStreamBeginCapture", stream, mode)
    try:
        for each in calls:
            each()
    finally:
        graph = driver.call("cuStreamEndCapture", stream)
    return Contender(_Replay(driver.call("cuGraphInstantiate", graph, 0), graph, stream), len(calls), calls)


@dataclass
class _Replay:
    executable: Any
    graph: Any
    stream: Any

    def __call__(self) -> None:
        driver.call("cuGraphLaunch", self.executable, self.stream)

    def __del__(self) -> None:
        free = getattr(driver, "call", None)
        if free is not None:  # the interpreter is not being torn down
            free("cuGraphExecDestroy", self.executable)
            free("cuGraphDestroy", self.graph)


def interleave(
    gpu: Gpu,
    contenders: Mapping[str, Contender],
    rounds: int,
    milliseconds: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Replays all contenders in each round, in an order drawn anew, so that drifting clocks hit all alike."""
    measure = milliseconds or gpu.milliseconds
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:
        measure(contenders[name].replay)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            contender = contenders[name]
            samples[name].append(measure(contender.replay) * 1e3 / contender.calls)
    return {name: summarise(samples[name]) for name in contenders}


def summarise(samples: Sequence[float]) -> Timing:
    """Median and quartiles of microseconds."""
    low, median, high = np.percentile(np.asarray(samples), [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(samples))

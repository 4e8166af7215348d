"""Barriers of a cluster, which has one CTA (PTX ISA, "barrier.cluster")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..emitter import Emitter
from ..errors import Fault
from ..memory import Array
from ..ptx.ir import Instruction
from ..registry import instruction, unsupported
from ..spaces import aligned
from ..warp import LANES, Split, Wait, Warp

_WORDS = {"release", "relaxed", "acquire", "aligned"}
CLUSTER = -1  # the number of its barrier, beside those of the CTA's named ones


@instruction("barrier.cluster.arrive", "barrier.cluster.wait", blocks=True)
def barrier_cluster(i: Instruction, e: Emitter) -> None:
    extra = [word for word in i.opcode[3:] if word not in _WORDS]
    if extra:
        raise unsupported(i, f"modifier .{extra[0]}")
    if i.has("aligned"):
        e.call(_aligned)
    if i.opcode[2] == "arrive":
        e.call(_arrive(releases=not i.has("relaxed")))
    else:
        e.wait_call(_wait)


def _aligned(_w: Warp, s: Split, lanes: Array | None) -> None:
    aligned(s, lanes)


def _arrive(*, releases: bool) -> Callable[..., None]:
    def run(w: Warp, _s: Split, lanes: Array | None) -> None:
        active = LANES if lanes is None else lanes
        barrier = w.cta.cluster_barrier
        phases = w.cluster_phase
        if np.count_nonzero(phases[active] >= 0):
            raise Fault("barrier", "a thread arrives twice at the cluster barrier without a wait in between")
        w.cluster_phase = phases.copy()
        w.cluster_phase[active] = barrier.generation
        barrier.arrived += len(active)
        if w.cta.grid.dependency is not None:
            w.cta.grid.dependency.arrive(w, lanes, barrier, barrier.generation)
        if w.cta.races is not None:
            w.cta.races.order.at_barrier(w, lanes, CLUSTER, barrier.generation, releases=releases)
        w.cta.settle_cluster_barrier()

    return run


def _wait(w: Warp, _s: Split, lanes: Array | None) -> Any:
    active = LANES if lanes is None else lanes
    barrier = w.cta.cluster_barrier
    phases = w.cluster_phase[active]
    if np.count_nonzero(phases < 0):
        raise Fault("barrier", "a thread waits at the cluster barrier without having arrived")
    if np.count_nonzero(phases == barrier.generation):
        return Wait(
            "cluster", barrier.queue, lambda: f"the cluster barrier ({barrier.arrived} threads are there)"
        )
    if w.cta.grid.dependency is not None:
        w.cta.grid.dependency.leave(w, lanes, barrier, int(phases[0]))
    if w.cta.races is not None:
        w.cta.races.order.past_barrier(w, lanes, CLUSTER, int(phases[0]))
    w.cluster_phase = w.cluster_phase.copy()
    w.cluster_phase[active] = -1
    return None

"""The prepared launches of an expert layer for one number of tokens, and what a call does with them.

A call writes the addresses that it brings to where the launches have them in their parameters; those in the
workspace are written when it changes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .. import driver
from ..counters import counters_of
from ..launch_config import LaunchConfig, make_config
from ..manifest import Variant
from . import launch

_pack_one = struct.Struct("@N").pack_into


@dataclass(slots=True)
class Step:
    """One launch: its parameters, and which of their addresses lie at what distance from the workspace's
    beginning. `counters`: where the address of the counters belongs that go with the workspace, -1 for
    nowhere; `map_a`: has the tensor map of the rows point over the workspace too."""

    key: str
    block: launch.Block
    config: LaunchConfig
    launch: Callable[[], int]
    scratch: tuple[tuple[int, int], ...]
    counters: int = -1
    map_a: Callable[[], int] | None = None


# An address of a call belongs at an offset in a step's parameters.
Place = tuple[Step, int]


def make_step(
    device: driver.Device,
    variant: Variant,
    params: ctypes.Structure | bytearray,
    grid: tuple[int, int, int],
    scratch: dict[int, int],
    counters: int = -1,
    map_a: tuple[int, int] | None = None,
) -> Step:
    """`scratch`: offset in the parameters to offset in the workspace; `map_a`: offsets of the map and of the
    address in the parameters that it has to point at. Raises CubinError and CudaError."""
    block = launch.Block(bytes(params))
    config = make_config(grid, variant.threads, variant.shared_memory, programmatic=variant.pdl)
    hot, pointer = device.driver.hot, device.driver.pointer
    replaced: Callable[[], int] | None = None
    if map_a is not None:
        address = ctypes.c_void_p.from_address(block.address + map_a[1])
        replaced = partial(hot.cuTensorMapReplaceAddress, pointer(block.address + map_a[0]), address)
    function = driver.get_function(device, variant)
    launches = partial(
        hot.cuLaunchKernelEx,
        pointer(ctypes.addressof(config)),
        pointer(function),
        pointer(ctypes.addressof(block.arguments)),
        None,
    )
    return Step(variant.key, block, config, launches, tuple(scratch.items()), counters, replaced)


class Chain:
    """A layer's launches for one number of tokens. Only one call may be at it at a time."""

    __slots__ = (
        *("_base", "_context", "_context_at", "_device", "_places", "_stream"),
        *("in_graphs", "needed", "steps"),
    )

    def __init__(
        self,
        device: driver.Device,
        steps: list[Step],
        needed: int,
        *,
        x: Sequence[Place],
        topk_weights: Sequence[Place],
        topk_ids: Sequence[Place],
        out: Sequence[Place],
    ) -> None:
        """`needed`: bytes of workspace; the others say where the addresses of a call belong."""
        self.steps, self.needed, self._device = steps, needed, device
        self.in_graphs: Chain | None = None  # what to launch instead where a graph is being captured
        self._places = [  # assigning to an integer there takes two thirds of the time of struct's pack_into
            (ctypes.c_uint64.from_buffer(step.block.memory, at), which)
            for which, places in enumerate((x, topk_weights, topk_ids, out))
            for step, at in places
        ]
        self._base = self._stream = -1
        self._context = ctypes.c_void_p()
        self._context_at = ctypes.byref(self._context)

    def context_is_current(self) -> bool:
        """Whether the device's context is the calling thread's."""
        status: int = self._device.driver.hot.cuCtxGetCurrent(self._context_at)
        return not status and self._context.value == self._device.context

    def run(self, stream: int, base: int, *addresses: int) -> None:
        """Launch a call on `stream`, given the addresses of x, topk_weights, topk_ids and out; `base` is that
        of `needed` bytes of workspace. The device's context is current. Raises CudaError."""
        if base != self._base:
            self._point_at_workspace(base)
        for place, which in self._places:
            place.value = addresses[which]
        if stream != self._stream:
            for step in self.steps:
                step.config.stream = stream
            self._stream = stream
        for step in self.steps:
            status = step.launch()
            if status:
                raise self._device.driver.error("cuLaunchKernelEx", status, variant=step.key)

    def _point_at_workspace(self, base: int) -> None:
        self._base = -1
        counters = 0
        for step in self.steps:
            for at, distance in step.scratch:
                _pack_one(step.block.memory, at, base + distance)
            if step.counters >= 0:
                counters = counters or counters_of(self._device, base)
                _pack_one(step.block.memory, step.counters, counters)
            if step.map_a is not None:
                status = step.map_a()
                if status:
                    raise self._device.driver.error("cuTensorMapReplaceAddress", status, variant=step.key)
        self._base = base

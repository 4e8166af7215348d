"""The demo on a GPU: the layer straight from its files into memory of our own, so that no framework is
needed; the result and its time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sm12x
from sm12x import driver
from sm12x.checkpoint import load_moe_layer
from sm12x.cli.workload import Workload
from sm12x.emulator import devices
from sm12x.errors import UnsupportedDeviceError
from sm12x.validation.device import DeviceArray, Gpu, device_attribute
from sm12x.validation.timing import capture, interleave

# GB/s by part of the device name: data sheets, and for the H200 the best of a sweep of readers.
KNOWN_BANDWIDTH = {
    **{gpu.part: (gpu.dram_gbps, gpu.dram_source) for gpu in devices.GPUS.values()},
    "RTX 5060 Ti": (448.0, "data sheet"),
}
LAUNCHES_PER_GRAPH = 32
REPLAYS = 15


@dataclass(frozen=True)
class Result:
    """`out` (T, H) of the first call; `time_us` of one call in a CUDA graph, weights not in L2, median of
    REPLAYS replays."""

    out: NDArray[Any]
    time_us: float
    rotated_bytes: int
    l2_bytes: int


def open_device() -> driver.Device:
    """The first device that has cubins. Raises UnsupportedDeviceError where none has."""
    refusals = []
    for ordinal in range(int(driver.call("cuDeviceGetCount"))):
        try:
            return driver.get_device(ordinal)
        except UnsupportedDeviceError as error:
            refusals.append(str(error))
    raise UnsupportedDeviceError("; ".join(refusals) or "the driver reports no device")


def bandwidth(device: driver.Device) -> tuple[float, str]:
    """DRAM bandwidth of a device in GB/s, and where the figure comes from."""
    for part, known in KNOWN_BANDWIDTH.items():
        if part in device.name and "Laptop" not in device.name:  # laptop parts of that name are slower
            return known
    kilohertz = device_attribute(device, "CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE")
    bits = device_attribute(device, "CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH")
    return 2.0 * kilohertz * bits / 8 / 1e6, "memory clock x bus width, as the driver reports them"


def rotations(workload: Workload) -> list[NDArray[np.int32]]:
    """topk_ids of routings like the real one, which comes first, each to experts that the others leave alone.

    Calls that walk through them read other weights every time, so that L2 holds none of them when their turn
    comes again.
    """
    active = np.flatnonzero(workload.counts)
    experts = workload.layer.num_experts
    others = np.setdiff1d(np.arange(experts), active)
    routings = [workload.topk_ids]
    for first in range(0, len(others) - len(active) + 1, len(active)):
        moved = np.zeros(experts, np.int32)
        moved[active] = others[first : first + len(active)]
        routings.append(moved[workload.topk_ids])
    return routings


def run(workload: Workload, folder: Path, device: driver.Device) -> Result:
    """One call for the result, then many in a graph for the time. Raises what ``load_moe_layer`` and
    ``sm12x.fused_moe`` raise."""
    gpu = Gpu.open(device.ordinal)
    layer = load_moe_layer(folder, workload.layer.layer, framework="sm12x", device=device.ordinal)
    arguments = layer.arguments()
    x, weights = gpu.upload(workload.x), gpu.upload(workload.topk_weights)
    routings = [gpu.upload(ids) for ids in rotations(workload)]
    out = gpu.empty(x.shape, "bfloat16")
    sm12x.fused_moe(x, topk_weights=weights, topk_ids=routings[0], **arguments, out=out, stream=gpu.stream)
    first = gpu.download(out)
    plan = sm12x.FusedMoE(**arguments)

    def call(ids: DeviceArray) -> None:
        plan(x, weights, ids, out=out, stream=gpu.stream)

    calls = [partial(call, ids) for ids in routings] * -(-LAUNCHES_PER_GRAPH // len(routings))
    calls[0]()  # what is allocated or loaded at the first call must not be in a graph
    timing = interleave(gpu, {"layer": capture(gpu, calls)}, REPLAYS)["layer"]
    active = int(np.count_nonzero(workload.counts))
    return Result(
        out=first,
        time_us=timing.median_us,
        rotated_bytes=len(routings) * active * workload.expert_bytes(),
        l2_bytes=device_attribute(device, "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE"),
    )

"""The demo on a GPU: operands in memory of our own, so that no framework is needed; the result and its
time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sm12x
from sm12x import driver, select
from sm12x.cli.workload import Workload
from sm12x.emulator import devices
from sm12x.errors import UnsupportedDeviceError
from sm12x.ops import launch
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
    """`out` of the first call; `time_us` of one call in a CUDA graph, weights not in L2, median of REPLAYS
    replays."""

    out: NDArray[Any]
    variant: str
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


def choose(workload: Workload, device: driver.Device) -> str:
    """The key of the variant that ``sm12x.grouped_gemm`` picks by itself for this workload."""
    shape = workload.shape
    problem = select.Problem(
        "packed",
        groups=shape["E"],
        a="float8_e4m3fn",
        b="float8_e4m3fn",
        out="bfloat16",
        arch=device.arch,
        rows=shape["M"],
        n=shape["N"],
        k=shape["K"],
    )
    return launch.choose(problem, None, device).variant.key


def rotations(workload: Workload) -> list[NDArray[np.int32]]:
    """Offsets of routings with the same rows per active expert, each on experts that the others leave alone.

    Calls that walk through them read other weights every time, so that L2 holds none of them when their turn
    comes again.
    """
    counts = workload.counts
    active = np.flatnonzero(counts)
    experts = len(counts)
    offsets = []
    for r in range(max(1, experts // max(1, len(active)))):
        moved = np.zeros_like(counts)
        # The first routing is the real one; the others take what is left, in order.
        chosen = (
            active
            if r == 0
            else np.setdiff1d(np.arange(experts), active)[(r - 1) * len(active) :][: len(active)]
        )
        moved[chosen] = counts[active]
        offsets.append(np.concatenate([[0], np.cumsum(moved)]).astype(np.int32))
    return offsets


def run(workload: Workload, device: driver.Device) -> Result:
    """One call for the result, then many in a graph for the time. Raises what ``sm12x.grouped_gemm``
    raises."""
    gpu = Gpu.open(device.ordinal)
    rows, n = workload.a.shape[0], workload.b.shape[1]
    a, b = gpu.upload(workload.a), gpu.upload(workload.b)
    a_scale, b_scale = gpu.upload(workload.a_scale), gpu.upload(workload.b_scale)
    routings = [gpu.upload(offsets) for offsets in rotations(workload)]
    out = gpu.empty((rows, n), "bfloat16")
    size = sm12x.workspace_size(workload.b.shape[0], device=device.ordinal)
    workspace = gpu.empty((size,), "uint8")
    variant = choose(workload, device)

    def call(offsets: DeviceArray) -> None:
        sm12x.grouped_gemm(
            a,
            b,
            a_scale=a_scale,
            b_scale=b_scale,
            offsets=offsets,
            out=out,
            workspace=workspace,
            stream=gpu.stream,
            variant=variant,
        )

    call(routings[0])
    first = gpu.download(out)
    calls = [partial(call, offsets) for offsets in routings] * -(-LAUNCHES_PER_GRAPH // len(routings))
    timing = interleave(gpu, {variant: capture(gpu, calls)}, REPLAYS)[variant]
    active = int(np.count_nonzero(workload.counts))
    return Result(
        out=first,
        variant=variant,
        time_us=timing.median_us,
        rotated_bytes=len(routings) * active * n * workload.a.shape[1],
        l2_bytes=device_attribute(device, "CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE"),
    )

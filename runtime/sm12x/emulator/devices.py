"""The devices that the emulator can be: what a program may ask the driver about them, and their rates.

Rates are those of DESIGN section 2, where each has its source. Nothing of it was measured by this project but
the H200's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT = "rtx5090"


@dataclass(frozen=True, slots=True)
class MmaRate:
    """Operations of one SM in a clock, two for each multiply-add, and where the figure comes from."""

    per_clock: int
    source: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device.

    part: what of its name tells it from others.
    shared_memory: bytes that one CTA can have at most; memory_bytes: that the device has.
    dram_gbps, clock_ghz: DRAM bandwidth in GB/s, and the clock that goes with the rates; with their sources.
    mma: rates by form of MMA, with FP32 accumulators: "plain" and "block_scaled" for FP8, and "nvfp4". Of a
      form that is not there, nobody knows the rate.
    """

    key: str
    name: str
    part: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory: int
    memory_bytes: int
    dram_gbps: float
    dram_source: str
    clock_ghz: float
    clock_source: str
    mma: dict[str, MmaRate] = field(default_factory=dict)


_GIB = 1 << 30
_OTHERS = "measured by others"
_ASSUMED = {"block_scaled": MmaRate(2048, "assumed"), "nvfp4": MmaRate(4096, "assumed")}
GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu(
            key="rtx5090",
            name="NVIDIA GeForce RTX 5090",
            part="RTX 5090",
            capability=(12, 0),
            sm_count=170,
            shared_memory=101376,
            memory_bytes=32 * _GIB,
            dram_gbps=1792.0,
            dram_source="data sheet",
            clock_ghz=2.85,
            clock_source="of the rates that others measured; the data sheet's boost is 2.41",
            mma={
                "plain": MmaRate(1024, _OTHERS),
                "block_scaled": MmaRate(2048, _OTHERS),
                "nvfp4": MmaRate(4096, "assumed"),
            },
        ),
        Gpu(
            key="rtxpro6000",
            name="NVIDIA RTX PRO 6000 Blackwell",
            part="RTX PRO 6000",
            capability=(12, 0),
            sm_count=188,
            shared_memory=101376,
            memory_bytes=96 * _GIB,
            dram_gbps=1792.0,
            dram_source="data sheet",
            clock_ghz=2.6,
            clock_source="of the assumed 1000 TFLOP/s",
            mma=_ASSUMED,
        ),
        Gpu(
            key="gb10",
            name="NVIDIA GB10",
            part="GB10",
            capability=(12, 1),
            sm_count=48,
            shared_memory=101376,
            memory_bytes=128 * _GIB,
            dram_gbps=273.0,
            dram_source="data sheet",
            clock_ghz=2.44,
            clock_source="of the assumed 240 TFLOP/s",
            mma=_ASSUMED,
        ),
        # There to compare the twins with real hardware. It has no MMA of the forms that are counted.
        Gpu(
            key="h200",
            name="NVIDIA H200",
            part="H200",
            capability=(9, 0),
            sm_count=132,
            shared_memory=232448,
            memory_bytes=141 * _GIB,
            dram_gbps=4500.0,
            dram_source="measured, reading only",
            clock_ghz=1.98,
            clock_source="data sheet",
        ),
    )
}


def find(key: str) -> Gpu:
    """The device of a key. Raises ValueError that lists them."""
    gpu = GPUS.get(key)
    if gpu is None:
        raise ValueError(f"device: expected one of {', '.join(GPUS)}, got {key!r}")
    return gpu

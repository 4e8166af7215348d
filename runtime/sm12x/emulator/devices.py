"""The devices that the emulator can be: what a program may ask the driver about them."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT = "rtx5090"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device. `shared_memory` is what one CTA can have at most, `memory_bytes` what the device has."""

    key: str
    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory: int
    memory_bytes: int


_GIB = 1 << 30
# The last one is there to compare the twins with real hardware.
GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 101376, 32 * _GIB),
        Gpu("rtxpro6000", "NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 101376, 96 * _GIB),
        Gpu("gb10", "NVIDIA GB10", (12, 1), 48, 101376, 128 * _GIB),
        Gpu("h200", "NVIDIA H200", (9, 0), 132, 232448, 141 * _GIB),
    )
}


def find(key: str) -> Gpu:
    """The device of a key. Raises ValueError that lists them."""
    gpu = GPUS.get(key)
    if gpu is None:
        raise ValueError(f"device: expected one of {', '.join(GPUS)}, got {key!r}")
    return gpu

"""cuLaunchKernelEx's arguments: CUlaunchConfig and CUlaunchAttribute, mirrored from cuda.h with ctypes."""

from __future__ import annotations

import ctypes

# CUlaunchAttributeID
IGNORE, COOPERATIVE, CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION, PRIORITY = 0, 2, 4, 6, 8


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; `value` is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig; `shared` is dynamic shared memory in bytes."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


def make_config(grid: tuple[int, int, int], threads: int, shared: int, *, programmatic: bool) -> LaunchConfig:
    """A launch of CTAs of `threads` threads, without its stream. `programmatic`: it may begin before what is
    ahead of it in the stream has ended, and waits for that itself."""
    attributes = (LaunchAttribute * 1)()
    attributes[0].id = PROGRAMMATIC_STREAM_SERIALIZATION
    attributes[0].value[0] = 1
    config = LaunchConfig(*grid, threads, 1, 1, shared)
    if programmatic:
        config.attributes = ctypes.cast(attributes, ctypes.POINTER(LaunchAttribute))  # keeps them alive
        config.count = 1
    return config

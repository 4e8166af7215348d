"""DLPack producers and a JAX, as far as sm12x looks, on the addresses of the fake driver."""

from __future__ import annotations

import contextlib
import sys
import types

import ml_dtypes
import numpy as np

from sm12x import outputs, streams
from sm12x.validation.device import DeviceArray


class DlpackArray:
    """A DLPack producer on a device that writes down which stream it was asked for."""

    def __init__(self, fake, shape, dtype, device=0):
        self.tensor = fake.tensor(shape, dtype, device)
        self.array = DeviceArray(self.tensor.address, tuple(shape), dtype, device, None)
        self.streams = []

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **options):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, **options)


class ArrayImpl(DlpackArray):
    """A JAX array, as far as sm12x looks."""

    __module__ = "jaxlib._jax"

    def is_deleted(self):
        return False


def install_jax(monkeypatch, fake):
    """Put a JAX in place for one test; returns its module. What it imports is a pair of "imported" and the
    array whose memory it is."""
    jax = types.ModuleType("jax")
    jax.local_devices = lambda backend: [types.SimpleNamespace(local_hardware_id=0)]
    jax.default_device = lambda device: contextlib.nullcontext()
    fp8 = {np.dtype(getattr(ml_dtypes, name)): name for name in ("bfloat16", "float8_e4m3fn")}

    def empty(shape, dtype):
        return ArrayImpl(fake, shape, fp8.get(np.dtype(dtype), np.dtype(dtype).name))

    def from_dlpack(export):
        export.__dlpack__(stream=0x9000)
        return ("imported", export.array)

    jax.numpy = types.SimpleNamespace(empty=empty)
    jax.dlpack = types.SimpleNamespace(from_dlpack=from_dlpack)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(streams, "_jax_streams", {})
    monkeypatch.setattr(outputs, "_held", [])
    return jax

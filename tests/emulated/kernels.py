"""Shipped kernels on an emulated device, for the tests."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache

import numpy as np

from sm12x import manifest
from sm12x.emulator.counting.collector import Collector
from sm12x.emulator.launch import launch, load
from sm12x.emulator.memory import GlobalMemory
from sm12x.emulator.shipped import read_ptx


@lru_cache(maxsize=64)
def ptx(key, arch="sm_120a"):
    return read_ptx(manifest.default().variants[key], arch)


class Machine:
    """Memory, and modules loaded into it. `counting`: results come with counters."""

    def __init__(self, *, counting=False):
        self.memory = GlobalMemory()
        self.counting = counting
        self._programs = {}

    def upload(self, array, label=None):
        """Address of a copy of an array."""
        content = np.ascontiguousarray(array)
        address = self.memory.allocate(max(content.nbytes, 1), label)
        self.memory.write(address, content.reshape(-1).view(np.uint8))
        return address

    def download(self, address, shape, dtype):
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.memory.read(address, count), np.uint8).view(dtype).reshape(shape).copy()

    def program(self, text):
        if text not in self._programs:
            module = load(text, self.memory)
            self._programs[text] = module.kernel(next(iter(module.ir.kernels)))
        return self._programs[text]

    def run(self, text, grid, block, params=b"", *, shared=0, seed=0, limit=10_000_000, **options):
        """Launch the only kernel of a PTX text. `grid` and `block` are sizes along x, or three."""
        sizes = [size if isinstance(size, tuple) else (size, 1, 1) for size in (grid, block)]
        content = bytes(params) if isinstance(params, ctypes.Structure) else params
        return launch(
            self.program(text),
            *sizes,
            shared,
            content,
            memory=self.memory,
            seed=seed,
            segment_limit=limit,
            **options,
            counts=Collector() if self.counting else None,
        )

    def run_shipped(self, key, grid, params, *, arch="sm_120a", seed=0):
        variant = manifest.default().variants[key]
        size = (grid, 1, 1) if variant.grid_axis == "x" else (1, grid, 1)
        return self.run(
            ptx(key, arch), size, variant.threads, params, shared=variant.shared_memory, seed=seed
        )


def kernel(body, *, registers="", params="", shared="", target="sm_120a"):
    """A PTX module with one kernel. Registers %p, %h, %r, %rd, %f and %d are there, 64 of each."""
    ranges = {"pred": "%p", "b16": "%h", "b32": "%r", "b64": "%rd", "f32": "%f", "f64": "%d"}
    declared = "\n".join(f"    .reg .{kind} {name}<64>;" for kind, name in ranges.items())
    return (
        f".version 9.0\n.target {target}\n.address_size 64\n{shared}\n"
        f".visible .entry test({params})\n{{\n{declared}\n{registers}\n{body}\n    ret;\n}}\n"
    )


def line_of(text, pattern):
    """The line of a PTX text, from 1, that matches a pattern."""
    for number, line in enumerate(text.split("\n"), 1):
        if re.search(pattern, line):
            return number
    raise AssertionError(f"no line matches {pattern!r}")

"""Runs forms on the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sm12x.emulator.launch import launch, load
from sm12x.emulator.memory import GlobalMemory

from .forms import Form, width
from .kernels import THREADS, layout, module, result_bytes


def joined(form: Form, operands: Sequence[Any], count: int) -> Any:
    """The buffer of operands."""
    starts, size = layout(form.operands, count)
    buffer = np.zeros(max(size, 1), np.uint8)
    for start, column in zip(starts, operands, strict=True):
        content = np.ascontiguousarray(column).view(np.uint8)
        buffer[start : start + len(content)] = content
    return buffer


def split(form: Form, buffer: Any, count: int) -> list[Any]:
    """The results in a buffer, one unsigned array each."""
    starts, _ = layout(form.results, count)
    found = []
    for kind, start in zip(form.results, starts, strict=True):
        size = width(kind) // 8
        found.append(buffer[start : start + size * count].view(f"u{size}").copy())
    return found


def run(
    forms: Sequence[Form], operands: Sequence[Sequence[Any]], count: int, *, seed: int = 0
) -> list[list[Any]]:
    """The results of each form. Raises EmulatorError where a form is not implemented, or breaks a rule."""
    memory = GlobalMemory()
    loaded = load(module(forms, count), memory)
    found = []
    for at, (form, columns) in enumerate(zip(forms, operands, strict=True)):
        content = joined(form, columns, count)
        source = memory.allocate(len(content), "operands")
        memory.write(source, content)
        _, size = result_bytes(form, count)
        target = memory.allocate(size, "results")
        memory.write(target, np.zeros(size, np.uint8))
        parameters = source.to_bytes(8, "little") + target.to_bytes(8, "little")
        grid, block = (count // THREADS, 1, 1), (THREADS, 1, 1)
        launch(loaded.kernel(f"form{at}"), grid, block, 0, parameters, memory=memory, seed=seed)
        found.append(split(form, np.frombuffer(memory.read(target, size), np.uint8), count))
        memory.free(source)
        memory.free(target)
    return found

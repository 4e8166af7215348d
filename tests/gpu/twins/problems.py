"""Grouped GEMMs that the twins run on both sides: operands in guarded, poisoned buffers, drawn from a seed.

"exact" operands are small integers with scales that are powers of two: every sum is exact in any order of
accumulation, so that outputs must be equal bit for bit. "random" ones take every finite FP8 value.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sm12x import manifest
from sm12x.arrays import numpy_dtype
from sm12x.validation.cases import random_e4m3_bits
from sm12x.validation.variants import gemm_variants

FP8 = "float8_e4m3fn"
GUARD = 64  # bytes around operands
GUARD_ROWS, GUARD_COLUMNS = 3, 16


@dataclass(frozen=True)
class Problem:
    """`rows` of each group; n and k of all of them, or for a list call `shapes` (n, k) of each. Scales:
    "value", "one", "group" or "vector". `offsets` replaces the right ones; `margin` are rows before and
    behind those of groups. `pad` are elements between rows of a and b."""

    variant: str
    name: str
    rows: tuple[int, ...]
    n: int = 0
    k: int = 0
    shapes: tuple[tuple[int, int], ...] = ()
    a_scale: str = "vector"
    b_scale: str = "vector"
    bias: str | None = None
    values: str = "random"
    wide_offsets: bool = False
    offsets: tuple[int, ...] | None = None
    margin: tuple[int, int] = (0, 0)
    pad: int = 0

    @property
    def key(self) -> str:
        return f"{self.variant}: {self.name}"

    @property
    def out(self) -> str:
        found = manifest.default().variants[self.variant].out
        return "float16" if found == "float16" else "bfloat16"


@dataclass
class Operand:
    """An array within a buffer of bytes: `offset` bytes in; strides in elements."""

    buffer: NDArray[np.uint8]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    def host(self) -> NDArray[Any]:
        kind = numpy_dtype(self.dtype)
        steps = tuple(step * kind.itemsize for step in self.strides)
        flat = self.buffer[self.offset :]
        flat = flat[: len(flat) // kind.itemsize * kind.itemsize].view(kind)
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps)


@dataclass
class Call:
    """Arguments of grouped_gemm with Operands in place of arrays, by name."""

    problem: Problem
    arguments: dict[str, Any]
    outs: list[Operand]
    owned: list[slice]  # rows of each output that are to be written
    operands: dict[str, Operand] = field(default_factory=dict)

    def collect(self) -> None:
        for name, value in self.arguments.items():
            if isinstance(value, list):
                for i, each in enumerate(value):
                    if isinstance(each, Operand):
                        self.operands[f"{name}[{i}]"] = each
            elif isinstance(value, Operand):
                self.operands[name] = value

    def resolved(self, take: Any) -> dict[str, Any]:
        """The arguments with `take(name, operand)` for each operand."""
        found: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if isinstance(value, list):
                found[name] = [
                    take(f"{name}[{i}]", each) if isinstance(each, Operand) else each
                    for i, each in enumerate(value)
                ]
            else:
                found[name] = take(name, value) if isinstance(value, Operand) else value
        return found


def aligned(size: int) -> NDArray[np.uint8]:
    raw = np.empty(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size]


class _Maker:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rng = np.random.default_rng(zlib.crc32(problem.key.encode()))

    def hold(self, values: NDArray[Any], dtype: str | None = None, pad: int = 0) -> Operand:
        """A copy in a buffer of random bytes, with `pad` elements behind each row."""
        values = np.ascontiguousarray(values)
        dtype = dtype or values.dtype.name
        size = values.dtype.itemsize
        columns = values.shape[-1] + pad if values.ndim else 1
        rows = int(np.prod(values.shape[:-1])) if values.ndim else 1
        buffer = aligned(2 * GUARD + max(1, rows * columns) * size)
        buffer[:] = self.rng.integers(0, 256, len(buffer), np.uint8)
        strides = [1]
        for extent in reversed((*values.shape[1:-1], columns)):
            strides.insert(0, strides[0] * extent)
        operand = Operand(buffer, GUARD, values.shape, tuple(strides[-values.ndim :]), dtype)
        if values.size:
            operand.host()[...] = values.view(numpy_dtype(dtype))
        return operand

    def fp8(self, shape: tuple[int, ...], pad: int = 0) -> Operand:
        if self.problem.values == "exact":
            bits = self.rng.integers(-4, 5, shape).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        else:
            bits = random_e4m3_bits(shape, self.rng)
        return self.hold(bits, FP8, pad)

    def scale(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if self.problem.values == "exact":
            return np.ldexp(np.float32(1), self.rng.integers(-4, 1, shape)).astype(np.float32)
        return (self.rng.random(shape) + 0.5).astype(np.float32) * np.float32(2**-6)

    def bias(self, shape: tuple[int, ...]) -> Operand:
        values = np.round(self.rng.standard_normal(shape) * 40)
        return self.hold(values.astype(numpy_dtype(self.problem.bias or "float32")))

    def output(self, rows: int, n: int) -> Operand:
        columns = n + GUARD_COLUMNS
        buffer = aligned((rows + 2 * GUARD_ROWS) * columns * 2)
        buffer[:] = self.rng.integers(0, 256, len(buffer), np.uint8)
        return Operand(buffer, GUARD_ROWS * columns * 2, (rows, n), (columns, 1), self.problem.out)


def make(problem: Problem) -> Call:
    return _list_call(problem) if problem.shapes else _packed_call(problem)


def _packed_call(p: Problem) -> Call:
    m, groups = _Maker(p), len(p.rows)
    before, after = p.margin
    total = before + sum(p.rows) + after
    right = before + np.concatenate([[0], np.cumsum(p.rows)])
    offsets = np.array(right if p.offsets is None else p.offsets, np.int64 if p.wide_offsets else np.int32)
    shapes = {
        "a": {"one": (1,), "group": (groups, 1, 1), "vector": (total, 1)},
        "b": {"one": (1,), "group": (groups,), "vector": (groups, p.n)},
    }

    def scale(side: str, mode: str) -> Any:
        if mode == "value":
            return float(m.scale((1,))[0])
        return m.hold(m.scale(shapes[side][mode]))

    out = m.output(total, p.n)
    arguments = {
        "a": m.fp8((total, p.k), p.pad),
        "b": m.fp8((groups, p.n, p.k), p.pad),
        "a_scale": scale("a", p.a_scale),
        "b_scale": scale("b", p.b_scale),
        "offsets": m.hold(offsets),
        "bias": m.bias((groups, p.n)) if p.bias else None,
        "out": out,
        "out_dtype": p.out,
        "variant": p.variant,
    }
    owned = slice(before, before + sum(p.rows)) if p.offsets is None else slice(0, 0)
    call = Call(p, arguments, [out], [owned])
    call.collect()
    return call


def _list_call(p: Problem) -> Call:
    m = _Maker(p)
    every = [(rows, *shape) for rows, shape in zip(p.rows, p.shapes, strict=True)]
    outs = [m.output(rows, n) for rows, n, _ in every]
    a_scales: list[Any] = []
    for i, (rows, _, _) in enumerate(every):
        a_scales.append([None, 0.5, m.hold(m.scale((rows,)))][i % 3] if rows > 1 else 2.0)
    arguments = {
        "a": [m.fp8((rows, k), p.pad) for rows, _, k in every],
        "b": [m.fp8((n, k), p.pad) for _, n, k in every],
        "a_scale": a_scales,
        "b_scale": [m.hold(m.scale((n, 1))) if i % 2 else 0.25 for i, (_, n, _) in enumerate(every)],
        "bias": [m.bias((n,)) for _, n, _ in every] if p.bias else None,
        "out": outs,
        "out_dtype": p.out,
        "variant": p.variant,
    }
    call = Call(p, arguments, outs, [slice(0, rows) for rows, *_ in every])
    call.collect()
    return call


def problems() -> list[Problem]:
    """At least ten for each GEMM variant built for the twin."""
    found = []
    many = tuple([0, 1, 2, 3, 1, 0, 5, 1] * 5)
    for variant in gemm_variants("sm_90a"):
        key = variant.key

        def add(
            name: str, rows: tuple[int, ...], n: int = 0, k: int = 0, key: str = key, **more: Any
        ) -> None:
            found.append(Problem(key, name, rows, n, k, **more))

        add("full tiles", (128, 64), 128, 128)
        add("edges, K tail", (1, 0, 17, 130), 136, 704, bias="float32")
        add("edges, K tail, exact", (129, 0, 33), 136, 704, bias="float32", values="exact")
        add("40 groups", many, 128, 144, a_scale="group", b_scale="group", bias="bfloat16")
        add("40 groups, exact", many, 40, 80, a_scale="group", b_scale="group", values="exact", pad=16)
        add("values", (63, 65), 264, 32, a_scale="value", b_scale="value", bias="float16", wide_offsets=True)
        add("one scale", (16, 15, 0), 8, 16, a_scale="one", b_scale="one", pad=32)
        add("unowned rows", (7, 0, 40), 72, 208, margin=(5, 9), a_scale="value")
        add("more tiles than SMs", (1,) * 150, 24, 16, a_scale="group", values="exact")
        bad = {"values": "exact", "a_scale": "value", "b_scale": "value"}
        add("decreasing offsets", (9, 0, 20), 72, 48, offsets=(0, 20, 9, 29), **bad)
        add("offsets past M", (9, 0, 20), 72, 48, offsets=(0, 9, 9, 2**32 + 29), wide_offsets=True, **bad)
        add("negative offsets", (9, 0, 20), 72, 48, offsets=(-64, 9, 9, 29), **bad)
        shapes = ((8, 16), (24, 32), (136, 144), (40, 704), (264, 16))
        add("list", (3, 0, 17, 33, 130), shapes=shapes, bias="float32")
        add("list, exact", (130, 0, 2, 33, 1), shapes=shapes, values="exact", pad=16)
    rows = tuple(0 if i % 50 == 7 else 1 + i % 2 for i in range(352))
    found.append(
        Problem(
            "fp8_ptr_array_128x16x128_swap_bf16",
            "list of more groups than one preparation takes",
            rows,
            shapes=((8, 16),) * 352,
            values="exact",
        )
    )
    return found

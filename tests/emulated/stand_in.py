"""Kernels written in NumPy that stand in for the PTX: everything around them runs as it is.

They do on emulated memory what the shipped kernels do: read the launch structs, and write the rows of every
group. Tests of the driver and of the mirrors of host arrays are fast with them, and can have them misbehave.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from sm12x import abi, manifest
from sm12x.emulator import driver, launches, tensor_map
from sm12x.emulator.launch import LaunchResult

FP8 = ml_dtypes.float8_e4m3fn


class StandIn:
    """`rogue(memory, groups)` runs at the end of every GEMM; `status` is what preparation leaves behind."""

    def __init__(self):
        self.rogue = None
        self.status = 0
        self.seeds = []
        self.residents = []
        self.truncated = []
        self.texts = []
        self.groups = []

    def load(self, text, memory, *, truncate_bits=None):
        self.truncated.append(truncate_bits)
        self.texts.append(text)
        names = re.findall(r"\.entry (\w+)", text)

        def kernel(name):
            (struct,) = {v.params for v in manifest.default().variants.values() if v.symbol == name}
            layout = SimpleNamespace(parameter_bytes=ctypes.sizeof(abi.STRUCTS[struct]), static_shared=0)
            ir = SimpleNamespace(instructions=())
            return SimpleNamespace(name=name, struct=abi.STRUCTS[struct], layout=layout, kernel=ir)

        return SimpleNamespace(ir=SimpleNamespace(kernels=dict.fromkeys(names)), kernel=kernel)

    def launch(
        self,
        program,
        grid,
        block,
        shared_bytes,
        parameters,
        *,
        memory,
        seed,
        resident=None,
        races=True,
        progress=None,
        counts=None,
    ):
        self.seeds.append(seed)
        self.residents.append(resident)
        if progress is not None:
            progress(1000)
        params = program.struct.from_buffer_copy(parameters)
        if program.struct is abi.sm12x_prepare_packed_params:
            self.groups = self._packed(params, memory)
            arrays, count = params.group_arrays, params.num_groups
            memory.write(arrays + abi.status_offset(count), self.status.to_bytes(4, "little"))
        elif program.struct is abi.sm12x_prepare_list_params:
            self.groups = self.groups if params.first_group else []
            self.groups += [self._listed(record) for record in params.groups[: params.count]]
        else:
            if program.struct is abi.sm12x_packed_params:
                self.groups = one_launch_groups(params, memory)
                self._count(params, grid, program.name, memory)
            assert params.num_groups == len(self.groups)
            for group in self.groups:
                self._multiply(memory, group, program.name)
            if self.rogue is not None:
                self.rogue(memory, self.groups)
        return LaunchResult(1, 0)

    def chain(self, links, *, memory):
        """`launch_chain`: launches that were held back, one after the other."""
        return [
            self.launch(
                link.program,
                link.grid,
                link.block,
                link.shared_bytes,
                link.parameters,
                memory=memory,
                seed=link.seed,
                resident=link.resident,
                progress=link.progress,
            )
            for link in links
        ]

    def _count(self, p, grid, symbol, memory):
        """Split-K: counters are found zero and left zero, and every CTA has its partials."""
        if not p.least_units:
            assert (p.partials, p.counters) == (0, 0)
            return
        (variant,) = (v for v in manifest.default().variants.values() if v.symbol == symbol)
        memory.read(p.partials + grid[0] * variant.workspace_per_cta - 1, 1)
        counters = memory.read(p.counters, 4 * grid[0] * variant.mma_warps)
        assert not any(counters)

    def _packed(self, p, memory):
        width = 8 if p.offsets_are_64_bit else 4
        raw = memory.read(p.offsets, (p.num_groups + 1) * width)
        offsets = np.frombuffer(raw, f"<i{width}").tolist()
        bias_type = {4: np.float32, 2: None}.get(p.bias_element_bytes)
        groups = []
        for e, (first, last) in enumerate(itertools.pairwise(offsets)):
            a_scale, b_scale = p.a_scale, p.b_scale
            if p.a_scale_mode == abi.SM12X_SCALE_VECTOR:
                a_scale += 4 * first
            elif p.a_scale_mode == abi.SM12X_SCALE_GROUP:
                a_scale += 4 * e
            if p.b_scale_mode in (abi.SM12X_SCALE_VECTOR, abi.SM12X_SCALE_GROUP):
                b_scale += 4 * e * (p.stride_b_scale if p.b_scale_mode == abi.SM12X_SCALE_VECTOR else 1)
            groups.append(
                SimpleNamespace(
                    a=p.a + first * p.stride_a,
                    b=p.b + e * p.stride_b_group,
                    d=p.d + first * p.stride_d * p.d_element_bytes,
                    m=last - first,
                    n=p.n,
                    k=p.k,
                    stride_a=p.stride_a,
                    stride_b=p.stride_b,
                    stride_d=p.stride_d,
                    scales=[
                        (p.a_scale_mode, a_scale, p.a_scale_value),
                        (p.b_scale_mode, b_scale, p.b_scale_value),
                    ],
                    bias=p.bias and p.bias + e * p.stride_bias * p.bias_element_bytes,
                    bias_type=bias_type,
                )
            )
        return groups

    def _listed(self, r):
        names = ("a", "b", "d", "m", "n", "k", "stride_a", "stride_b", "stride_d", "bias")
        scales = [(r.a_scale_mode, r.a_scale, r.a_scale_value), (r.b_scale_mode, r.b_scale, r.b_scale_value)]
        return SimpleNamespace(
            **{name: getattr(r, name) for name in names}, scales=scales, bias_type=np.float32
        )

    def _multiply(self, memory, g, symbol):
        rows = getattr(g, "rows", None) or [g.a + i * g.stride_a for i in range(g.m)]

        def operand(addresses, length):
            lines = [bytes(length) if at is None else memory.read(at, length) for at in addresses]
            return np.frombuffer(b"".join(lines), FP8).astype(np.float32).reshape(len(lines), length)

        def scale(mode, address, value, count):
            if mode == abi.SM12X_SCALE_VALUE:
                return np.float32(value)
            if not isinstance(address, int):
                return np.float32(address)
            words = np.frombuffer(
                memory.read(address, 4 * (count if mode == abi.SM12X_SCALE_VECTOR else 1)), "<f4"
            )
            return words

        product = operand(rows, g.k) @ operand([g.b + i * g.stride_b for i in range(g.n)], g.k).T
        product = product * np.reshape(scale(*g.scales[0], g.m), (-1, 1)) * scale(*g.scales[1], g.n)
        if g.bias:
            product = product + np.frombuffer(memory.read(g.bias, 4 * g.n), "<f4")
        if getattr(g, "row_weight", None):
            product = product * np.frombuffer(memory.read(g.row_weight, 4 * g.m), "<f4")[:, None]
        kind = getattr(g, "out", np.float16 if symbol.endswith("fp16") else ml_dtypes.bfloat16)
        result = product.astype(kind)
        for i in range(g.m):
            memory.write(g.d + i * g.stride_d * result.itemsize, result[i].tobytes())


OUT_TYPES = {
    abi.SM12X_OUT_FLOAT32: np.float32,
    abi.SM12X_OUT_BFLOAT16: ml_dtypes.bfloat16,
    abi.SM12X_OUT_FLOAT16: np.float16,
}


def one_launch_groups(p, memory):
    """The groups of sm12x_packed_params. Operands lie where the tensor maps say."""

    def integers(address, count, wide):
        width = 8 if wide else 4
        return np.frombuffer(memory.read(address, count * width), f"<i{width}").tolist()

    masked = p.row_layout == abi.SM12X_ROWS_MASKED
    weights = tensor_map.decode(bytes(p.map_b))
    tokens = None if p.row_index else tensor_map.decode(bytes(p.map_a))
    assert weights.dims == (p.k, p.n, p.num_groups)
    assert tokens is None or tokens.dims == (p.k, p.rows, p.num_groups if masked else 1)
    bounds = integers(p.bounds, p.num_groups + (not masked), p.bounds_are_64_bit)
    spans = [(0, count) for count in bounds] if masked else list(itertools.pairwise(bounds))
    index = integers(p.row_index, p.rows, p.row_index_is_64_bit) if p.row_index else None
    out = OUT_TYPES[p.out_type]
    size = np.dtype(out).itemsize
    groups = []
    for e, (first, last) in enumerate(spans):
        at = e * p.rows + first if masked else first
        if index is None:
            numbers = range(first, last)
            base = tokens.address + (e * tokens.strides[1] if masked else 0)
            rows = [base + row * tokens.strides[0] for row in numbers]
            scales_at = range(at, at + last - first)
        else:
            numbers = scales_at = [row if 0 <= row < p.a_rows else None for row in index[first:last]]
            rows = [None if row is None else p.a + row * p.stride_a for row in numbers]
        a_scale, b_scale = p.a_scale, p.b_scale
        if p.a_scale_mode == abi.SM12X_SCALE_VECTOR:
            words = [None if row is None else memory.read(p.a_scale + 4 * row, 4) for row in scales_at]
            a_scale = [0.0 if word is None else np.frombuffer(word, "<f4")[0] for word in words]
        elif p.a_scale_mode == abi.SM12X_SCALE_GROUP:
            a_scale += 4 * e
        if p.b_scale_mode in (abi.SM12X_SCALE_VECTOR, abi.SM12X_SCALE_GROUP):
            b_scale += 4 * e * (p.stride_b_scale if p.b_scale_mode == abi.SM12X_SCALE_VECTOR else 1)
        groups.append(
            SimpleNamespace(
                a=rows[0] if rows else p.a,
                rows=rows,
                b=weights.address + e * weights.strides[1],
                d=p.d + (e * p.stride_d_group + first * p.stride_d) * size,
                m=last - first,
                n=p.n,
                k=p.k,
                stride_a=p.stride_a,
                stride_b=weights.strides[0],
                stride_d=p.stride_d,
                scales=[
                    (p.a_scale_mode, a_scale, p.a_scale_value),
                    (p.b_scale_mode, b_scale, p.b_scale_value),
                ],
                bias=p.bias and p.bias + e * p.stride_bias * 4,
                row_weight=p.row_weight and p.row_weight + 4 * at,
                out=out,
            )
        )
    return groups


def install(monkeypatch):
    """Put stand-in kernels in place of the emulator's for one test."""
    made = StandIn()
    monkeypatch.setattr(driver, "load", made.load)
    monkeypatch.setattr(driver, "launch", made.launch)
    monkeypatch.setattr(launches, "launch_chain", made.chain)
    reset(monkeypatch)
    return made


def reset(monkeypatch):
    """A new emulated driver, as in a new process, for one test."""
    from sm12x import driver as runtime
    from sm12x.ops import grouped_gemm as module

    monkeypatch.setattr(driver, "_emulator", driver.Emulator())
    emulated = [ordinal for ordinal in runtime._devices if ordinal >= runtime.EMULATED]
    for ordinal in emulated:
        del runtime._devices[ordinal]
    module._plans.clear()

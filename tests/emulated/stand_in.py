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
from sm12x.emulator import driver
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
            assert params.num_groups == len(self.groups)
            for group in self.groups:
                self._multiply(memory, group, program.name)
            if self.rogue is not None:
                self.rogue(memory, self.groups)
        return LaunchResult(1, 0)

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
        def rows(address, count, length, stride):
            lines = [memory.read(address + i * stride, length) for i in range(count)]
            return np.frombuffer(b"".join(lines), FP8).astype(np.float32).reshape(count, length)

        def scale(mode, address, value, count):
            if mode == abi.SM12X_SCALE_VALUE:
                return np.float32(value)
            words = np.frombuffer(
                memory.read(address, 4 * (count if mode == abi.SM12X_SCALE_VECTOR else 1)), "<f4"
            )
            return words

        product = rows(g.a, g.m, g.k, g.stride_a) @ rows(g.b, g.n, g.k, g.stride_b).T
        product = product * np.reshape(scale(*g.scales[0], g.m), (-1, 1)) * scale(*g.scales[1], g.n)
        if g.bias:
            product = product + np.frombuffer(memory.read(g.bias, 4 * g.n), "<f4")
        result = product.astype(np.float16 if symbol.endswith("fp16") else ml_dtypes.bfloat16)
        for i in range(g.m):
            memory.write(g.d + i * g.stride_d * 2, result[i].tobytes())


def install(monkeypatch):
    """Put stand-in kernels in place of the emulator's for one test."""
    made = StandIn()
    monkeypatch.setattr(driver, "load", made.load)
    monkeypatch.setattr(driver, "launch", made.launch)
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

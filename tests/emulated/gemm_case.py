"""Packed grouped GEMMs through the shipped kernels on an emulated device, as the runtime launches them: a
preparation kernel fills the group arrays, the GEMM edits its tensor maps, loads, multiplies and stores.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from emulated.kernels import Machine
from sm12x import abi, manifest
from sm12x.emulator import tensor_map
from sm12x.reference import check, grouped_gemm_float64, random_fp8

POISON = 0xA5
GUARD_ROWS, GUARD_COLUMNS = 3, 16
OUT = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_ELEMENT = {1: 0, "bfloat16": 9, "float16": 6}  # CUtensorMapDataType
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle


@dataclass(frozen=True)
class Problem:
    """Rows of each group, features and depth. `a_scale`, `b_scale`: "value", "one", "group" or "vector";
    `bias`: a NumPy type or None.
    """

    rows: tuple[int, ...]
    n: int
    k: int
    a_scale: str = "vector"
    b_scale: str = "vector"
    bias: object = None


MODES = {
    "value": abi.SM12X_SCALE_VALUE,
    "one": abi.SM12X_SCALE_ONE,
    "group": abi.SM12X_SCALE_GROUP,
    "vector": abi.SM12X_SCALE_VECTOR,
}


class Case:
    """Operands of a problem, on the host and on a machine; the output is poisoned, with guard rows around it
    and guard columns behind each row.
    """

    def __init__(self, problem, out_type, seed):
        rng = np.random.default_rng(seed)
        self.problem, self.out_type, self.machine = problem, OUT[out_type], Machine()
        groups, total = len(problem.rows), sum(problem.rows)
        self.offsets = np.concatenate([[0], np.cumsum(problem.rows)]).astype(np.int32)
        self.a = random_fp8((total, problem.k), rng)
        self.b = random_fp8((groups, problem.n, problem.k), rng)
        self.a_scale = self._scale(rng, problem.a_scale, groups, (total,))
        self.b_scale = self._scale(rng, problem.b_scale, groups, (groups, problem.n))
        self.bias = None
        if problem.bias is not None:
            self.bias = (rng.standard_normal((groups, problem.n)) * 100).astype(problem.bias)
        self.stride_d = problem.n + GUARD_COLUMNS
        self.out_rows = total + 2 * GUARD_ROWS

    @staticmethod
    def _scale(rng, mode, groups, vector):
        shape = {"value": (1,), "one": (1,), "group": (groups,), "vector": vector}[mode]
        return (rng.random(shape) + 0.5).astype(np.float32)

    def reference(self):
        a_scale = self.a_scale
        if self.problem.a_scale == "group":
            a_scale = a_scale.reshape(-1, 1, 1)
        elif self.problem.a_scale in ("value", "one"):
            a_scale = float(a_scale[0])
        b_scale = float(self.b_scale[0]) if self.problem.b_scale in ("value", "one") else self.b_scale
        return grouped_gemm_float64(
            self.a, self.b, a_scale=a_scale, b_scale=b_scale, offsets=self.offsets, bias=self.bias
        )

    def run(self, variant, ctas, *, arch="sm_120a", seed=0, machine=None):
        """The output (rows, n), after a check that nothing around it was written."""
        m = machine or self.machine
        poisoned = np.full((self.out_rows, self.stride_d * 2), POISON, np.uint8)
        out = m.upload(poisoned, "the output")
        groups = self._prepare(m, variant, out + GUARD_ROWS * self.stride_d * 2, arch, seed)
        workspace = m.memory.allocate(ctas * variant.workspace_per_cta, "the tensor maps")
        params = abi.sm12x_ptr_array_params(
            group_arrays=groups,
            tensor_maps=workspace,
            num_groups=len(self.problem.rows),
            ctas=ctas,
            bias_type=self._bias_type(),
        )
        maps = b"".join(prototype(variant, name, workspace) for name in ("a", "b", "d"))
        ctypes.memmove(ctypes.addressof(params), maps, len(maps))
        self.result = m.run_shipped(variant.key, ctas, params, arch=arch, seed=seed)
        found = m.download(out, poisoned.shape, np.uint8)
        inside = found[GUARD_ROWS:-GUARD_ROWS, : self.problem.n * 2].copy()
        found[GUARD_ROWS:-GUARD_ROWS, : self.problem.n * 2] = POISON
        assert (found == POISON).all(), "bytes outside of the output were written"
        return inside.view(self.out_type)

    def _bias_type(self):
        if self.bias is None:
            return 0
        return abi.BIAS_TYPES[self.bias.dtype.name]

    def _prepare(self, m, variant, out, arch, seed):
        p = self.problem
        groups = len(p.rows)
        params = abi.sm12x_prepare_packed_params(
            a=m.upload(self.a, "a"),
            b=m.upload(self.b, "b"),
            d=out,
            offsets=m.upload(self.offsets, "offsets"),
            a_scale=m.upload(self.a_scale, "a_scale"),
            b_scale=m.upload(self.b_scale, "b_scale"),
            bias=m.upload(self.bias, "bias") if self.bias is not None else 0,
            group_arrays=m.memory.allocate(abi.group_arrays_bytes(groups), "the group arrays"),
            rows=int(self.offsets[-1]),
            stride_a=p.k,
            stride_b=p.k,
            stride_b_group=p.n * p.k,
            stride_d=self.stride_d,
            stride_b_scale=p.n,
            stride_bias=p.n,
            n=p.n,
            k=p.k,
            num_groups=groups,
            a_scale_mode=MODES[p.a_scale],
            b_scale_mode=MODES[p.b_scale],
            a_scale_value=float(self.a_scale[0]) if len(self.a_scale) else 0.0,
            b_scale_value=float(self.b_scale.reshape(-1)[0]),
            d_element_bytes=2,
            bias_element_bytes=self.bias.itemsize if self.bias is not None else 0,
            swap_ab=int(variant.swap_ab),
        )
        m.run_shipped("fp8_ptr_array_prepare_packed", 1, params, arch=arch, seed=seed)
        return params.group_arrays

    def check(self, out):
        """The largest error over DESIGN section 7's bound."""
        ref, abs_sum = self.reference()
        return check(out, ref, abs_sum, self.problem.k)[1]


def prototype(variant, name, address):
    """The tensor map of an operand as the runtime encodes it: box, swizzle and type; the kernel replaces the
    rest.
    """
    spec = variant.tensor_maps[name]
    box = spec.box + (1,) * (spec.rank - len(spec.box))
    strides, stride = [], spec.element_bytes
    for extent in box[:-1]:
        stride = -(-stride * extent // 16) * 16
        strides.append(stride)
    kind = _ELEMENT[1] if spec.element_bytes == 1 else _ELEMENT[variant.out]
    ones = [1] * spec.rank
    return tensor_map.encode_tiled(
        kind, spec.rank, address, box, strides, box, ones, 0, _SWIZZLE[spec.swizzle], 0, 0
    )


def variant_of(key):
    return manifest.default().variants[key]

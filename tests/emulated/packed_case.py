"""Packed calls on kernels of the family fp8_packed, launched directly on an emulated device: one kernel, and
the test says how many CTAs share the work, and how.
"""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from emulated.gemm_case import OUT
from emulated.kernels import Machine
from sm12x import abi
from sm12x.emulator import tensor_map
from sm12x.reference import check, grouped_gemm_float64, random_fp8

_UINT8 = 0  # CUtensorMapDataType
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
_POISON = 0x7F  # e4m3's NaN, behind the rows of every operand


class PackedCase:
    """Operands of a call, on the host: `rows` of each group, scales per token and per channel, bfloat16
    out.
    """

    def __init__(self, rows, n, k, seed):
        rng = np.random.default_rng(seed)
        self.rows, self.n, self.k, self.out_type = rows, n, k, OUT["bfloat16"]
        self.offsets = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
        self.a = random_fp8((sum(rows), k), rng)
        self.b = random_fp8((len(rows), n, k), rng)
        self.a_scale = (rng.random(sum(rows)) + 0.5).astype(np.float32)
        self.b_scale = (rng.random((len(rows), n)) + 0.5).astype(np.float32)

    def run(self, variant, ctas, *, least_units=0, machine=None, arch="sm_120a", seed=0):
        """Launch; the output (rows, n), and the emulator's result in `result`."""
        m = machine or Machine()
        params = self.parameters(m, variant, ctas, least_units=least_units)
        self.result = m.run_shipped(variant.key, ctas, params, arch=arch, seed=seed)
        return self.output(m, params)

    def output(self, m, params):
        return m.download(params.d, (sum(self.rows), self.n), self.out_type)

    def parameters(self, m, variant, ctas, *, least_units=0, early_weights=False, shift=0):
        """Uploads the operands and says where they are, as a launch takes it. `shift`: offsets begin so many
        words behind a multiple of 256 bytes."""
        total, groups = sum(self.rows), len(self.rows)
        a = _upload_rows(m, self.a, "a")
        b = self.b_address = _upload_rows(m, self.b, "b")
        d = m.memory.allocate(max(1, total * self.n * 2), "the output")
        partials = counters = 0
        if least_units:
            partials = m.memory.allocate(ctas * variant.workspace_per_cta, "the partials")
            counters = m.upload(np.zeros(ctas * variant.mma_warps, np.uint32), "the counters")
        params = abi.sm12x_packed_params(
            a=a,
            d=d,
            bounds=m.upload(np.r_[np.full(shift, -1), self.offsets].astype(np.int32), "offsets") + 4 * shift,
            a_scale=m.upload(self.a_scale, "a_scale"),
            b_scale=m.upload(self.b_scale, "b_scale"),
            partials=partials,
            counters=counters,
            rows=total,
            a_rows=total,
            stride_a=self.k,
            stride_d=self.n,
            stride_b_scale=self.n,
            n=self.n,
            k=self.k,
            num_groups=groups,
            row_layout=abi.SM12X_ROWS_PACKED,
            a_scale_mode=abi.SM12X_SCALE_VECTOR,
            b_scale_mode=abi.SM12X_SCALE_VECTOR,
            out_type=abi.SM12X_OUT_BFLOAT16,
            least_units=least_units,
            flags=abi.SM12X_EARLY_WEIGHTS if early_weights else 0,
        )
        maps = encode_map(variant, "a", a, (self.k, total, 1), (self.k, total * self.k))
        for size in range(variant.weight_maps):
            maps += encode_map(variant, "b", b, (self.k, self.n, groups), (self.k, self.n * self.k), size)
        ctypes.memmove(ctypes.addressof(params), maps, len(maps))
        return params

    def error_ratio(self, out):
        """The largest error over DESIGN section 7's bound."""
        ref, abs_sum = grouped_gemm_float64(
            self.a, self.b, a_scale=self.a_scale, b_scale=self.b_scale, offsets=self.offsets
        )
        return check(out, ref, abs_sum, self.k)[1]


def _upload_rows(m, array, label):
    """An operand, with a row of NaN behind it that no kernel has any business with."""
    behind = np.full((1, array.shape[-1]), _POISON, np.uint8).view(ml_dtypes.float8_e4m3fn)
    return m.upload(np.concatenate([array.reshape(-1, array.shape[-1]), behind]), label)


def encode_map(variant, name, address, shape, strides, size=0):
    """The tensor map of an operand; `size`: of several, which."""
    spec = variant.tensor_maps[name]
    box = (spec.box[0], spec.box[1] << size) + (1,) * (spec.rank - len(spec.box))
    ones, swizzle = [1] * spec.rank, _SWIZZLE[spec.swizzle]
    return tensor_map.encode_tiled(_UINT8, spec.rank, address, shape, strides, box, ones, 0, swizzle, 0, 0)

"""The preparation kernels of fp8_ptr_array, run from their shipped PTX, against a NumPy model of
cuda/kernels/ fp8_ptr_array_prepare_*.cu: every byte of the group arrays, and no byte besides.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from emulated.kernels import Machine
from sm12x import abi

POISON = 0xA5
ARCHITECTURES = ("sm_120a", "sm_90a")
# offset factor, NumPy type, elements per group
ARRAYS = {
    "ptr_a": (abi.SM12X_OFFSET_PTR_A, np.uint64, 1),
    "ptr_b": (abi.SM12X_OFFSET_PTR_B, np.uint64, 1),
    "ptr_d": (abi.SM12X_OFFSET_PTR_D, np.uint64, 1),
    "stride_a": (abi.SM12X_OFFSET_STRIDE_A, np.int64, 1),
    "stride_b": (abi.SM12X_OFFSET_STRIDE_B, np.int64, 1),
    "stride_d": (abi.SM12X_OFFSET_STRIDE_D, np.int64, 1),
    "m_scale": (abi.SM12X_OFFSET_M_SCALE, np.uint64, 1),
    "n_scale": (abi.SM12X_OFFSET_N_SCALE, np.uint64, 1),
    "bias": (abi.SM12X_OFFSET_BIAS, np.uint64, 1),
    "m_scale_stride": (abi.SM12X_OFFSET_M_SCALE_STRIDE, np.int32, 1),
    "n_scale_stride": (abi.SM12X_OFFSET_N_SCALE_STRIDE, np.int32, 1),
    "m_value": (abi.SM12X_OFFSET_M_VALUE, np.float32, 1),
    "n_value": (abi.SM12X_OFFSET_N_VALUE, np.float32, 1),
    "shape": (abi.SM12X_OFFSET_SHAPE, np.int32, 3),
}


class GroupArrays:
    """A model of the group arrays: what is set is expected, the rest stays poisoned."""

    def __init__(self, groups, address):
        self.groups, self.address = groups, address
        self.content = np.full(abi.group_arrays_bytes(groups), POISON, np.uint8)

    def at(self, name):
        factor, dtype, width = ARRAYS[name]
        start = factor * abi.groups_padded(self.groups)
        size = np.dtype(dtype).itemsize * width * self.groups
        found = self.content[start : start + size].view(dtype)
        return found.reshape(self.groups, width) if width > 1 else found

    def slot(self, name, group):
        factor, dtype, _ = ARRAYS[name]
        start = factor * abi.groups_padded(self.groups)
        return self.address + start + group * np.dtype(dtype).itemsize

    def set_status(self, status):
        at = abi.status_offset(self.groups)
        self.content[at : at + 4].view(np.int32)[0] = status

    def set_scale(self, side, group, mode, base, value, vector_start):
        slot = f"{side}_value"
        if mode == abi.SM12X_SCALE_VALUE:
            self.at(slot)[group] = value
            address = self.slot(slot, group)
        else:
            moved = {
                abi.SM12X_SCALE_ONE: 0,
                abi.SM12X_SCALE_GROUP: group,
                abi.SM12X_SCALE_VECTOR: vector_start,
            }
            address = base + 4 * moved[mode]
        self.at(f"{side}_scale")[group] = address
        self.at(f"{side}_scale_stride")[group] = mode == abi.SM12X_SCALE_VECTOR


def clamped(offsets, rows):
    """Offsets as the kernel uses them, and its status word."""
    bad_range = any(not 0 <= o <= rows for o in offsets)
    decrease = any(b < a for a, b in itertools.pairwise(offsets))
    bounds = [min(max(offsets[0], 0), rows)]
    for offset in offsets[1:]:
        bounds.append(max(bounds[-1], min(offset, rows)))
    return bounds, abi.SM12X_STATUS_OFFSETS_RANGE * bad_range | abi.SM12X_STATUS_OFFSETS_DECREASE * decrease


def packed_model(params, offsets, address):
    model = GroupArrays(params.num_groups, address)
    bounds, status = clamped(offsets, params.rows)
    tokens, weights = ("b", "a") if params.swap_ab else ("a", "b")
    rows_side, features_side = ("n", "m") if params.swap_ab else ("m", "n")
    for group in range(params.num_groups):
        first, rows = bounds[group], bounds[group + 1] - bounds[group]
        model.at(f"ptr_{tokens}")[group] = params.a + first * params.stride_a
        model.at(f"ptr_{weights}")[group] = params.b + group * params.stride_b_group
        model.at("ptr_d")[group] = params.d + first * params.stride_d * params.d_element_bytes
        model.at(f"stride_{tokens}")[group] = params.stride_a
        model.at(f"stride_{weights}")[group] = params.stride_b
        model.at("stride_d")[group] = params.stride_d
        bias = params.bias + group * params.stride_bias * params.bias_element_bytes if params.bias else 0
        model.at("bias")[group] = bias
        model.set_scale(rows_side, group, params.a_scale_mode, params.a_scale, params.a_scale_value, first)
        start = group * params.stride_b_scale
        model.set_scale(
            features_side, group, params.b_scale_mode, params.b_scale, params.b_scale_value, start
        )
        shape = (params.n, rows, params.k) if params.swap_ab else (rows, params.n, params.k)
        model.at("shape")[group] = shape
    model.set_status(status)
    return model


def packed_case(rng, groups, wide):
    rows = int(rng.integers(1, 4000))
    offsets = np.sort(rng.integers(0, rows + 1, groups + 1))
    if rng.random() < 0.5:  # offsets that the kernel has to clamp
        offsets[rng.integers(0, groups + 1, 3)] = rng.integers(-9, rows + 9, 3)
    modes = rng.integers(0, 4, 2)
    machine = Machine()
    params = abi.sm12x_prepare_packed_params(
        **{name: int(rng.integers(1 << 40, 1 << 50)) for name in ("a", "b", "d", "a_scale", "b_scale")},
        offsets=machine.upload(offsets.astype(np.int64 if wide else np.int32), "offsets"),
        bias=int(rng.integers(1 << 40, 1 << 50)) * int(rng.integers(0, 2)),
        rows=rows,
        **{
            name: int(rng.integers(1, 1 << 34))
            for name in (
                "stride_a",
                "stride_b",
                "stride_b_group",
                "stride_d",
                "stride_b_scale",
                "stride_bias",
            )
        },
        n=int(rng.integers(1, 9000)),
        k=int(rng.integers(0, 9000)),
        num_groups=groups,
        offsets_are_64_bit=int(wide),
        a_scale_mode=int(modes[0]),
        b_scale_mode=int(modes[1]),
        a_scale_value=float(np.float32(rng.random())),
        b_scale_value=float(np.float32(rng.random())),
        d_element_bytes=2,
        bias_element_bytes=int(rng.choice([2, 4])),
        swap_ab=int(rng.integers(0, 2)),
    )
    params.group_arrays = machine.upload(
        np.full(abi.group_arrays_bytes(groups), POISON, np.uint8), "group arrays"
    )
    return machine, params, offsets.tolist()


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 33, 256, 300])
def test_packed_preparation_fills_the_group_arrays_and_nothing_else(arch, groups, schedule):
    seed = groups * 10 + (arch == "sm_90a")
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    machine, params, offsets = packed_case(rng, groups, wide=bool(seed % 2))
    machine.run_shipped("fp8_ptr_array_prepare_packed", 1, params, arch=arch, seed=schedule)
    expected = packed_model(params, offsets, params.group_arrays)
    got = machine.download(params.group_arrays, expected.content.shape, np.uint8)
    for name in ARRAYS:
        model = GroupArrays(groups, params.group_arrays)
        model.content = got
        np.testing.assert_array_equal(model.at(name), expected.at(name), err_msg=name)
    np.testing.assert_array_equal(got, expected.content)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("groups", "first", "count"), [(5, 0, 5), (400, 340, 60), (340, 0, 340)])
def test_list_preparation_copies_its_records(arch, groups, first, count, schedule):
    seed = groups + count
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    machine = Machine()
    params = abi.sm12x_prepare_list_params(
        num_groups=groups, first_group=first, count=count, swap_ab=int(rng.integers(0, 2))
    )
    params.group_arrays = machine.upload(
        np.full(abi.group_arrays_bytes(groups), POISON, np.uint8), "group arrays"
    )
    expected = GroupArrays(groups, params.group_arrays)
    expected.set_status(0)
    tokens, weights = ("b", "a") if params.swap_ab else ("a", "b")
    rows_side, features_side = ("n", "m") if params.swap_ab else ("m", "n")
    for index in range(count):
        record, group = params.groups[index], first + index
        for name in ("a", "b", "d", "a_scale", "b_scale", "bias", "stride_a", "stride_b", "stride_d"):
            setattr(record, name, int(rng.integers(1, 1 << 50)))
        for name in ("m", "n", "k"):
            setattr(record, name, int(rng.integers(0, 1 << 30)))
        record.a_scale_value, record.b_scale_value = rng.random(2).astype(np.float32)
        record.a_scale_mode, record.b_scale_mode = (int(mode) for mode in rng.choice([0, 1, 3], 2))
        expected.at(f"ptr_{tokens}")[group] = record.a
        expected.at(f"ptr_{weights}")[group] = record.b
        expected.at("ptr_d")[group] = record.d
        expected.at(f"stride_{tokens}")[group] = record.stride_a
        expected.at(f"stride_{weights}")[group] = record.stride_b
        expected.at("stride_d")[group] = record.stride_d
        expected.at("bias")[group] = record.bias
        expected.set_scale(rows_side, group, record.a_scale_mode, record.a_scale, record.a_scale_value, 0)
        expected.set_scale(features_side, group, record.b_scale_mode, record.b_scale, record.b_scale_value, 0)
        shape = (record.n, record.m, record.k) if params.swap_ab else (record.m, record.n, record.k)
        expected.at("shape")[group] = shape
    machine.run_shipped("fp8_ptr_array_prepare_list", 1, params, arch=arch, seed=schedule)
    got = machine.download(params.group_arrays, expected.content.shape, np.uint8)
    np.testing.assert_array_equal(got, expected.content)

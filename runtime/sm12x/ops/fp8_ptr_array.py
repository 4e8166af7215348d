"""Launches of the family fp8_ptr_array: a preparation kernel fills the group arrays that the GEMM reads.

The workspace begins with the tensor maps that the CTAs rewrite, then come the group arrays.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import abi, driver, manifest
from ..select import Choice
from ..tensor_maps import get_tensor_maps
from . import launch, validate
from .operands import Operands

# Writes the two workspace addresses, group arrays and tensor maps, into sm12x_ptr_array_params.
pack_workspace = struct.Struct("=2Q").pack_into
WORKSPACE_AT = abi.sm12x_ptr_array_params.group_arrays.offset
_pack_pointers = struct.Struct("=8Q").pack_into
_pack_values = struct.Struct("=2f").pack_into
_VALUES_AT = abi.sm12x_prepare_packed_params.a_scale_value.offset

Launch = Callable[[ctypes.c_void_p, Any, None], int]


def kernel_launch(device: driver.Device, variant: manifest.Variant, ctas: int) -> Launch:
    """cuLaunchKernel of `variant`, loaded if it is not, with `ctas` CTAs along its grid axis; takes stream,
    arguments, None."""
    function = driver.get_function(device, variant)
    grid = (ctas, 1) if variant.grid_axis == "x" else (1, ctas)
    sizes = (*grid, 1, variant.threads, 1, 1, variant.shared_memory)
    # As C integers: ctypes takes Python's one by one, 1.5 us a launch.
    return partial(device.driver.hot.cuLaunchKernel, ctypes.c_void_p(function), *map(ctypes.c_uint, sizes))


def gemm_params(
    device: driver.Device, variant: manifest.Variant, groups: int, ctas: int, bias_type: int, address: int
) -> bytes:
    """sm12x_ptr_array_params with all but the two workspace addresses."""
    params = abi.sm12x_ptr_array_params(num_groups=groups, ctas=ctas, bias_type=bias_type)
    maps = get_tensor_maps(device, variant, address)
    ctypes.memmove(ctypes.addressof(params), maps, len(maps))
    return bytes(params)


class _Slot:
    """What one call writes to. Two threads in the same plan have one each."""

    __slots__ = (
        "_keep",
        "context",
        "context_at",
        "gemm",
        "gemm_arguments",
        "prepare",
        "prepare_arguments",
        "stream",
    )

    def __init__(self, prepare: bytes, gemm: bytes) -> None:
        blocks = launch.Block(prepare), launch.Block(gemm)
        self.prepare, self.gemm = blocks[0].memory, blocks[1].memory
        self.prepare_arguments, self.gemm_arguments = blocks[0].arguments, blocks[1].arguments
        self.stream = ctypes.c_void_p()
        self.context = ctypes.c_void_p()
        self.context_at = ctypes.byref(self.context)
        self._keep = blocks


@dataclass(slots=True)
class PtrArrayLaunch:
    """A packed call on kernels of this family, without its addresses. `needed`: bytes of workspace."""

    device: driver.Device
    key: str
    prepare_key: str
    prepare: Launch
    gemm: Launch
    prepare_params: bytes
    gemm_params: bytes
    maps_bytes: int
    needed: int
    shapes: str
    status_at: int
    get_context: Any
    context: int
    slots: list[_Slot]

    def run(
        self,
        stream: int,
        workspace: int,
        a: int,
        b: int,
        d: int,
        bounds: int,
        row_index: int,
        a_scale: int,
        b_scale: int,
        bias: int,
        row_weight: int,
        a_value: float,
        b_value: float,
    ) -> None:
        """Launch a call on `stream`, given its addresses; `row_index` and `row_weight` are 0. `workspace` 0:
        allocated and freed in stream order.

        Raises CudaError, and with SM12X_CHECK ValueError for bad offsets.
        """
        if not workspace:
            with driver.current(self.device), driver.temporary(self.device, self.needed, stream) as base:
                self.run(
                    *(stream, base, a, b, d, bounds, row_index),
                    *(a_scale, b_scale, bias, row_weight, a_value, b_value),
                )
            return
        try:
            slot = self.slots.pop()
        except IndexError:
            slot = _Slot(self.prepare_params, self.gemm_params)
        arrays = workspace + self.maps_bytes
        _pack_pointers(slot.prepare, 0, a, b, d, bounds, a_scale, b_scale, bias, arrays)
        _pack_values(slot.prepare, _VALUES_AT, a_value, b_value)
        pack_workspace(slot.gemm, WORKSPACE_AT, arrays, workspace)
        slot.stream.value = stream
        if self.get_context(slot.context_at) or slot.context.value != self.context or launch.CHECK:
            with driver.current(self.device):
                self._enqueue(slot, workspace)
        else:
            self._enqueue(slot, 0)
        self.slots.append(slot)

    def _enqueue(self, slot: _Slot, workspace: int) -> None:
        if workspace and launch.CHECK:
            launch.refuse_capture(self.device, slot.stream.value or 0)
        status = self.prepare(slot.stream, slot.prepare_arguments, None)
        if status:
            raise launch.launch_error(self.device, status, self.prepare_key, self.shapes)
        if workspace and launch.CHECK:
            self._check_offsets(slot, workspace)
        status = self.gemm(slot.stream, slot.gemm_arguments, None)
        if status:
            raise launch.launch_error(self.device, status, self.key, self.shapes)

    def _check_offsets(self, slot: _Slot, workspace: int) -> None:
        word = driver.read_bytes(self.device, workspace + self.status_at, 4, slot.stream.value or 0)
        status = int.from_bytes(word, "little")
        if status == abi.SM12X_STATUS_OK:
            return
        faults = []
        if status & abi.SM12X_STATUS_OFFSETS_DECREASE:
            faults.append(launch.DECREASE)
        if status & abi.SM12X_STATUS_OFFSETS_RANGE:
            faults.append(launch.OUT_OF_RANGE)
        raise launch.bad_offsets(faults or [f"status {status}"], self.shapes)


def make_launch(operands: Operands, choice: Choice, address: int) -> PtrArrayLaunch:
    """The launches of a packed call; `address` is any on the device. Raises CubinError and CudaError."""
    problem, device, variant = operands.problem, operands.device, choice.variant
    ctas = launch.grid_size(problem, choice, device)
    bias = operands.bias
    params = abi.sm12x_prepare_packed_params(
        rows=operands.rows,
        stride_a=operands.a.stride,
        stride_b=operands.b.stride,
        stride_b_group=operands.b_group,
        stride_d=operands.d.stride,
        stride_b_scale=operands.b_scale_stride,
        stride_bias=operands.bias_stride,
        n=problem.n,
        k=problem.k,
        num_groups=problem.groups,
        offsets_are_64_bit=int(operands.wide_bounds),
        a_scale_mode=operands.a_scale_mode,
        b_scale_mode=operands.b_scale_mode,
        d_element_bytes=operands.d.element_bytes,
        bias_element_bytes=0 if bias is None else validate.BIAS_BYTES[bias],
        swap_ab=int(variant.swap_ab),
    )
    prepare = manifest.default().only(variant.family, "prepare_packed")
    bias_type = 0 if bias is None else abi.BIAS_TYPES[bias]
    maps = launch.scratch_bytes(variant, ctas)
    return PtrArrayLaunch(
        device=device,
        key=variant.key,
        prepare_key=prepare.key,
        prepare=kernel_launch(device, prepare, 1),
        gemm=kernel_launch(device, variant, ctas),
        prepare_params=bytes(params),
        gemm_params=gemm_params(device, variant, problem.groups, ctas, bias_type, address),
        maps_bytes=maps,
        needed=maps + abi.group_arrays_bytes(problem.groups),
        shapes=operands.shapes,
        status_at=maps + abi.status_offset(problem.groups),
        get_context=device.driver.hot.cuCtxGetCurrent,
        context=device.context,
        slots=[],
    )

"""Launches of the family fp8_packed: one kernel, whose tensor maps lie over the caller's own arrays.

Everything that a call changes is an address. They are written into prepared parameters, and into the tensor
maps by the driver. The weights have several maps, but few addresses, one for each layer of a model: what the
driver made of an address is kept. Whole tiles need no workspace; split-K has its partials there, and counters
of our own.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from .. import abi, driver
from ..counters import counters_of
from ..launch_config import LaunchConfig, make_config
from ..select import Choice
from ..tensor_maps import BYTES, encode_array
from . import launch
from .operands import Operands

_Params = abi.sm12x_packed_params
_MAP_A, _MAP_B = _Params.map_a.offset, _Params.map_b.offset
# a, d, bounds, row_index, a_scale, b_scale, bias, row_weight, partials, counters lie behind each other.
# N, size_t, takes struct half as long as Q; sm12x runs on 64-bit hosts only, where they are the same.
_pack_addresses = struct.Struct("@10N").pack_into
_ADDRESSES_AT = _Params.a.offset
_pack_values = struct.Struct("=2f").pack_into
_VALUES_AT = _Params.a_scale_value.offset
MOST_WEIGHTS = 512  # addresses of weights whose maps a launch keeps, up to 640 bytes each
_BOUNDS = {False: "i", True: "q"}  # struct's letters


class _Slot:
    """What one call writes to. Two threads in the same plan have one each."""

    __slots__ = (
        "_keep",
        "a",
        "address_b",
        "b",
        "config",
        "context",
        "context_at",
        "launch",
        "memory",
        "replace_a",
        "replace_b",
        "stream",
        "weights",
    )

    def __init__(self, made: PackedLaunch) -> None:
        block = launch.Block(made.params)
        self.memory = block.memory
        self.config = LaunchConfig.from_buffer_copy(made.config)
        self.stream = 0
        self.context = ctypes.c_void_p()
        self.context_at = ctypes.byref(self.context)
        self.a = self.b = -1  # where the maps point; none are addresses
        self.address_b = ctypes.c_void_p()
        hot, pointer = made.device.driver.hot, made.device.driver.pointer
        replace = hot.cuTensorMapReplaceAddress
        # What the map of a shall point at is read where the parameters have it.
        address_a = ctypes.c_void_p.from_address(block.address + _Params.a.offset)
        self.replace_a: Callable[[], int] = partial(replace, pointer(block.address + _MAP_A), address_a)
        self.replace_b = [
            partial(replace, pointer(block.address + at), self.address_b)
            for at in range(_MAP_B, _MAP_B + made.weight_bytes, BYTES)
        ]
        self.weights = self.memory[_MAP_B : _MAP_B + made.weight_bytes]
        at = pointer(ctypes.addressof(self.config))
        arguments = pointer(ctypes.addressof(block.arguments))
        self.launch: Callable[[], int] = partial(
            hot.cuLaunchKernelEx, at, pointer(made.function), arguments, None
        )
        self._keep = block


@dataclass(slots=True)
class PackedLaunch:
    """A packed or masked call on a kernel of this family, without its addresses.

    `needed`: bytes of workspace, 0 for whole tiles. `gathers`: there is a row_index, and no map of a.
    `weight_bytes`: of all maps of b together; `weights`: those maps by the address of b.
    `by_value`: a scale comes by value. `bounds`: how SM12X_CHECK=1 reads them back: as what struct, the most
    that one may be, and whether they are offsets.
    """

    device: driver.Device
    key: str
    function: int
    config: LaunchConfig
    params: bytes
    needed: int
    shapes: str
    gathers: bool
    weight_bytes: int
    weights: dict[int, bytes]
    by_value: bool
    bounds: tuple[struct.Struct, int, bool]
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
        entered: bool = False,
    ) -> None:
        """Launch a call on `stream`, given its addresses. `workspace` 0: where one is needed, it is allocated
        and freed in stream order. `entered`: the device's context is current, and bounds were checked.

        Raises CudaError, and with SM12X_CHECK ValueError for bad offsets or counts.
        """
        partials = counters = 0
        if self.needed:
            if not workspace:
                with driver.current(self.device), driver.temporary(self.device, self.needed, stream) as base:
                    self.run(
                        *(stream, base, a, b, d, bounds, row_index),
                        *(a_scale, b_scale, bias, row_weight, a_value, b_value),
                    )
                return
            partials = workspace
            counters = self.device.counters.get(workspace) or counters_of(self.device, workspace)
        try:
            slot = self.slots.pop()
        except IndexError:
            slot = _Slot(self)
        if not entered and (
            self.get_context(slot.context_at) or slot.context.value != self.context or launch.CHECK
        ):
            self.slots.append(slot)
            with driver.current(self.device):
                if launch.CHECK:
                    self._check_bounds(bounds, stream)
                self.run(
                    *(stream, workspace, a, b, d, bounds, row_index),
                    *(a_scale, b_scale, bias, row_weight, a_value, b_value, True),
                )
            return
        _pack_addresses(
            slot.memory,
            _ADDRESSES_AT,
            a,
            d,
            bounds,
            row_index,
            a_scale,
            b_scale,
            bias,
            row_weight,
            partials,
            counters,
        )
        if self.by_value:
            _pack_values(slot.memory, _VALUES_AT, a_value, b_value)
        if slot.stream != stream:
            slot.stream = slot.config.stream = stream
        if not self.gathers and a != slot.a:
            status = slot.replace_a()
            if status:
                raise self._error("cuTensorMapReplaceAddress", status)
            slot.a = a
        if b != slot.b:
            maps = self.weights.get(b)
            if maps is None:
                maps = self._point_at_weights(slot, b)
            slot.weights[:] = maps
            slot.b = b
        status = slot.launch()
        if status:
            raise self._error("cuLaunchKernelEx", status)
        self.slots.append(slot)

    def _point_at_weights(self, slot: _Slot, b: int) -> bytes:
        slot.address_b.value = b
        for replace in slot.replace_b:
            status = replace()
            if status:
                raise self._error("cuTensorMapReplaceAddress", status)
        if len(self.weights) >= MOST_WEIGHTS:
            self.weights.clear()
        maps = self.weights[b] = bytes(slot.weights)
        return maps

    def _error(self, call: str, status: int) -> Exception:
        return self.device.driver.error(call, status, variant=self.key, shapes=self.shapes)

    def _check_bounds(self, address: int, stream: int) -> None:
        layout, most, are_offsets = self.bounds
        launch.refuse_capture(self.device, stream)
        values = layout.unpack(driver.read_bytes(self.device, address, layout.size, stream))
        outside = any(not 0 <= value <= most for value in values)
        if not are_offsets:
            if outside:
                raise ValueError(
                    f"rows: expected values from 0 to max_m = {most}, got {min(values)} to {max(values)} "
                    f"({self.shapes}); out was not written"
                )
            return
        faults = [launch.DECREASE] if any(x > y for x, y in pairwise(values)) else []
        if outside:
            faults.append(launch.OUT_OF_RANGE)
        if faults:
            raise launch.bad_offsets(faults, self.shapes)


def make_launch(
    operands: Operands, choice: Choice, a: int, b: int, early_weights: bool = False
) -> PackedLaunch:
    """The launch of a packed or masked call, its tensor maps encoded at addresses of a and b.

    Raises CubinError and CudaError.
    """
    problem, device, variant = operands.problem, operands.device, choice.variant
    masked, gathers = problem.kind == "masked", operands.wide_row_index is not None
    splits = choice.least_units > 0
    ctas = launch.grid_size(problem, choice, device)
    params = _Params(
        rows=operands.rows,
        a_rows=operands.a_rows,
        stride_a=operands.a.stride,
        stride_d=operands.d.stride,
        stride_d_group=operands.d_group,
        stride_b_scale=operands.b_scale_stride,
        stride_bias=operands.bias_stride,
        n=problem.n,
        k=problem.k,
        num_groups=problem.groups,
        row_layout=operands.row_layout,
        bounds_are_64_bit=int(operands.wide_bounds),
        row_index_is_64_bit=int(bool(operands.wide_row_index)),
        a_scale_mode=operands.a_scale_mode,
        b_scale_mode=operands.b_scale_mode,
        bias_type=0 if operands.bias is None else abi.BIAS_TYPES[operands.bias],
        out_type=abi.OUT_TYPES[problem.out],
        least_units=choice.least_units,
        flags=abi.SM12X_EARLY_WEIGHTS if early_weights else 0,
    )
    content = bytearray(params)
    k, n, groups = problem.k, problem.n, problem.groups
    if not gathers:
        shape = (k, operands.a_rows, groups if masked else 1)
        strides = (operands.a.stride, operands.a_group if masked else operands.a.stride)
        content[_MAP_A : _MAP_A + BYTES] = encode_array(device, variant, "a", a, shape, strides)
    strides = (operands.b.stride, operands.b_group)
    weights = b"".join(
        encode_array(device, variant, "b", b, (k, n, groups), strides, size)
        for size in range(variant.weight_maps)
    )
    content[_MAP_B : _MAP_B + len(weights)] = weights
    bounds = struct.Struct(f"={groups + (not masked)}{_BOUNDS[operands.wide_bounds]}")
    grid = (ctas, 1, 1) if variant.grid_axis == "x" else (1, ctas, 1)
    return PackedLaunch(
        device=device,
        key=variant.key,
        function=driver.get_function(device, variant),
        config=make_config(grid, variant.threads, variant.shared_memory, programmatic=variant.pdl),
        params=bytes(content),
        needed=launch.scratch_bytes(variant, ctas) if splits else 0,
        shapes=operands.shapes,
        gathers=gathers,
        weight_bytes=len(weights),
        weights={},
        by_value=abi.SM12X_SCALE_VALUE in (operands.a_scale_mode, operands.b_scale_mode),
        bounds=(bounds, operands.rows, not masked),
        get_context=device.driver.hot.cuCtxGetCurrent,
        context=device.context,
        slots=[],
    )

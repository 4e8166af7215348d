"""The packed call: rows of all groups behind each other in `a`, weights in one (E, N, K) array.

Everything that depends on shapes, strides, dtypes, devices and the way scales come is worked out once and
kept in a `PackedPlan`. A call with a known plan checks addresses, writes them into prepared parameters and
launches two kernels.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

from .. import abi, driver, manifest
from ..arrays import Array
from ..select import Problem
from . import launch, validate
from .memory import (
    check_alignment,
    check_operands,
    check_overlap,
    check_present,
    check_workspace,
    workspace_base,
)
from .validate import Matrix, Scale

_pack_pointers = struct.Struct("=8Q").pack_into
_pack_values = struct.Struct("=2f").pack_into
_pack_workspace = launch.PACK_WORKSPACE
_VALUES_AT = abi.sm12x_prepare_packed_params.a_scale_value.offset
_WORKSPACE_AT = launch.WORKSPACE_AT


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
class Kernels:
    """What a plan launches. The workspace begins with `maps_bytes` of tensor maps, then come group arrays."""

    device: driver.Device
    variant: manifest.Variant
    prepare_key: str
    prepare: launch.Launch
    gemm: launch.Launch
    prepare_params: bytes
    gemm_params: bytes
    maps_bytes: int
    needed: int
    shapes: str
    status_at: int
    get_context: Any
    context: int
    slots: list[_Slot]


@dataclass(slots=True)
class PackedPlan:
    """A validated packed call without its addresses. `kernels` is None where there is nothing to compute."""

    device: int
    out_shape: tuple[int, int]
    out_dtype: str
    a: Matrix
    b: Matrix
    d: Matrix
    span_a: int
    span_b: int
    span_d: int
    offsets_mask: int
    bias_mask: int
    workspace_bytes: int
    hand_over: bool  # an array is JAX's: `tensors.deliver` has work to do
    kernels: Kernels | None


def plan_packed(
    a: Array,
    b: Array,
    a_scale: Scale,
    b_scale: Scale,
    offsets: Array,
    out: Array | None,
    out_dtype: Any,
    bias: Array | None,
    workspace: Array | None,
    dtype: Any,
    variant: Any,
) -> PackedPlan:
    """Validate everything but addresses and prepare the launches. Raises as `sm12x.grouped_gemm` says."""
    name_a, name_b = validate.fp8_names(dtype)
    kind_a, kind_b = validate.fp8_dtype(a, "a", name_a), validate.fp8_dtype(b, "b", name_b)
    kind_out = validate.out_dtype_name(out_dtype)
    validate.rank(a, "a", "(M, K)", 2)
    validate.rank(b, "b", "(E, N, K)", 3)
    (rows, k), (groups, n, k_of_b) = a.shape, b.shape
    validate.sizes(rows, n, k, k_of_b, "a", "b")
    if groups > validate.MAX_GROUPS:
        raise ValueError(f"b: expected at most {validate.MAX_GROUPS} experts, got {groups}")
    a_rows = validate.matrix(a, "a", 1)
    b_rows = validate.matrix(b, "b", 1, (1, 2))
    b_group = validate.group_stride(b, b_rows)
    wide_offsets = validate.offsets(offsets, groups)
    a_mode = validate.packed_a_scale(a_scale, rows, groups)
    b_mode, b_scale_stride = validate.packed_b_scale(b_scale, groups, n)
    if bias is not None:
        validate.bias(bias, (groups, n), "bias")
    out_bytes = validate.itemsize(kind_out)
    d_rows = (
        Matrix(rows, n, n, out_bytes) if out is None else validate.output(out, (rows, n), kind_out, "out")
    )
    workspace_bytes = 0 if workspace is None else validate.workspace_bytes(workspace)
    named = (
        ("a", a),
        ("b", b),
        ("offsets", offsets),
        ("a_scale", a_scale if isinstance(a_scale, Array) else None),
        ("b_scale", b_scale if isinstance(b_scale, Array) else None),
        ("bias", bias),
        ("out", out),
        ("workspace", workspace),
    )
    ordinal = validate.same_device(named)
    device = driver.get_device(ordinal)
    problem = Problem("packed", groups, kind_a, kind_b, kind_out, device.arch, rows, n, k)
    chosen = launch.choose(problem, variant, device)
    evenly = groups <= 1 or b_group == n * b_rows.stride
    b_span = (groups - 1) * b_group + b_rows.span if groups else 0
    plan = PackedPlan(
        device=ordinal,
        out_shape=(rows, n),
        out_dtype=kind_out,
        a=a_rows,
        b=Matrix(groups * n, k, b_rows.stride, 1) if evenly else Matrix(1, b_span, b_span, 1),
        d=d_rows,
        span_a=a_rows.span,
        span_b=b_span,
        span_d=d_rows.span,
        offsets_mask=7 if wide_offsets else 3,
        bias_mask=0 if bias is None else validate.BIAS_BYTES[bias.dtype] - 1,
        workspace_bytes=workspace_bytes,
        hand_over=any(array is not None and array.framework == "jax" for _, array in named),
        kernels=None,
    )
    if rows == 0 or groups == 0:
        return plan
    ctas = launch.grid_size(problem, chosen, device)
    params = abi.sm12x_prepare_packed_params(
        rows=rows,
        stride_a=a_rows.stride,
        stride_b=b_rows.stride,
        stride_b_group=b_group,
        stride_d=d_rows.stride,
        stride_b_scale=b_scale_stride,
        stride_bias=0 if bias is None else validate.between(bias, "bias", n),
        n=n,
        k=k,
        num_groups=groups,
        offsets_are_64_bit=int(wide_offsets),
        a_scale_mode=a_mode,
        b_scale_mode=b_mode,
        d_element_bytes=out_bytes,
        bias_element_bytes=0 if bias is None else validate.BIAS_BYTES[bias.dtype],
        swap_ab=int(chosen.swap_ab),
    )
    prepare = manifest.default().only(chosen.family, "prepare_packed")
    bias_type = 0 if bias is None else abi.BIAS_TYPES[bias.dtype]
    maps = launch.maps_bytes(chosen, ctas)
    needed = maps + abi.group_arrays_bytes(groups)
    if workspace is not None:
        workspace_base(0, workspace_bytes, needed)  # an empty one has no address that calls could check
    plan.kernels = Kernels(
        device=device,
        variant=chosen,
        prepare_key=prepare.key,
        prepare=launch.kernel_launch(device, prepare, 1),
        gemm=launch.kernel_launch(device, chosen, ctas),
        prepare_params=bytes(params),
        gemm_params=launch.gemm_params(device, chosen, groups, ctas, bias_type, b.ptr),
        maps_bytes=maps,
        needed=needed,
        shapes=f"packed M={rows} E={groups} N={n} K={k}",
        status_at=maps + abi.status_offset(groups),
        get_context=device.driver.hot.cuCtxGetCurrent,
        context=device.context,
        slots=[],
    )
    return plan


def suspicious(
    plan: PackedPlan,
    kernels: Kernels,
    a: int,
    b: int,
    d: int,
    offsets: int,
    a_scale: int,
    b_scale: int,
    bias: int,
    workspace: int,
    base: int,
) -> bool:
    """Whether an address breaks a rule, or may (a span is wider than the rows in it): `refuse` decides.

    `workspace` is the address of the caller's, or 0; `base` where in it we begin.
    """
    a_end, b_end, d_end = a + plan.span_a, b + plan.span_b, d + plan.span_d
    if (
        (a | b | d) & 15
        or offsets & plan.offsets_mask
        or (a_scale | b_scale) & 3
        or bias & plan.bias_mask
        or not (a and b and d and offsets)
        or (d < a_end and a < d_end)
        or (d < b_end and b < d_end)
    ):
        return True
    if not workspace:
        return False
    end = base + kernels.needed
    return (
        end > workspace + plan.workspace_bytes
        or (base < a_end and a < end)
        or (base < b_end and b < end)
        or (base < d_end and d < end)
    )


def refuse(
    plan: PackedPlan,
    a: Array,
    b: Array,
    out: Array,
    offsets: Array,
    a_scale: int,
    b_scale: int,
    bias: int,
    workspace: Array | None,
) -> None:
    """The checks of a call's addresses, in full. `run_packed`'s caller has found a sign that one fails; where
    none does (rows in each other's gaps) it returns."""
    validate.writable(out, "out")
    if workspace is not None:
        validate.writable(workspace, "workspace")
    check_present((("a", a.ptr), ("b", b.ptr), ("out", out.ptr), ("offsets", offsets.ptr)))
    check_operands(a.ptr, b.ptr, out.ptr)
    check_alignment(
        (
            ("offsets", offsets.ptr, plan.offsets_mask + 1),
            ("a_scale", a_scale, 4),
            ("b_scale", b_scale, 4),
            ("bias", bias, plan.bias_mask + 1),
        )
    )
    check_overlap("out", out.ptr, plan.d, (("a", a.ptr, plan.a), ("b", b.ptr, plan.b)))
    if workspace is not None and plan.kernels is not None:
        base = workspace_base(workspace.ptr, plan.workspace_bytes, plan.kernels.needed)
        operands = (("a", a.ptr, plan.a), ("b", b.ptr, plan.b), ("out", out.ptr, plan.d))
        check_workspace(base, plan.kernels.needed, operands)


def run_packed(
    kernels: Kernels,
    stream: int,
    a: int,
    b: int,
    d: int,
    offsets: int,
    a_scale: int,
    b_scale: int,
    bias: int,
    a_value: float,
    b_value: float,
    workspace: int,
) -> None:
    """Launch a call on `stream`, given its addresses. `workspace` 0: allocated and freed in stream order.

    Raises CudaError, and with SM12X_CHECK ValueError for bad offsets.
    """
    if not workspace:
        with driver.current(kernels.device), driver.temporary(kernels.device, kernels.needed, stream) as base:
            run_packed(kernels, stream, a, b, d, offsets, a_scale, b_scale, bias, a_value, b_value, base)
        return
    try:
        slot = kernels.slots.pop()
    except IndexError:
        slot = _Slot(kernels.prepare_params, kernels.gemm_params)
    arrays = workspace + kernels.maps_bytes
    _pack_pointers(slot.prepare, 0, a, b, d, offsets, a_scale, b_scale, bias, arrays)
    _pack_values(slot.prepare, _VALUES_AT, a_value, b_value)
    _pack_workspace(slot.gemm, _WORKSPACE_AT, arrays, workspace)
    slot.stream.value = stream
    if kernels.get_context(slot.context_at) or slot.context.value != kernels.context or launch.CHECK:
        with driver.current(kernels.device):
            _enqueue(kernels, slot, workspace)
    else:
        _enqueue(kernels, slot, 0)
    kernels.slots.append(slot)


def _enqueue(kernels: Kernels, slot: _Slot, workspace: int) -> None:
    if workspace and launch.CHECK:
        _refuse_capture(kernels, slot)
    status = kernels.prepare(slot.stream, slot.prepare_arguments, None)
    if status:
        raise launch.launch_error(kernels.device, status, kernels.prepare_key, kernels.shapes)
    if workspace and launch.CHECK:
        _check_offsets(kernels, slot, workspace)
    status = kernels.gemm(slot.stream, slot.gemm_arguments, None)
    if status:
        raise launch.launch_error(kernels.device, status, kernels.variant.key, kernels.shapes)


def _refuse_capture(kernels: Kernels, slot: _Slot) -> None:
    if driver.stream_is_capturing(kernels.device, slot.stream.value or 0):
        raise ValueError(
            "stream: SM12X_CHECK=1 reads the offsets' status back, which a stream that is being "
            "captured into a graph "
            "cannot do; unset SM12X_CHECK or capture without it"
        )


def _check_offsets(kernels: Kernels, slot: _Slot, workspace: int) -> None:
    status = driver.read_int32(kernels.device, workspace + kernels.status_at, slot.stream.value or 0)
    if status == abi.SM12X_STATUS_OK:
        return
    faults = []
    if status & abi.SM12X_STATUS_OFFSETS_DECREASE:
        faults.append("some that decrease")
    if status & abi.SM12X_STATUS_OFFSETS_RANGE:
        faults.append("some below 0 or above M")
    raise ValueError(
        "offsets: expected values from 0 to M that never decrease, got "
        f"{' and '.join(faults) or f'status {status}'} "
        f"({kernels.shapes}); out was not written"
    )

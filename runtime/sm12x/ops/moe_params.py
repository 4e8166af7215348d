"""What the kernels of an expert layer get of its weights and its activation, whichever of them run."""

from __future__ import annotations

import math
from typing import Any

from .. import abi, driver
from ..arrays import Array
from ..manifest import Variant
from ..select import Problem
from ..tensor_maps import encode_array
from .moe_validate import Call, Layer, LayerArrays, Weights

_ACTIVATIONS = {
    "silu": abi.SM12X_ACTIVATION_SILU,
    "swigluoai": abi.SM12X_ACTIVATION_SILU,
    "swigluoai_uninterleave": abi.SM12X_ACTIVATION_SILU,
    "gelu": abi.SM12X_ACTIVATION_GELU,
    "gelu_tanh": abi.SM12X_ACTIVATION_GELU_TANH,
    "relu2": abi.SM12X_ACTIVATION_RELU2,
}


def address(value: Array | float | None) -> int:
    """Of an array; 0 for a number and for nothing."""
    return value.ptr if isinstance(value, Array) else 0


def number(value: Array | float | None) -> float:
    """A number; 1.0 for an array and for nothing."""
    return value if isinstance(value, float) else 1.0


def gemm_params(gemm: Problem, weights: Weights, scale: Any, bias: Any) -> Any:
    """The sm12x_packed_params of either GEMM but for maps, rows of a and d, and addresses in the
    workspace."""
    return abi.sm12x_packed_params(
        b_scale=address(scale),
        bias=address(bias),
        rows=gemm.rows,
        a_rows=gemm.rows,
        stride_b_scale=weights.scale_stride,
        stride_bias=weights.bias_stride,
        n=gemm.n,
        k=gemm.k,
        num_groups=gemm.groups,
        row_layout=abi.SM12X_ROWS_PACKED,
        b_scale_mode=weights.scale_mode,
        b_scale_value=number(scale),
        bias_type=0 if weights.bias is None else abi.BIAS_TYPES[weights.bias],
        out_type=abi.OUT_TYPES[gemm.out],
    )


def up_params(gemm: Any, layer: Layer, weights: LayerArrays, call: Call) -> Any:
    """The sm12x_up_params around those of the first GEMM, without addresses in the workspace."""
    how = layer.activation
    pair, half = gate_strides(layer)
    return abi.sm12x_up_params(
        gemm=gemm,
        d_scale=address(weights.a2_scale),
        d_scale_value=number(weights.a2_scale),
        alpha=how.alpha if how.is_swigluoai else 1.0,
        beta=how.beta if how.is_swigluoai else 0.0,
        limit=math.inf if how.limit is None else how.limit,
        activation=_ACTIVATIONS[how.name],
        half_stride=half,
        pair_stride=pair,
        expert_map=address(weights.expert_map),
        routes=call.routes.most_rows,
        map_size=layer.global_experts,
        ids_are_64_bit=int(call.routes.wide_ids),
    )


def gate_strides(layer: Layer) -> tuple[int, int]:
    """Rows of w1 from a gate to the next, and from a gate to its up."""
    return (2, 1) if layer.activation.interleaved else (1, layer.intermediate)


def first_maps(device: driver.Device, variant: Variant, layer: Layer, w1: Array) -> bytes:
    """The tensor maps "b" of a variant over w1, one for each size of a box."""
    experts, n, k = w1.shape
    row, expert = layer.w1.inner.stride, layer.w1.group_stride
    if not variant.gated:
        return _maps(device, variant, "b", w1, (k, n, experts), (row, expert))
    pair, half = gate_strides(layer)
    strides = (pair * row, half * row, 8 * pair * row, expert)
    return _maps(device, variant, "b", w1, (k, 8, 2, n // 16, experts), strides)


def second_maps(device: driver.Device, variant: Variant, name: str, layer: Layer, w2: Array) -> bytes:
    """The tensor maps `name` of a variant over w2, one for each size of a box."""
    experts, n, k = w2.shape
    row, expert = layer.w2.inner.stride, layer.w2.group_stride
    return _maps(device, variant, name, w2, (k, n, experts), (row, expert))


def _maps(
    device: driver.Device,
    variant: Variant,
    name: str,
    array: Array,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> bytes:
    return b"".join(
        encode_array(device, variant, name, array.ptr, shape, strides, size)
        for size in range(variant.weight_maps)
    )

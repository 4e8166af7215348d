"""The launch structs of cuda/include/sm12x/abi.h, abi_packed.h and abi_moe.h, mirrored once.

Struct, field and constant names are the header's. `mismatches` compares the mirror with what the build read
out of the compiled header; a unit test runs it, and so does the first call of a process, before any kernel is
launched.

ctypes cannot align a struct to 64 bytes before Python 3.13. The driver copies kernel parameters out of host
memory, so only sizes and offsets matter here; the tail that the alignment adds is spelled out as `_tail`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

SM12X_SCALE_VALUE = 0
SM12X_SCALE_ONE = 1
SM12X_SCALE_GROUP = 2
SM12X_SCALE_VECTOR = 3

SM12X_BIAS_FLOAT32 = 0
SM12X_BIAS_BFLOAT16 = 1
SM12X_BIAS_FLOAT16 = 2

SM12X_OUT_FLOAT32 = 0
SM12X_OUT_BFLOAT16 = 1
SM12X_OUT_FLOAT16 = 2
SM12X_OUT_E4M3 = 3

SM12X_ACTIVATION_SILU = 0
SM12X_ACTIVATION_GELU = 1
SM12X_ACTIVATION_GELU_TANH = 2
SM12X_ACTIVATION_RELU2 = 3

SM12X_QUANTIZE_ROWS = 0
SM12X_QUANTIZE_MAXIMA = 1
SM12X_QUANTIZE_TENSOR = 2
SM12X_QUANTIZE_STATIC = 3

SM12X_ROUTE_ALL = 0
SM12X_ROUTE_COUNT = 1
SM12X_ROUTE_PLACE = 2

SM12X_ROUTES_PER_CTA = 8192
SM12X_MOST_COUNTED_EXPERTS = 256

SM12X_LAYER_ROUTES = 512
SM12X_LAYER_STRIPS = 1024
SM12X_LAYER_STATE = 4

SM12X_ROWS_PACKED = 0
SM12X_ROWS_MASKED = 1

SM12X_EARLY_WEIGHTS = 1
SM12X_KEEP_RESULTS = 2

SM12X_STATUS_OK = 0
SM12X_STATUS_OFFSETS_DECREASE = 1
SM12X_STATUS_OFFSETS_RANGE = 2

SM12X_WEIGHT_MAPS = 6

SM12X_LIST_CAPACITY = 340

SM12X_OFFSET_PTR_A = 0
SM12X_OFFSET_PTR_B = 8
SM12X_OFFSET_PTR_D = 16
SM12X_OFFSET_STRIDE_A = 24
SM12X_OFFSET_STRIDE_B = 32
SM12X_OFFSET_STRIDE_D = 40
SM12X_OFFSET_M_SCALE = 48
SM12X_OFFSET_N_SCALE = 56
SM12X_OFFSET_BIAS = 64
SM12X_OFFSET_M_SCALE_STRIDE = 72
SM12X_OFFSET_N_SCALE_STRIDE = 76
SM12X_OFFSET_M_VALUE = 80
SM12X_OFFSET_N_VALUE = 84
SM12X_OFFSET_SHAPE = 88
SM12X_OFFSET_STATUS = 100

BIAS_TYPES = {
    "float32": SM12X_BIAS_FLOAT32,
    "bfloat16": SM12X_BIAS_BFLOAT16,
    "float16": SM12X_BIAS_FLOAT16,
}
OUT_TYPES = {
    "float32": SM12X_OUT_FLOAT32,
    "bfloat16": SM12X_OUT_BFLOAT16,
    "float16": SM12X_OUT_FLOAT16,
    "float8_e4m3fn": SM12X_OUT_E4M3,
}


def constants() -> dict[str, int]:
    """Every SM12X_* constant of the mirror."""
    return {name: value for name, value in globals().items() if name.startswith("SM12X_")}


def groups_padded(groups: int) -> int:
    """SM12X_GROUPS_PADDED: the length of each group array."""
    return (groups + 3) // 4 * 4


def group_arrays_bytes(groups: int) -> int:
    """SM12X_GROUP_ARRAYS_BYTES: bytes of the group arrays of `groups` groups, status word included."""
    return groups_padded(groups) * SM12X_OFFSET_STATUS + 16


def status_offset(groups: int) -> int:
    """Byte offset of the int32 status word in the group arrays."""
    return groups_padded(groups) * SM12X_OFFSET_STATUS


class sm12x_tensor_map(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class sm12x_ptr_array_params(ctypes.Structure):
    _fields_ = [
        ("map_a", sm12x_tensor_map),
        ("map_b", sm12x_tensor_map),
        ("map_d", sm12x_tensor_map),
        ("group_arrays", ctypes.c_uint64),
        ("tensor_maps", ctypes.c_uint64),
        ("num_groups", ctypes.c_int32),
        ("ctas", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("_tail", ctypes.c_uint8 * 32),
    ]


class sm12x_prepare_packed_params(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("d", ctypes.c_uint64),
        ("offsets", ctypes.c_uint64),
        ("a_scale", ctypes.c_uint64),
        ("b_scale", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("group_arrays", ctypes.c_uint64),
        ("rows", ctypes.c_int64),
        ("stride_a", ctypes.c_int64),
        ("stride_b", ctypes.c_int64),
        ("stride_b_group", ctypes.c_int64),
        ("stride_d", ctypes.c_int64),
        ("stride_b_scale", ctypes.c_int64),
        ("stride_bias", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("offsets_are_64_bit", ctypes.c_int32),
        ("a_scale_mode", ctypes.c_int32),
        ("b_scale_mode", ctypes.c_int32),
        ("a_scale_value", ctypes.c_float),
        ("b_scale_value", ctypes.c_float),
        ("d_element_bytes", ctypes.c_int32),
        ("bias_element_bytes", ctypes.c_int32),
        ("swap_ab", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class sm12x_group_record(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("d", ctypes.c_uint64),
        ("a_scale", ctypes.c_uint64),
        ("b_scale", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("stride_a", ctypes.c_int64),
        ("stride_b", ctypes.c_int64),
        ("stride_d", ctypes.c_int64),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("a_scale_value", ctypes.c_float),
        ("b_scale_value", ctypes.c_float),
        ("a_scale_mode", ctypes.c_uint16),
        ("b_scale_mode", ctypes.c_uint16),
    ]


class sm12x_prepare_list_params(ctypes.Structure):
    _fields_ = [
        ("group_arrays", ctypes.c_uint64),
        ("num_groups", ctypes.c_int32),
        ("first_group", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("swap_ab", ctypes.c_int32),
        ("groups", sm12x_group_record * SM12X_LIST_CAPACITY),
    ]


class sm12x_packed_params(ctypes.Structure):
    _fields_ = [
        ("map_a", sm12x_tensor_map),
        ("map_b", sm12x_tensor_map * SM12X_WEIGHT_MAPS),
        ("a", ctypes.c_uint64),
        ("d", ctypes.c_uint64),
        ("bounds", ctypes.c_uint64),
        ("row_index", ctypes.c_uint64),
        ("a_scale", ctypes.c_uint64),
        ("b_scale", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("row_weight", ctypes.c_uint64),
        ("partials", ctypes.c_uint64),
        ("counters", ctypes.c_uint64),
        ("rows", ctypes.c_int64),
        ("a_rows", ctypes.c_int64),
        ("stride_a", ctypes.c_int64),
        ("stride_d", ctypes.c_int64),
        ("stride_d_group", ctypes.c_int64),
        ("stride_b_scale", ctypes.c_int64),
        ("stride_bias", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("row_layout", ctypes.c_int32),
        ("bounds_are_64_bit", ctypes.c_int32),
        ("row_index_is_64_bit", ctypes.c_int32),
        ("a_scale_mode", ctypes.c_int32),
        ("b_scale_mode", ctypes.c_int32),
        ("a_scale_value", ctypes.c_float),
        ("b_scale_value", ctypes.c_float),
        ("bias_type", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
        ("least_units", ctypes.c_int32),
        ("flags", ctypes.c_int32),
    ]


class sm12x_up_params(ctypes.Structure):
    _fields_ = [
        ("gemm", sm12x_packed_params),
        ("row_maxima", ctypes.c_uint64),
        ("topk_ids", ctypes.c_uint64),
        ("expert_map", ctypes.c_uint64),
        ("d_scale", ctypes.c_uint64),
        ("d_scale_value", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("activation", ctypes.c_int32),
        ("half_stride", ctypes.c_int32),
        ("pair_stride", ctypes.c_int32),
        ("routes", ctypes.c_int32),
        ("map_size", ctypes.c_int32),
        ("ids_are_64_bit", ctypes.c_int32),
        ("_tail", ctypes.c_uint8 * 56),
    ]


class sm12x_down_params(ctypes.Structure):
    _fields_ = [
        ("gemm", sm12x_packed_params),
        ("row_maxima", ctypes.c_uint64),
        ("a_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("_tail", ctypes.c_uint8 * 48),
    ]


class sm12x_layer_params(ctypes.Structure):
    _fields_ = [
        ("up", sm12x_up_params),
        ("down", sm12x_packed_params),
        ("topk_weights", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("state", ctypes.c_uint64),
        ("stride_out", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("_tail", ctypes.c_uint8 * 16),
    ]


class sm12x_quantize_params(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_uint64),
        ("q", ctypes.c_uint64),
        ("scale", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("row_count", ctypes.c_uint64),
        ("rows", ctypes.c_int64),
        ("stride_x", ctypes.c_int64),
        ("stride_q", ctypes.c_int64),
        ("k", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("static_scale", ctypes.c_float),
        ("padding", ctypes.c_int32),
    ]


class sm12x_maxima_params(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_uint64),
        ("maxima", ctypes.c_uint64),
        ("rows", ctypes.c_int64),
        ("stride_x", ctypes.c_int64),
        ("k", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
    ]


class sm12x_route_params(ctypes.Structure):
    _fields_ = [
        ("tokens", sm12x_quantize_params),
        ("topk_ids", ctypes.c_uint64),
        ("topk_weights", ctypes.c_uint64),
        ("expert_map", ctypes.c_uint64),
        ("offsets", ctypes.c_uint64),
        ("row_index", ctypes.c_uint64),
        ("route_row", ctypes.c_uint64),
        ("row_weight", ctypes.c_uint64),
        ("row_maxima", ctypes.c_uint64),
        ("counts", ctypes.c_uint64),
        ("padded", ctypes.c_uint64),
        ("routes", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("map_size", ctypes.c_int32),
        ("ids_are_64_bit", ctypes.c_int32),
        ("phase", ctypes.c_int32),
        ("route_ctas", ctypes.c_int32),
        ("padded_bytes", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("early", ctypes.c_int32),
    ]


class sm12x_combine_params(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("route_row", ctypes.c_uint64),
        ("stride_rows", ctypes.c_int64),
        ("stride_out", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("type", ctypes.c_int32),
    ]


class sm12x_mma_probe_params(ctypes.Structure):
    _fields_ = [
        ("in", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("iterations", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    struct.__name__: struct
    for struct in (
        sm12x_tensor_map,
        sm12x_ptr_array_params,
        sm12x_prepare_packed_params,
        sm12x_group_record,
        sm12x_prepare_list_params,
        sm12x_packed_params,
        sm12x_up_params,
        sm12x_down_params,
        sm12x_layer_params,
        sm12x_quantize_params,
        sm12x_maxima_params,
        sm12x_route_params,
        sm12x_combine_params,
        sm12x_mma_probe_params,
    )
}


def mismatches(recorded: Mapping[str, Any]) -> list[str]:
    """Differences between this mirror and the `abi` object of a manifest, a sentence each; empty when equal.

    Every struct that the mirror has must be recorded, with exactly the mirror's fields; constants that only
    one side has are differences too.
    """
    found = []
    structs: Mapping[str, Any] = recorded.get("structs", {})
    for name, struct in STRUCTS.items():
        if name not in structs:
            found.append(f"{name}: not in the manifest")
            continue
        size = structs[name].get("size")
        if size != ctypes.sizeof(struct):
            found.append(f"{name}: {ctypes.sizeof(struct)} bytes here, {size} in the manifest")
        fields = {key: tuple(value) for key, value in structs[name].get("fields", {}).items()}
        mirror = {
            key: (getattr(struct, key).offset, getattr(struct, key).size)
            for key, *_ in struct._fields_
            if not key.startswith("_")
        }
        for key in sorted(fields.keys() | mirror.keys()):
            if fields.get(key) != mirror.get(key):
                found.append(
                    f"{name}.{key}: (offset, size) {mirror.get(key)} here, {fields.get(key)} in the manifest"
                )
    for name in sorted(structs.keys() - STRUCTS.keys()):
        found.append(f"{name}: not in the mirror")
    mine, theirs = constants(), dict(recorded.get("constants", {}))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            found.append(f"{name}: {mine.get(name)} here, {theirs.get(name)} in the manifest")
    return found

"""Tensor maps: what a variant fixes (box, swizzle, element type), and for whole arrays their shape.

Kernels of the family fp8_ptr_array get prototypes, encoded once per device: they replace address, shape and
strides group by group. Those of fp8_packed get maps of whole arrays, of which a call replaces the address;
those of an expert layer get maps of the layer's weights, which stay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from .driver import Device, current
from .errors import CubinError
from .manifest import TENSOR_MAPS, TensorMap, Variant

BYTES = 128
ALIGNMENT = 64  # of a tensor map in memory
_UINT8, _FLOAT16, _BFLOAT16 = 0, 6, 9  # CUtensorMapDataType
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
_L2_NONE, _L2_128B = 0, 2  # CUtensorMapL2promotion


def get_tensor_maps(device: Device, variant: Variant, address: int) -> bytes:
    """The prototypes of a variant's tensor maps, in the order of its params, encoded once per device.

    The kernel replaces address, shape and strides; `address` is any address on the device but 0.
    """
    maps = device.prototypes.get(variant.key)
    if maps is not None:
        return maps
    encoded = []
    for name in TENSOR_MAPS[variant.params]:
        spec = _specification(variant, name)
        box = spec.box + (1,) * (spec.rank - len(spec.box))
        steps, stride = [], spec.element_bytes
        for extent in box[:-1]:
            stride = -(-stride * extent // 16) * 16
            steps.append(stride)
        encoded.append(encode_array(device, variant, name, address, box, steps))
    maps = b"".join(encoded)  # two threads may both encode: they get the same bytes
    device.prototypes[variant.key] = maps
    return maps


def _specification(variant: Variant, name: str) -> TensorMap:
    if variant.tensor_maps is None:
        raise CubinError(f"{variant.key}: the manifest records no tensor maps")
    return variant.tensor_maps[name]


def encode_array(
    device: Device,
    variant: Variant,
    name: str,
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    size: int = 0,
) -> bytes:
    """The tensor map `name` of a variant over a whole array: 128 bytes.

    `shape`: elements in each dimension, innermost first, as many as the map has. `strides`: bytes between
    neighbours in each dimension but the innermost, multiples of 16. What a box has past the array is zero.
    `size` doubles the box's features so many times: maps of the weights differ in that.
    Raises CudaError where the driver refuses them.
    """
    spec = _specification(variant, name)
    rank = spec.rank
    box = [*spec.box, *(1,) * (rank - len(spec.box))]
    if rank == 5:  # (k, 8, 2, 8 gates and their ups, experts): 8 gates and 8 ups in turns, in shared memory
        box = [box[0], 8, 2, (box[1] << size) // 16, 1]
    elif size:
        box[1] <<= size
    kind = _UINT8 if spec.element_bytes == 1 else {"float16": _FLOAT16, "bfloat16": _BFLOAT16}[variant.out]
    storage = (ctypes.c_uint64 * 24)()  # 128 bytes that begin at a multiple of 64, wherever ctypes put them
    start = -ctypes.addressof(storage) % ALIGNMENT
    with current(device):
        status = device.driver.hot.cuTensorMapEncodeTiled(
            ctypes.c_void_p(ctypes.addressof(storage) + start),
            kind,
            rank,
            ctypes.c_void_p(address & -16),  # a map must; a caller's bad address is refused elsewhere
            (ctypes.c_uint64 * rank)(*shape),
            (ctypes.c_uint64 * max(1, rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*(1,) * rank),
            0,
            _SWIZZLES[spec.swizzle],
            _L2_NONE if name == "d" else _L2_128B,
            0,
        )
    if status:
        raise device.driver.error(
            "cuTensorMapEncodeTiled",
            status,
            variant=variant.key,
            shapes=f"tensor map of {name}, shape {tuple(shape)}, strides {tuple(strides)}, {spec}",
        )
    return bytes(storage)[start : start + BYTES]

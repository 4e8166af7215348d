"""Tensor-map prototypes: box, swizzle and element type of a variant, encoded once per device.

The kernel replaces address, shape and strides group by group, so nothing here depends on a call.
"""

from __future__ import annotations

import ctypes

from .driver import Device, current
from .errors import CubinError
from .manifest import OPERANDS, TensorMap, Variant

_UINT8, _FLOAT16, _BFLOAT16 = 0, 6, 9  # CUtensorMapDataType
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
_L2_NONE, _L2_128B = 0, 2  # CUtensorMapL2promotion


def get_tensor_maps(device: Device, variant: Variant, address: int) -> bytes:
    """The prototypes of a variant's tensor maps for a, b and d: 384 bytes, encoded once per device.

    The kernel replaces address, shape and strides; `address` is any address on the device but 0.
    """
    maps = device.prototypes.get(variant.key)
    if maps is not None:
        return maps
    if variant.tensor_maps is None:
        raise CubinError(f"{variant.key}: the manifest records no tensor maps")
    with current(device):  # two threads may both encode: they get the same bytes
        maps = b"".join(
            _encode(device, variant, name, variant.tensor_maps[name], address) for name in OPERANDS
        )
        device.prototypes[variant.key] = maps
    return maps


def _encode(device: Device, variant: Variant, name: str, spec: TensorMap, address: int) -> bytes:
    rank = spec.rank
    box = spec.box + (1,) * (rank - len(spec.box))
    steps, stride = [], spec.element_bytes
    for extent in box[:-1]:
        stride = -(-stride * extent // 16) * 16
        steps.append(stride)
    kind = _UINT8 if spec.element_bytes == 1 else {"float16": _FLOAT16, "bfloat16": _BFLOAT16}[variant.out]
    storage = (ctypes.c_uint64 * 24)()  # 128 bytes that begin at a multiple of 64, wherever ctypes put them
    start = -ctypes.addressof(storage) % 64
    status = device.driver.hot.cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(storage) + start),
        kind,
        rank,
        ctypes.c_void_p(address & -16),  # what a map must have; a caller's bad address is refused elsewhere
        (ctypes.c_uint64 * rank)(*box),
        (ctypes.c_uint64 * max(1, rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        0,
        _SWIZZLES[spec.swizzle],
        _L2_NONE if name == "d" else _L2_128B,
        0,
    )
    if status:
        raise device.driver.error(
            "cuTensorMapEncodeTiled", status, variant=variant.key, shapes=f"tensor map of {name} {spec}"
        )
    return bytes(storage)[start : start + 128]

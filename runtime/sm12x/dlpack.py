"""Reading DLPack capsules, versioned and not, with ctypes; and making them for device memory of our own.

A capsule is read and never consumed: it keeps its name, so its own destructor hands the memory back to the
producer when the last reference to it goes. Whoever uses the pointer holds the capsule.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, TypeAlias

from .arrays import HOST, compact_strides, stream_handle

MAX_VERSION = (1, 1)
"""Newest DLPack that we ask for: the first one with codes for 8-bit floats."""

CUDA = 2
"""DLPack's type of a CUDA device, kDLCUDA."""

_ON_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_ON_DEVICE = (CUDA, 13)  # kDLCUDA, kDLCUDAManaged
_NO_WRITES = 1 | 2  # DLPACK_FLAG_BITMASK_READ_ONLY, DLPACK_FLAG_BITMASK_IS_COPIED
_MAX_RANK = 64

# One code per kind of number; the width in bits and the lanes complete the dtype.
_CODES = {
    **{(0, 8 * n): f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{(1, 8 * n): f"uint{8 * n}" for n in (1, 2, 4, 8)},
    **{(2, 8 * n): f"float{8 * n}" for n in (2, 4, 8)},
    (4, 16): "bfloat16",
    (6, 8): "bool",
    (7, 8): "float8_e3m4",
    (8, 8): "float8_e4m3",
    (9, 8): "float8_e4m3b11fnuz",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
    (14, 8): "float8_e8m0fnu",
}
# Keyed by DLDataType read as one 32-bit word: code, bits << 8, lanes << 16. Only one lane is an element we
# know.
_DTYPES = {code | bits << 8 | 1 << 16: name for (code, bits), name in _CODES.items()}

_WORDS = {name: word for word, name in _DTYPES.items()}

# DLTensor: data, device type, device id, ndim, dtype, shape, strides, byte_offset.
_TENSOR = struct.Struct("=QiiiIQQQ")
# DLManagedTensorVersioned: version major, minor, (manager_ctx, deleter), flags, and then the DLTensor.
_VERSIONED = struct.Struct("=II8x8xQQiiiIQQQ")
_LENGTHS = tuple(struct.Struct(f"={rank}q").unpack for rank in range(_MAX_RANK + 1))
# from_address and unpack take 0.2 us together; a ctypes.Structure takes that for every field.
_tensor_at = (ctypes.c_char * _TENSOR.size).from_address
_versioned_at = (ctypes.c_char * _VERSIONED.size).from_address
_lengths_at = tuple((ctypes.c_int64 * rank).from_address for rank in range(_MAX_RANK + 1))

# Prototypes of our own: setting argtypes on ctypes.pythonapi would change it for everybody in the process.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


View: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], str, int, bool]
"""What a capsule says: ptr, shape, strides in elements, dtype, device (-1 for the host), readonly.

`readonly` is also set where the producer exported a copy: nobody would see what is written to it. A plain
tuple, because building a named one takes a fifth of the time of reading a capsule.
"""


def export(obj: Any, name: str, stream: int) -> object:
    """Ask `obj` for a DLPack capsule that is safe to use on `stream`.

    The producer makes `stream` wait for whatever still writes the array. Host arrays get no stream, as the
    protocol says.

    Raises TypeError naming `name` where the array lies on a device other than CUDA and host, or where the
    producer refuses; errors of the producer's own device work pass through.
    """
    try:
        device_type, device_id = obj.__dlpack_device__()
        if device_type in _ON_DEVICE:
            handle = stream_handle(stream)
            try:
                return obj.__dlpack__(stream=handle, max_version=MAX_VERSION)
            except TypeError:  # a producer from before DLPack 1.0 knows no max_version
                return obj.__dlpack__(stream=handle)
        if device_type in _ON_HOST:
            try:
                return obj.__dlpack__(max_version=MAX_VERSION)
            except TypeError:
                return obj.__dlpack__()
    except Exception as error:
        refusal = _refusal(obj, name, error)
        if refusal is None:
            raise
        raise refusal from error
    raise TypeError(_wrong_device(name, int(device_type), device_id))


def read(capsule: object, name: str) -> View:
    """Read a capsule named "dltensor" or "dltensor_versioned" without consuming it.

    Raises TypeError naming `name` where the capsule is of another kind, already consumed, of an unknown major
    version, or describes a dtype or device that we don't know.
    """
    try:
        base = _capsule_pointer(capsule, b"dltensor_versioned")
    except ValueError:  # not versioned; asking for the name first would cost a fifth more for those that are
        base = _unversioned_pointer(capsule, name)
        data, kind, ordinal, rank, word, shape_at, strides_at, offset = _TENSOR.unpack(_tensor_at(base))
        readonly = False
    else:
        major, minor, flags, data, kind, ordinal, rank, word, shape_at, strides_at, offset = (
            _VERSIONED.unpack(_versioned_at(base))
        )
        if major != 1:
            raise TypeError(f"{name}: expected DLPack version 1, got {major}.{minor}")
        readonly = flags & _NO_WRITES != 0

    dtype = _DTYPES.get(word)
    if dtype is None:
        raise TypeError(_unknown_dtype(name, word))
    if kind in _ON_DEVICE:
        device = ordinal
    elif kind in _ON_HOST:
        device = HOST
    else:
        raise TypeError(_wrong_device(name, kind, ordinal))
    if not 0 <= rank <= _MAX_RANK:
        raise TypeError(f"{name}: expected at most {_MAX_RANK} dimensions, got a DLPack tensor of {rank}")
    shape = _LENGTHS[rank](_lengths_at[rank](shape_at)) if rank else ()
    if not strides_at:  # the DLPack spelling of row-major without gaps
        strides = compact_strides(shape)
    else:
        strides = _LENGTHS[rank](_lengths_at[rank](strides_at)) if rank else ()
    return (data + offset if data else 0, shape, strides, dtype, device, readonly)


class _HostView:
    """What NumPy takes for host memory; an array made of it holds `owner`."""

    def __init__(self, interface: dict[str, object], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def make_capsule(
    ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: int, owner: object
) -> object:
    """An unversioned capsule of memory on CUDA device `device`; `strides` in elements, `dtype` a name.

    The capsule, or whoever consumes it, holds `owner` until it is done with the memory. Every call gives a
    capsule of its own.

    NumPy makes the capsule, as if the memory were the host's and its elements plain words, and only what it
    says of device and dtype is changed here. So destructor and deleter are C: they may run on any thread,
    with an exception on its way, or when the interpreter has gone, none of which a ctypes callback survives.
    """
    import numpy

    word = _WORDS[dtype]
    size = (word >> 8 & 0xFF) // 8
    interface = {
        "version": 3,
        "shape": shape,
        "typestr": numpy.dtype(f"u{size}").str,
        "data": (ptr, False),
        "strides": tuple([size * step for step in strides]),
    }
    capsule: object = numpy.asarray(_HostView(interface, owner)).__dlpack__()
    tensor = _tensor_at(_capsule_pointer(capsule, b"dltensor"))
    data, _, _, rank, _, *rest = _TENSOR.unpack(tensor)
    _TENSOR.pack_into(tensor, 0, data, CUDA, device, rank, word, *rest)
    return capsule


def _unversioned_pointer(capsule: object, name: str) -> int:
    try:
        return int(_capsule_pointer(capsule, b"dltensor"))
    except ValueError:
        pass
    try:
        found = f"one named {_capsule_name(capsule)!r}"
    except ValueError:  # no capsule at all
        found = f"{type(capsule).__module__}.{type(capsule).__qualname__}"
    raise TypeError(f"{name}: expected an unused DLPack capsule, got {found}")


def _wrong_device(name: str, device_type: int, device_id: int) -> str:
    where = f"DLPack device ({device_type}, {device_id})"
    return f"{name}: expected an array in CUDA or host memory, got one on {where}"


def _unknown_dtype(name: str, word: int) -> str:
    code, bits, lanes = word & 0xFF, word >> 8 & 0xFF, word >> 16
    return (
        f"{name}: expected one of {', '.join(_CODES.values())}, "
        f"got a DLPack dtype of code {code} with {bits} bits and {lanes} lanes"
    )


def _refusal(obj: Any, name: str, error: Exception) -> TypeError | None:
    """The error to raise in place of a producer's `error`; None where that one may be of its device work."""
    kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
    if "float8" in str(getattr(obj, "dtype", "")):
        return TypeError(
            f"{name}: {kind} does not export its dtype {obj.dtype} through DLPack ({error}); "
            "reinterpret the array as uint8 and name the FP8 type with dtype="
        )
    if isinstance(error, (TypeError, ValueError, BufferError, NotImplementedError)):
        return TypeError(f"{name}: {kind} refused to export itself through DLPack: {error}")
    return None

"""Arrays of any framework, as pointer, shape, strides, dtype and device, without importing any framework.

torch tensors, CuPy and NumPy arrays are read through their own attributes; JAX and every other DLPack
producer through `__dlpack__`, with the launch stream handed over; what is left through
`__cuda_array_interface__`.

Lifetime. `Array.owner` keeps the memory alive; hold it until the launch is enqueued. Frameworks free memory
in the order of the stream that it was allocated on: a caller who launches on another stream than the
framework's current one keeps the arrays alive until the work is done (in torch, `tensor.record_stream`). JAX
arrays are the exception: JAX has no current stream, the stream is ours, and `deliver` keeps them alive until
the work is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import dlpack, ordering
from .arrays import DTYPES, HOST, Array, Ordering, compact_strides, make_array, stream_handle
from .outputs import JaxOutput, allocate_like, deliver
from .streams import current_stream

__all__ = ["Array", "JaxOutput", "allocate_like", "current_stream", "deliver", "framework_of", "ingest"]

_Reader = Callable[[Any, str, int, Ordering], Array]


def ingest(obj: Any, name: str, stream: int, order: Ordering = ordering) -> Array:
    """Describe `obj`, an array on a CUDA device or the host, so that it can be used on `stream`.

    `name` is the argument's name, for errors. DLPack producers (JAX among them) make `stream` wait for
    whatever still writes the array; torch and CuPy arrays are taken to be ready on `stream`, which by default
    is their framework's current one. `order` is used for `__cuda_array_interface__` only, which tells no
    device and brings no order by itself.

    Raises TypeError naming `name` where `obj` is no array, is of an unknown dtype, or lies neither in CUDA
    nor in host memory; ValueError naming it where its memory is gone (a deleted or donated JAX array).
    """
    reader = _READERS.get(type(obj))
    if reader is None:
        reader = _reader_of(obj, name)
    return reader(obj, name, stream, order)


def framework_of(obj: Any, name: str = "array") -> str:
    """Framework of `obj`, as in `Array.framework`. Raises TypeError naming `name` where it is no array."""
    reader = _READERS.get(type(obj)) or _reader_of(obj, name)
    return _FRAMEWORKS[reader]


# Dtype object of a framework -> name, learned as they come: looking one up costs 30 ns, spelling it out 500.
_dtype_names: dict[Any, str] = {}


def _learn_dtype(dtype: Any, name: str) -> str:
    # A torch dtype has no name of its own but prints as torch.float32; a NumPy dtype of foreign byte order
    # has one.
    spelled = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
    if spelled not in DTYPES or not getattr(dtype, "isnative", True):
        raise TypeError(f"{name}: expected a dtype among {', '.join(sorted(DTYPES))}, got {dtype}")
    _dtype_names[dtype] = spelled
    return str(spelled)


# Lazily negated is only what was the imaginary part of a conjugated complex tensor.
_PARTS_OF_COMPLEX = frozenset({"float16", "float32", "float64"})


def _read_torch(tensor: Any, name: str, stream: int, order: Ordering) -> Array:
    dtype = _dtype_names.get(tensor.dtype) or _learn_dtype(tensor.dtype, name)
    if tensor.is_cuda:
        device = tensor.get_device()
    elif tensor.is_cpu:
        device = HOST
    else:
        raise TypeError(f"{name}: expected a tensor in CUDA or host memory, got one on {tensor.device}")
    if dtype in _PARTS_OF_COMPLEX and tensor.is_neg():
        raise TypeError(f"{name}: expected a plain tensor, got a lazily negated one: pass its resolve_neg()")
    try:
        return make_array(
            (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype, device, "torch", tensor, False)
        )
    except RuntimeError as error:  # sparse layouts, functorch's tensors and others without storage
        raise TypeError(f"{name}: expected a strided tensor with memory of its own: {error}") from error


def _read_cupy(array: Any, name: str, stream: int, order: Ordering) -> Array:
    dtype = _dtype_names.get(array.dtype) or _learn_dtype(array.dtype, name)
    memory = array.data
    strides = array.strides
    size = array.itemsize
    if size != 1:
        strides = tuple([step // size for step in strides])
    return make_array((memory.ptr, array.shape, strides, dtype, memory.device_id, "cupy", array, False))


def _read_numpy(array: Any, name: str, stream: int, order: Ordering) -> Array:
    dtype = _dtype_names.get(array.dtype) or _learn_dtype(array.dtype, name)
    strides = array.strides
    size = array.itemsize
    if size != 1:
        strides = tuple([step // size for step in strides])
    return make_array(
        (array.ctypes.data, array.shape, strides, dtype, HOST, "numpy", array, not array.flags.writeable)
    )


def _read_jax(array: Any, name: str, stream: int, order: Ordering) -> Array:
    if array.is_deleted():
        raise ValueError(f"{name}: expected a live JAX array, got one that was deleted or donated")
    view = dlpack.read(capsule := dlpack.export(array, name, stream), name)
    return make_array((*view[:5], "jax", capsule, True))  # JAX arrays are immutable whatever the capsule says


def _read_jax_output(output: JaxOutput, name: str, stream: int, order: Ordering) -> Array:
    return _read_jax(output.array, name, stream, order)._replace(readonly=False)


def _read_dlpack(obj: Any, name: str, stream: int, order: Ordering) -> Array:
    capsule = dlpack.export(obj, name, stream)
    ptr, shape, strides, dtype, device, readonly = dlpack.read(capsule, name)
    return make_array((ptr, shape, strides, dtype, device, "dlpack", capsule, readonly))


_TYPESTRS = {
    "|b1": "bool",
    "|i1": "int8",
    "|u1": "uint8",
    **{f"<i{size}": f"int{8 * size}" for size in (2, 4, 8)},
    **{f"<u{size}": f"uint{8 * size}" for size in (2, 4, 8)},
    **{f"<f{size}": f"float{8 * size}" for size in (2, 4, 8)},
}


def _read_cuda_array_interface(obj: Any, name: str, stream: int, order: Ordering) -> Array:
    interface = obj.__cuda_array_interface__
    typestr = interface["typestr"]
    dtype = _TYPESTRS.get(typestr)
    if dtype is None:
        raise TypeError(
            f"{name}: expected __cuda_array_interface__ with a typestr among {', '.join(_TYPESTRS)}, "
            f"got {typestr!r}; pass an 8-bit float as uint8 and name it with dtype="
        )
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: expected an array without a mask, got one with a mask")
    ptr, readonly = interface["data"]
    if not ptr:
        raise TypeError(f"{name}: an empty array with __cuda_array_interface__ only does not tell its device")
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    size = int(typestr[2:])
    strides = compact_strides(shape) if strides is None else tuple([step // size for step in strides])
    device = order.pointer_device(ptr)
    producer = interface.get("stream")
    if producer is not None and interface["version"] >= 3:
        if producer == 0:
            raise ValueError(f"{name}: __cuda_array_interface__ gives stream 0, which its protocol forbids")
        if producer != stream_handle(stream):
            event = order.event_create(device)
            order.event_record(event, producer, device)
            order.stream_wait_event(stream, event, device)
            order.event_destroy(event)
    return make_array((ptr, shape, strides, dtype, device, "cuda_array_interface", obj, bool(readonly)))


_FRAMEWORKS: dict[_Reader, str] = {
    _read_torch: "torch",
    _read_cupy: "cupy",
    _read_numpy: "numpy",
    _read_jax: "jax",
    _read_jax_output: "jax",
    _read_dlpack: "dlpack",
    _read_cuda_array_interface: "cuda_array_interface",
}
# Array type -> reader. Types are added as they come; there are few of them.
_READERS: dict[type, _Reader] = {JaxOutput: _read_jax_output}
# (root of the module, name) of the class, or of a base of it, that has the attributes we read.
_KNOWN_CLASSES: dict[tuple[str, str], _Reader] = {
    ("torch", "Tensor"): _read_torch,
    ("cupy", "ndarray"): _read_cupy,
    ("numpy", "ndarray"): _read_numpy,
    ("jax", "ArrayImpl"): _read_jax,
    ("jaxlib", "ArrayImpl"): _read_jax,
}


def _reader_of(obj: Any, name: str) -> _Reader:
    cls = type(obj)
    kind = f"{cls.__module__}.{cls.__qualname__}"
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        if root == "jax" and base.__name__ == "Tracer":
            raise TypeError(f"{name}: expected a JAX array, got a tracer: call sm12x outside of jax.jit")
        reader = _KNOWN_CLASSES.get((root, base.__name__))
        if reader is None:
            continue
        dispatch = getattr(base, "__torch_dispatch__", None)
        if reader is _read_torch and getattr(cls, "__torch_dispatch__", None) is not dispatch:
            # DTensor, FakeTensor, quantised tensors: their memory is in inner tensors, data_ptr() is
            # meaningless.
            raise TypeError(f"{name}: expected a plain torch tensor, got the wrapper {kind}")
        if reader is _read_numpy and hasattr(obj, "mask"):
            raise TypeError(f"{name}: expected an array without a mask, got {kind}")
        _READERS[cls] = reader
        return reader
    if hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__"):
        _READERS[cls] = _read_dlpack
        return _read_dlpack
    if hasattr(obj, "__cuda_array_interface__"):
        return _read_cuda_array_interface
    raise TypeError(
        f"{name}: expected an array (torch, CuPy, JAX, NumPy, DLPack or __cuda_array_interface__), got {kind}"
    )

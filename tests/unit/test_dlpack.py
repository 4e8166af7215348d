"""DLPack capsules of every kind are read right and handed back once; its rules on streams are kept."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from sm12x import dlpack
from sm12x.tensors import ingest


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("dl_tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    )


_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _api)
)
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))
# In a destructor the capsule has no references left: as py_object it would be revived and destroyed again.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _api)
)
_Callback = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_alive: dict[int, Any] = {}
_deleted: list[int] = []
_twice: list[int] = []


@_Callback
def _deleter(address: int) -> None:
    if _alive.pop(address, None) is None:
        _twice.append(address)
    _deleted.append(address)


@_Callback
def _destructor(capsule: int) -> None:
    for name in (b"dltensor", b"dltensor_versioned"):
        if _is_valid(capsule, name):
            _deleter(_pointer(capsule, name))


def make_capsule(
    *,
    versioned: bool,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] | None = None,
    dtype: tuple[int, int, int] = (1, 8, 1),
    device: tuple[int, int] = (1, 0),
    data: int = 4096,
    byte_offset: int = 0,
    flags: int = 0,
    version: tuple[int, int] = (1, 1),
) -> object:
    """A capsule as a producer in C would make it: its memory lives until its deleter is called."""
    managed: Any = ManagedVersioned() if versioned else Managed()
    tensor = managed.dl_tensor
    tensor.data, tensor.byte_offset, tensor.ndim = data, byte_offset, len(shape)
    tensor.device_type, tensor.device_id = device
    tensor.code, tensor.bits, tensor.lanes = dtype
    lengths = (ctypes.c_int64 * len(shape))(*shape)
    steps = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
    tensor.shape = ctypes.cast(lengths, ctypes.POINTER(ctypes.c_int64))
    if steps is not None:
        tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p)
    if versioned:
        managed.major, managed.minor = version
        managed.flags = flags
    address = ctypes.addressof(managed)
    _alive[address] = (managed, lengths, steps)
    return _new(
        address,
        b"dltensor_versioned" if versioned else b"dltensor",
        ctypes.cast(_destructor, ctypes.c_void_p),
    )


class Producer:
    """An array that is known by DLPack only. `log` holds the keywords of each export."""

    dtype = "uint8"

    def __init__(self, device: tuple[int, int] = (2, 0), *, versioned: bool = True, **tensor: Any) -> None:
        self.device, self.versioned, self.tensor = device, versioned, tensor
        self.log: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> object:
        self.log.append(options)
        return make_capsule(versioned=self.versioned, device=self.device, **self.tensor)


class OldProducer(Producer):
    def __dlpack__(self, stream: int | None = None) -> object:  # type: ignore[override]
        self.log.append({"stream": stream})
        return make_capsule(versioned=False, device=self.device, **self.tensor)


@pytest.fixture(autouse=True)
def _every_capsule_goes_back() -> Any:
    _deleted.clear()
    yield
    gc.collect()
    assert not _alive, "capsules whose deleter was never called"
    assert not _twice, "capsules whose deleter was called again"


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


VERSIONED = pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "unversioned"])


@VERSIONED
@pytest.mark.parametrize(
    ("code", "bits", "name"),
    [
        (0, 32, "int32"),
        (0, 64, "int64"),
        (1, 8, "uint8"),
        (2, 16, "float16"),
        (2, 32, "float32"),
        (4, 16, "bfloat16"),
        (6, 8, "bool"),
        (10, 8, "float8_e4m3fn"),
        (11, 8, "float8_e4m3fnuz"),
        (12, 8, "float8_e5m2"),
        (14, 8, "float8_e8m0fnu"),
    ],
)
def test_every_field_of_a_capsule_is_read(
    versioned: bool, code: int, bits: int, name: str, rng: random.Random
) -> None:
    rank = rng.randint(1, 6)
    shape = tuple(rng.randint(0, 2**40) for _ in range(rank))
    strides = tuple(rng.randint(-(2**40), 2**40) for _ in range(rank))
    data, offset, device = rng.randrange(1, 2**47), rng.randrange(2**33), rng.randrange(8)
    capsule = make_capsule(
        versioned=versioned,
        shape=shape,
        strides=strides,
        dtype=(code, bits, 1),
        device=(2, device),
        data=data,
        byte_offset=offset,
    )
    assert dlpack.read(capsule, "a") == (data + offset, shape, strides, name, device, False)


@VERSIONED
def test_null_strides_mean_row_major(versioned: bool) -> None:
    view = dlpack.read(make_capsule(versioned=versioned, shape=(4, 5, 6)), "a")
    assert view[2] == (30, 6, 1)


@VERSIONED
def test_scalar_has_no_dimensions(versioned: bool) -> None:
    assert dlpack.read(make_capsule(versioned=versioned, shape=(), strides=()), "a")[1:3] == ((), ())


@VERSIONED
def test_null_data_stays_null_whatever_the_offset(versioned: bool) -> None:
    assert dlpack.read(make_capsule(versioned=versioned, shape=(0, 4), data=0, byte_offset=64), "a")[0] == 0


@VERSIONED
@pytest.mark.parametrize(
    "dtype", [(10, 8, 2), (10, 16, 1), (2, 32, 4), (2, 32, 0), (17, 4, 1), (5, 64, 1), (3, 64, 1), (99, 8, 1)]
)
def test_other_dtypes_and_lanes_are_refused(versioned: bool, dtype: tuple[int, int, int]) -> None:
    expected = f"^b_scale: .*code {dtype[0]} with {dtype[1]} bits and {dtype[2]} lanes"
    with pytest.raises(TypeError, match=expected):
        dlpack.read(make_capsule(versioned=versioned, dtype=dtype), "b_scale")


@VERSIONED
@pytest.mark.parametrize(("device", "ordinal"), [((1, 0), -1), ((3, 0), -1), ((2, 5), 5), ((13, 3), 3)])
def test_device_is_the_cuda_ordinal_or_the_host(
    versioned: bool, device: tuple[int, int], ordinal: int
) -> None:
    assert dlpack.read(make_capsule(versioned=versioned, device=device), "a")[4] == ordinal


@pytest.mark.parametrize("device", [(10, 0), (8, 1), (14, 0)])  # ROCm, Metal, oneAPI
def test_other_devices_are_refused_before_and_after_export(device: tuple[int, int]) -> None:
    expected = rf"^out: .*DLPack device \({device[0]}, {device[1]}\)"
    with pytest.raises(TypeError, match=expected):
        dlpack.read(make_capsule(versioned=True, device=device), "out")
    producer = Producer(device)
    with pytest.raises(TypeError, match=expected):
        ingest(producer, "out", 7)
    assert producer.log == []


@pytest.mark.parametrize(("flags", "readonly"), [(0, False), (1, True), (2, True), (3, True), (4, False)])
def test_forbidden_and_invisible_writes_are_readonly(flags: int, readonly: bool) -> None:
    assert dlpack.read(make_capsule(versioned=True, flags=flags), "out")[5] is readonly
    assert ingest(Producer(flags=flags), "out", 7).readonly is readonly


def test_newer_major_version_is_refused_and_handed_back() -> None:
    with pytest.raises(TypeError, match=r"^a: expected DLPack version 1, got 2\.3"):
        dlpack.read(make_capsule(versioned=True, version=(2, 3)), "a")


@VERSIONED
def test_used_capsule_is_refused(versioned: bool) -> None:
    capsule = make_capsule(versioned=versioned)
    address = next(reversed(_alive))
    assert _rename(capsule, b"used_dltensor") == 0
    with pytest.raises(
        TypeError, match=r"^a: expected an unused DLPack capsule, got one named b'used_dltensor'"
    ):
        dlpack.read(capsule, "a")
    _deleter(address)  # what the consumer that used it does


def test_something_else_than_a_capsule_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^a: expected an unused DLPack capsule, got builtins\.list"):
        dlpack.read([], "a")


@VERSIONED
def test_impossible_rank_is_refused(versioned: bool) -> None:
    with pytest.raises(TypeError, match=r"^a: expected at most 64 dimensions, got a DLPack tensor of 65"):
        dlpack.read(make_capsule(versioned=versioned, shape=(1,) * 65), "a")


@pytest.mark.parametrize("kind", [Producer, OldProducer])
def test_deleter_is_called_once_and_only_after_the_owner_went(kind: type[Producer]) -> None:
    producer = kind(shape=(3, 4))
    array = ingest(producer, "a", 7)
    del producer
    gc.collect()
    assert _deleted == []
    assert array.framework == "dlpack"
    owner = array.owner
    del array
    gc.collect()
    assert _deleted == []
    del owner
    gc.collect()
    assert len(_deleted) == 1


@pytest.mark.parametrize("kind", [Producer, OldProducer])
def test_ten_thousand_rounds_leak_nothing(kind: type[Producer]) -> None:
    producer = kind(shape=(3, 4), strides=(4, 1))

    def rounds(count: int) -> None:
        for _ in range(count):
            ingest(producer, "a", 7)
        producer.log.clear()
        _deleted.clear()

    rounds(100)
    gc.collect()
    before, references = sys.getallocatedblocks(), sys.getrefcount(producer)
    rounds(10_000)
    gc.collect()
    assert not _alive
    assert sys.getrefcount(producer) == references
    assert sys.getallocatedblocks() - before < 200


def test_refused_capsules_leak_nothing_either() -> None:
    producer = Producer(dtype=(99, 8, 1))
    for _ in range(100):
        with pytest.raises(TypeError):
            ingest(producer, "a", 7)
    gc.collect()
    assert len(_deleted) == 100


@pytest.mark.parametrize(("stream", "handed"), [(0, 1), (1, 1), (2, 2), (0x7F0012345678, 0x7F0012345678)])
@pytest.mark.parametrize("kind", [Producer, OldProducer])
def test_launch_stream_is_handed_over_and_never_as_zero(
    kind: type[Producer], stream: int, handed: int
) -> None:
    producer = kind()
    ingest(producer, "a", stream)
    assert [options["stream"] for options in producer.log] == [handed]


@pytest.mark.parametrize("device", [(1, 0), (3, 0)])
def test_host_arrays_get_no_stream(device: tuple[int, int]) -> None:
    producer = Producer(device)
    assert ingest(producer, "a", 7).device == -1
    assert producer.log == [{"max_version": dlpack.MAX_VERSION}]


class Refusing(Producer):
    def __init__(self, error: Exception, dtype: str = "uint8") -> None:
        super().__init__()
        self.error, self.dtype = error, dtype

    def __dlpack__(self, **options: Any) -> object:
        raise self.error


@pytest.mark.parametrize(
    "error", [BufferError("no"), TypeError("no"), ValueError("no"), NotImplementedError("no")]
)
def test_refusal_names_the_argument(error: Exception) -> None:
    with pytest.raises(TypeError, match=r"^b: .*Refusing refused to export itself through DLPack: no"):
        ingest(Refusing(error), "b", 7)


@pytest.mark.parametrize("error", [BufferError("no"), RuntimeError("no")])
def test_refusal_of_fp8_says_what_to_do(error: Exception) -> None:
    with pytest.raises(TypeError, match=r"^b: .*float8_e5m2.* uint8 and name the FP8 type with dtype="):
        ingest(Refusing(error, "float8_e5m2"), "b", 7)


def test_device_errors_of_the_producer_pass_through() -> None:
    with pytest.raises(RuntimeError, match=r"^an illegal memory access"):
        ingest(Refusing(RuntimeError("an illegal memory access was encountered")), "b", 7)


class Wrapped:
    """Hides everything of an array but its DLPack methods."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


def test_numpy_array_through_dlpack_agrees_with_its_own_attributes(rng: random.Random) -> None:
    base = np.zeros((rng.randint(2, 9), rng.randint(2, 9), 8), np.float32)
    for array in (base, base[1:, :, ::2], base.transpose(2, 0, 1)):
        through = ingest(Wrapped(array), "a", 7)
        direct = ingest(array, "a", 7)
        assert through[:5] == direct[:5]
        assert through.framework == "dlpack"
    base.flags.writeable = False
    assert ingest(Wrapped(base), "a", 7).readonly


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "uint8"])
def test_torch_tensor_through_dlpack_agrees_with_its_own_attributes(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(6, 8).to(getattr(torch, dtype))[1:, ::2]
    assert ingest(Wrapped(tensor), "a", 7)[:5] == ingest(tensor, "a", 7)[:5]


def test_torch_memory_is_held_by_the_owner_and_let_go_after() -> None:
    torch = pytest.importorskip("torch")
    memory = np.zeros(64)
    alive = weakref.ref(memory)
    array = ingest(Wrapped(torch.from_numpy(memory)), "a", 7)
    del memory
    gc.collect()
    assert alive() is not None
    del array
    gc.collect()
    assert alive() is None

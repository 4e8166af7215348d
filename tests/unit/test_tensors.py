"""Arrays of every framework are described right without importing one; what is not usable is refused."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sm12x import streams
from sm12x.tensors import Array, current_stream, framework_of, ingest

STREAM = 0x5000
TORCH_DTYPES = (
    *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32"),
    *("uint8", "int32", "int64"),
)


@dataclass
class FakeOrder:
    """Writes down the driver calls it gets. Events are handles from 100 on; device 3 owns every pointer."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    done: bool = True

    def __getattr__(self, call: str) -> Any:
        def record(*arguments: int) -> Any:
            self.calls.append((call, *arguments))
            count = sum(made == call for made, *_ in self.calls)
            return {"event_create": 99 + count, "stream_create": 0x900 + count, "pointer_device": 3}.get(call)

        return record


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


class FakeDtype:
    def __init__(self, name: str) -> None:
        self.text = name

    def __repr__(self) -> str:
        return f"torch.{self.text}"


class Tensor:
    """Has of torch.Tensor what ingest may use, and nothing else."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, device: str, ptr: int
    ) -> None:
        self.shape, self._strides, self.dtype, self.device, self._ptr = (
            shape,
            strides,
            FakeDtype(dtype),
            device,
            ptr,
        )
        kind, _, index = device.partition(":")
        self.is_cuda, self.is_cpu, self._index = kind == "cuda", kind == "cpu", int(index or -1)
        self.negated, self.strided = False, True

    def data_ptr(self) -> int:
        if not self.strided:
            raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")
        return self._ptr

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def get_device(self) -> int:
        return self._index

    def is_neg(self) -> bool:
        return self.negated


Tensor.__module__ = "torch"


@dataclass
class Memory:
    ptr: int
    device_id: int


class ndarray:
    """Has of cupy.ndarray what ingest may use, and nothing else."""

    def __init__(self, like: np.ndarray, ptr: int, device: int) -> None:
        self.shape, self.strides, self.dtype, self.itemsize = (
            like.shape,
            like.strides,
            like.dtype,
            like.itemsize,
        )
        self.data = Memory(ptr, device)


ndarray.__module__ = "cupy"


def test_fake_torch_tensor_is_read_through_its_attributes(rng: random.Random) -> None:
    for dtype in TORCH_DTYPES:
        shape = tuple(rng.randint(1, 1000) for _ in range(rng.randint(1, 4)))
        strides = tuple(rng.randint(1, 1000) for _ in shape)
        tensor = Tensor(shape, strides, dtype, f"cuda:{rng.randrange(8)}", rng.randrange(2**47))
        array = ingest(tensor, "a", STREAM)
        assert array == Array(tensor._ptr, shape, strides, dtype, tensor._index, "torch", tensor, False)
        assert array.owner is tensor


def test_subclass_of_torch_tensor_in_another_module_is_torch() -> None:
    class Parameter(Tensor):
        pass

    parameter = Parameter((4,), (1,), "float32", "cuda:1", 64)
    assert framework_of(parameter) == "torch"
    assert ingest(parameter, "a", STREAM).device == 1


def test_torch_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^b: expected a tensor in CUDA or host memory, got one on xpu:0"):
        ingest(Tensor((4,), (1,), "float32", "xpu:0", 64), "b", STREAM)


def test_unknown_torch_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^b: expected a dtype among .*, got torch.complex64"):
        ingest(Tensor((4,), (1,), "complex64", "cuda:0", 64), "b", STREAM)


def test_torch_tensor_without_storage_is_refused() -> None:
    tensor = Tensor((4,), (1,), "float32", "cuda:0", 64)
    tensor.strided = False
    with pytest.raises(TypeError, match=r"^a: expected a strided tensor with memory of its own"):
        ingest(tensor, "a", STREAM)


def test_lazily_negated_torch_tensor_is_refused() -> None:
    tensor = Tensor((4,), (1,), "float32", "cuda:0", 64)
    tensor.negated = True
    with pytest.raises(TypeError, match=r"^a_scale: .*lazily negated.*resolve_neg"):
        ingest(tensor, "a_scale", STREAM)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64, ml_dtypes.bfloat16])
def test_fake_cupy_array_has_strides_in_elements(dtype: Any, rng: random.Random) -> None:
    base = np.zeros((rng.randint(2, 9), rng.randint(2, 9), 8), dtype)
    for like in (base, base[::2, :, 1:5], base.transpose(2, 0, 1), base[:0]):
        fake = ndarray(like, rng.randrange(2**47), rng.randrange(8))
        array = ingest(fake, "a", STREAM)
        strides = tuple(step // like.itemsize for step in like.strides)
        assert array == Array(
            fake.data.ptr, like.shape, strides, np.dtype(dtype).name, fake.data.device_id, "cupy", fake, False
        )


@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.int32, np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16],
)
def test_numpy_array_is_on_the_host(dtype: Any) -> None:
    base = np.zeros((5, 6), dtype)
    array = ingest(base[1:, ::2], "a", STREAM)
    assert array.ptr == base.__array_interface__["data"][0] + 6 * base.itemsize
    assert array[1:6] == ((4, 3), (6, 2), np.dtype(dtype).name, -1, "numpy")
    assert not array.readonly
    base.flags.writeable = False
    assert ingest(base, "a", STREAM).readonly


@pytest.mark.parametrize(
    "array", [np.zeros(3, ">f4"), np.zeros(3, np.complex64), np.zeros(3, "U4"), np.zeros(3, "f4,i4")]
)
def test_numpy_dtype_that_no_kernel_knows_is_refused(array: Any) -> None:
    with pytest.raises(TypeError, match=r"^offsets: expected a dtype among"):
        ingest(array, "offsets", STREAM)


def test_masked_array_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^a: expected an array without a mask"):
        ingest(np.ma.masked_array(np.zeros(3)), "a", STREAM)


@pytest.mark.parametrize("value", [None, 1.0, [1.0, 2.0], "array", np.float32(1)])
def test_what_is_no_array_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^a_scale: expected an array .* got (builtins|numpy)\."):
        ingest(value, "a_scale", STREAM)


class Numba:
    """An array that is known by `__cuda_array_interface__` only."""

    def __init__(self, **entries: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (4, 6),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
            "strides": None,
            **entries,
        }


def test_cuda_array_interface_without_strides_is_row_major() -> None:
    order, obj = FakeOrder(), Numba()
    assert ingest(obj, "a", STREAM, order) == Array(
        4096, (4, 6), (6, 1), "float32", 3, "cuda_array_interface", obj, False
    )
    assert order.calls == [("pointer_device", 4096)]


def test_cuda_array_interface_has_strides_in_bytes_and_a_readonly_flag() -> None:
    array = ingest(Numba(strides=(64, 8), data=(4096, True), typestr="<f2"), "a", STREAM, FakeOrder())
    assert (array.strides, array.dtype, array.readonly) == ((32, 4), "float16", True)


def test_launch_stream_waits_for_the_stream_of_a_cuda_array_interface() -> None:
    order = FakeOrder()
    ingest(Numba(stream=0x7000), "a", STREAM, order)
    assert order.calls == [
        ("pointer_device", 4096),
        ("event_create", 3),
        ("event_record", 100, 0x7000, 3),
        ("stream_wait_event", STREAM, 100, 3),
        ("event_destroy", 100),
    ]


@pytest.mark.parametrize(("producer", "launch"), [(STREAM, STREAM), (1, 0), (1, 1), (2, 2), (None, STREAM)])
def test_no_wait_where_the_streams_are_the_same(producer: int | None, launch: int) -> None:
    order = FakeOrder()
    ingest(Numba(stream=producer), "a", launch, order)
    assert order.calls == [("pointer_device", 4096)]


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({"stream": 0}, ValueError, "stream 0"),
        ({"mask": object()}, TypeError, "mask"),
        ({"typestr": "<V1"}, TypeError, "uint8 and name it with dtype="),
        ({"typestr": ">f4"}, TypeError, "typestr"),
        ({"data": (0, False)}, TypeError, "empty array"),
    ],
)
def test_cuda_array_interface_that_cannot_be_used(entries: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^b: .*{words}"):
        ingest(Numba(**entries), "b", STREAM, FakeOrder())


def test_real_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    base = torch.zeros(6, 8)
    for dtype in TORCH_DTYPES:
        tensor = base.to(getattr(torch, dtype))[1:, ::2]
        array = ingest(tensor, "a", STREAM)
        assert array == Array(tensor.data_ptr(), (5, 4), (8, 2), dtype, -1, "torch", tensor, False)
        assert type(array.shape) is tuple
    parameter = torch.nn.Parameter(base)
    assert parameter.requires_grad
    assert ingest(parameter, "a", STREAM).ptr == base.data_ptr()
    assert ingest(torch.zeros(0, 8), "a", STREAM).shape == (0, 8)


def test_real_torch_tensors_that_cannot_be_used() -> None:
    torch = pytest.importorskip("torch")
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    negated = torch.zeros(4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with fake.FakeTensorMode():
        wrapper = torch.zeros(4)
    for tensor, words in (
        (negated, "lazily negated"),
        (torch.zeros(4, 4).to_sparse(), "strided"),
        (torch.zeros(4, device="meta"), "on meta"),
        (wrapper, "the wrapper torch._subclasses.fake_tensor.FakeTensor"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
    ):
        with pytest.raises(TypeError, match=f"^b: .*{words}"):
            ingest(tensor, "b", STREAM)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float32", "uint8", "int32"])
def test_real_jax_arrays(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    value = jax.numpy.zeros((6, 8), dtype=getattr(jax.numpy, dtype))
    array = ingest(value, "a", STREAM)
    assert array[:6] == (value.unsafe_buffer_pointer(), (6, 8), (8, 1), dtype, -1, "jax")
    assert array.readonly
    assert framework_of(value) == "jax"


def test_deleted_jax_array_is_refused() -> None:
    jax = pytest.importorskip("jax")
    value = jax.numpy.zeros(4)
    value.delete()
    with pytest.raises(ValueError, match=r"^a: expected a live JAX array, got one that was deleted"):
        ingest(value, "a", STREAM)


def test_jax_tracer_is_refused() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"^a: expected a JAX array, got a tracer"):
        jax.jit(lambda x: ingest(x, "a", STREAM))(jax.numpy.zeros(4))


def test_sharded_jax_array_is_refused() -> None:
    pytest.importorskip("jax")
    run_alone("""
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax
        from sm12x.tensors import ingest
        mesh = jax.sharding.Mesh(jax.devices("cpu"), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        try:
            ingest(jax.device_put(jax.numpy.zeros(4), sharding), "a", 7)
        except TypeError as error:
            assert str(error).startswith("a: "), error
        else:
            raise SystemExit("a sharded array was accepted")
    """)


def run_alone(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=None, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_framework_is_imported() -> None:
    run_alone("""
        import sys
        import numpy
        from sm12x.tensors import allocate_like, current_stream, ingest
        ingest(numpy.zeros((4, 4), numpy.float32), "a", 0)
        class Producer:
            def __dlpack_device__(self):
                return (1, 0)
            def __dlpack__(self, **options):
                return numpy.zeros(4).__dlpack__(**options)
        ingest(Producer(), "b", 0)
        allocate_like("numpy", (4, 4), "bfloat16", -1, 0)
        assert current_stream("numpy", 0) == 0
        loaded = {"torch", "jax", "jaxlib", "cupy", "tvm_ffi", "numba"} & set(sys.modules)
        assert not loaded, loaded
    """)


def test_current_stream_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = types.ModuleType("torch")
    torch._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 0x1000 + device)
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=0x2000 + device)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert current_stream("torch", 3) == 0x1003
    del torch._C._cuda_getCurrentRawStream
    assert current_stream("torch", 3) == 0x2003


def test_current_stream_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy: Any = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(
        get_current_stream=lambda device: types.SimpleNamespace(ptr=0x3000 + device)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert current_stream("cupy", 2) == 0x3002


def test_jax_gets_one_stream_of_ours_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_jax_streams", {})
    order = FakeOrder()
    first = current_stream("jax", 0, order)
    assert current_stream("jax", 1, order) != first
    assert current_stream("jax", 0, order) == first
    assert order.calls == [("stream_create", 0), ("stream_create", 1)]


def test_threads_that_ask_at_once_get_the_same_jax_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_jax_streams", {})
    made = iter(range(100, 200))

    class SlowOrder(FakeOrder):
        def stream_create(self, device: int) -> int:
            time.sleep(0.02)
            return next(made)

    with ThreadPoolExecutor(8) as pool:
        got = set(pool.map(lambda _: current_stream("jax", 0, SlowOrder()), range(8)))
    assert got == {100}


@pytest.mark.parametrize("framework", ["numpy", "dlpack", "cuda_array_interface"])
def test_others_use_the_legacy_default_stream(framework: str) -> None:
    assert current_stream(framework, 0) == 0

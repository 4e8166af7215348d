"""Results come from the caller's framework; JAX's are ordered behind the launch and held until it ends."""

from __future__ import annotations

import ctypes
import gc
import sys
import types
import warnings
import weakref
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sm12x import outputs
from sm12x.arrays import Array
from sm12x.tensors import JaxOutput, allocate_like, deliver, framework_of, ingest

STREAM = 0x5000


class FakeOrder:
    """Writes down the driver calls it gets. Events are handles from 100 on; those in `passed` have passed."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.passed: set[int] = set()
        self.events = 99

    def event_create(self, device: int) -> int:
        self.events += 1
        self.calls.append(("event_create", device))
        return self.events

    def event_query(self, event: int) -> bool:
        return event in self.passed

    def __getattr__(self, call: str) -> Any:
        return lambda *arguments: self.calls.append((call, *arguments))


@pytest.fixture(autouse=True)
def _nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_held", [])


def test_numpy_result() -> None:
    result = allocate_like("numpy", (3, 8), "bfloat16", -1, 0)
    assert (result.shape, result.dtype) == ((3, 8), np.dtype(ml_dtypes.bfloat16))
    assert allocate_like("numpy", (3, 8), "float32", -1, 0).dtype == np.float32


def test_torch_result_on_the_host() -> None:
    torch = pytest.importorskip("torch")
    result = allocate_like("torch", (3, 8), "bfloat16", -1, 0)
    assert (tuple(result.shape), result.dtype, result.device.type) == ((3, 8), torch.bfloat16, "cpu")


class FakeTorch(types.ModuleType):
    """torch with a current stream of 0x1000 that says on which stream it allocated."""

    __version__ = "0"
    bfloat16 = "torch.bfloat16"

    def __init__(self) -> None:
        super().__init__("torch")
        self.on = 0x1000
        self._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 0x1000)
        self.cuda = types.SimpleNamespace(
            ExternalStream=lambda stream, device: (stream, device),
            default_stream=lambda device: (0, device),
            stream=self.use,
        )

    @contextmanager
    def use(self, stream: tuple[int, int]) -> Any:
        before, self.on = self.on, stream[0]
        yield
        self.on = before

    def empty(self, shape: tuple[int, ...], *, dtype: str, device: int) -> tuple[Any, ...]:
        return shape, dtype, device, self.on


@pytest.mark.parametrize(("stream", "allocated_on"), [(0x1000, 0x1000), (STREAM, STREAM), (0, 0), (1, 0)])
def test_torch_allocates_on_the_stream_that_writes(
    stream: int, allocated_on: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    result = allocate_like("torch", (3, 8), "bfloat16", 2, stream)
    assert result == ((3, 8), "torch.bfloat16", 2, allocated_on)
    assert torch.on == 0x1000


def test_dtype_that_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", FakeTorch())
    with pytest.raises(ValueError, match=r"^out: torch 0 has no dtype float4"):
        allocate_like("torch", (3, 8), "float4", 0, 0x1000)


class FakeCupy(types.ModuleType):
    """CuPy with a current stream of 0x1000 that has float32 only, and says where it allocated."""

    __version__ = "13.6.0"

    def __init__(self) -> None:
        super().__init__("cupy")
        self.where: list[Any] = []
        self.cuda = types.SimpleNamespace(
            Device=lambda device: self.use(("device", device)),
            ExternalStream=self.external_stream,
            get_current_stream=lambda device: types.SimpleNamespace(ptr=0x1000),
        )

    def external_stream(self, stream: int, device: int) -> Any:
        warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)
        return self.use(("stream", stream, device))

    @contextmanager
    def use(self, what: tuple[Any, ...]) -> Any:
        self.where.append(what)
        yield
        self.where.pop()

    def empty(self, shape: tuple[int, ...], *, dtype: np.dtype[Any]) -> tuple[Any, ...]:
        if dtype != np.float32:
            raise ValueError(f"Unsupported dtype {dtype}")
        return shape, *self.where


def test_cupy_allocates_on_the_device_and_the_stream_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    assert allocate_like("cupy", (3,), "float32", 2, 0x1000) == ((3,), ("device", 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elsewhere = allocate_like("cupy", (3,), "float32", 2, STREAM)
    assert elsewhere == ((3,), ("device", 2), ("stream", STREAM, 2))


def test_dtype_that_cupy_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    with pytest.raises(ValueError, match=r"^out: CuPy 13\.6\.0 has no bfloat16 .* CuPy 14"):
        allocate_like("cupy", (3,), "bfloat16", 2, 0x1000)


@pytest.mark.parametrize("framework", ["dlpack", "cuda_array_interface"])
def test_frameworks_without_an_allocator_are_told_to_pass_out(framework: str) -> None:
    with pytest.raises(TypeError, match=f"^out: expected an array, .*{framework}.* got None"):
        allocate_like(framework, (3,), "bfloat16", 0, 0)


def test_what_is_not_jax_is_delivered_as_it_is_without_driver_calls() -> None:
    order, out = FakeOrder(), object()
    inputs = [Array(1, (1,), (1,), "uint8", 0, framework, None) for framework in ("torch", "cupy", "dlpack")]
    assert deliver([out], inputs, STREAM, 0, order) == [out]
    assert order.calls == []


class Owner:
    pass


def test_jax_inputs_are_held_until_the_launch_has_ended() -> None:
    order, owner = FakeOrder(), Owner()
    alive = weakref.ref(owner)
    inputs = [Array(1, (1,), (1,), "uint8", 2, "jax", owner)]
    assert deliver([None], inputs, STREAM, 2, order) == [None]
    assert order.calls == [("event_create", 2), ("event_record", 100, STREAM, 2)]
    del owner, inputs
    gc.collect()
    assert alive() is not None
    other = [Array(1, (1,), (1,), "uint8", 2, "jax", Owner())]
    deliver([], other, STREAM, 2, order)
    assert alive() is not None
    order.passed.add(100)
    deliver([], other, STREAM, 2, order)
    gc.collect()
    assert alive() is None
    assert ("event_destroy", 100) in order.calls
    assert ("event_destroy", 101) not in order.calls


def test_jax_inputs_are_held_too_where_delivery_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    jax: Any = types.ModuleType("jax")
    jax.dlpack = types.SimpleNamespace(from_dlpack=lambda export: 1 / 0)
    monkeypatch.setitem(sys.modules, "jax", jax)
    with pytest.raises(ZeroDivisionError):
        deliver([JaxOutput(Owner())], [], STREAM, 0, FakeOrder())
    assert len(outputs._held) == 1


class FakeJaxArray:
    def __init__(self) -> None:
        self.exports: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, **options: Any) -> str:
        self.exports.append(options)
        return "capsule"


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"stream": 0x7000}, [("stream_wait_event", 0x7000, 100, 1)]),
        ({"stream": 0x7000, "max_version": (1, 0)}, [("stream_wait_event", 0x7000, 100, 1)]),
        ({"stream": 1}, [("stream_wait_event", 1, 100, 1)]),
        ({"stream": None}, [("event_synchronize", 100)]),
        ({"stream": -1}, []),
    ],
)
def test_jax_waits_for_the_launch_before_it_takes_its_result(
    options: dict[str, Any], calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jax: Any = types.ModuleType("jax")
    jax.dlpack = types.SimpleNamespace(from_dlpack=lambda export: export.__dlpack__(**options))
    monkeypatch.setitem(sys.modules, "jax", jax)
    order, array = FakeOrder(), FakeJaxArray()
    assert deliver([JaxOutput(array), "torch"], [], STREAM, 1, order) == ["capsule", "torch"]
    assert order.calls == [("event_create", 1), ("event_record", 100, STREAM, 1), *calls]
    assert array.exports == [options]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_jax_result_is_written_in_place_and_delivered(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    order = FakeOrder()
    out = allocate_like("jax", (5, 8), dtype, -1, STREAM)
    assert framework_of(out) == "jax"
    array = ingest(out, "out", STREAM, order)
    assert (array.shape, array.strides, array.dtype, array.device) == ((5, 8), (8, 1), dtype, -1)
    assert not array.readonly
    expected = np.random.default_rng().standard_normal((5, 8)).astype(jax.numpy.dtype(dtype))
    ctypes.memmove(array.ptr, expected.ctypes.data, expected.nbytes)
    (result,) = deliver([out], [array], STREAM, -1, order)
    del out, array
    gc.collect()
    assert isinstance(result, jax.Array)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(result), expected)
    np.testing.assert_array_equal(np.asarray(result + result), expected + expected)


def test_jax_without_the_device_is_told_so() -> None:
    jax = pytest.importorskip("jax")
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this JAX has a GPU")
    with pytest.raises(ValueError, match=r"^out: JAX has no cuda devices in this process"):
        allocate_like("jax", (5, 8), "float32", 7, STREAM)

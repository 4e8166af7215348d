"""Where a layer goes: which framework, which device, and that every matrix arrives where it belongs.

torch and CuPy are stand-ins over NumPy with the few functions that the loader calls, and refuse what the real
ones refuse; device memory of our own is on the fake driver.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import types

import numpy as np
import pytest

from sm12x import device_memory, driver
from sm12x.checkpoint import UNQUANTIZED, load_moe_layer, make_checkpoint
from unit import fake_driver
from unit.checkpoints import SCHEMES, new_seed
from unit.fake_memory import DriverWithMemory


class FakeTensor:
    def __init__(self, values, dtype, device):
        self.values, self.dtype, self.device = values, dtype, device

    def view(self, dtype):
        assert (self.dtype, dtype) == ("float8_e4m3fn", "uint8")
        return FakeTensor(self.values, dtype, self.device)

    def __getitem__(self, at):
        return FakeTensor(self.values[at], self.dtype, self.device)

    def copy_(self, other):
        assert (self.dtype, self.values.shape) == (other.dtype, other.values.shape)
        self.values[...] = other.values


def fake_torch(available=True):
    torch = types.ModuleType("torch")
    torch.uint8, torch.float8_e4m3fn, torch.float32 = "uint8", "float8_e4m3fn", "float32"
    torch.cuda = types.SimpleNamespace(is_available=lambda: available)

    def empty(shape, dtype, device):
        return FakeTensor(np.zeros(shape, "uint8" if dtype == "float8_e4m3fn" else dtype), dtype, device)

    def from_numpy(values):
        if values.dtype.name not in ("uint8", "float32"):
            raise TypeError(f"can't convert np.ndarray of type {values.dtype}")
        return FakeTensor(values, values.dtype.name, "cpu")

    torch.empty, torch.from_numpy = empty, from_numpy
    return torch


class FakeCupyArray:
    def __init__(self, values, device):
        self.values, self.device = values, device

    def __getitem__(self, at):
        return FakeCupyArray(self.values[at], self.device)

    def set(self, values):
        assert self.values.flags.c_contiguous
        assert (self.values.dtype, self.values.shape) == (values.dtype, values.shape)
        self.values[...] = values


def fake_cupy(available=True):
    cupy = types.ModuleType("cupy")
    current = [0]

    @contextlib.contextmanager
    def on(ordinal):
        before, current[0] = current[0], current[0] if ordinal is None else ordinal
        yield
        current[0] = before

    class Device:
        def __init__(self, ordinal):
            self.ordinal = ordinal

        def __enter__(self):
            self.context = on(self.ordinal)
            self.context.__enter__()

        def __exit__(self, *error):
            self.context.__exit__(*error)

    def empty(shape, dtype):
        assert dtype in ("uint8", "float32")
        return FakeCupyArray(np.zeros(shape, dtype), current[0])

    cupy.empty = empty
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        is_available=lambda: available,
        get_current_stream=lambda: types.SimpleNamespace(synchronize=lambda: None),
    )
    return cupy


@pytest.fixture(params=["fp8-dynamic", "unquantized", "method-fp8-static"])
def folder(request, tmp_path):
    stacked = request.param == "unquantized"
    make_checkpoint(
        tmp_path,
        scheme=SCHEMES[request.param],
        num_experts=3,
        hidden_size=48,
        stacked=stacked,
        seed=new_seed(),
    )
    return tmp_path


def same(layer, host, bits):
    """Whether the arrays of `layer`, through `bits`, are those of a layer in host memory."""
    assert layer.arguments().keys() == host.arguments().keys()
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        right = getattr(host, name)
        right = right.view(np.uint8) if right.dtype.itemsize == 1 else right
        np.testing.assert_array_equal(bits(getattr(layer, name)), right)
    for name in ("weight", "scale", "per_expert_scale"):
        np.testing.assert_array_equal(bits(getattr(layer.router, name)), getattr(host.router, name))
    return (layer.a1_scale, layer.a2_scale) == (host.a1_scale, host.a2_scale)


@pytest.mark.parametrize(
    ("device", "name"),
    [(None, "cuda"), ("cuda", "cuda"), (1, "cuda:1"), ("cuda:2", "cuda:2"), ("cpu", "cpu")],
)
def test_torch_gets_tensors_on_its_device(folder, monkeypatch, device, name):
    monkeypatch.setitem(sys.modules, "torch", fake_torch())
    layer = load_moe_layer(folder, 0, framework="torch", device=device)
    assert (layer.w1.dtype, layer.w1_scale.dtype, layer.dtype) == ("float8_e4m3fn", "float32", None)
    assert {layer.w1.device, layer.w2.device, layer.w1_scale.device, layer.router.weight.device} == {name}
    assert same(layer, load_moe_layer(folder, 0, framework="numpy"), lambda tensor: tensor.values)


@pytest.mark.parametrize(("device", "ordinal"), [(None, 0), ("cuda:1", 1), (1, 1)])
def test_cupy_gets_bytes_and_is_told_so(folder, monkeypatch, device, ordinal):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    layer = load_moe_layer(folder, 0, framework="cupy", device=device)
    assert layer.arguments()["dtype"] == "float8_e4m3fn"
    assert layer.w1.values.dtype == np.uint8
    assert {layer.w1.device, layer.w2_scale.device} == {ordinal}
    assert same(layer, load_moe_layer(folder, 0, framework="numpy"), lambda array: array.values)


def test_our_own_memory_needs_no_framework_and_is_given_back(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(fake_driver, "FakeDriver", DriverWithMemory)
    fake = fake_driver.install(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    layer = load_moe_layer(folder, 0, framework="sm12x", device=1)
    assert (layer.w1.dtype, layer.w1.ordinal, layer.w1.stream) == ("float8_e4m3fn", 1, None)

    def bits(array):
        values = device_memory.download(driver.get_device(1), array, 0)
        return values.view(np.uint8) if values.dtype.itemsize == 1 else values

    assert same(layer, load_moe_layer(folder, 0, framework="numpy"), bits)
    assert fake.blocks
    del layer
    gc.collect()
    assert not fake.blocks


def loaded_into(folder, **options):
    layer = load_moe_layer(folder, 0, **options)
    return {"FakeTensor": "torch", "FakeCupyArray": "cupy", "ndarray": "numpy"}[type(layer.w1).__name__]


@pytest.mark.parametrize("folder", ["fp8-dynamic"], indirect=True)
def test_which_framework_is_taken(folder, monkeypatch):
    """torch where it is imported and sees a GPU, else CuPy where it is installed and does, else NumPy."""
    found = importlib.util.find_spec
    spec = types.SimpleNamespace(name="cupy")
    installed = [True]
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (spec if installed[0] else None) if name == "cupy" else found(name),
    )
    monkeypatch.setitem(sys.modules, "torch", fake_torch())
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert loaded_into(folder) == "torch"
    assert loaded_into(folder, device="cpu") == "numpy"
    monkeypatch.setitem(sys.modules, "torch", fake_torch(available=False))
    assert loaded_into(folder) == "cupy"
    monkeypatch.delitem(sys.modules, "torch")
    assert loaded_into(folder) == "cupy"
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(available=False))
    assert loaded_into(folder) == "numpy"
    monkeypatch.setitem(sys.modules, "cupy", None)  # its import fails
    assert loaded_into(folder) == "numpy"
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    installed[0] = False
    assert loaded_into(folder) == "numpy"
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("framework", "device"),
    [("numpy", 0), ("numpy", "cuda"), (None, "gpu"), ("torch", -1), ("torch", True), ("torch", "cuda:x")],
)
def test_a_device_that_is_none_is_refused(tmp_path, monkeypatch, framework, device):
    make_checkpoint(tmp_path, scheme=UNQUANTIZED)
    monkeypatch.setitem(sys.modules, "torch", fake_torch())
    with pytest.raises(ValueError, match="device: expected"):
        load_moe_layer(tmp_path, 0, framework=framework, device=device)


@pytest.mark.parametrize("framework", ["cupy", "sm12x"])
def test_no_host_memory_of_these(tmp_path, framework):
    make_checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=f"device: expected a CUDA device for framework '{framework}', got 'cpu'"
    ):
        load_moe_layer(tmp_path, 0, framework=framework, device="cpu")


def test_a_gpu_is_asked_for_where_no_framework_sees_one(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="device: expected None or 'cpu' for NumPy arrays, got 'cuda:0'"):
        load_moe_layer(tmp_path, 0, device="cuda:0")

"""Device memory of our own: read like any DLPack producer's, and freed when its last consumer lets go."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from sm12x import device_memory, dlpack, driver
from sm12x.arrays import numpy_dtype
from sm12x.device_memory import DeviceArray, download, upload
from sm12x.errors import CudaError
from sm12x.tensors import ingest

DTYPES = ["int32", "int64", "uint8", "float16", "float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
STREAM = 7


@pytest.fixture
def device(monkeypatch):
    """A device whose memory is the host's, so that copies and frees can be followed without a GPU."""
    memory, calls = {}, []

    def call(name, *arguments):
        calls.append((name, *arguments))
        if name == "cuMemAlloc":
            block = ctypes.create_string_buffer(arguments[0])
            memory[ctypes.addressof(block)] = block
            return ctypes.addressof(block)
        if name == "cuMemFree":
            memory.pop(arguments[0])
        if name.startswith("cuMemcpy"):
            ctypes.memmove(*arguments[:3])

    made = SimpleNamespace(ordinal=3, memory=memory, calls=calls)
    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "current", lambda device: nullcontext())
    monkeypatch.setattr(driver, "get_device", lambda ordinal: made)
    return made


@pytest.fixture
def on_host(monkeypatch):
    """Has the arrays say that they lie where the fake device's memory is: real consumers then take them."""
    monkeypatch.setattr(dlpack, "CUDA", 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_is_read_like_any_dlpack_producers(device, dtype):
    host = np.arange(48).astype(numpy_dtype(dtype)).reshape(4, 12)
    array = upload(device, host, STREAM)
    read = ingest(array, "a", STREAM)
    assert read[:5] == (array.ptr, (4, 12), (12, 1), dtype, 3)
    assert not read.readonly
    np.testing.assert_array_equal(download(device, array, STREAM).view(np.uint8), host.view(np.uint8))
    del read, array
    assert not device.memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 5), (8, 1)), ((3, 5), (1, 3)), ((0, 16), (16, 1)), ((2, 0), (0, 1)), ((), ()), ((1,), (9,))],
)
def test_views_are_exported_with_their_strides(device, dtype, shape, strides):
    read = ingest(DeviceArray(4096, shape, dtype, 0, None, strides), "a", 0)
    assert (read.ptr, read.shape, read.dtype, read.device) == (4096, shape, dtype, 0)
    several = [axis for axis, extent in enumerate(shape) if extent > 1 and 0 not in shape]
    assert [read.strides[axis] for axis in several] == [strides[axis] for axis in several]


def test_a_consumer_outlives_the_array_however_often_it_was_exported(device, on_host):
    host = np.arange(20, dtype=np.int32).reshape(4, 5)
    array = upload(device, host, STREAM)
    first = np.from_dlpack(array)
    second = np.from_dlpack(array)
    unused = array.__dlpack__(stream=STREAM)
    del array
    gc.collect()
    np.testing.assert_array_equal(first, host)
    del first
    np.testing.assert_array_equal(second, host)
    del second
    assert dlpack.read(unused, "a")[1] == (4, 5)
    assert device.memory, "a capsule that nobody consumed holds the memory too"
    del unused
    assert not device.memory
    assert [name for name, *_ in device.calls].count("cuMemFree") == 1


def test_torch_outlives_the_array_however_often_it_was_exported(device, on_host):
    torch = pytest.importorskip("torch")
    host = np.arange(20, dtype=np.float32).reshape(4, 5)
    array = upload(device, host, STREAM)
    tensors = [torch.from_dlpack(array.__dlpack__(stream=STREAM)) for _ in range(2)]
    del array
    gc.collect()
    assert all(torch.equal(tensor, torch.from_numpy(host)) for tensor in tensors)
    tensors.pop()
    assert device.memory
    tensors.pop()
    assert not device.memory


def test_a_capsule_dropped_while_an_error_is_raised_does_not_hide_it(device):
    array = upload(device, np.zeros(4, np.int32), STREAM)

    def fail(capsule, text):
        raise KeyError(text)

    with pytest.raises(KeyError, match="the real error"):
        fail(array.__dlpack__(stream=STREAM), "the real error")
    del array
    assert not device.memory


AT_EXIT = """
import ctypes
import numpy as np
from sm12x import dlpack
dlpack.CUDA = 1
block = ctypes.create_string_buffer(64)
class Array:
    def __dlpack_device__(self):
        return 1, 0
    def __dlpack__(self, **options):
        return dlpack.make_capsule(ctypes.addressof(block), (16,), (1,), "int32", 0, block)
np.kept = np.from_dlpack(Array())
np.cycle = [Array().__dlpack__()]
np.cycle.append(np.cycle)
"""


def test_a_consumer_that_is_left_at_exit_ends_quietly():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_stream_waits_for_the_one_that_writes_the_array(device):
    array = upload(device, np.zeros(4, np.int32), STREAM)
    waits = ("cuStreamSynchronize", STREAM)
    device.calls.clear()
    array.__dlpack__(stream=STREAM)
    array.__dlpack__(stream=-1)
    assert not device.calls
    for other in (None, 1, 9):
        array.__dlpack__(stream=other)
    assert device.calls == [waits] * 3


def test_a_view_keeps_the_allocation(device):
    array = upload(device, np.arange(8, dtype=np.int32), STREAM)
    view = DeviceArray(array.ptr + 16, (4,), array.dtype, array.ordinal, array.owner)
    del array
    np.testing.assert_array_equal(download(device, view, STREAM), [4, 5, 6, 7])
    del view
    assert not device.memory


def test_memory_that_cannot_be_freed_is_no_error_of_the_code_that_drops_it(device, monkeypatch):
    array = upload(device, np.zeros(4, np.int32), STREAM)

    def call(name, *arguments):
        raise CudaError("an illegal memory access was encountered")

    monkeypatch.setattr(device_memory.driver, "call", call)
    said = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: said.append(str(what.exc_value)))
    del array
    assert said == []

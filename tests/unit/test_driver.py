"""The driver layer on a fake driver: every status checked, everything loaded once, the caller's "
"context put back."""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sm12x import driver, manifest
from sm12x.errors import CubinError, CudaError, DriverError, UnsupportedDeviceError
from sm12x.tensor_maps import get_tensor_maps
from unit.fake_driver import CONTEXT, FakeGpu, install

COOP = "fp8_ptr_array_128x128x128_coop_bf16"
SWAP = "fp8_ptr_array_128x16x128_swap_fp16"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


def variant(key=COOP):
    return manifest.default().variants[key]


def test_no_driver_library(fake, monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_load_library", missing)
    with pytest.raises(DriverError, match=r"no NVIDIA driver.*libcuda\.so\.1.*install the NVIDIA driver"):
        driver.get_device(0)


def test_no_driver_for_cuda_bindings(fake):
    def refuse(flags):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    fake.bindings.cuInit = refuse
    with pytest.raises(DriverError, match="no NVIDIA driver"):
        driver.get_driver()


def test_cuda_bindings_missing(fake, monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(driver, "_import_bindings", missing)
    with pytest.raises(DriverError, match=r"cuda.bindings cannot be imported"):
        driver.get_driver()


def test_a_driver_without_tensor_maps_is_too_old(fake):
    del fake.library.cuTensorMapEncodeTiled
    with pytest.raises(DriverError, match=r"too old.*cuTensorMapEncodeTiled"):
        driver.get_driver()


def test_failed_initialisation_carries_the_drivers_words(fake):
    fake.fail["cuInit"] = 3
    with pytest.raises(DriverError, match=r"CUDA_ERROR_NOT_INITIALIZED.*forked") as caught:
        driver.get_device(0)
    assert (caught.value.name, caught.value.code, caught.value.call) == (
        "CUDA_ERROR_NOT_INITIALIZED",
        3,
        "cuInit",
    )
    fake.fail.clear()
    assert driver.get_device(0).arch == "sm_120a", "a failure is not remembered"


@pytest.mark.parametrize(
    ("version", "major", "words"),
    [
        (
            12040,
            "13",
            "supports CUDA 12.4, and the cu13 cubins need 13.0: update it to release 580 or newer$",
        ),
        (12090, "13", "supports CUDA 12.9.*or install sm12x-cu12 instead of sm12x-cu13"),
        (
            12070,
            "12",
            "supports CUDA 12.7, and the cu12 cubins need 12.8: update it to release 570 or newer$",
        ),
    ],
)
def test_a_driver_too_old_says_what_to_do(monkeypatch, tmp_path, version, major, words):
    install(monkeypatch, tmp_path, version=version, major=major)
    with pytest.raises(DriverError, match=words):
        driver.get_device(0)


@pytest.mark.parametrize(("version", "major"), [(12080, "12"), (13000, "12"), (13000, "13"), (13020, "13")])
def test_a_driver_new_enough_is_taken(monkeypatch, tmp_path, version, major):
    install(monkeypatch, tmp_path, version=version, major=major)
    assert driver.get_device(0).major == f"cu{major}"


def test_an_unsupported_device_lists_what_exists(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, gpus=[FakeGpu("NVIDIA L4", (8, 9), 58)])
    with pytest.raises(
        UnsupportedDeviceError,
        match=r"device 0 \(NVIDIA L4\) has compute capability 8\.9.*no sm12x wheel.*"
        r"sm_120a \(compute capability 12\.0\), sm_121a.*sm_90a",
    ):
        driver.get_device(0)


def test_a_device_of_the_other_wheel_says_which(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path, gpus=[FakeGpu("GB10", (12, 1), 48)])
    held = manifest.load(fake.root)
    for each in held.variants.values():
        del each.targets["sm_121a"].cubins["cu13"]
    monkeypatch.setattr(manifest, "default", lambda: held)
    with pytest.raises(UnsupportedDeviceError, match="install sm12x-cu12, which has one"):
        driver.get_device(0)


@pytest.mark.parametrize(
    ("capability", "arch"), [((12, 0), "sm_120a"), ((12, 1), "sm_121a"), ((9, 0), "sm_90a")]
)
def test_the_architecture_follows_from_the_capability(monkeypatch, tmp_path, capability, arch):
    fake = install(monkeypatch, tmp_path, gpus=[FakeGpu("x", capability, 48)])
    device = driver.get_device(0)
    driver.get_function(device, variant())
    assert device.arch == arch
    assert fake.loaded == [(fake.root / "cu13" / arch / f"{COOP}.cubin").read_bytes()]


def test_a_device_that_is_not_there(fake):
    with pytest.raises(ValueError, match="expected one of the 2 CUDA devices of this process, got 2"):
        driver.get_device(2)


def test_cubins_of_another_abi_are_not_loaded(fake, monkeypatch):
    held = manifest.load(fake.root)
    held.abi["structs"]["sm12x_ptr_array_params"]["size"] = 512
    monkeypatch.setattr(manifest, "default", lambda: held)
    with pytest.raises(CubinError, match=r"another abi\.h: sm12x_ptr_array_params: 448 bytes here, 512"):
        driver.get_device(0)
    assert fake.loaded == []


def test_a_function_is_loaded_once_and_its_shared_memory_set_once(fake):
    device = driver.get_device(0)
    functions = {driver.get_function(device, variant()) for _ in range(3)}
    assert len(functions) == 1
    assert fake.calls.count("cuLibraryLoadData") == 1
    assert fake.attributes == [
        (f"sm12x_{COOP}", "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", variant().shared_memory)
    ]
    driver.get_function(driver.get_device(1), variant())
    assert fake.calls.count("cuLibraryLoadData") == 2, "each device has its own"


def test_threads_load_a_function_once(fake):
    barrier = threading.Barrier(8)

    def load(_):
        barrier.wait()
        return driver.get_function(driver.get_device(0), variant())

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(load, range(8)))) == 1
    assert fake.calls.count("cuLibraryLoadData") == 1
    assert fake.calls.count("cuInit") == 1
    assert fake.calls.count("cuDevicePrimaryCtxRetain") == 1


def test_a_flipped_bit_never_reaches_the_driver(fake):
    device = driver.get_device(0)
    path = fake.root / "cu13" / "sm_120a" / f"{COOP}.cubin"
    bad = bytearray(path.read_bytes())
    bad[17] ^= 4
    path.write_bytes(bad)
    with pytest.raises(CubinError, match="sha256"):
        driver.get_function(device, variant())
    assert fake.loaded == []
    assert device.functions == {}


@pytest.mark.parametrize(
    "call",
    [
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuKernelGetFunction",
        "cuFuncSetAttribute",
        "cuCtxSetCurrent",
    ],
)
def test_every_status_of_loading_is_checked(fake, call):
    device = driver.get_device(0)
    fake.fail[call] = [209]
    with pytest.raises(CudaError, match=f"{call} failed with CUDA_ERROR_NO_BINARY_FOR_GPU") as caught:
        driver.get_function(device, variant())
    assert (caught.value.code, caught.value.text) == (209, "text of 209")
    if call != "cuCtxSetCurrent":
        assert caught.value.variant == COOP
    assert driver.get_function(device, variant()), "a failure is not remembered"


@pytest.mark.parametrize(
    "call",
    [
        "cuDriverGetVersion",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDeviceGetName",
        "cuDevicePrimaryCtxRetain",
    ],
)
def test_every_status_of_opening_a_device_is_checked(fake, call):
    fake.fail[call] = [100]
    with pytest.raises(CudaError, match=f"{call} failed") as caught:
        driver.get_device(0)
    assert caught.value.code == 100
    assert driver.get_device(0).sm_count == 170


@pytest.mark.parametrize("before", [0, CONTEXT + 1, 0x7F00_1234_5678])
def test_the_callers_context_is_put_back(fake, before):
    device = driver.get_device(0)
    fake.context = before
    with driver.current(device):
        assert fake.context == CONTEXT
    assert fake.context == before
    with pytest.raises(KeyError), driver.current(device):
        raise KeyError
    assert fake.context == before


def test_a_context_that_is_current_is_left_alone(fake):
    device = driver.get_device(0)
    fake.context = device.context
    with driver.current(device):
        pass
    assert "cuCtxSetCurrent" not in fake.calls


def test_tensor_maps_are_encoded_once_per_device_and_variant(fake):
    device = driver.get_device(0)
    maps = get_tensor_maps(device, variant(SWAP), 0x7F00_0000_0013)
    assert maps == get_tensor_maps(device, variant(SWAP), 0x7F00_0000_0020)
    assert fake.calls.count("cuTensorMapEncodeTiled") == 3
    assert len(maps) == 384
    texts = [maps[i : i + 120].rstrip(b"\0").decode() for i in (0, 128, 256)]
    # UINT8 and swizzle 128 B with L2 promotion 128 B for the operands, FLOAT16 without for D.
    assert texts == [
        "0 2 [128, 128] [128] [128, 128] 3 2",
        "0 2 [128, 16] [128] [128, 16] 3 2",
        "6 2 [64, 64] [128] [64, 64] 3 0",
    ]
    get_tensor_maps(driver.get_device(1), variant(SWAP), 0x7F00_0000_0010)
    assert fake.calls.count("cuTensorMapEncodeTiled") == 6


def test_tensor_map_failure_names_the_variant(fake):
    fake.fail["cuTensorMapEncodeTiled"] = 1
    with pytest.raises(CudaError, match=r"cuTensorMapEncodeTiled.*CUDA_ERROR_INVALID_VALUE") as caught:
        get_tensor_maps(driver.get_device(0), variant(), 0x7F00_0000_0010)
    assert caught.value.variant == COOP


def test_an_unknown_status_is_still_an_error(fake):
    fake.fail["cuDeviceGet"] = 0
    fake.bindings.cuDeviceGet = lambda ordinal: (987654, None)
    with pytest.raises(CudaError, match=r"CUDA_ERROR_UNKNOWN.*987654"):
        driver.get_device(0)


def test_a_sticky_status_points_at_earlier_work(fake):
    driver.get_driver()
    assert "launched earlier" in str(driver.cuda_error("cuLaunchKernel", 700))
    assert "launched earlier" not in str(driver.cuda_error("cuLaunchKernel", 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_after_fork_there_is_a_clear_error_and_no_hang(fake):
    device = driver.get_device(0)
    assert device is driver.get_device(0)
    read, write = os.pipe()
    # Another thread holds the lock while this one forks: the child must not wait for it.
    held, release = threading.Event(), threading.Event()

    def hold():
        with driver._lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        try:
            driver.get_device(0)
            os.write(write, b"no error")
        except CudaError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    release.set()
    thread.join()
    with os.fdopen(read, "rb") as pipe:
        message = pipe.read().decode()
    os.waitpid(child, 0)
    assert f"initialised by sm12x in process {os.getpid()} before it forked" in message
    assert "spawn" in message
    assert driver.get_device(0) is device, "the parent goes on"


def test_launches_let_other_threads_run_and_the_brief_calls_beside_them_do_not(fake):
    """A full queue blocks a launch until the device gets on, and a callback of it may want Python's lock."""
    hot = driver.get_driver().hot
    keeps_lock = 4  # ctypes' FUNCFLAG_PYTHONAPI
    for name in ("cuLaunchKernel", "cuLaunchKernelEx"):
        assert not getattr(hot, name)._flags_ & keeps_lock, name
    for name in ("cuCtxGetCurrent", "cuTensorMapReplaceAddress"):
        assert getattr(hot, name)._flags_ & keeps_lock, name


def test_prepared_pointers_are_not_cut(fake):
    """Functions of the driver have no argument types."""
    seen = []
    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda p: seen.append(p) or 0)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.cast(callback, ctypes.c_void_p).value)
    made = driver.get_driver()
    assert function(made.pointer(0x7F12_3456_789A)) == 0
    assert driver._keeping_lock(function)(made.pointer(0x7F12_3456_789A)) == 0
    assert seen == [0x7F12_3456_789A] * 2

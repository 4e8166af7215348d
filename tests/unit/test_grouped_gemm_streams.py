"""Streams, contexts, threads, failing driver calls, and SM12X_CHECK, on a fake driver."""

from __future__ import annotations

import ctypes
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import sm12x
from sm12x import abi, driver
from sm12x.errors import CubinError, CudaError, DriverError
from sm12x.ops import grouped_gemm as module
from sm12x.ops import launch
from unit.fake_driver import CONTEXT, install
from unit.gemm_cases import PREPARE, STREAM, E, K, M, N, nothing_happened, operands


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = install(monkeypatch, tmp_path)
    fake.streams[0] = STREAM
    return fake


class Object:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, 0),
        (2, 2),
        (STREAM + 16, STREAM + 16),
        (Object(cuda_stream=STREAM + 32), STREAM + 32),
        (Object(ptr=STREAM + 48), STREAM + 48),
        (ctypes.c_void_p(STREAM + 64), STREAM + 64),
        (ctypes.c_void_p(0), 0),
        (Object(__cuda_stream__=lambda: (0, STREAM + 80)), STREAM + 80),
        (Object(__cuda_stream__=(0, STREAM + 96)), STREAM + 96),
    ],
)
def test_an_explicit_stream(fake, stream, handle):
    sm12x.grouped_gemm(**operands(fake, stream=stream))
    assert {each.stream for each in fake.launches} == {handle}


@pytest.mark.parametrize("stream", [-1, 2**64, True, 1.0, "0", object(), Object(ptr="x")])
def test_a_stream_that_is_none(fake, stream):
    with pytest.raises((TypeError, ValueError), match="stream: expected"):
        sm12x.grouped_gemm(**operands(fake, stream=stream))
    assert nothing_happened(fake)


def test_the_current_stream_is_asked_for_on_every_call(fake):
    for stream in (STREAM, STREAM + 16, 0):
        fake.streams[0] = stream
        sm12x.grouped_gemm(**operands(fake))
        assert fake.launches[-1].stream == stream
    assert len(module._plans) == 1


def test_every_device_gets_its_own_context_and_stream(fake):
    fake.streams[1] = STREAM + 16
    fake.context = CONTEXT
    args = {name: fake.tensor(x.shape, x.dtype.name, 1) for name, x in operands(fake).items()}
    for _ in range(2):
        sm12x.grouped_gemm(**args)
    assert {(each.context, each.stream) for each in fake.launches} == {(CONTEXT + 1, STREAM + 16)}
    assert fake.context == CONTEXT


@pytest.mark.parametrize("before", [0, CONTEXT, CONTEXT + 1, 0x7F00_1234_5678])
def test_a_known_plan_launches_in_the_devices_context_whatever_is_current(fake, before):
    workspace = fake.tensor((sm12x.workspace_size(E),), "uint8")
    for _ in range(2):
        fake.context = before
        sm12x.grouped_gemm(**operands(fake, workspace=workspace))
        assert fake.context == before
    assert [each.context for each in fake.launches] == [CONTEXT] * 4
    fake.context = CONTEXT
    fake.fail["cuCtxGetCurrent"] = [4]
    sm12x.grouped_gemm(**operands(fake, workspace=workspace))  # asked again, with the status checked
    fake.fail["cuCtxGetCurrent"] = [4, 4]
    with pytest.raises(CudaError, match="cuCtxGetCurrent failed with CUDA_ERROR_DEINITIALIZED"):
        sm12x.grouped_gemm(**operands(fake, workspace=workspace))


def test_threads_do_not_share_parameters(fake):
    rng = random.Random()
    calls = [operands(fake, workspace=fake.tensor((sm12x.workspace_size(E),), "uint8")) for _ in range(64)]
    fake.context = CONTEXT
    sm12x.grouped_gemm(**calls[0])
    fake.launches.clear()
    barrier = threading.Barrier(4)

    def run(part):
        barrier.wait()
        for args in part:
            sm12x.grouped_gemm(**args, stream=args["a"].address)  # the stream tells the calls apart

    rng.shuffle(calls)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [calls[i::4] for i in range(4)]))
    by_stream = {}
    for each in fake.launches:
        by_stream.setdefault(each.stream, []).append(each)
    for args in calls:
        prepare, gemm = by_stream[args["a"].address]
        p, g = prepare.params, gemm.params
        assert (p.a, p.b, p.d) == tuple(args[x].address for x in ("a", "b", "out"))
        assert g.tensor_maps == args["workspace"].address
        assert g.group_arrays == p.group_arrays


@pytest.mark.parametrize(("statuses", "who"), [([1], "prepare_packed"), ([0, 719], "128x16x128_swap_bf16")])
def test_a_failed_launch_is_an_error_with_everything_in_it(fake, statuses, who):
    fake.fail["cuLaunchKernel"] = list(statuses)
    with pytest.raises(CudaError, match="cuLaunchKernel failed with CUDA_ERROR") as caught:
        sm12x.grouped_gemm(**operands(fake))
    error = caught.value
    assert (error.call, error.code, error.text) == ("cuLaunchKernel", statuses[-1], f"text of {statuses[-1]}")
    assert error.name.startswith("CUDA_ERROR_")
    assert error.variant == f"fp8_ptr_array_{who}"
    assert error.shapes == f"packed M={M} E={E} N={N} K={K}"
    assert error.shapes in str(error)
    assert error.variant in str(error)
    assert list(fake.allocated) == fake.freed, "the workspace is freed all the same"
    assert fake.context == 0
    sm12x.grouped_gemm(**operands(fake))


@pytest.mark.parametrize("call", ["cuMemAllocAsync", "cuMemFreeAsync", "cuCtxSetCurrent", "cuCtxGetCurrent"])
def test_every_status_of_a_call_is_checked(fake, call):
    sm12x.grouped_gemm(**operands(fake))
    fake.launches.clear()
    fake.fail[call] = [2]
    with pytest.raises(CudaError, match=f"{call} failed with CUDA_ERROR_OUT_OF_MEMORY"):
        sm12x.grouped_gemm(**operands(fake))
    if call != "cuMemFreeAsync":
        assert fake.launches == []


def test_a_machine_without_a_driver(fake, monkeypatch):
    def missing():
        raise OSError("no such file")

    monkeypatch.setattr(driver, "_load_library", missing)
    with pytest.raises(DriverError, match="no NVIDIA driver"):
        sm12x.grouped_gemm(**operands(fake))


def test_a_broken_cubin_stops_the_call(fake):
    path = fake.root / "cu13" / "sm_120a" / "fp8_ptr_array_prepare_packed.cubin"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CubinError, match="truncated"):
        sm12x.grouped_gemm(**operands(fake))
    assert nothing_happened(fake)


def test_check_reads_the_status_and_stops_before_the_gemm(fake, monkeypatch):
    monkeypatch.setattr(launch, "CHECK", True)
    sm12x.grouped_gemm(**operands(fake))
    assert [entry[0] for entry in fake.log] == ["alloc", "launch", "copy", "synchronize", "launch", "free"]
    copied = next(entry[1] for entry in fake.log if entry[0] == "copy")
    assert copied == fake.launches[0].params.group_arrays + abi.status_offset(E)
    for status, words in ((1, "decrease"), (2, "below 0 or above M"), (3, "decrease and")):
        fake.launches.clear()
        fake.status_word = status
        with pytest.raises(ValueError, match=f"offsets: expected values.*{words}"):
            sm12x.grouped_gemm(**operands(fake))
        assert [each.symbol for each in fake.launches] == [PREPARE]
    assert sorted(fake.allocated) == sorted(fake.freed)


def test_check_is_refused_while_capturing(fake, monkeypatch):
    monkeypatch.setattr(launch, "CHECK", True)
    workspace = fake.tensor((sm12x.workspace_size(E),), "uint8")
    fake.capturing = True
    with pytest.raises(ValueError, match=r"stream: SM12X_CHECK=1 .* captured"):
        sm12x.grouped_gemm(**operands(fake, workspace=workspace))
    assert fake.launches == []


def test_the_choice_is_printed_once_for_each_problem(fake, monkeypatch, capsys):
    monkeypatch.setattr(launch, "LOG_SELECT", True)
    for _ in range(2):
        sm12x.grouped_gemm(**operands(fake))
        module._plans.clear()
    text = capsys.readouterr().err
    assert text.count(f"sm12x select: packed M={M} E={E} N={N} K={K}") == 1
    assert "1. fp8_ptr_array_128x16x128_swap_bf16" in text


def test_the_plan_cache_is_bounded(fake, monkeypatch):
    monkeypatch.setattr(module, "MAX_PLANS", 4)
    for m in range(1, 12):
        sm12x.grouped_gemm(**operands(fake, m))
        assert len(module._plans) <= 4


def test_the_error_of_a_failed_launch_is_not_hidden_by_the_free_that_fails_too(fake):
    fake.fail["cuLaunchKernel"] = [0, 719]
    fake.fail["cuMemFreeAsync"] = 719
    with pytest.raises(CudaError, match="cuLaunchKernel failed") as caught:
        sm12x.grouped_gemm(**operands(fake))
    assert caught.value.variant == "fp8_ptr_array_128x16x128_swap_bf16"
    assert fake.context == 0

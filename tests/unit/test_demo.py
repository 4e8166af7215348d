"""``python -m sm12x demo``: its workload, its JSON, and what it says where there is no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import sm12x
from sm12x import driver, emulator, manifest, reference
from sm12x.cli import demo, demo_gpu, main, workload
from sm12x.cli.demo_gpu import rotations
from sm12x.cli.doctor import Finding
from sm12x.cli.progress import progress

KEYS = {"ok", "backend", "device", "variant", "max_rel_err", "tolerance_ratio", "time_us", "shape"}


@pytest.fixture
def no_gpu(monkeypatch):
    problem = Finding("driver", "problem", "no NVIDIA driver was found", "install one")
    monkeypatch.setattr(demo, "problems", lambda: [problem])


@pytest.fixture
def small(monkeypatch):
    """The demo's workload at sizes that take milliseconds."""
    for name, size in (("K", 64), ("N", 48), ("EMULATED_K", 64), ("EMULATED_N", 48)):
        monkeypatch.setattr(workload, name, size)


def test_json_on_a_machine_without_a_gpu_is_one_object(no_gpu, small, capsys):
    assert main(["demo", "--json", "--tokens", "5", "--experts", "12", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert set(report) == KEYS
    assert report["ok"] is True
    assert report["backend"] == "emulator"
    assert report["device"] == "NVIDIA GeForce RTX 5090 (emulated)"
    assert manifest.default().variants[report["variant"]].role == "gemm"
    assert report["time_us"] > 0
    assert 0 < report["tolerance_ratio"] <= 1
    assert 0 < report["max_rel_err"] < 2**-7
    assert report["shape"] == {"T": 5, "M": 40, "E": 12, "top_k": 8, "K": 64, "N": 48}
    assert captured.err == ""  # no terminal, no progress bar


def test_the_full_command_in_its_own_process():
    """The machine's own sizes, module entry, stdout nothing but JSON."""
    command = [sys.executable, "-m", "sm12x", "demo", "--json", "--tokens", "2", "--experts", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == KEYS
    k, n = (704, 256) if report["backend"] == "emulator" else (2816, 1408)
    assert report["shape"] == {"T": 2, "M": 8, "E": 4, "top_k": 4, "K": k, "N": n}
    assert report["ok"] is True


def test_text_says_that_no_gpu_is_used_and_why_and_that_no_time_counts(no_gpu, small, capsys):
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert "no GPU is used. driver: no NVIDIA driver was found" in printed
    assert "install one" in printed
    assert "T 16, M 128, E 16" in printed
    assert "the same kernels run in the emulator" in printed
    assert "on a smaller problem: K 64 and N 48 instead of 64 and 48" in printed
    assert "no time of the emulator says anything about a GPU" in printed
    assert re.search(r"\bfp8_\w+ \(sm_120a\)", printed)
    assert "GB/s" not in printed
    assert printed.endswith("ok\n")


def test_the_emulator_runs_the_kernel_itself(no_gpu, small, capsys, monkeypatch):
    """What a kernel does wrong fails the demo: no NumPy result stands in."""

    def refuse(*args, **kwargs):
        raise emulator.EmulatorError("the kernel trapped")

    for launches in ("driver.launch", "launches.launch_chain"):
        monkeypatch.setattr(f"sm12x.emulator.{launches}", refuse)
    assert main(["demo", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**dict.fromkeys(KEYS), "ok": False}
    assert "the kernel trapped" in printed.err


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernel is the NumPy backend."""
    device = SimpleNamespace(name="NVIDIA H200", capability=(9, 0), arch="sm_90a", major="cu13", ordinal=0)

    def run(made, on):
        assert on is device
        out = reference.grouped_gemm_numpy(
            made.a, made.b, a_scale=made.a_scale, b_scale=made.b_scale, offsets=made.offsets
        )
        return demo_gpu.Result(out, "some_variant", 20.0, rotated_bytes=10**9, l2_bytes=60 * 10**6)

    monkeypatch.setattr(demo, "problems", lambda: [])
    monkeypatch.setattr(demo_gpu, "open_device", lambda: device)
    monkeypatch.setattr(demo_gpu, "run", run)
    monkeypatch.setattr(driver, "get_driver", lambda: SimpleNamespace(version=13000))
    return device


def test_json_on_a_gpu(gpu, small, capsys):
    assert main(["demo", "--json", "--tokens", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == KEYS
    assert report["backend"] == "cuda"
    assert report["device"] == "NVIDIA H200"
    assert report["variant"] == "some_variant"
    assert report["time_us"] == 20.0
    assert report["shape"]["E"] == 128
    assert 0 < report["tolerance_ratio"] <= 1


def test_a_driver_call_that_fails_is_still_one_object(gpu, small, capsys, monkeypatch):
    def run(made, on):
        raise sm12x.CudaError("cuLaunchKernel failed")

    monkeypatch.setattr(demo_gpu, "run", run)
    assert main(["demo", "--json", "--tokens", "4"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**dict.fromkeys(KEYS), "ok": False}
    assert "cuLaunchKernel failed" in printed.err


def test_text_on_a_gpu_has_time_speed_and_the_sampled_check(gpu, small, capsys):
    assert main(["demo", "--tokens", "100", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    made = workload.build(100, 128, 1, show_progress=False)
    active = np.count_nonzero(made.counts)
    floor_us = made.least_bytes() / 4500e3
    assert (
        f"{made.least_bytes() / 20e-6 / 1e9:.0f} GB/s, {100 * floor_us / 20:.0f}% of the memory floor"
        in printed
    )
    assert "4500 GB/s, measured, reading only" in printed
    assert "some_variant (cu13/sm_90a)" in printed
    assert "1000 MB (cold: at least 3 times the L2 of 60 MB)" in printed
    assert f"16 of the {active} experts with rows" in printed


def test_a_gpu_of_unknown_bandwidth_has_no_floor(gpu, small, monkeypatch, capsys):
    monkeypatch.setattr(demo_gpu, "bandwidth", lambda device: (0.0, "the driver"))
    assert main(["demo", "--tokens", "4"]) == 0
    assert "the memory floor is unknown" in capsys.readouterr().out


def test_bandwidth_of_an_unknown_part_is_clock_times_bus_width(monkeypatch):
    attributes = {
        "CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE": 14001000,
        "CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH": 512,
    }
    monkeypatch.setattr(demo_gpu, "device_attribute", lambda device, name: attributes[name])
    speed, source = demo_gpu.bandwidth(SimpleNamespace(name="NVIDIA RTX 6090"))
    assert speed == pytest.approx(1792.128)
    assert "driver" in source
    assert demo_gpu.bandwidth(SimpleNamespace(name="NVIDIA GeForce RTX 5060 Ti"))[0] == 448
    laptop = SimpleNamespace(name="NVIDIA GeForce RTX 5090 Laptop GPU")
    assert demo_gpu.bandwidth(laptop) == (speed, source), "half of what the desktop part of that name has"


def test_progress_without_tqdm_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(progress(iter("abc"), "copying", 3)) == ["a", "b", "c"]
    assert "copying: 3 steps (no progress bar: tqdm is not installed)" in capsys.readouterr().err
    assert list(progress(iter("abc"), "copying", 3, enabled=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_wrong_result_fails(no_gpu, small, capsys, monkeypatch):
    right = sm12x.grouped_gemm

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[-1, -1] += 1
        return out

    monkeypatch.setattr(sm12x, "grouped_gemm", wrong)
    assert main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["demo"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_nan_in_the_result_fails_and_is_valid_json(no_gpu, small, capsys, monkeypatch):
    nan = np.full((128, 48), np.nan, ml_dtypes.bfloat16)
    monkeypatch.setattr(sm12x, "grouped_gemm", lambda *args, **kwargs: nan)
    assert main(["demo", "--json"]) == 1
    report = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert report["ok"] is False
    assert report["tolerance_ratio"] is None


def test_a_broken_installation_fails_instead_of_running_on_the_cpu(monkeypatch, capsys):
    found = [
        Finding("cubins", "problem", "gemm.cubin is altered", "reinstall"),
        Finding("driver", "problem", "none"),
    ]
    monkeypatch.setattr(demo, "problems", lambda: found)
    assert main(["demo", "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert set(report) == KEYS
    assert report["ok"] is False
    assert "gemm.cubin is altered" in captured.err


@pytest.mark.parametrize("option", [["--tokens", "0"], ["--experts", "1025"], ["--tokens", "many"]])
def test_bad_options_are_usage_errors(option):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *option])
    assert stop.value.code == 2


def test_the_workload_is_quantised_and_routed_as_described(small):
    seed = int(np.random.SeedSequence().entropy) % 2**32
    print(f"seed {seed}")
    made = workload.build(6, 10, seed, show_progress=False)
    assert made.a.shape == (48, 64)
    assert made.b.shape == (10, 48, 64)
    assert made.a.dtype == made.b.dtype == ml_dtypes.float8_e4m3fn
    assert made.a_scale.shape == (48, 1)
    assert made.b_scale.shape == (10, 48, 1)
    assert made.offsets[-1] == made.counts.sum() == 48
    assert (np.abs(made.b.astype(np.float32)).max(axis=-1) == 448).all()  # every channel uses its whole range
    rows = np.concatenate([made.a.view(np.uint8), made.a_scale.view(np.uint8)], axis=1)
    assert len(np.unique(rows, axis=0)) == 6  # the rows of a token are copies, scale included
    again = workload.build(6, 10, seed, show_progress=False)
    for field in ("a", "a_scale", "b", "b_scale", "offsets"):
        np.testing.assert_array_equal(
            getattr(made, field).view(np.uint8), getattr(again, field).view(np.uint8)
        )
    other = workload.build(6, 10, seed + 1, show_progress=False)
    assert (made.b.view(np.uint8) != other.b.view(np.uint8)).any()


def test_least_bytes_counts_weights_of_experts_with_rows_once(small):
    made = workload.build(1, 16, 0, show_progress=False)
    weights, activations, out = 8 * 48 * (64 + 4), 8 * (64 + 4), 8 * 48 * 2
    assert made.least_bytes() == weights + activations + out + 17 * 4


def test_sampled_experts_have_rows_and_include_the_extremes(small):
    made = workload.build(40, 64, 5, show_progress=False)
    sample = workload.sample_experts(made, 7, seed=1)
    assert len(set(sample)) == 7
    counts = made.counts[sample]
    assert counts.min() == made.counts[made.counts > 0].min()
    assert counts.max() == made.counts.max()
    assert workload.sample_experts(made, 64, seed=1) == np.flatnonzero(made.counts).tolist()


def test_the_check_covers_the_rows_of_the_experts_it_is_given(small):
    made = workload.build(20, 8, 5, show_progress=False)
    out = reference.grouped_gemm_numpy(
        made.a, made.b, a_scale=made.a_scale, b_scale=made.b_scale, offsets=made.offsets
    )
    out[made.offsets[3]] = np.nan
    assert workload.check(made, out, [0, 1, 2], show_progress=False)[1] <= 1
    assert workload.check(made, out, [3], show_progress=False)[1] == np.inf


def test_rotated_routings_use_other_experts_and_keep_the_rows(small):
    made = workload.build(1, 64, 5, show_progress=False)
    offsets = rotations(made)
    assert len(offsets) == 8
    np.testing.assert_array_equal(offsets[0], made.offsets)
    used = [set(np.flatnonzero(np.diff(each)).tolist()) for each in offsets]
    assert len(set.union(*used)) == 64  # each expert in one routing only
    assert all(each.dtype == np.int32 and each[-1] == 8 for each in offsets)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sm12x {sm12x.__version__}\n"

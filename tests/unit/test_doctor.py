"""``python -m sm12x doctor`` finds each thing that can be wrong with a machine, and says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sm12x import abi, driver, manifest
from sm12x.cli import doctor, main
from sm12x.errors import CudaError, DriverError, UnsupportedDeviceError
from unit.fake_manifest import GEMM, write_manifest


def status_of(findings, check):
    return {finding.check: finding.status for finding in findings}.get(check)


def finding(check):
    (found,) = [f for f in doctor.diagnose() if f.check == check]
    return found


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which everything is fine: a checkout with cubins, cuda-bindings 13.3, one supported
    GPU."""
    held = write_manifest(tmp_path, {"gemm": GEMM})
    raw = json.loads((tmp_path / "manifest.json").read_text())
    for target in raw["variants"]["gemm"]["targets"].values():
        for cubin in target["cubins"].values():
            path = tmp_path / cubin["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(64))
            cubin.update(size=64, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    held = manifest.load(tmp_path)
    device = SimpleNamespace(
        name="NVIDIA GeForce RTX 5090", capability=(12, 0), arch="sm_120a", major="cu13", sm_count=170
    )
    state = SimpleNamespace(
        root=tmp_path,
        raw=raw,
        versions={"cuda-bindings": "13.3.1", "numpy": "2.4.6", "ml_dtypes": "0.6.0", "sm12x-cu13": "0.1.0"},
        devices=[device],
        driver_version=13030,
        major="cu13",
        loaded=[],
    )
    monkeypatch.setattr(doctor, "_version", lambda name: state.versions.get(name))
    monkeypatch.setattr(manifest, "find_root", lambda: tmp_path)
    monkeypatch.setattr(manifest, "default", lambda: held)
    monkeypatch.setattr(manifest, "wheel_major", lambda *_: None)
    monkeypatch.setattr(manifest, "cuda_major", lambda: state.major)
    monkeypatch.setattr(abi, "mismatches", lambda recorded: [])
    monkeypatch.setattr(doctor, "_import_bindings", lambda: None)
    monkeypatch.setattr(driver, "get_driver", lambda: SimpleNamespace(version=state.driver_version))
    monkeypatch.setattr(driver, "call", lambda name, *_: {"cuDeviceGetCount": len(state.devices)}[name])

    def get_device(ordinal):
        if isinstance(state.devices[ordinal], Exception):
            raise state.devices[ordinal]
        return state.devices[ordinal]

    monkeypatch.setattr(driver, "get_device", get_device)
    monkeypatch.setattr(driver, "get_function", lambda device, variant: state.loaded.append(variant.key))
    return state


def test_nothing_is_wrong_with_a_good_machine(machine, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "PROBLEM" not in printed
    assert "can use the GPU" in printed
    assert "RTX 5090, compute capability 12.0" in printed
    assert machine.loaded == ["gemm"]
    assert doctor.problems() == []


def test_json_is_one_object_and_problems_set_the_exit_code(machine, capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    machine.driver_version = 12090
    assert main(["doctor", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    problems = [f for f in printed["findings"] if f["status"] == "problem"]
    assert [f["check"] for f in problems] == ["driver"]
    assert set(problems[0]) == {"check", "status", "detail", "remedy"}


def test_a_driver_too_old_for_the_wheel(machine):
    machine.driver_version = 12090
    found = finding("driver")
    assert found.status == "problem"
    assert "12.9" in found.detail
    assert "580" in found.remedy
    machine.major, machine.versions["cuda-bindings"] = "cu12", "12.9.4"
    assert finding("driver").status == "ok"


def test_no_driver(machine, monkeypatch):
    def get_driver():
        raise DriverError("no NVIDIA driver was found (libcuda.so.1: cannot open)")

    monkeypatch.setattr(driver, "get_driver", get_driver)
    findings = doctor.diagnose()
    assert status_of(findings, "driver") == "problem"
    assert not any(f.check.startswith("device") for f in findings)
    (problem,) = doctor.problems()
    assert problem.is_about_the_machine
    assert "libcuda" in problem.detail
    assert "--gpus all" in problem.remedy


def test_a_driver_without_a_visible_gpu(machine, monkeypatch):
    def get_driver():
        raise DriverError("cuInit failed", name="CUDA_ERROR_NO_DEVICE", code=100)

    monkeypatch.setattr(driver, "get_driver", get_driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in finding("driver").remedy
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "no NVIDIA GPU is visible" in finding("driver").remedy


def test_an_unsupported_device_is_a_problem_only_where_no_other_is_supported(machine):
    good = machine.devices[0]
    machine.devices = [UnsupportedDeviceError("device 0 (A100) has compute capability 8.0")]
    assert finding("device 0").status == "problem"
    assert "kernels" in finding("device 0").remedy
    machine.devices.append(good)
    findings = doctor.diagnose()
    assert status_of(findings, "device 0") == "warning"
    assert status_of(findings, "device 1") == "ok"
    machine.devices = []
    assert finding("devices").status == "problem"


def test_a_kernel_that_does_not_load_is_a_problem(machine, monkeypatch):
    def get_function(device, variant):
        raise CudaError("cuLibraryLoadData failed with CUDA_ERROR_OUT_OF_MEMORY (2)", code=2)

    monkeypatch.setattr(driver, "get_function", get_function)
    assert finding("device 0").status == "problem"
    assert "free memory" in finding("device 0").remedy


def test_both_wheels_installed(machine, monkeypatch):
    machine.versions["sm12x-cu12"] = "0.1.0"
    assert finding("package").status == "problem"
    assert "pip uninstall -y sm12x-cu12 sm12x-cu13" in finding("package").remedy

    def wheel_major(*_):
        raise ImportError("sm12x-cu12 and sm12x-cu13 are both installed")

    monkeypatch.setattr(manifest, "wheel_major", wheel_major)
    assert finding("package").status == "problem"


def test_cuda_bindings_missing_or_of_the_wrong_version(machine, monkeypatch):
    machine.versions["cuda-bindings"] = "12.9.4"
    assert finding("cuda.bindings").status == "problem"
    assert "cuda-bindings>=13.0,<14" in finding("cuda.bindings").remedy
    machine.major, machine.versions["cuda-bindings"] = "cu12", "12.8.0"
    assert "cuda-bindings>=12.9,<13" in finding("cuda.bindings").remedy
    machine.versions["cuda-bindings"] = "12.9.0"
    assert finding("cuda.bindings").status == "ok"

    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(doctor, "_import_bindings", missing)
    machine.versions.pop("cuda-bindings")
    assert finding("cuda.bindings").status == "problem"
    assert "pip install" in finding("cuda.bindings").remedy


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "newer", "no manifest", "abi"])
def test_damaged_cubins(machine, damage, monkeypatch):
    path = machine.root / "cu13/sm_121a/gemm.cubin"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[17] ^= 4
        path.write_bytes(data)
    elif damage == "newer":
        (machine.root / "manifest.json").write_text(
            json.dumps({**machine.raw, "schema": manifest.SCHEMA + 1})
        )
    elif damage == "no manifest":
        (machine.root / "manifest.json").unlink()
    else:
        monkeypatch.setattr(abi, "mismatches", lambda recorded: ["sm12x_group_record: size 96, not 100"])
    found = finding("cubins")
    assert found.status == "problem"
    words = {"newer": "newer", "no manifest": "manifest.json", "abi": "abi.h"}
    assert words.get(damage, "gemm.cubin") in found.detail
    assert "reinstall" in found.remedy
    assert not doctor.problems()[0].is_about_the_machine


def test_a_wheel_answers_for_its_own_cubins_only(machine, monkeypatch):
    (machine.root / "cu12/sm_120a/gemm.cubin").unlink()
    assert finding("cubins").status == "problem"
    monkeypatch.setattr(manifest, "wheel_major", lambda *_: "cu13")
    assert finding("cubins").status == "ok"


def test_a_process_in_which_no_driver_can_be_found():
    """The real thing, in a process of its own: no libcuda can be loaded, and doctor says so without a
    traceback."""
    hide = (
        "import ctypes, sys\n"
        "from sm12x import driver\n"
        "def absent():\n"
        "    return ctypes.CDLL('libcuda_that_is_not_there.so.1')\n"
        "driver._load_library = absent\n"
        "from sm12x.cli import main\n"
        "sys.exit(main(['doctor', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    printed = json.loads(done.stdout)
    assert printed["ok"] is False
    (found,) = [f for f in printed["findings"] if f["check"] == "driver"]
    assert found["status"] == "problem"
    assert "libcuda_that_is_not_there" in found["detail"]


def test_a_wrong_environment_variable_is_a_finding_and_no_traceback(machine, monkeypatch):
    text = "SM12X_CUDA_MAJOR: expected 12 or 13, got '11'"

    def cuda_major():
        raise ValueError(text)

    monkeypatch.setattr(manifest, "cuda_major", cuda_major)
    machine.devices[:] = [ValueError(text)]
    assert finding("cuda.bindings").detail == finding("device 0").detail == text

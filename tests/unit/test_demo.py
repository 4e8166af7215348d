"""``python -m sm12x demo``: its workload, its JSON, and what it says where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import sm12x
from sm12x import driver, emulator, manifest, reference
from sm12x.checkpoint import FP8_STATIC, UNQUANTIZED, load_moe_layer, make_checkpoint, softmax_top_k
from sm12x.cli import demo, demo_gpu, main, workload
from sm12x.cli.demo_gpu import rotations
from sm12x.cli.doctor import Finding
from sm12x.cli.progress import progress
from unit.checkpoints import alter, new_seed

KEYS = {
    *("ok", "backend", "device", "variant", "max_rel_err", "tolerance_ratio", "time_us", "shape"),
    *("checkpoint", "layer", "model_type", "scheme"),
}


@pytest.fixture
def no_gpu(monkeypatch):
    problem = Finding("driver", "problem", "no NVIDIA driver was found", "install one")
    monkeypatch.setattr(demo, "problems", lambda: [problem])


@pytest.fixture
def small(monkeypatch):
    """The demo's workload at sizes that take milliseconds."""
    sizes = {"HIDDEN": 80, "INTERMEDIATE": 64, "EMULATED_HIDDEN": 64, "EMULATED_INTERMEDIATE": 48}
    for name, size in sizes.items():
        monkeypatch.setattr(workload, name, size)


@pytest.fixture
def as_numpy(monkeypatch):
    """The emulator's kernels are the NumPy backend; the arguments of each call."""
    calls = []
    fused_moe = sm12x.fused_moe

    def emulated(x, *, backend, **arguments):
        assert backend == "emulator"
        assert emulator.session.active() is not None
        calls.append({"x": x, **arguments})
        return fused_moe(x, **arguments)

    monkeypatch.setattr(sm12x, "fused_moe", emulated)
    return calls


def build(folder, tokens=6, experts=10, seed=3):
    """The demo's own workload, small."""
    workload.make(folder, experts, seed, emulated=True)
    return workload.build(folder, 0, tokens, seed, show_progress=False)


def test_json_on_a_machine_without_a_gpu_is_one_object(no_gpu, small, as_numpy, capsys):
    assert main(["demo", "--json", "--tokens", "5", "--experts", "12", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert set(report) == KEYS
    assert report["ok"] is True
    assert report["backend"] == "emulator"
    assert report["device"] == "NVIDIA GeForce RTX 5090 (emulated)"
    assert report["variant"] is None  # no launch was seen
    assert report["time_us"] > 0
    assert 0 < report["tolerance_ratio"] <= 1
    assert 0 < report["max_rel_err"] < 2e-2
    assert report["shape"] == {"T": 5, "E": 12, "top_k": 8, "H": 64, "I": 48}
    assert (report["checkpoint"], report["layer"], report["model_type"]) == (None, 0, "gemma4_text")
    assert report["scheme"] == "compressed-tensors, e4m3 weights per channel, dynamic activation scales"
    assert captured.err == ""  # no terminal, no progress bar
    (call,) = as_numpy
    assert call["activation"] == "gelu_tanh"


def test_the_full_command_in_its_own_process():
    """The machine's own sizes, module entry, stdout nothing but JSON; the kernels themselves."""
    command = [sys.executable, "-m", "sm12x", "demo", "--json", "--tokens", "2", "--experts", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == KEYS
    h, i = (256, 128) if report["backend"] == "emulator" else (2816, 704)
    assert report["shape"] == {"T": 2, "E": 4, "top_k": 4, "H": h, "I": i}
    assert report["ok"] is True
    if report["backend"] == "emulator":
        assert set(report["variant"].split(", ")) <= set(manifest.default().variants)


def test_text_says_that_no_gpu_is_used_and_why_and_that_no_time_counts(no_gpu, small, as_numpy, capsys):
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert "no GPU is used. driver: no NVIDIA driver was found" in printed
    assert "install one" in printed
    assert "T 16, E 16, top_k 8, H 64, I 48" in printed
    assert "the same kernels run in the emulator" in printed
    assert "made       a checkpoint with random weights (2 files, " in printed
    assert "layer      0 of gemma4_text: compressed-tensors, e4m3 weights per channel" in printed
    assert "no time of the emulator says anything about a GPU" in printed
    assert "GB/s" not in printed
    assert printed.endswith("ok\n")


def test_launches_of_the_emulator_are_listed(no_gpu, small, as_numpy, capsys, monkeypatch):
    listed = sm12x.fused_moe

    def launching(*args, **kwargs):
        for variant in ("route", "gemm"):
            launch = SimpleNamespace(variant=variant, arch="sm_120a")
            emulator.session.active().launches.append(launch)
        return listed(*args, **kwargs)

    monkeypatch.setattr(sm12x, "fused_moe", launching)
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert "launch     route (sm_120a)\nlaunch     gemm (sm_120a)\n" in printed
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "route, gemm"


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "gemma4"])
@pytest.mark.parametrize("scheme", [FP8_STATIC, UNQUANTIZED])
def test_a_checkpoints_layer_goes_from_its_files_to_a_checked_result(
    no_gpu, as_numpy, capsys, tmp_path, model, scheme
):
    make_checkpoint(tmp_path, model=model, scheme=scheme, layers=3, num_experts=5, seed=new_seed())
    command = ["demo", "--json", "--checkpoint", str(tmp_path), "--layer", "2", "--tokens", "3"]
    assert main(command) == 0
    seed, report = capsys.readouterr().out.splitlines()
    print(seed)
    report = json.loads(report)
    assert report["ok"] is True
    assert (report["checkpoint"], report["layer"]) == (str(tmp_path), 2)
    assert report["shape"] == {"T": 3, "E": 5, "top_k": 2, "H": 64, "I": 32}
    (call,) = as_numpy
    layer = load_moe_layer(tmp_path, 2, framework="numpy")
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        np.testing.assert_array_equal(call[name].view(np.uint8), getattr(layer, name).view(np.uint8))
    assert (call["a1_scale"], call["activation"]) == (layer.a1_scale, layer.activation)
    weights, ids = softmax_top_k(call["x"], layer.router, 2)
    np.testing.assert_array_equal(call["topk_ids"], ids)
    np.testing.assert_array_equal(call["topk_weights"], weights)


def test_one_token_of_a_checkpoint_is_emulated_by_default(no_gpu, as_numpy, capsys, tmp_path):
    make_checkpoint(tmp_path)
    assert main(["demo", "--checkpoint", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "T 1, E 8, top_k 2" in printed
    assert "made" not in printed


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_a_checkpoint_that_cannot_be_used_is_named(no_gpu, capsys, tmp_path, json_option):
    make_checkpoint(tmp_path, num_experts=2)
    name = "model.language_model.layers.0.experts.1.up_proj.weight_scale"
    alter(tmp_path, lambda tensors: tensors.pop(name))
    assert main(["demo", "--checkpoint", str(tmp_path), *json_option]) == 1
    captured = capsys.readouterr()
    assert f"CheckpointError: {tmp_path / 'model.safetensors'}: {name}: expected" in captured.err
    if json_option:
        assert json.loads(captured.out) == {**dict.fromkeys(KEYS), "ok": False}


def test_a_layer_without_a_router_cannot_be_shown(no_gpu, capsys, tmp_path):
    make_checkpoint(tmp_path)
    alter(tmp_path, lambda tensors: tensors.pop("model.language_model.layers.0.router.proj.weight"))
    assert main(["demo", "--checkpoint", str(tmp_path)]) == 1
    assert "expected a router's weight in layer 0, got none" in capsys.readouterr().err


def test_without_safetensors_it_says_what_to_install(no_gpu, small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    assert main(["demo", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert "pip install safetensors" in captured.err


def test_what_is_made_is_gone_afterwards(no_gpu, small, as_numpy, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    build = workload.build

    def watching(folder, *args, **kwargs):
        seen.extend(folder.iterdir())
        return build(folder, *args, **kwargs)

    monkeypatch.setattr(workload, "build", watching)
    assert main(["demo", "--json"]) == 0
    assert {file.name for file in seen} >= {"config.json", "model.safetensors.index.json"}
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_fails_fails_the_demo(no_gpu, small, capsys, monkeypatch):
    """No NumPy result stands in."""

    def refuse(*args, **kwargs):
        raise emulator.EmulatorError("the kernel trapped")

    monkeypatch.setattr(sm12x, "fused_moe", refuse)
    assert main(["demo", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**dict.fromkeys(KEYS), "ok": False}
    assert "the kernel trapped" in printed.err


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernels are the NumPy backend."""
    device = SimpleNamespace(name="NVIDIA H200", capability=(9, 0), arch="sm_90a", major="cu13", ordinal=0)

    def run(made, folder, on):
        assert on is device
        assert (Path(folder) / "config.json").is_file()
        out = reference.fused_moe_numpy(
            made.x, topk_weights=made.topk_weights, topk_ids=made.topk_ids, **made.layer.arguments()
        )
        return demo_gpu.Result(out, 20.0, rotated_bytes=10**9, l2_bytes=60 * 10**6)

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
    assert report["variant"] is None
    assert report["time_us"] == 20.0
    assert report["shape"] == {"T": 4, "E": 64, "top_k": 8, "H": 80, "I": 64}
    assert 0 < report["tolerance_ratio"] <= 1


def test_a_driver_call_that_fails_is_still_one_object(gpu, small, capsys, monkeypatch):
    def run(made, folder, on):
        raise sm12x.CudaError("cuLaunchKernel failed")

    monkeypatch.setattr(demo_gpu, "run", run)
    assert main(["demo", "--json", "--tokens", "4"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {**dict.fromkeys(KEYS), "ok": False}
    assert "cuLaunchKernel failed" in printed.err


def test_text_on_a_gpu_has_time_speed_and_the_sampled_check(gpu, small, capsys, tmp_path):
    assert main(["demo", "--tokens", "100", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    workload.make(tmp_path, 64, 1, emulated=False)
    made = workload.build(tmp_path, 0, 100, 1, show_progress=False)
    floor_us = made.least_bytes() / 4500e3
    assert (
        f"{made.least_bytes() / 20e-6 / 1e9:.0f} GB/s, {100 * floor_us / 20:.0f}% of the memory floor"
        in printed
    )
    assert "4500 GB/s, measured, reading only" in printed
    assert "driver for CUDA 13.0, cubins cu13/sm_90a" in printed
    assert "1000 MB (cold: at least 3 times the L2 of 60 MB)" in printed
    assert "16 of 100 tokens" in printed


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


def test_a_wrong_result_fails(no_gpu, small, as_numpy, capsys, monkeypatch):
    right = sm12x.fused_moe

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[-1, -1] += 1
        return out

    monkeypatch.setattr(sm12x, "fused_moe", wrong)
    assert main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["demo"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_nan_in_the_result_fails_and_is_valid_json(no_gpu, small, capsys, monkeypatch):
    nan = np.full((16, 64), np.nan, ml_dtypes.bfloat16)
    monkeypatch.setattr(sm12x, "fused_moe", lambda *args, **kwargs: nan)
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


@pytest.mark.parametrize(
    "option",
    [
        ["--tokens", "0"],
        ["--experts", "1025"],
        ["--tokens", "many"],
        ["--layer", "-1"],
        ["--experts", "8", "--checkpoint", "."],
    ],
)
def test_bad_options_are_usage_errors(option):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *option])
    assert stop.value.code == 2


def test_the_same_seed_is_the_same_workload(small, tmp_path):
    seed = new_seed()
    made, again = build(tmp_path / "a", seed=seed), build(tmp_path / "b", seed=seed)
    for pick in (lambda each: each.x, lambda each: each.topk_weights, lambda each: each.layer.w1):
        np.testing.assert_array_equal(pick(made).view(np.uint8), pick(again).view(np.uint8))
    other = build(tmp_path / "c", seed=seed + 1)
    assert (made.layer.w1.view(np.uint8) != other.layer.w1.view(np.uint8)).any()
    assert (made.x.view(np.uint8) != other.x.view(np.uint8)).any()


def test_least_bytes_counts_experts_with_tokens_once(small, tmp_path):
    made = build(tmp_path, tokens=2, experts=64)
    active = len(set(made.topk_ids.reshape(-1).tolist()))
    assert 8 <= active <= 16
    expert = 3 * 48 * 64 + 4 * (2 * 48 + 64)
    assert made.expert_bytes() == expert
    assert made.least_bytes() == active * expert + 2 * 2 * 64 * 2 + 2 * 8 * (4 + 4)


def test_sampled_tokens_include_the_ends(small, tmp_path):
    made = build(tmp_path, tokens=40)
    sample = workload.sample_tokens(made, 7, seed=1)
    assert len(set(sample)) == 7
    assert {0, 39} <= set(sample)
    assert workload.sample_tokens(made, 40, seed=1) == list(range(40))


def test_the_check_covers_the_tokens_it_is_given(small, tmp_path):
    made = build(tmp_path, tokens=4)
    out = reference.fused_moe_numpy(
        made.x, topk_weights=made.topk_weights, topk_ids=made.topk_ids, **made.layer.arguments()
    )
    out[3, 5] = np.nan
    assert workload.check(made, out, [0, 1, 2], show_progress=False)[1] <= 1
    assert workload.check(made, out, [3], show_progress=False)[1] == np.inf


def test_rotated_routings_use_other_experts_and_keep_who_shares_them(small, tmp_path):
    made = build(tmp_path, tokens=2, experts=64)
    routings = rotations(made)
    used = [set(ids.reshape(-1).tolist()) for ids in routings]
    assert len(routings) == 64 // len(used[0])
    np.testing.assert_array_equal(routings[0], made.topk_ids)
    assert len(set.union(*used)) == sum(len(each) for each in used)  # each expert in one routing only
    for ids in routings:
        assert (ids.dtype, ids.shape) == (np.int32, (2, 8))
        same = made.topk_ids.reshape(-1)[:, None] == made.topk_ids.reshape(-1)
        np.testing.assert_array_equal(ids.reshape(-1)[:, None] == ids.reshape(-1), same)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sm12x {sm12x.__version__}\n"

"""``python -m sm12x kernels``: every cubin of the manifest, with what the build recorded about it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sm12x import manifest
from sm12x.cli import main
from unit.fake_manifest import GEMM, PACKED, PREPARE, write_manifest


@pytest.fixture
def held(tmp_path, monkeypatch):
    loaded = write_manifest(tmp_path, {"gemm_swap": GEMM, "prepare": PREPARE, "packed": PACKED})
    monkeypatch.setattr(manifest, "default", lambda: loaded)
    present = tmp_path / "cu13/sm_121a/gemm_swap.cubin"
    present.parent.mkdir(parents=True)
    present.write_bytes(b"not empty")
    return loaded


def test_json_has_one_record_for_each_cubin(held, capsys):
    assert main(["kernels", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["toolchain"] == {"nvcc": "13.3.73"}
    records = {(r["kernel"], r["arch"], r["cuda_major"]): r for r in printed["kernels"]}
    assert len(records) == len(printed["kernels"]) == 12
    record = records["gemm_swap", "sm_121a", "cu13"]
    assert record["registers"] == 111
    assert record["spill_bytes"] == 72
    assert record["shared_memory"] == 99000
    assert record["tile"] == [128, 32, 64]
    assert (record["token_tile"], record["feature_tile"]) == (32, 128)
    assert record["flags"] == ["swap_ab", "mma=unit_scale"]
    assert (record["outs"], record["pdl"], record["mma_warps"]) == (["bfloat16"], False, None)
    assert record["compile_flags"] == ["-O3", "-arch=sm_121a"]
    assert record["installed"]
    assert not records["gemm_swap", "sm_120a", "cu13"]["installed"]
    record = records["prepare", "sm_120a", "cu12"]
    assert (record["tile"], record["outs"], record["pdl"]) == (None, None, False)
    record = records["packed", "sm_120a", "cu13"]
    assert record["outs"] == ["bfloat16", "float16", "float32"]
    assert (record["pdl"], record["mma_warps"], record["threads"]) == (True, 4, 192)
    assert record["flags"] == ["swap_ab", "pdl", "mma=unit_scale"]


def test_the_table_shows_the_same_facts(held, capsys):
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [
        line for line in lines if line.startswith("gemm_swap") and "sm_121a" in line and "cu13" in line
    ]
    words = " ".join(line.split())
    assert words == "gemm_swap sm_121a cu13 111 72 99000 384 3 128x32x64 bf16 swap_ab mma=unit_scale"
    (line,) = [line for line in lines if line.startswith("packed") and "sm_121a" in line and "cu12" in line]
    assert line.split()[9:] == ["bf16,fp16,fp32", "swap_ab", "pdl", "mma=unit_scale", "not", "installed"]
    (line,) = [line for line in lines if line.startswith("prepare") and "sm_120a" in line and "cu12" in line]
    assert line.endswith("not installed")
    assert "3 kernels, 12 cubins" in lines[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs head")
def test_a_reader_that_stops_early_gets_no_traceback():
    command = f'"{sys.executable}" -m sm12x kernels --json | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_a_missing_manifest_is_one_sentence_and_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(manifest, "default", lambda: manifest.load(tmp_path))
    assert main(["kernels"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sm12x kernels: ")
    assert "manifest.json is missing" in captured.err


def test_the_shipped_manifest_has_every_kernel_for_three_architectures_and_two_cuda_majors(capsys):
    assert main(["kernels", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["kernels"]
    targets = {(arch, major) for arch in ("sm_120a", "sm_121a", "sm_90a") for major in ("cu12", "cu13")}
    keys = {record["kernel"] for record in records}
    assert any("prepare" in key for key in keys)
    for key in keys:
        assert {(r["arch"], r["cuda_major"]) for r in records if r["kernel"] == key} == targets

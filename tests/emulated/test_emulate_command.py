"""``python -m sm12x emulate``: what it runs, prints and returns. Kernels are stand-ins in NumPy, but for the
test at the end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from emulated import stand_in
from sm12x.cli import main
from sm12x.emulator import EmulatorError, Violation
from sm12x.ops import emulated

COOP = "fp8_ptr_array_128x128x128_coop_bf16"
SWAP = "fp8_ptr_array_128x16x128_swap_fp16"


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(emulated, "BACKEND", None)
    made = stand_in.install(monkeypatch)
    yield made
    stand_in.reset(monkeypatch)


def report(capsys, *arguments):
    code = main(["emulate", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_json_has_the_verdict_and_every_launch(kernels, capsys):
    options = ("--variant", COOP, "--m", "5,0,130", "--n", "256", "--k", "704", "--seed", "3", "--check")
    code, found = report(capsys, *options)
    assert code == 0
    assert found["ok"] is True
    assert found["violations"] == []
    assert 0 < found["max_rel_err"] < 0.01
    assert 0 < found["tolerance_ratio"] <= 1
    assert found["shape"] == {"m": [5, 0, 130], "M": 135, "E": 3, "N": 256, "K": 704}
    assert (found["device"], found["seed"]) == ("rtx5090", 3)
    prepare, gemm = found["launches"]
    assert prepare["variant"] == "fp8_ptr_array_prepare_packed"
    assert (gemm["variant"], gemm["arch"], gemm["block"]) == (COOP, "sm_120a", [384, 1, 1])
    assert kernels.seeds == [3, 3]
    # Stand-ins count nothing.
    assert (found["counters"], found["floor_us"]) == (None, None)


def test_without_check_nothing_is_compared(kernels, capsys):
    code, found = report(capsys, "--m", "1")
    assert (code, found["ok"], found["max_rel_err"], found["tolerance_ratio"]) == (0, True, None, None)


def test_the_device_is_chosen_by_name(kernels, capsys):
    for name, arch in (("rtx5090", "sm_120a"), ("rtxpro6000", "sm_120a"), ("gb10", "sm_121a")):
        code, found = report(capsys, "--device", name, "--m", "3,4", "--variant", SWAP, "--check")
        assert (code, found["device"]) == (0, name)
        assert {launch["arch"] for launch in found["launches"]} == {arch}
    code, found = report(capsys, "--m", "300,300", "--n", "512", "--sms", "2")
    assert max(found["launches"][-1]["grid"]) == 2


def test_options_reach_the_emulator(kernels, capsys):
    assert report(capsys, "--m", "3", "--resident", "1", "--truncate-bits", "22")[0] == 0
    assert (set(kernels.residents), set(kernels.truncated)) == ({1}, {22})


def test_the_same_seed_is_the_same_problem(kernels, capsys):
    runs = [report(capsys, "--m", "7,9", "--check", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert runs[0]["max_rel_err"] == runs[1]["max_rel_err"] != runs[2]["max_rel_err"]


def test_a_wrong_result_fails(kernels, capsys):
    def spoil(memory, groups):
        memory.write(groups[0].d, np.float16(1000).tobytes())

    kernels.rogue = spoil
    code, found = report(capsys, "--m", "4", "--variant", SWAP, "--check")
    assert (code, found["ok"]) == (1, False)
    assert found["tolerance_ratio"] > 1
    assert main(["emulate", "--m", "4", "--variant", SWAP, "--check"]) == 1
    assert "FAILED: the error exceeds the tolerance" in capsys.readouterr().out


def test_a_nan_fails_and_is_valid_json(kernels, capsys):
    kernels.rogue = lambda memory, groups: memory.write(groups[0].d, np.float16(np.nan).tobytes())
    code, found = report(capsys, "--m", "4", "--variant", SWAP, "--check")
    assert (code, found["ok"], found["max_rel_err"], found["tolerance_ratio"]) == (1, False, None, None)
    assert main(["emulate", "--m", "4", "--variant", SWAP, "--check"]) == 1
    assert "FAILED: the output has a NaN" in capsys.readouterr().out


def test_what_a_kernel_does_wrong_is_reported_with_its_place(kernels, capsys):
    violation = Violation(
        "bounds", "4-byte read at 0x10: a null pointer", 17, "ld.global.b32 %r1, [%rd1];", 2, 3, (4,)
    )

    def fault(memory, groups):
        raise EmulatorError(violation.message, violation=violation)

    kernels.rogue = fault
    code, found = report(capsys, "--m", "4", "--variant", COOP)
    assert (code, found["ok"]) == (1, False)
    (told,) = found["violations"]
    assert (told["variant"], told["kind"], told["line"], told["cta"], told["warp"]) == (
        COOP,
        "bounds",
        17,
        2,
        3,
    )
    assert [launch["variant"] for launch in found["launches"]] == ["fp8_ptr_array_prepare_packed"]
    assert main(["emulate", "--m", "4", "--variant", COOP]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED: {COOP}: bounds: 4-byte read at 0x10: a null pointer" in printed
    assert "PTX line 17: ld.global.b32" in printed


def test_what_the_emulator_lacks_is_no_violation(kernels, capsys):
    def lack(memory, groups):
        raise EmulatorError("wgmma is not implemented", "wgmma.fence;", 9)

    kernels.rogue = lack
    code, found = report(capsys, "--m", "4")
    assert (code, found["ok"], found["violations"]) == (1, False, [])
    assert found["error"] == "wgmma is not implemented (PTX line 9: wgmma.fence;)"


def test_the_text_says_what_ran(kernels, capsys):
    assert main(["emulate", "--m", "5,0", "--device", "gb10", "--check", "--variant", COOP]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "device     NVIDIA GB10, emulated, 48 SMs"
    assert lines[1] == "problem    2 groups with 5, 0 rows, N 256, K 704; seed 0"
    assert lines[2].startswith(
        "launch     fp8_ptr_array_prepare_packed (sm_121a): 1 x 256 threads, emulated in "
    )
    assert lines[3].startswith(f"launch     {COOP} (sm_121a): ")
    assert "of the tolerance (at most 1 passes) against float64" in lines[4]
    assert lines[5] == "ok"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--variant", "nothing"), "expected one of fp8_"),
        (("--variant", "fp8_ptr_array_prepare_list"), "expected one of fp8_"),
        (("--m", "5,x"), "expected rows for each group, as in 5,0,130"),
        (("--m", "5,,1"), "expected rows for each group, as in 5,0,130"),
        (("--m", "5,-1"), "expected at least 0, got -1"),
        (("--m", ",".join(["1"] * 1025)), "expected at most 1024 groups, got 1025"),
        (("--m", "2147483647,1"), "expected at most 2147483647 rows in all, got 2147483648"),
        (("--sms", "x"), "argument --sms: expected an integer, got 'x'"),
        (("--seed", "1.5"), "argument --seed: expected an integer, got '1.5'"),
        (("--n", "0"), "expected at least 1, got 0"),
        (("--seed", "-2"), "expected at least 0, got -2"),
        (("--device", "rtx4090"), "invalid choice"),
    ],
)
def test_bad_arguments_are_usage_errors(kernels, capsys, arguments, told):
    with pytest.raises(SystemExit) as error:
        main(["emulate", *arguments])
    assert error.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--k", "700"), "a: expected K to be a positive multiple of 16, got 700"),
        (("--n", "12"), "b: expected N to be a positive multiple of 8, got 12"),
        (("--sms", "171"), "sms: expected 1 to 170 for rtx5090, got 171"),
        (("--n", str(2**60)), "m, n, k: expected operands that fit into memory: "),
        (("--k", str(2**70)), "m, n, k: expected operands that fit into memory: "),
    ],
)
def test_a_problem_that_no_kernel_takes_is_a_usage_error(kernels, capsys, arguments, told):
    assert main(["emulate", "--json", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"sm12x emulate: {told}")
    assert len(captured.err.splitlines()) == 1


def test_a_problem_without_rows_says_that_nothing_ran(kernels, capsys):
    assert main(["emulate", "--m", "0,0", "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["ok: no kernel had to run, there are no rows"]
    code, found = report(capsys, "--m", "0,0", "--check")
    assert (code, found["ok"], found["launches"], found["floor_us"]) == (0, True, [], None)


def test_a_shipped_kernel_runs(monkeypatch, capsys):
    monkeypatch.setattr(emulated, "BACKEND", None)
    stand_in.reset(monkeypatch)
    options = ("--variant", "fp8_ptr_array_128x16x128_swap_bf16", "--m", "2,0,17", "--n", "8", "--k", "144")
    code, found = report(capsys, *options, "--check", "--seed", "5", "--sms", "2")
    stand_in.reset(monkeypatch)
    assert (code, found["ok"], found["violations"]) == (0, True, [])
    assert found["tolerance_ratio"] > 0
    assert all(launch["segments"] > 100 for launch in found["launches"]), "no stand-in ran"

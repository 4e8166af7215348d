"""What tests/gpu/build_headers builds: the list of run cases, the programs, and the check inside them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "cuda" / "run"


@pytest.fixture(scope="module")
def script() -> Any:
    loader = importlib.machinery.SourceFileLoader(
        "build_headers", str(ROOT / "tests" / "gpu" / "build_headers")
    )
    spec = importlib.util.spec_from_loader("build_headers", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_headers"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(script: Any) -> list[Any]:
    entries = script.load_matrix().entries
    return [entries[name] for name in script.read_cases(entries)]


def test_every_case_can_be_run(script: Any, cases: list[Any]) -> None:
    assert len(cases) >= 24
    assert len({entry.name for entry in cases}) == len(cases)
    assert {entry.name: script.left_out(entry, True) for entry in cases if script.left_out(entry, True)} == {}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("epilogue", {"auto", "cooperative", "pingpong", "tma", "no_smem", "direct"}),
        ("d", {"bf16", "fp16", "fp32", "e4m3", "e5m2"}),
        ("c", {"void", "bf16", "fp16", "fp32"}),
        ("layout", {"row", "column"}),
        ("mma", {"unit_scale", "plain"}),
        ("skip_empty_columns", {False, True}),
        ("schedule", {"upstream_cooperative", "upstream_pingpong", "cooperative", "pingpong", "auto"}),
        ("bias_side", {"m", "n"}),
    ],
)
def test_cases_cover(cases: list[Any], what: str, expected: set[Any]) -> None:
    assert {getattr(entry, what) for entry in cases} >= expected


def test_cases_cover_fusions_operands_tiles_and_alignment(script: Any, cases: list[Any]) -> None:
    assert {entry.fusion for entry in cases} == set(script.FUSION_NAMES)
    assert {(entry.a, entry.b) for entry in cases} == {
        (a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")
    }
    assert {entry.tile[1] for entry in cases} >= {8, 16, 32, 64, 128, 256}
    assert {entry.tile[0] for entry in cases} >= {64, 128, 256}
    direct = [entry for entry in cases if entry.epilogue in ("direct", "no_smem")]
    assert any(entry.alignment_d == 1 and entry.alignment_c == 1 and entry.c != "void" for entry in direct)


def test_a_program_names_its_case_and_fusion(script: Any, cases: list[Any]) -> None:
    for entry in cases:
        text = script.case_program(entry).text
        assert f'"{entry.name}"' in text
        assert f"run::Fusion::{script.FUSION_NAMES[entry.fusion]};" in text
        assert ("true};" in text) == (entry.bias_side == "m")


def test_selection(script: Any) -> None:
    assert [program.name for program in script.select_programs(["issue_3263"], False)] == ["issue_3263"]
    narrow = [program.name for program in script.select_programs(["cooperative_128x8x*"], False)]
    assert narrow
    assert all(name.startswith("cooperative_128x8x") for name in narrow)
    names = [program.name for program in script.select_programs([], False)]
    assert names[:3] == ["host_check_test", "cutlass_moe_mm", "issue_3263"]
    with pytest.raises(script.BuildError, match="no program is called nonsense"):
        script.select_programs(["nonsense"], False)


def test_a_name_that_is_not_in_the_matrix_is_refused(script: Any) -> None:
    with pytest.raises(script.BuildError, match="not in the matrix"):
        script.read_cases({})


def test_cutlass_is_found_in_a_wheel_and_nowhere_else(script: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "wheels" / "nvidia_cutlass-4.2.0.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("cutlass_library/source/include/cutlass/cutlass.h", "//\n")
        archive.writestr("cutlass_library/manifest.py", "\n")
    for given in (wheel, wheel.parent):
        include = script.find_cutlass(str(given), tmp_path / "unpacked")
        assert (include / "cutlass" / "cutlass.h").is_file()
    assert not (tmp_path / "unpacked" / "cutlass_library" / "manifest.py").exists()
    assert script.find_cutlass(str(include), tmp_path) == include
    with pytest.raises(script.BuildError, match="neither an include folder"):
        script.find_cutlass(str(tmp_path), tmp_path)


def build_and_run(folder: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the check with")
    command = [compiler, "-std=c++17", "-O1", "-pthread", "host_check_test.cpp", "-o", "check"]
    subprocess.run(command, cwd=folder, check=True)
    return subprocess.run([str(folder / "check")], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", ""),
        ("if (part <= 1.0) {", "if (!(part > 1.0)) {", "an element that was not written is accepted"),
        ("if (written[i] != kPoison) {", "if (false) {", "is not watched"),
        ("return {value, ulp(", "return {value, 8 * ulp(", "in the last place is accepted"),
        ("double const bias = problem", "double const bias = 0.0 * problem", "a missing bias is accepted"),
    ],
)
def test_the_check_sees_planted_errors(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    """The program that proves the check passes, and complains where the check itself is broken."""
    for name in ("host_check.hpp", "host_check_test.cpp"):
        shutil.copy(RUN / name, tmp_path / name)
    header = tmp_path / "host_check.hpp"
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new) if old else text)
    done = build_and_run(tmp_path)
    assert (done.returncode == 0) == (not complaint), done.stdout
    assert complaint in done.stdout

"""``sm12x verify`` finds every kind of damage, and says what it left out."""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

from sm12x.cli import verify

PTX = ".version 9.3\n.target sm_120a\n.address_size 64\n\n.visible .entry k()\n{\n\tret;\n}\n"
VERSIONS = {"cu12": "12.9.86", "cu13": "13.3.73"}


def _cubin(major: str) -> bytes:
    """What the stand-in ptxas below makes of PTX for one CUDA major."""
    text = PTX.replace(".version 9.3", ".version 8.8") if major == "cu12" else PTX
    return b"\x7fELF" + hashlib.sha256(text.encode()).digest()


@pytest.fixture
def cubins(tmp_path: Path) -> Path:
    """A folder with one variant whose cubins the stand-in ptxas made."""
    folder = tmp_path / "cubins"
    records: dict[str, Any] = {}
    for major, version in VERSIONS.items():
        data = _cubin(major)
        path = f"{major}/sm_120a/k.cubin"
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(data)
        records[major] = {
            "path": path,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "assembler": version,
            "registers": 24,
            "spill_bytes": 8,
            "stack_bytes": 16,
        }
    (folder / "ptx" / "sm_120a").mkdir(parents=True)
    (folder / "ptx" / "sm_120a" / "k.ptx.xz").write_bytes(lzma.compress(PTX.encode()))
    ptx = {
        "path": "ptx/sm_120a/k.ptx.xz",
        "sha256": hashlib.sha256(PTX.encode()).hexdigest(),
        "sources_sha256": "0" * 64,
        "flags": [],
    }
    variant = {
        "family": "f",
        "role": "prepare_packed",
        "params": "p",
        "symbol": "k",
        "threads": 32,
        "shared_memory": 0,
        "targets": {"sm_120a": {"ptx": ptx, "cubins": records}},
    }
    manifest = {
        "schema": 1,
        "toolchain": {},
        "abi": {"structs": {}, "constants": {}},
        "variants": {"k": variant},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _stand_in_ptxas(folder: Path, version: str, *, spill: int = 8, tail: bytes = b"") -> Path:
    """A script that behaves as ptxas: prints its version, or hashes its input into an output file."""
    path = folder / f"ptxas-{version}"
    path.write_text(
        f"""#!{sys.executable}
import hashlib, sys
if sys.argv[1] == "--version":
    print("Cuda compilation tools, release, V{version}")
    sys.exit(0)
text = open(sys.argv[4], "rb").read()
open(sys.argv[6], "wb").write(b"\\x7fELF" + hashlib.sha256(text).digest() + {tail!r})
print("ptxas info    : Compiling entry function 'k' for 'sm_120a'", file=sys.stderr)
print("ptxas info    : Function properties for k", file=sys.stderr)
print("    16 bytes stack frame, {spill} bytes spill stores, 12 bytes spill loads", file=sys.stderr)
print("ptxas info    : Used 24 registers", file=sys.stderr)
"""
    )
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _no_installed_ptxas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only what a test gives is there."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(verify.sysconfig, "get_path", lambda _: str(tmp_path / "nothing"))


def test_intact_folder_passes_and_names_what_was_left_out(cubins: Path) -> None:
    report = verify.verify(cubins)
    assert report.problems == []
    assert (report.variants, report.cubins, report.ptx, report.reassembled) == (1, 2, 1, {})
    assert any("no ptxas 12.9.86" in line for line in report.not_checked)
    assert any("no ptxas 13.3.73" in line for line in report.not_checked)


def test_reassembly_uses_the_recorded_version_for_each_major(cubins: Path, tmp_path: Path) -> None:
    tools = [_stand_in_ptxas(tmp_path, version) for version in VERSIONS.values()]
    report = verify.verify(cubins, tools)
    assert report.problems == []
    assert report.not_checked == []
    assert report.reassembled == {"cu12 (ptxas 12.9.86)": 1, "cu13 (ptxas 13.3.73)": 1}


def test_other_bytes_and_other_usage_are_problems(cubins: Path, tmp_path: Path) -> None:
    report = verify.verify(cubins, [_stand_in_ptxas(tmp_path, "12.9.86", tail=b"x")])
    assert len(report.problems) == 1
    assert "other bytes" in report.problems[0]
    report = verify.verify(cubins, [_stand_in_ptxas(tmp_path, "12.9.86", spill=9)])
    assert len(report.problems) == 1
    assert "spill" in report.problems[0]


@pytest.mark.parametrize("name", ["cu12/sm_120a/k.cubin", "cu13/sm_120a/k.cubin", "ptx/sm_120a/k.ptx.xz"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found(cubins: Path, name: str, damage: str) -> None:
    path = cubins / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    report = verify.verify(cubins)
    assert len(report.problems) == 1, report.problems
    assert Path(name).name in report.problems[0]


def test_other_ptx_text_is_found(cubins: Path) -> None:
    (cubins / "ptx/sm_120a/k.ptx.xz").write_bytes(lzma.compress(PTX.replace("ret", "trap").encode()))
    report = verify.verify(cubins)
    assert [line for line in report.problems if "sha256" in line]


def test_stray_cubin_is_found(cubins: Path) -> None:
    (cubins / "cu13" / "sm_120a" / "other.cubin").write_bytes(b"x")
    assert verify.verify(cubins).problems == ["cu13/sm_120a/other.cubin: the manifest does not name it"]


@pytest.mark.parametrize("change", [{"schema": 2}, {"variants": {}}, {"variants": {"k": {}}}])
def test_bad_manifest_is_found(cubins: Path, change: dict[str, Any]) -> None:
    path = cubins / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert verify.verify(cubins).problems


def test_missing_manifest_is_found(tmp_path: Path) -> None:
    assert verify.verify(tmp_path).problems


def test_given_ptxas_that_cannot_run_is_a_problem(cubins: Path, tmp_path: Path) -> None:
    report = verify.verify(cubins, [tmp_path / "absent"])
    assert any("--ptxas" in line for line in report.problems)


def test_a_wheel_holds_one_major(cubins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cubins / "cu12/sm_120a/k.cubin").unlink()
    monkeypatch.setattr(verify, "find_root", lambda: cubins)
    monkeypatch.setattr(verify, "wheel_major", lambda: "cu13")
    report = verify.verify()
    assert report.problems == []
    assert (report.cubins, report.ptx) == (1, 1)
    assert any("cu12" in line for line in report.not_checked)


def test_command_line(cubins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    assert verify.run(parser.parse_args(["--cubins", str(cubins), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (cubins / "cu13/sm_120a/k.cubin").write_bytes(b"")
    assert verify.run(parser.parse_args(["--cubins", str(cubins)])) == 1
    assert "PROBLEM: cu13/sm_120a/k.cubin: expected 36 bytes" in capsys.readouterr().err


def test_a_relative_ptxas_is_run_from_where_the_user_is(
    cubins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = _stand_in_ptxas(tmp_path, "13.3.73")
    monkeypatch.chdir(tmp_path)
    report = verify.verify(cubins, [Path(tool.name)])
    assert report.problems == []
    assert report.reassembled == {"cu13 (ptxas 13.3.73)": 1}

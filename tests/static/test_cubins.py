"""cubins/ is what the manifest says, the manifest is what the sources say, and every kernel fits the
hardware.
"""

from __future__ import annotations

import copy
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sm12x.abi
from sm12x_build import ROOT, TARGETS, BuildError, abi, checks, lint, ptx, store
from sm12x_build.variants import load_variants


def test_files_and_manifest_agree(manifest: dict[str, Any]) -> None:
    assert lint.file_problems(manifest, store.CUBINS_DIR) == []


def test_ptx_is_what_the_manifest_says(manifest: dict[str, Any]) -> None:
    assert lint.ptx_problems(manifest, store.CUBINS_DIR) == []


def test_resources_fit(manifest: dict[str, Any]) -> None:
    assert lint.resource_problems(manifest) == []


def test_cubins_are_not_stale(manifest: dict[str, Any]) -> None:
    assert checks.stale_targets(load_variants(), manifest) == []


def test_manifest_is_canonical(manifest: dict[str, Any]) -> None:
    assert (store.CUBINS_DIR / store.MANIFEST).read_text() == store.canonical_json(manifest)


def test_every_variant_has_every_target(manifest: dict[str, Any]) -> None:
    for key, variant in manifest["variants"].items():
        assert sorted(variant["targets"]) == sorted(TARGETS), key


def test_runtime_mirrors_the_abi(manifest: dict[str, Any]) -> None:
    assert sm12x.abi.mismatches(manifest["abi"]) == []


def test_launch_structs_are_known(manifest: dict[str, Any]) -> None:
    for key, variant in manifest["variants"].items():
        assert variant["params"] in manifest["abi"]["structs"], key


def test_header_gives_the_recorded_abi(manifest: dict[str, Any]) -> None:
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no host C++ compiler")
    assert abi.dump_abi(ROOT) == manifest["abi"]


# Planted violations: each check must see them, and must fail where there is nothing to check.


@pytest.fixture
def scratch(manifest: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of the manifest and of cubins/ to break."""
    folder = tmp_path / "cubins"
    shutil.copytree(store.CUBINS_DIR, folder)
    return copy.deepcopy(manifest), folder


def _first(manifest: dict[str, Any], target: str = "sm_120a") -> tuple[dict[str, Any], dict[str, Any]]:
    variant = manifest["variants"][sorted(manifest["variants"])[0]]
    return variant, variant["targets"][target]


@pytest.mark.parametrize("check", [lint.resource_problems, lambda m: lint.file_problems(m, Path(".")),
                                   lambda m: lint.ptx_problems(m, Path("."))])  # fmt: skip
def test_empty_manifest_is_a_failure(check: Callable[[dict[str, Any]], list[str]]) -> None:
    assert check({"variants": {}}) != []


def test_planted_file_is_caught(scratch: tuple[dict[str, Any], Path]) -> None:
    manifest, folder = scratch
    (folder / "cu13" / "sm_120a" / "planted.cubin").write_bytes(b"x")
    assert lint.file_problems(manifest, folder) == ["cu13/sm_120a/planted.cubin: not in the manifest"]


def test_flipped_bit_and_missing_cubin_are_caught(scratch: tuple[dict[str, Any], Path]) -> None:
    manifest, folder = scratch
    _, record = _first(manifest)
    path = folder / record["cubins"]["cu13"]["path"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (folder / record["cubins"]["cu12"]["path"]).unlink()
    problems = lint.file_problems(manifest, folder)
    assert len(problems) == 2
    assert any("missing" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v.update(shared_memory=lint.SHARED_MEMORY_LIMIT + 1), "shared memory"),
        (lambda v: v["targets"]["sm_120a"]["cubins"]["cu12"].update(spill_bytes=129), "spills 129"),
        (
            lambda v: v["targets"]["sm_121a"]["cubins"]["cu13"].update(registers=255, threads=1024),
            "registers",
        ),
        (lambda v: v["targets"]["sm_90a"]["cubins"].pop("cu13"), "cubins for"),
    ],
)
def test_planted_resource_is_caught(
    manifest: dict[str, Any], change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    broken = copy.deepcopy(manifest)
    variant, _ = _first(broken)
    variant["threads"] = 384
    change(variant)
    problems = lint.resource_problems(broken)
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize("family_and_role", [("fp8_ptr_array", "prepare_list"), ("fp8_packed", "gemm")])
@pytest.mark.parametrize(
    ("usage", "expected"), [("spill_bytes", "spills 4"), ("stack_bytes", "a stack of 4")]
)
def test_own_kernels_may_not_spill_at_all(
    manifest: dict[str, Any], family_and_role: tuple[str, str], usage: str, expected: str
) -> None:
    broken = copy.deepcopy(manifest)
    variant = next(v for v in broken["variants"].values() if (v["family"], v["role"]) == family_and_role)
    cubin = variant["targets"]["sm_120a"]["cubins"]["cu13"]
    cubin.update(spill_bytes=0, stack_bytes=0)
    before = lint.resource_problems(broken)
    cubin[usage] = 4
    (problem,) = set(lint.resource_problems(broken)) - set(before)
    assert problem.startswith(f"{variant['symbol'].removeprefix('sm12x_')} sm_120a cu13: {expected}")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text + "\n", "not normalised"),
        (lambda text: text.replace("sm_120a", "sm_121a"), "is for sm_121a"),
        (lambda text: text + ".visible .entry second()\n{\n\tret;\n}\n", "entries"),
        (lambda text: text.replace("\tgriddepcontrol.wait;", ""), "griddepcontrol.wait says"),
        (
            lambda text: text.replace("\tgriddepcontrol.launch_dependents;", ""),
            "griddepcontrol.launch_dependents says",
        ),
        (lambda text: text.replace("\tret;", "\tmembar.gl;\n\tret;", 1), "more than its .target"),
        (lambda text: text + ".shared .align 16 .b8 planted[102400];\n", "static included"),
        (lambda text: text.replace(ptx.INFO_SYMBOL + "[", "other["), ptx.INFO_SYMBOL),
    ],
)
def test_planted_ptx_is_caught(
    scratch: tuple[dict[str, Any], Path], change: Callable[[str], str], expected: str
) -> None:
    manifest, folder = scratch
    _, record = _first(manifest)
    path = folder / record["ptx"]["path"]
    path.write_bytes(lzma.compress(change(store.read_ptx(path)).encode()))
    problems = lint.ptx_problems(manifest, folder)
    assert any(expected in problem for problem in problems), problems
    assert any("not the one that the manifest hashed" in problem for problem in problems), problems


def test_pdl_flag_without_a_wait_is_caught(manifest: dict[str, Any]) -> None:
    broken = copy.deepcopy(manifest)
    for planted in (True, False):
        next(v for v in broken["variants"].values() if v["pdl"] != planted)["pdl"] = planted
    problems = [p for p in lint.ptx_problems(broken, store.CUBINS_DIR) if "pdl is" in p]
    assert len(problems) == 2 * 2 * len(TARGETS)
    assert {p.split("pdl is ")[1] for p in problems} == {
        f"{planted}, griddepcontrol.{what} says otherwise"
        for planted in (True, False)
        for what in ("wait", "launch_dependents")
    }


def test_stale_source_flags_and_table_are_caught(manifest: dict[str, Any]) -> None:
    broken = copy.deepcopy(manifest)
    keys = sorted(broken["variants"])
    variant, record = _first(broken)
    record["ptx"]["sources_sha256"] = "0" * 64
    variant["targets"]["sm_90a"]["ptx"]["flags"].append("-DOTHER")
    variant["role"] = "planted"
    broken["variants"]["planted"] = broken["variants"].pop(keys[-1])
    stale = checks.stale_targets(load_variants(), broken)
    for expected in ("changed since", "flags changed", "role is", "not in the table", "not in the manifest"):
        assert any(expected in line for line in stale), (expected, stale)


def test_header_reader_refuses_a_hole() -> None:
    with pytest.raises(BuildError, match="hole of 4 bytes before b"):
        abi._require_no_holes("s", {"size": 16, "align": 8, "fields": {"a": [0, 4], "b": [8, 8]}})

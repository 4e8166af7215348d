"""The committed PTX and cubins come out of the committed sources, wherever the clone lies."""

from __future__ import annotations

import datetime
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sm12x_build import MAJORS, ROOT, checks, store
from sm12x_build.assembler import assemble
from sm12x_build.compiler import compile_ptx
from sm12x_build.toolchain import Toolchain
from sm12x_build.variants import load_variants


def test_every_ptx_assembles_to_its_cubins(manifest: dict[str, Any], toolchain: Toolchain) -> None:
    checked = 0
    for key, variant in sorted(manifest["variants"].items()):
        for target, record in sorted(variant["targets"].items()):
            text = store.read_ptx(store.CUBINS_DIR / record["ptx"]["path"])
            for major in MAJORS:
                cubin = record["cubins"][major]
                made = assemble(toolchain.ptxas[major], text, target, major)
                assert made.cubin == (store.CUBINS_DIR / cubin["path"]).read_bytes(), cubin["path"]
                usage = [made.registers, made.spill_bytes, made.stack_bytes]
                assert usage == [cubin[n] for n in ("registers", "spill_bytes", "stack_bytes")], key
                checked += 1
    assert checked, "the manifest lists no PTX"


def test_two_clones_give_one_ptx(manifest: dict[str, Any], toolchain: Toolchain, tmp_path: Path) -> None:
    """nvcc hashes the absolute source path into names; CUTLASS's headers bring some: a GEMM is built."""
    gemms = sorted(key for key, variant in manifest["variants"].items() if variant["role"] == "gemm")
    (key,) = checks.rotating_sample(gemms, 1, datetime.date.today().toordinal())
    variant = load_variants()[key]
    clones = [tmp_path / "one", tmp_path / "elsewhere" / "two"]
    for clone in clones:
        shutil.copytree(ROOT / "cuda", clone / "cuda")

    def compile_in(clone: Path) -> str:
        return str(compile_ptx(variant, "sm_120a", toolchain, root=clone, cache_dir=None).text)

    with ThreadPoolExecutor(max_workers=2) as pool:
        texts = list(pool.map(compile_in, clones))
    assert "_INTERNAL_" in texts[0], "this kernel holds no name with a path in it: the test proves nothing"
    assert texts[0] == texts[1]
    committed = manifest["variants"][key]["targets"]["sm_120a"]["ptx"]["path"]
    assert texts[0] == store.read_ptx(store.CUBINS_DIR / committed)


def test_comparison_sees_another_cubin(manifest: dict[str, Any], toolchain: Toolchain) -> None:
    """The comparison above is worth something: the same PTX with one instruction more gives other bytes."""
    record = next(iter(manifest["variants"].values()))["targets"]["sm_120a"]
    text = store.read_ptx(store.CUBINS_DIR / record["ptx"]["path"])
    changed = text.replace("\tret;", "\tmembar.sys;\n\tret;")
    if changed == text:
        pytest.fail("the PTX has no ret to put something before")
    made = assemble(toolchain.ptxas["cu13"], changed, "sm_120a", "cu13")
    assert made.cubin != (store.CUBINS_DIR / record["cubins"]["cu13"]["path"]).read_bytes()

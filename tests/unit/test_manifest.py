"""The manifest: what is read, what is refused, and that no altered cubin gets past it."""

from __future__ import annotations

import json
import random
import sys
import types
from pathlib import Path

import pytest

from sm12x import manifest
from sm12x.errors import CubinError
from unit.fake_family import GEMMS, PACKED, write_family

SHIPPED = Path(__file__).resolve().parents[2] / "cubins"

COOP = "fp8_ptr_array_128x128x128_coop_bf16"
SWAP = "fp8_ptr_array_128x16x128_swap_fp16"
ONE_LAUNCH = "fp8_packed_128x16x64_swap"


@pytest.fixture
def root(tmp_path):
    write_family(tmp_path)
    return tmp_path


def rewrite(root, edit):
    path = root / "manifest.json"
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))


def test_load_gives_every_fact_of_a_variant(root):
    held = manifest.load(root)
    assert len(held.gemms()) == 2 * len(GEMMS)
    coop, swap = held.variants[COOP], held.variants[SWAP]
    assert (coop.tile, coop.token_tile, coop.feature_tile) == ((128, 128, 128), 128, 128)
    assert (swap.tile, swap.token_tile, swap.feature_tile) == ((128, 16, 128), 16, 128)
    assert swap.swap_ab
    assert (swap.out, swap.grid_axis) == ("float16", "y")
    assert swap.tensor_maps["d"] == manifest.TensorMap(2, (64, 64), 128, 2)
    assert set(swap.targets["sm_90a"].cubins) == {"cu12", "cu13"}
    assert held.architectures("cu13") == ("sm_120a", "sm_121a", "sm_90a")
    assert held.only("fp8_ptr_array", "prepare_list").threads == 384


def test_load_gives_every_fact_of_a_packed_variant(root):
    write_family(root, packed=True)
    held = manifest.load(root)
    assert len(held.gemms("fp8_packed")) == len(PACKED)
    variant = held.variants[ONE_LAUNCH]
    assert (variant.outs, variant.out) == (("bfloat16", "float16", "float32"), "bfloat16")
    assert (variant.params, variant.pdl, variant.mma_warps) == ("sm12x_packed_params", True, 8)
    assert (variant.weight_maps, held.variants[COOP].weight_maps) == (5, 0)
    assert (variant.workspace_per_cta, variant.token_tile, variant.feature_tile) == (16384, 16, 128)
    assert variant.tensor_maps == {
        "a": manifest.TensorMap(3, (64, 16), 64, 1),
        "b": manifest.TensorMap(3, (64, 8), 64, 1),
    }
    assert (held.variants[COOP].outs, held.variants[COOP].mma_warps) == (("bfloat16",), 0)
    prepare = held.variants["fp8_ptr_array_prepare_list"]
    assert (prepare.outs, prepare.out) == ((), "")


def test_load_gives_every_fact_of_a_kernel_of_a_whole_layer(whole_root):
    held = manifest.load(whole_root)
    kernels = {variant.gated: variant for variant in held.gemms(role="layer")}
    assert kernels.keys() == {True, False}
    for gated, variant in kernels.items():
        assert (variant.family, variant.params) == ("fp8_layer", "sm12x_layer_params")
        assert (variant.pdl, variant.mma_warps, variant.weight_maps) == (True, 8, 4)
        assert (variant.workspace_per_cta, variant.token_tile, variant.feature_tile) == (0, 8, 128)
        assert variant.tensor_maps == {
            "b": manifest.TensorMap(5 if gated else 3, (128, 16), 128, 1),
            "b2": manifest.TensorMap(3, (128, 16), 128, 1),
        }
    assert {variant.role for variant in held.gemms()} == {"gemm"}, "grouped_gemm never gets them"


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v.pop("mma_warps"),
        lambda v: v.update(mma_warps=0),
        lambda v: v.pop("weight_maps"),
        lambda v: v.update(weight_maps=0),
        lambda v: v.update(weight_maps=7),
        lambda v: v.update(outs=[]),
        lambda v: v.pop("outs"),
        lambda v: v["tensor_maps"].pop("a"),
        lambda v: v.update(params="sm12x_other_params"),
    ],
)
def test_a_packed_variant_with_a_bad_field_is_refused(root, edit):
    write_family(root, packed=True)
    rewrite(root, lambda contents: edit(contents["variants"][ONE_LAUNCH]))
    with pytest.raises(CubinError, match="not a manifest of schema 1"):
        manifest.load(root)


def test_only_refuses_none_and_several(root):
    held = manifest.load(root)
    with pytest.raises(CubinError, match="found 0"):
        held.only("fp8_ptr_array", "prepare_masked")
    with pytest.raises(CubinError, match="found 8"):
        held.only("fp8_ptr_array", "gemm")


def test_a_newer_schema_asks_for_an_upgrade(root):
    rewrite(root, lambda contents: contents.update(schema=manifest.SCHEMA + 1))
    with pytest.raises(
        CubinError, match=f"schema {manifest.SCHEMA + 1} is newer than {manifest.SCHEMA}.*upgrade"
    ):
        manifest.load(root)


@pytest.mark.parametrize("schema", [None, "1", 0, True])
def test_a_schema_that_is_no_number_is_refused(root, schema):
    rewrite(root, lambda contents: contents.update(schema=schema))
    with pytest.raises(CubinError, match="schema number"):
        manifest.load(root)


def test_a_missing_or_broken_manifest_is_refused(root):
    path = root / "manifest.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CubinError, match="cannot be read"):
        manifest.load(root)
    path.unlink()
    with pytest.raises(CubinError, match="missing"):
        manifest.load(root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v.pop("symbol"),
        lambda v: v.update(threads=0),
        lambda v: v.update(threads="384"),
        lambda v: v.update(grid_axis="z"),
        lambda v: v.update(workspace_per_cta=100),
        lambda v: v.update(tile=[128, 128]),
        lambda v: v.update(tile=[128, 0, 128]),
        lambda v: v.update(pdl=True),
        lambda v: v["tensor_maps"].pop("d"),
        lambda v: v["targets"]["sm_120a"]["cubins"]["cu13"].pop("sha256"),
    ],
)
def test_a_variant_with_a_bad_field_is_refused(root, edit):
    rewrite(root, lambda contents: edit(contents["variants"][COOP]))
    with pytest.raises(CubinError, match="not a manifest of schema 1"):
        manifest.load(root)


def test_an_intact_cubin_is_read(root):
    held = manifest.load(root)
    for arch in ("sm_120a", "sm_121a", "sm_90a"):
        for major in manifest.MAJORS:
            data = manifest.read_cubin(held, held.variants[COOP], arch, major)
            assert data == (root / major / arch / f"{COOP}.cubin").read_bytes()


def test_a_missing_cubin_is_an_error(root):
    held = manifest.load(root)
    (root / "cu13" / "sm_120a" / f"{COOP}.cubin").unlink()
    with pytest.raises(CubinError, match=f"{COOP}.*missing"):
        manifest.read_cubin(held, held.variants[COOP], "sm_120a", "cu13")


def test_a_truncated_cubin_is_an_error(root):
    held = manifest.load(root)
    path = root / "cu13" / "sm_120a" / f"{COOP}.cubin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CubinError, match="truncated"):
        manifest.read_cubin(held, held.variants[COOP], "sm_120a", "cu13")


def test_a_flipped_bit_anywhere_is_an_error(root):
    held = manifest.load(root)
    path = root / "cu12" / "sm_121a" / f"{COOP}.cubin"
    good = path.read_bytes()
    for _ in range(20):
        bit = random.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(CubinError, match="altered: expected sha256"):
            manifest.read_cubin(held, held.variants[COOP], "sm_121a", "cu12")


def test_an_absent_target_lists_what_exists(root):
    rewrite(root, lambda c: c["variants"][COOP]["targets"].pop("sm_90a"))
    held = manifest.load(root)
    with pytest.raises(CubinError, match=r"no cubin for cu13/sm_90a; there are cu12/sm_120a.*cu13/sm_121a"):
        manifest.read_cubin(held, held.variants[COOP], "sm_90a", "cu13")


def test_both_wheels_at_once_is_one_clear_import_error(tmp_path):
    assert manifest.wheel_major(tmp_path) is None
    (tmp_path / "_cuda_major_12").touch()
    assert manifest.wheel_major(tmp_path) == "cu12"
    (tmp_path / "_cuda_major_13").touch()
    with pytest.raises(
        ImportError, match=r"sm12x-cu12 and sm12x-cu13 are both.*pip uninstall -y sm12x-cu12 sm12x-cu13"
    ):
        manifest.wheel_major(tmp_path)


def test_a_checkout_takes_the_major_of_the_variable_then_of_cuda_bindings(monkeypatch):
    monkeypatch.setattr(manifest, "wheel_major", lambda: None)
    monkeypatch.setenv("SM12X_CUDA_MAJOR", "12")
    assert manifest.cuda_major() == "cu12"
    monkeypatch.setenv("SM12X_CUDA_MAJOR", "11")
    with pytest.raises(ValueError, match="SM12X_CUDA_MAJOR: expected 12 or 13, got '11'"):
        manifest.cuda_major()
    monkeypatch.delenv("SM12X_CUDA_MAJOR")
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.bindings = bindings
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    for version, major in (("12.9.4", "cu12"), ("13.3.1", "cu13")):
        bindings.__version__ = version
        assert manifest.cuda_major() == major
    bindings.__version__ = "14.0.0"
    with pytest.raises(CubinError, match=r"cuda-bindings 14\.0\.0"):
        manifest.cuda_major()


def test_a_wheel_holds_its_own_major_only(monkeypatch):
    monkeypatch.setattr(manifest, "wheel_major", lambda: "cu13")
    monkeypatch.delenv("SM12X_CUDA_MAJOR", raising=False)
    assert manifest.cuda_major() == "cu13"
    monkeypatch.setenv("SM12X_CUDA_MAJOR", "12")
    with pytest.raises(ValueError, match="SM12X_CUDA_MAJOR: expected 13"):
        manifest.cuda_major()


def test_find_root_says_where_it_looked(monkeypatch, tmp_path):
    package = tmp_path / "runtime" / "sm12x"
    package.mkdir(parents=True)
    monkeypatch.setattr(manifest, "PACKAGE", package)
    with pytest.raises(CubinError, match="cubins"):
        manifest.find_root()
    write_family(tmp_path / "cubins")
    assert manifest.find_root() == tmp_path / "cubins"
    write_family(package / "cubins")
    assert manifest.find_root() == package / "cubins", "an installed package's own data comes first"


@pytest.mark.skipif(not (SHIPPED / "manifest.json").exists(), reason="cubins/manifest.json is not built")
def test_every_shipped_cubin_is_the_one_in_the_manifest():
    held = manifest.load(SHIPPED)
    assert len(held.gemms("fp8_ptr_array")) >= 8
    for role in ("prepare_packed", "prepare_list"):
        assert held.only("fp8_ptr_array", role)
    for variant in held.variants.values():
        assert set(variant.targets) == {"sm_120a", "sm_121a", "sm_90a"}
        for arch in variant.targets:
            for major in manifest.MAJORS:
                assert manifest.read_cubin(held, variant, arch, major).startswith(b"\x7fELF")

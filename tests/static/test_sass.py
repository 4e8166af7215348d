"""The machine code of the shipped cubins: the right MMA, nothing in local memory beside it, PDL wait and
trigger iff flagged, and how many issue slots the packed kernels' main loops take.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sm12x_build import BuildError, lint, main_loop, sass, store

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "cuda" / "README.md"


@pytest.fixture(scope="module")
def kernels(manifest: dict[str, Any], nvdisasm: Path) -> dict[str, sass.Kernel]:
    """Every cubin's code by the cubin's path."""
    paths = [path for _, _, _, path in _cubins(manifest)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        read = pool.map(lambda path: sass.disassemble(nvdisasm, store.CUBINS_DIR / path), paths)
        return dict(zip(paths, read, strict=True))


def _cubins(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any], str, str]]:
    found = [
        (key, variant, target, cubin["path"])
        for key, variant in sorted(manifest["variants"].items())
        for target, record in sorted(variant["targets"].items())
        for cubin in record["cubins"].values()
    ]
    assert found, "the manifest lists no cubin"
    return found


def test_main_loops_hold_the_right_mma_and_no_local_memory(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel]
) -> None:
    with_mma = [item for item in _cubins(manifest) if "mma" in item[1]]
    assert any(item[1]["role"] == "gemm" for item in with_mma), "the manifest lists no GEMM kernel"
    problems = []
    for _, variant, target, path in with_mma:
        found = sass.mma_problems(kernels[path], mma=variant["mma"], target=target)
        problems += [f"{path}: {problem}" for problem in found]
    assert problems == []


def test_own_kernels_use_no_local_memory(manifest: dict[str, Any], kernels: dict[str, sass.Kernel]) -> None:
    own = [item for item in _cubins(manifest) if not lint.runs_in_cutlass_shell(item[1])]
    assert {item[1]["role"] for item in own} >= {"gemm", "prepare_packed"}, "kernels of our own are missing"
    used = {path: [str(i) for i in kernels[path].instructions if i.is_local] for _, _, _, path in own}
    assert {path: found for path, found in used.items() if found} == {}


def test_pdl_wait_and_trigger_iff_flagged(manifest: dict[str, Any], kernels: dict[str, sass.Kernel]) -> None:
    assert {variant["pdl"] for _, variant, _, _ in _cubins(manifest)} == {False, True}
    for _, variant, _, path in _cubins(manifest):
        assert sass.waits_on_grid(kernels[path]) == variant["pdl"], path
        assert sass.launches_dependents(kernels[path]) == variant["pdl"], path


@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("major", ["cu12", "cu13"])
def test_the_large_packed_tile_takes_few_issue_slots(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel], target: str, major: str
) -> None:
    """At most 1.6 per MMA. The NOPs that ptxas 12.9 puts behind most QMMA.SF, in every kernel, are not the
    source's: for cu12 the same without them."""
    rows = main_loop.read_shipped(manifest, kernels.__getitem__, target=target, major=major)
    large = [loop for variant, _, loop in rows if variant["tile"][:2] == [128, 128] and not loop.step]
    assert large, "no packed kernel has a 128x128 tile"
    for loop in large:
        padding = loop.mix.nop / loop.mix.mma if major == "cu12" else 0.0
        assert loop.mix.slots_per_mma - padding <= 1.6, loop


def test_the_readme_has_the_packed_main_loops_as_they_are(
    manifest: dict[str, Any], kernels: dict[str, sass.Kernel]
) -> None:
    rows = main_loop.read_shipped(manifest, kernels.__getitem__)
    table = main_loop.shipped_table(rows, manifest["toolchain"])
    assert table in README.read_text(), "run python cuda/tools/main_loop.py --shipped"


def test_kernel_has_its_symbol(manifest: dict[str, Any], kernels: dict[str, sass.Kernel]) -> None:
    for _, variant, _, path in _cubins(manifest):
        assert kernels[path].name == variant["symbol"]


# The reader of SASS itself, on listings with planted violations. Each has two warp roles: a producer loop
# that may use local memory, and a consumer loop with the MMA whose wait the assembler moved behind the end of
# the kernel.

LISTING = """
\t.section\t.text.planted,"ax",@progbits
planted:
.text.planted:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 BRA `(.L_consumer) ;
.L_producer:
        /*0020*/                   STL [R1], R2 ;
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/              @P1 BRA `(.L_producer) ;
        /*0050*/                   EXIT ;
.L_consumer:
        /*0060*/                   BSSY.RECONVERGENT B0, `(.L_joined) ;
        /*0070*/             @!P2 BRA `(.L_wait) ;
.L_back:
        /*0080*/                   {mma} ;
        /*0090*/                   BSYNC.RECONVERGENT B0 ;
.L_far:
        /*00a0*/                   BRA.U UP0, `(.L_consumer) ;
        /*00b0*/                   EXIT ;
.L_wait:
        /*00c0*/                   {waiting} ;
        /*00d0*/                   BRA `(.L_back) ;
.L_joined:
        /*00e0*/                   {joined} ;
        /*00f0*/                   BRA `(.L_far) ;
\t.section\t.nv.info,"",@"SHT_CUDA_INFO"
"""
UNIT_SCALE = "QMMA.SF.16832.F32.E4M3.E4M3.E8 R8, R4, R12, R8, R1, R1, UR4"
PLAIN = "QMMA.16832.F32.E4M3.E4M3 R8, R4, R12, R8"
HALF = "HMMA.16816.F32 R8, R4, R12, R8"


def _planted(mma: str = UNIT_SCALE, waiting: str = "NOP", joined: str = "NOP") -> sass.Kernel:
    listing = LISTING.replace("{mma}", mma).replace("{waiting}", waiting).replace("{joined}", joined)
    (kernel,) = sass.parse(listing)
    return kernel


def test_clean_listing_passes_with_a_spilling_producer() -> None:
    assert sass.mma_problems(_planted(), mma="unit_scale", target="sm_120a") == []
    assert sass.mma_problems(_planted(mma=PLAIN), mma="plain", target="sm_120a") == []
    assert sass.mma_problems(_planted(mma=HALF), mma="unit_scale", target="sm_90a") == []


def test_loops_are_told_apart() -> None:
    loops = _planted().loops()
    assert [[i.address for i in loop] for loop in loops] == [
        [0x20, 0x30, 0x40],
        [0x60, 0x70, 0x80, 0x90, 0xA0, 0xC0, 0xD0, 0xE0, 0xF0],
    ]


@pytest.mark.parametrize(
    ("mma", "policy", "target"),
    [(PLAIN, "unit_scale", "sm_120a"), (UNIT_SCALE, "plain", "sm_121a"), (UNIT_SCALE, "unit_scale", "sm_90a"),
     (HALF, "unit_scale", "sm_120a")],
)  # fmt: skip
def test_wrong_mma_is_caught(mma: str, policy: str, target: str) -> None:
    problems = sass.mma_problems(_planted(mma=mma), mma=policy, target=target)
    assert any("wrong MMA" in problem for problem in problems), problems


def test_missing_mma_is_caught() -> None:
    assert sass.mma_problems(_planted(mma="FADD R1, R2, R3"), mma="unit_scale", target="sm_120a") == [
        "planted: no loop holds an MMA"
    ]


@pytest.mark.parametrize("place", ["waiting", "joined"])
@pytest.mark.parametrize("access", ["LDL.64 R2, [R1+0x8]", "STL [R1], R3"])
def test_local_memory_in_an_mma_loop_is_caught(place: str, access: str) -> None:
    problems = sass.mma_problems(_planted(**{place: access}), mma="unit_scale", target="sm_120a")
    assert any("local memory in a loop with an MMA" in problem for problem in problems), problems


def test_local_memory_in_a_called_function_is_caught() -> None:
    listing = LISTING.replace("{waiting}", "CALL.REL.NOINC `($helper)").replace("{joined}", "NOP")
    helper = "$helper:\n"
    helper += "        /*0100*/                   LDL R2, [R1] ;\n"
    helper += "        /*0110*/                   RET.REL.NODEC R4 `(planted) ;\n"
    listing = listing.replace("{mma}", UNIT_SCALE).replace(
        "\t.section\t.nv.info", helper + "\t.section\t.nv.info"
    )
    (kernel,) = sass.parse(listing)
    problems = sass.mma_problems(kernel, mma="unit_scale", target="sm_120a")
    assert any("/*0100*/" in problem for problem in problems), problems


def test_empty_or_odd_listing_is_a_failure() -> None:
    with pytest.raises(BuildError, match="no code"):
        sass.parse("")
    with pytest.raises(BuildError, match="no instruction"):
        sass.parse('\t.section\t.text.empty,"ax",@progbits\n')
    with pytest.raises(BuildError, match="where does this go"):
        _planted(joined="BRX R2 -0x100").loops()


def test_wait_and_trigger_are_seen() -> None:
    assert not sass.waits_on_grid(_planted(joined="PREEXIT"))
    assert sass.waits_on_grid(_planted(joined="ACQBULK"))
    assert not sass.launches_dependents(_planted(joined="ACQBULK"))
    assert sass.launches_dependents(_planted(joined="PREEXIT"))
